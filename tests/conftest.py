"""What several test files share: hand-made tasks, batches, data sets and models."""

import os

import numpy as np
import pytest
import torch

import data
from data import FINAL_OBS, TERMINATED
from model import Perceiver, config_for

torch.set_num_threads(1)  # tiny models: a second thread only waits

WORDS = "do the thing"


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: takes minutes; `pytest -m slow` runs these")


def pytest_collection_modifyitems(config, items):
    if config.option.markexpr:
        return
    for item in items:
        if "slow" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="slow: pytest -m slow"))


def meta(name="a", obs_dim=1, action_dim=1, discount=0.9, low=0.0, high=1.0):
    """What model and learner need to know of a hand-made task."""
    return {
        "name": name,
        "instruction": WORDS,
        "obs_dim": obs_dim,
        "action_dim": action_dim,
        "discount": discount,
        "return_to_go": [low, high],
    }


def tiny(metas):
    return config_for("tiny", metas)


def column(values):
    """Numbers or vectors, one for each of B steps -> (B, 1, O)"""
    return torch.tensor(np.array(values), dtype=torch.float32).reshape(len(values), 1, -1)


def batch(obs, action, reward, next_obs=None, terminated=True, return_to_go=None, task=None):
    """A Batch of single steps from lists of numbers or of vectors."""
    return_to_go = reward if return_to_go is None else return_to_go
    next_obs = obs if next_obs is None else next_obs
    task = [0] * len(obs) if task is None else task
    flag = np.broadcast_to(terminated, len(obs)) * TERMINATED
    columns = [column(values) for values in (obs, action, reward, return_to_go, flag)]
    now = torch.cat(columns, dim=-1)  # (B, 1, O + A + 3)
    obs_dim = columns[0].shape[-1]
    after = torch.zeros_like(now)
    after[..., :obs_dim] = column(next_obs)
    after[..., data.FLAG] = FINAL_OBS
    return data.Batch(torch.cat([now, after], dim=1), obs_dim, torch.tensor(task))


def task_meta(obs_dim=2, action_dim=1, env_id="Reacher-v5"):
    """What meta.json says of a hand-made task before its first episode."""
    return {
        "format": data.FORMAT,
        "env_id": env_id,
        "instruction": WORDS,
        "obs_dim": obs_dim,
        "action_dim": action_dim,
        "action_low": [-1.0] * action_dim,
        "action_high": [1.0] * action_dim,
        "discount": 0.9,
        "reference": None,
        "return_to_go": None,
        "rows": 0,
    }


def numbered(number, length, obs_dim=2, action_dim=1, terminated=False):
    """An Episode that tells where it is from: obs (number, step), action step/100, reward step."""
    step = np.arange(length, dtype=np.float32)
    obs = np.zeros((length + 1, obs_dim), np.float32)
    obs[:, 0] = number
    obs[:, 1] = np.arange(length + 1)
    action = np.repeat(step[:, None] / 100, action_dim, axis=1)
    return data.Episode(obs, action, step, terminated)


def write_task(folder, lengths, obs_dim=2, action_dim=1, terminated=False, env_id="Reacher-v5"):
    """A task of `numbered` episodes of these lengths."""
    episodes = []
    for number, length in enumerate(lengths):
        episodes.append(numbered(number, length, obs_dim, action_dim, terminated))
    data.append(folder, episodes, task_meta(obs_dim, action_dim, env_id))
    return data.Task(folder)


@pytest.fixture(autouse=True)
def no_fsync(monkeypatch):
    """No test can see a power cut, and a busy disk took 18 ms for each file (2026-11-23)."""
    monkeypatch.setattr(os, "fsync", lambda _: None)


@pytest.fixture(scope="session")
def small_data(tmp_path_factory):
    """Two real tasks, a few episodes each; made once for all tests."""
    import prepare  # needs gymnasium, which the kernels' tests do not
    folder = tmp_path_factory.mktemp("datasets")
    prepare.build(folder, ["switching"], ["Hopper-v5", "Reacher-v5"], transitions=2_000)
    return folder / "switching"


@pytest.fixture
def model():
    """A tiny model of two embodiments: 3 scalars and 2 actions, 5 scalars and 1 action."""
    torch.manual_seed(0)
    return Perceiver(tiny([meta("a", 3, 2), meta("b", 5, 1)]))
