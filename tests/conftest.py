import numpy as np
import pytest
import torch

import data
from behaviors import collect
from model import Perceiver, TaskSpec, config_for

torch.set_num_threads(1)  # tiny models: a second thread only waits

WORDS = "do the thing"


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: takes minutes; `pytest -m slow` runs these")


def pytest_collection_modifyitems(config, items):
    if not config.option.markexpr:
        for item in items:
            if "slow" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="slow: pytest -m slow"))


def meta(name="a", obs_dim=1, action_dim=1, discount=0.9, low=0.0, high=1.0):
    """What the learner needs to know of a hand-made task."""
    return {"name": name, "instruction": WORDS, "obs_dim": obs_dim, "action_dim": action_dim,
            "discount": discount, "return_to_go": [low, high]}


def spec(meta):
    return TaskSpec(meta["name"], meta["instruction"], meta["obs_dim"], meta["action_dim"])


def tiny(metas):
    return config_for("tiny", [spec(m) for m in metas])


def batch(obs, action, reward, next_obs=None, terminated=True, return_to_go=None, task=None):
    """A Batch of single steps from lists of numbers or of vectors."""
    column = lambda x: torch.tensor(np.array(x), dtype=torch.float32).reshape(len(obs), 1, -1)  # (B, 1, ...)
    now = torch.cat([column(x) for x in (obs, action, reward, reward if return_to_go is None else return_to_go,
                                         np.broadcast_to(terminated, len(obs)) * data.TERMINATED)], dim=-1)
    after = torch.zeros_like(now)
    after[..., :column(obs).shape[-1]], after[..., -1] = column(obs if next_obs is None else next_obs), data.FINAL_OBS
    return data.Batch(torch.cat([now, after], dim=1), column(obs).shape[-1],
                      torch.zeros(len(obs), dtype=torch.long) if task is None else torch.tensor(task))


def write_task(folder, lengths, obs_dim=2, action_dim=1, terminated=False, env_id="Reacher-v5"):
    """A task whose numbers tell where they come from: obs = (episode, step), action = step / 100, reward = step."""
    start = {"format": data.FORMAT, "env_id": env_id, "instruction": WORDS, "obs_dim": obs_dim,
             "action_dim": action_dim, "action_low": [-1.0] * action_dim, "action_high": [1.0] * action_dim,
             "discount": 0.9, "reference": None, "return_to_go": None, "shards": []}
    episodes = []
    for number, length in enumerate(lengths):
        obs = np.zeros((length + 1, obs_dim), np.float32)
        obs[:, 0], obs[:, 1] = number, np.arange(length + 1)
        action = np.repeat(np.arange(length, dtype=np.float32)[:, None] / 100, action_dim, 1)
        episodes.append(data.Episode(obs, action, np.arange(length, dtype=np.float32), terminated))
    data.append(folder, episodes, start)
    return data.Task(folder)


@pytest.fixture(scope="session")
def small_data(tmp_path_factory):
    """Two real tasks, a few episodes each; made once for all tests."""
    folder = tmp_path_factory.mktemp("datasets")
    collect.build(folder, ["switching"], ["Hopper-v5", "Reacher-v5"], transitions=2_000)
    return folder / "switching"


@pytest.fixture
def model():
    """A tiny model of two embodiments: 3 scalars and 2 actions, 5 scalars and 1 action."""
    torch.manual_seed(0)
    return Perceiver(tiny([meta("a", 3, 2), meta("b", 5, 1)]))
