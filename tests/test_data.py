"""What is written is what is read; windows stay inside episodes; damage is named; nothing is half believed."""

import contextlib
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

import data
from behaviors import collect
from tests.conftest import write_task

ROOT = Path(__file__).parent.parent
needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")


def rng(seed=0):
    return np.random.default_rng(seed)


def episode(reward=(1.0, 1.0), **changes):
    """An Episode for the tasks of `write_task`."""
    length = len(reward)
    return data.Episode(**{**dict(obs=np.ones((length + 1, 2)), action=np.zeros((length, 1)), reward=np.array(reward),
                                  terminated=True), **changes})


def all_rows(task):
    return np.concatenate([task.rows(number)[1] for number in range(len(task.episodes))])


@pytest.fixture(autouse=True)
def no_fsync(monkeypatch):
    """Nothing here can see a power cut, and a busy disk took 18 ms for each (2026-11-23)."""
    monkeypatch.setattr(os, "fsync", lambda _: None)


@pytest.fixture
def small_shards(monkeypatch):
    """Eight rows of `write_task` in a shard."""
    monkeypatch.setattr(data, "SHARD_BYTES", 8 * 6 * 4)


# ---------------------------------------------------------------- what is written is what is read

def test_round_trip(tmp_path):
    task = write_task(tmp_path / "a", [3, 1, 4])
    rows = all_rows(task)
    assert task.meta["episodes"] == 3 and task.meta["transitions"] == 8 and len(rows) == 11
    start, length = task.episodes[2]["start"], task.episodes[2]["length"]
    assert (start, length, task.episodes[2]["score"]) == (6, 4, 0 + 1 + 2 + 3)
    np.testing.assert_array_equal(rows[start:start + 5, 1], [0, 1, 2, 3, 4])
    assert rows[start + 4, -1] == data.FINAL_OBS and rows[start + 3, -1] == data.TRUNCATED
    task.verify()


@st.composite
def sets_of_episodes(draw):
    obs_dim, action_dim = draw(st.integers(2, 5)), draw(st.integers(1, 4))
    random = rng(draw(st.integers(0, 99)))
    return obs_dim, action_dim, [
        data.Episode(random.normal(size=(length + 1, obs_dim)).astype(np.float32),
                     random.uniform(-1, 1, (length, action_dim)).astype(np.float32),
                     random.normal(size=length).astype(np.float32), terminated)
        for length, terminated in draw(st.lists(st.tuples(st.integers(1, 12), st.booleans()), min_size=1, max_size=8))]


@settings(max_examples=25, deadline=None)
@given(sets_of_episodes(), st.integers(1, 9), st.integers(1, 40), st.integers(0, 8), st.integers(0, 2**32))
def test_any_set_is_read_as_written_and_sampled_whole(tmp_path_factory, made, steps, shard_rows, split, seed):
    """Random lengths, dimensions, windows, shard sizes and appends."""
    obs_dim, action_dim, episodes = made
    folder = tmp_path_factory.mktemp("set") / "a"
    task = write_task(folder, [2], obs_dim, action_dim)  # for its meta; written again below
    meta = {**task.meta, "shards": [], "return_to_go": None}
    (folder / "meta.json").unlink()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "SHARD_BYTES", shard_rows * (obs_dim + action_dim + 3) * 4)
        split = max(1, min(split, len(episodes)))
        data.append(folder, episodes[:split], meta)
        data.append(folder, episodes[split:])
    task = data.Task(folder)
    task.verify()
    assert len(task.episodes) == len(episodes)
    for written, read in zip(episodes, task):
        for name in ("obs", "action", "reward", "terminated"):
            np.testing.assert_array_equal(getattr(read, name), getattr(written, name))
    batch = data.Sampler([task], 64, steps).sample(rng(seed))
    for row in range(64):  # the window is found in exactly the place that its first observation names
        number, t = next((n, t) for n, e in enumerate(episodes) for t in range(len(e.reward))
                         if np.array_equal(e.obs[t], batch.obs[row, 0]) and np.array_equal(e.obs[t + 1], batch.next_obs[row, 0]))
        written = episodes[number]
        length = len(written.reward)
        at = np.minimum(np.arange(t, t + steps + 1), length)
        valid = np.arange(t, t + steps) < length
        np.testing.assert_array_equal(batch.obs[row], written.obs[at[:-1]])
        np.testing.assert_array_equal(batch.next_obs[row], written.obs[at[1:]])
        np.testing.assert_array_equal(batch.valid[row], valid)
        np.testing.assert_array_equal(batch.reward[row][valid], written.reward[t:t + steps])
        np.testing.assert_array_equal(batch.action[row][valid], written.action[t:t + steps])
        last = np.arange(t, t + steps) == length - 1
        np.testing.assert_array_equal(batch.terminated[row], last & written.terminated)
        np.testing.assert_array_equal(batch.truncated[row], last & (not written.terminated))
        assert (batch.reward[row][~valid] == 0).all() and (batch.action[row][~valid] == 0).all()


def test_return_to_go_by_hand():
    reward = np.array([1.0, 2.0, 4.0])
    np.testing.assert_allclose(data.return_to_go(reward, True, 0.5), [1 + 1 + 1, 2 + 2, 4])
    # Truncated: the mean of the last 1 / (1 - 0.5) rewards, 3, goes on for ever: worth 6 after the last step.
    np.testing.assert_allclose(data.return_to_go(reward, False, 0.5)[2], 4 + 0.5 * 6, rtol=1e-6)


# ---------------------------------------------------------------- sampling

@pytest.mark.parametrize("steps", [1, 3, 7])
def test_windows_never_cross_episodes(tmp_path, steps):
    task = write_task(tmp_path / "a", [1, 2, 5, 30])
    sampler = data.Sampler([task], 512, steps)
    batch = sampler.sample(rng())
    episode, step = batch.obs[..., 0], batch.obs[..., 1]
    assert (episode == episode[:, :1]).all() and (batch.next_obs[..., 0] == episode).all()
    assert (batch.next_obs[..., 1] - step == batch.valid).all()  # each valid step moves on by one, the others stay
    assert (batch.reward == step * batch.valid).all()
    assert batch.valid[:, 0].all()
    lengths = np.array([1, 2, 5, 30])[episode[:, 0].long()]
    np.testing.assert_array_equal(batch.valid.sum(1), np.minimum(steps, lengths - step[:, 0].numpy()))
    assert (batch.truncated.any(1).numpy() == (step[:, 0].numpy() + steps >= lengths)).all()
    assert not batch.terminated.any()


@pytest.mark.parametrize("shards", [False, True])
def test_every_transition_is_equally_likely(tmp_path, request, shards):
    if shards:
        request.getfixturevalue("small_shards")
    task = write_task(tmp_path / "a", [1, 2, 5, 2])
    assert len(task.maps) == (3 if shards else 1)
    batch = data.Sampler([task], 100_000).sample(rng())
    _, counts = np.unique(batch.obs[:, 0].numpy(), axis=0, return_counts=True)
    assert len(counts) == 10 and abs(counts - 10_000).max() < 500  # 5 standard deviations


def test_shards_change_no_batch(tmp_path, monkeypatch):
    one = write_task(tmp_path / "one", [3, 5, 2, 6, 7])
    monkeypatch.setattr(data, "SHARD_BYTES", 8 * 6 * 4)
    many = write_task(tmp_path / "many", [3, 5, 2, 6, 7])
    assert len(one.maps) == 1 and len(many.maps) == 5
    assert torch.equal(*(data.Sampler([task], 64, 3).sample(rng()).rows for task in (one, many)))


def test_top_keeps_the_best_episodes(tmp_path):
    task = write_task(tmp_path / "a", [2, 9, 3, 4])  # longer episodes have higher returns
    batch = data.Sampler([task], 256, top=0.5).sample(rng())
    assert set(batch.obs[:, 0, 0].tolist()) == {1.0, 3.0}


def test_tasks_are_padded_and_actions_scaled(tmp_path):
    tasks = [write_task(tmp_path / "a", [5], obs_dim=2), write_task(tmp_path / "b", [5], obs_dim=4, action_dim=3)]
    tasks[1].meta["action_low"], tasks[1].meta["action_high"] = [0.0] * 3, [0.04] * 3
    batch = data.Sampler(tasks, 64).sample(rng())
    first = batch.task == 0
    assert 10 < first.sum() < 54
    assert batch.obs.shape == (64, 1, 4) and batch.action.shape == (64, 1, 3)
    assert (batch.obs[first][..., 2:] == 0).all() and (batch.action[first][..., 1:] == 0).all()
    assert (batch.action[first][..., 0] == batch.obs[first][..., 1] / 100).all() and (batch.obs[first][..., 1] > 0).any()
    # step 0 has action 0, which is the box's lower end; step 4 has 0.04, its upper end
    np.testing.assert_allclose(batch.action[~first][..., 0], batch.obs[~first][..., 1] / 2 - 1, atol=1e-6)


def test_sources_have_weights_and_alphas_and_share_their_tasks(tmp_path):
    tasks = [write_task(tmp_path / "one" / "a", [5]), write_task(tmp_path / "two" / "b", [5]),
             write_task(tmp_path / "two" / "a", [50])]
    batch = data.Sampler(tasks, 10_000, weights=[6, 1, 1], alphas=[0.1, 0.2, 0.3]).sample(rng())
    assert [m["name"] for m in data.merged_metas(tasks)] == ["a", "b"]
    for alpha, task, share in ((0.1, 0, 0.75), (0.2, 1, 0.125), (0.3, 0, 0.125)):
        drawn = torch.isclose(batch.alpha, torch.tensor(alpha))
        assert abs(drawn.float().mean() - share) < 0.02 and (batch.task[drawn] == task).all()
    assert (batch.obs[batch.alpha < 0.15][..., 1] < 5).all() and (batch.obs[batch.alpha > 0.25][..., 1] > 5).any()


@pytest.mark.parametrize("weights, drawn", [([0, 1, 2], {1, 2}), ([1, 0, 0], {0}), ([0, 1, 0], {1})])
def test_what_has_no_weight_is_not_drawn(tmp_path, weights, drawn):
    tasks = [write_task(tmp_path / name, [1, 3, 1]) for name in "abc"]
    assert set(data.Sampler(tasks, 1000, weights=weights).sample(rng()).task.tolist()) == drawn


def test_every_draw_is_a_transition_at_the_ends_of_its_episodes_interval_too(tmp_path):
    """The numbers drawn are put on all the intervals' ends, and next to them."""
    sampler = data.Sampler([write_task(tmp_path / "a", [1, 7, 2, 1, 1, 1, 300, 1, 5])], 1, 3, weights=[3])
    ends = np.array([0, *np.cumsum([1, 7, 2, 1, 1, 1, 300, 1, 5])]) / 319

    points = np.concatenate([np.nextafter(ends[1:], 0), ends, np.nextafter(ends[:-1], 1)])

    class Numbers:
        random = lambda self, out, points=iter(points): out.fill(next(points))

    episode, begin, left = sampler.draw([Numbers()] * len(points))  # batches of one: its number as it is
    first = sampler.final - np.array([1, 7, 2, 1, 1, 1, 300, 1, 5])
    assert (left >= 1).all() and (begin + left == sampler.final[episode]).all() and set(episode) == set(range(9))
    assert (np.searchsorted(first, begin, "right") - 1 == episode).all()


def test_sources_of_a_task_must_agree(tmp_path):
    tasks = [write_task(tmp_path / "one" / "a", [5]), write_task(tmp_path / "two" / "a", [9], obs_dim=3)]
    with pytest.raises(data.DataError, match="two/a/meta.json: obs_dim is 3, but 2 in another source"):
        data.merged_metas(tasks)
    tasks[1] = write_task(tmp_path / "three" / "a", [9])
    merged, = data.merged_metas(tasks)
    assert merged["return_to_go"][1] == tasks[1].meta["return_to_go"][1]


def test_ranks_share_one_batch(tmp_path, small_shards):
    sampler = data.Sampler([write_task(tmp_path / "a", [2] * 7)], 30, 3)
    batch, shares = sampler.sample(rng()), [sampler.sample(rng(), rank, 3) for rank in range(3)]
    for rank, share in enumerate(shares):
        assert torch.equal(share.obs, batch.obs[rank::3]) and torch.equal(share.valid, batch.valid[rank::3])


def test_batches_made_at_once_are_those_made_one_by_one(tmp_path, small_shards):
    tasks = [write_task(tmp_path / name, [5, 3, 9, 2], action_dim=width) for name, width in (("a", 1), ("b", 2))]
    sampler = data.Sampler(tasks, 10, 3, alphas=[0.1, 0.2])
    sampler.at_once = 4
    for (rank, ranks), count in itertools.product([(0, 1), (1, 2)], [1, 4, 11]):
        batches = list(sampler.batches((rng(seed) for seed in range(count)), rank, ranks))
        assert len(batches) == count
        for seed, batch in enumerate(batches):
            alone = sampler.sample(rng(seed), rank, ranks)
            assert all(torch.equal(getattr(batch, name), getattr(alone, name)) for name in ("rows", "task", "alpha"))


def test_a_batch_is_stratified(tmp_path):
    """Of a task drawn with half of the weight half of a batch comes, and no part of an episode is left out."""
    tasks = [write_task(tmp_path / "a", [100]), write_task(tmp_path / "b", [100], obs_dim=3)]
    for seed in range(20):
        batch = data.Sampler(tasks, 40).sample(rng(seed))
        assert (batch.task == torch.arange(2).repeat_interleave(20)).all()
        assert (batch.obs[:, 0, 1] // 5 == torch.arange(20).repeat(2)).all()


def test_same_rng_same_batch(tmp_path):
    sampler = data.Sampler([write_task(tmp_path / "a", [50])], 32)
    one, two, other = (sampler.sample(rng(seed)).obs for seed in (1, 1, 2))
    assert (one == two).all() and not (one == other).all()


def test_constants_give_finite_inputs(tmp_path):
    """Dimensions, actions, rewards and an action box that never change."""
    write_task(tmp_path / "a", [3])
    meta = {**data.Task(tmp_path / "a").meta, "action_low": [0.5], "action_high": [0.5], "shards": [], "return_to_go": None}
    (tmp_path / "a" / "meta.json").unlink()
    data.append(tmp_path / "a", [episode([0.0] * 9, action=np.full((9, 1), 0.5))] * 2, meta)
    batch = data.Sampler([data.Task(tmp_path / "a")], 16, 3).sample(rng())
    assert torch.isfinite(batch.rows).all()
    assert (batch.action[batch.valid] == 0).all()


# ---------------------------------------------------------------- writers that are killed, or two

def fork(work):
    """Do `work` in a child process; its exit status."""
    child = os.fork()
    if not child:
        with contextlib.suppress(BaseException):
            work()
            os._exit(0)
        os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@needs_fork
@pytest.mark.parametrize("anew", [False, True])
def test_killed_at_any_line_what_was_complete_stays(tmp_path, monkeypatch, anew):
    """A writer is killed before each line of data.py that it runs; the set stays readable, and a retry works."""
    monkeypatch.setattr(data, "SHARD_BYTES", 100)
    meta = {**write_task(tmp_path / "before", [2, 3]).meta, "shards": [], "return_to_go": None}
    folder = tmp_path / "a"

    def start():
        shutil.rmtree(folder, ignore_errors=True)
        if not anew:
            write_task(folder, [2, 3])

    def killed_at(count):
        seen = 0

        def trace(frame, event, _):
            nonlocal seen
            if not frame.f_code.co_filename == data.__file__:
                return None
            seen += event == "line"
            if seen == count:
                os.kill(os.getpid(), signal.SIGKILL)
            return trace

        sys.settrace(trace)
        data.append(folder, [episode([7.0]), episode([7.0, 8.0])], meta if anew else None)

    lines, kills, outcomes = 1, 0, set()
    while True:
        start()
        status = fork(lambda: killed_at(lines))
        if status == 0:
            break
        assert status == -signal.SIGKILL
        kills += 1
        if anew and not (folder / "meta.json").exists():
            outcomes.add(0)
            with pytest.raises(data.DataError, match="no data set here"):
                data.Task(folder)
            data.append(folder, [episode([7.0]), episode([7.0, 8.0])], meta)
        else:
            task = data.Task(folder)
            task.verify()
            outcomes.add(len(task.episodes))
            assert all_rows(task)[0, -3] == (7 if anew else 0)
            data.append(folder, [episode([7.0])])
        task = data.Task(folder)
        task.verify()
        assert task.episodes["score"][-1] in (7, 15) and not data.leftovers(folder, task.meta)
        lines += 3  # every third line: forks cost
    assert kills > 40 and min(outcomes) == (0 if anew else 2) and outcomes <= {0, 2, 4} - {4 if anew else 0}


def test_a_killed_writers_rest_is_named_and_ignored(tmp_path, capsys, monkeypatch):
    write_task(tmp_path / "a", [3, 4])
    (tmp_path / "a" / "rows-001.bin").write_bytes(b"half an episode")
    run_cli(monkeypatch, "verify", tmp_path)
    assert "a/rows-001.bin (15 bytes), the rest of a writer that was killed" in capsys.readouterr().out
    data.append(tmp_path / "a", [episode()])
    task = data.Task(tmp_path / "a")
    task.verify()
    assert task.meta["episodes"] == 3 and all_rows(task)[9:, -1].tolist() == [0, data.TERMINATED, data.FINAL_OBS]


def test_a_failed_append_keeps_what_was_there(tmp_path):
    write_task(tmp_path / "a", [3, 4])
    with pytest.raises(data.DataError, match="episode 3: reward is not finite at step 1"):
        data.append(tmp_path / "a", [episode(), episode([1.0, np.nan])])
    task = data.Task(tmp_path / "a")
    task.verify()
    assert task.meta["episodes"] == 2


def test_a_second_writer_refuses(tmp_path):
    task = write_task(tmp_path / "a", [3])

    def episodes():
        with pytest.raises(data.DataError, match="another process is writing here"):
            data.append(tmp_path / "a", [episode()])
        yield episode()

    data.append(tmp_path / "a", episodes())
    assert data.Task(tmp_path / "a").meta["episodes"] == 2 and len(task.episodes) == 1
    with data.whole(tmp_path / "b") as partial:
        partial.mkdir()
        with pytest.raises(data.DataError, match="another process is writing here"), data.whole(tmp_path / "b"):
            pass


def test_a_reader_keeps_its_episodes_while_a_writer_appends(tmp_path):
    task = write_task(tmp_path / "a", [3, 4])
    sampler = data.Sampler([task], 32)
    before = sampler.sample(rng())
    data.append(tmp_path / "a", [episode()] * 5)
    assert torch.equal(before.obs, sampler.sample(rng()).obs)


# ---------------------------------------------------------------- damage

@pytest.mark.parametrize("changes, message", [
    (dict(reward=np.zeros((2, 1))), r"episode 1: reward has shape \(2, 1\), expected \(2,\)"),
    (dict(terminated=np.zeros((2, 1), bool)), r"episode 1: terminated has shape \(2, 1\), expected \(\)"),
    (dict(obs=np.ones((2, 2))), r"episode 1: obs has shape \(2, 2\), expected \(3, 2\)"),
    (dict(obs=np.ones((3, 5))), r"obs has shape \(3, 5\), expected \(3, 2\)"),
    (dict(action=np.array([["left"], ["right"]])), "action has dtype <U5, expected numbers"),
    (dict(obs=np.array([[1, 2], [1, None], [0, 0]])), "obs has dtype object, expected numbers"),
    (dict(action=np.array([[0.0], [np.inf]])), "action is not finite at step 1"),
    (dict(obs=np.array([[0, 0], [0, 1e39], [0, 0]])), "obs is not finite at step 1"),  # float32 cannot hold it
    (dict(reward=np.zeros(0), action=np.zeros((0, 1)), obs=np.zeros((1, 2))), "no transitions"),
])
def test_a_wrong_episode_is_refused(tmp_path, changes, message):
    write_task(tmp_path / "a", [3])
    with pytest.raises(data.DataError, match=message):
        data.append(tmp_path / "a", [episode(**changes)])
    assert data.Task(tmp_path / "a").meta["episodes"] == 1


def rewrite(path, change):
    raw = bytearray(path.read_bytes())
    change(raw)
    path.write_bytes(raw)


def flip(at):
    return lambda path: rewrite(path, lambda raw: raw.__setitem__(at, raw[at] ^ 1))


def test_nan_is_named_by_file_episode_and_step(tmp_path):
    task = write_task(tmp_path / "a", [3, 4])
    at = (task.episodes[1]["start"] + 2) * task.width * 4
    rewrite(tmp_path / "a" / "rows-000.bin", lambda raw: raw.__setitem__(slice(at, at + 4), np.float32(np.nan).tobytes()))
    with pytest.raises(data.DataError, match="rows-000.bin: task a, episode 1, step 2: a number is not finite"):
        data.Task(tmp_path / "a").verify()


@pytest.mark.parametrize("name, damage, message", [
    ("rows-001.bin", lambda p: p.write_bytes(p.read_bytes()[:-8]), "rows-001.bin: 112 bytes, expected 120: the file was cut short"),
    ("rows-001.bin", lambda p: p.write_bytes(p.read_bytes() + b"more"), "rows-001.bin: 124 bytes, .* the file has grown"),
    ("rows-001.bin", lambda p: p.unlink(), "rows-001.bin: the shard is missing or empty"),
    ("rows-001.bin", flip(30), "rows-001.bin: task a, episode 1: wrong checksum"),
    ("episodes.npy", lambda p: p.write_bytes(p.read_bytes()[:50]), "episodes.npy: it is missing or damaged"),
    ("episodes.npy", lambda p: p.unlink(), "episodes.npy: it is missing or damaged"),
    ("episodes.npy", flip(-1), "episodes.npy: wrong checksum"),
    ("episodes.npy", lambda p: np.save(p, np.zeros(2)), "records of float64, expected"),
    ("meta.json", lambda p: p.write_text(p.read_text()[:40]), "meta.json: it is damaged"),
    ("meta.json", lambda p: p.write_text(json.dumps({**json.loads(p.read_text()), "format": 1})),
     "meta.json: format 1, but this code reads format 2"),
    ("meta.json", lambda p: p.write_text(json.dumps({**json.loads(p.read_text()), "return_to_go": [0, 1]})),
     "episode 0: its returns leave the bounds"),
    ("meta.json", lambda p: p.unlink(), "no data set here"),
])
def test_damage_is_named(tmp_path, small_shards, name, damage, message):
    write_task(tmp_path / "a", [3, 4])
    damage(tmp_path / "a" / name)
    with pytest.raises(data.DataError, match=message):
        data.Task(tmp_path / "a").verify()


def test_episodes_that_overlap_are_found(tmp_path):
    task = write_task(tmp_path / "a", [3, 4])
    task.episodes["start"][1] -= 1
    with pytest.raises(data.DataError, match="episodes.npy: the episodes do not cover the rows"):
        task.verify()


@needs_fork
def test_a_file_cut_short_while_it_is_sampled_is_an_error_not_a_crash(tmp_path):
    """In a process of its own: without the check this is SIGBUS."""
    sampler = data.Sampler([write_task(tmp_path / "a", [3000] * 3)], 64)

    def work():
        os.truncate(tmp_path / "a" / "rows-000.bin", 4096)
        with pytest.raises(data.DataError, match="rows-000.bin: 4,096 bytes, expected 216,072: the file was cut short"):
            sampler.sample(rng(1))

    assert fork(work) == 0


def test_unknown_task_lists_the_known(tmp_path):
    write_task(tmp_path / "a", [3])
    with pytest.raises(data.DataError, match="no task 'b'; there are: a"):
        data.open_tasks(tmp_path, ["b"])


# ---------------------------------------------------------------- larger than memory

def sparse_task(folder, transitions, obs_dim=17, action_dim=6, length=1000):
    """A task of zeros whose shards are holes: it takes no room on the disk."""
    folder.mkdir(parents=True)
    width, count = obs_dim + action_dim + 3, transitions // length
    table = np.zeros(count, data.EPISODE)
    table["start"], table["length"] = np.arange(count) * (length + 1), length
    fit = data.SHARD_BYTES // (width * 4) // (length + 1)
    shards = [min(fit, count - begin) * (length + 1) for begin in range(0, count, fit)]
    for number, rows in enumerate(shards):
        with open(data.shard_path(folder, number), "wb") as file:
            file.truncate(rows * width * 4)
    np.save(folder / "episodes.npy", table)
    start = {"format": data.FORMAT, "env_id": "HalfCheetah-v5", "instruction": "run", "obs_dim": obs_dim,
             "action_dim": action_dim, "action_low": [-1.0] * action_dim, "action_high": [1.0] * action_dim, "discount": 0.99,
             "reference": None, "return_to_go": [0.0, 0.0], "shards": shards, "checksum": data.zlib.crc32(table),
             "episodes": count, "transitions": count * length, "score": {"mean": 0, "std": 0, "min": 0, "max": 0}}
    (folder / "meta.json").write_text(json.dumps(start))


def test_fifty_million_transitions_open_in_a_second(tmp_path):
    sparse_task(tmp_path / "a", 50_000_000)
    began = time.process_time()
    task = data.Task(tmp_path / "a")
    sampler = data.Sampler([task], 256, 5)
    opened = time.process_time() - began  # the first batch, which faults pages in, is not part of opening
    assert opened < 1 and task.meta["transitions"] == 50_000_000
    assert len(task.maps) == 5 and sampler.sample(rng()).valid[:, 0].all()


@pytest.mark.skipif(sys.platform != "linux", reason="/proc and RLIMIT_DATA")
def test_memory_stays_flat_on_a_set_ten_times_its_limit(tmp_path):
    """Training draws from 8 GB while the process may hold 0.8 GB of its own."""
    sparse_task(tmp_path / "HalfCheetah-v5", 77_000_000)
    total = sum(path.stat().st_size for path in (tmp_path / "HalfCheetah-v5").glob("rows-*"))
    limit = 800_000_000
    assert total > 10 * limit
    script = f"""
        import json, re, resource, train
        torch = train.torch
        torch.set_num_threads(1)
        resource.setrlimit(resource.RLIMIT_DATA, ({limit}, {limit}))
        own, seen = lambda: int(re.search(r"RssAnon:\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024, []
        update = train.Learner.update
        def watched(learner, *args):
            seen.append(own())
            return update(learner, *args)
        train.Learner.update = watched
        train.main(["--size", "tiny", "--data", {str(tmp_path)!r}, "--out", {str(tmp_path / 'run')!r}, "--steps", "60",
                    "--warmup", "0.2", "--no-verify", "--eval-every", "0", "--episodes", "0", "--batch-size", "128", "--device", "cpu"])
        print(json.dumps(seen))
    """
    ran = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], cwd=ROOT, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    seen = json.loads(ran.stdout.splitlines()[-1])
    assert len(seen) == 60 and max(seen) < limit and max(seen[-20:]) - max(seen[20:40]) < 5_000_000


def test_verify_holds_one_episode_at_a_time(tmp_path):
    task = write_task(tmp_path / "a", [1000] * 100)
    tracemalloc.start()
    task.verify()
    assert tracemalloc.get_traced_memory()[1] < 1_000_000 < task.shard(0).nbytes
    tracemalloc.stop()


# ---------------------------------------------------------------- the default data set

def test_a_build_is_a_function_of_its_seed(small_data, tmp_path):
    collect.build(tmp_path, ["switching"], ["Reacher-v5"], transitions=2_000)
    one, two = data.Task(small_data / "Reacher-v5"), data.Task(tmp_path / "switching" / "Reacher-v5")
    assert one.meta["checksum"] == two.meta["checksum"]


def test_an_interrupted_build_is_not_believed(tmp_path, monkeypatch):
    def interrupted(folder, episodes, meta):
        folder.mkdir(parents=True)
        (folder / "rows-000.bin").write_bytes(b"half")
        raise KeyboardInterrupt
    monkeypatch.setattr(data, "append", interrupted)
    with pytest.raises(KeyboardInterrupt):
        collect.build(tmp_path, ["switching"], ["Reacher-v5"], transitions=100)
    monkeypatch.undo()
    with pytest.raises(data.DataError, match="no data set here"):
        data.open_tasks(tmp_path / "switching")
    collect.build(tmp_path, ["switching"], ["Reacher-v5"], transitions=100)
    data.open_tasks(tmp_path / "switching")[0].verify()


# ---------------------------------------------------------------- in and out

def run_cli(monkeypatch, *flags):
    monkeypatch.setattr(sys, "argv", ["data.py", *map(str, flags)])
    data.main()


def pendulum(folder, lengths=(3, 5), terminated=(False, True)):
    """A task of Pendulum-v1, whose actions reach from -2 to 2, as an .npz folder and as what was written there."""
    random = rng(0)
    episodes = [data.Episode(random.normal(size=(n + 1, 3)).astype(np.float32), random.uniform(-2, 2, (n, 1)).astype(np.float32),
                             random.normal(size=n).astype(np.float32), end) for n, end in zip(lengths, terminated)]
    folder.mkdir(parents=True)
    for number, made in enumerate(episodes):
        np.savez(folder / f"{number}.npz", **vars(made))
    return episodes


def assert_same(task, episodes):
    task.verify()
    assert len(task.episodes) == len(episodes)
    for one, two in zip(task, episodes):
        for name in ("obs", "action", "reward", "terminated"):
            np.testing.assert_array_equal(getattr(one, name), getattr(two, name))


@pytest.mark.parametrize("target", ["out", "out.hdf5", "minari:own/pendulum-v0"])
def test_in_out_and_in_again(tmp_path, monkeypatch, target):
    """.npz -> ours -> another format -> ours: to the bit."""
    if target != "out":
        pytest.importorskip("h5py" if "hdf5" in target else "minari")
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    monkeypatch.chdir(tmp_path)
    episodes = pendulum(tmp_path / "npz")
    run_cli(monkeypatch, "import", "npz", "own", "--env-id", "Pendulum-v1", "--instruction", "swing up")
    assert_same(data.Task("own/Pendulum-v1"), episodes)
    run_cli(monkeypatch, "export", "own/Pendulum-v1", target)
    named = () if target.startswith("minari:") else ("--env-id", "Pendulum-v1")  # Minari's sets name their environment
    run_cli(monkeypatch, "import", target, "again", *named)
    assert_same(data.Task("again/Pendulum-v1"), episodes)
    meta = data.Task("own/Pendulum-v1").meta
    assert meta["instruction"] == "swing up" and meta["reference"] is None and meta["action_high"] == [2.0]


def test_d4rl_layout(tmp_path):
    """Episodes end at terminals and timeouts; a time limit's last transition needs next_observations."""
    h5py = pytest.importorskip("h5py")
    from behaviors.formats import read_hdf5
    with h5py.File(tmp_path / "a.hdf5", "w") as file:
        file["observations"], file["actions"] = np.arange(14.0).reshape(7, 2), np.zeros((7, 1))
        file["rewards"], file["terminals"] = np.arange(7.0), np.arange(7) == 2
        file["timeouts"] = np.arange(7) == 4
    assert [(e.reward.tolist(), bool(e.terminated)) for e in read_hdf5(tmp_path / "a.hdf5")] == \
        [([0, 1, 2], True), ([3], False), ([5], False)]
    with h5py.File(tmp_path / "a.hdf5", "a") as file:
        file["next_observations"] = 100 + np.arange(14.0).reshape(7, 2)
    first, second, third = read_hdf5(tmp_path / "a.hdf5")
    assert second.reward.tolist() == [3, 4] and second.obs[:, 0].tolist() == [6, 8, 108] and len(third.reward) == 2
    with h5py.File(tmp_path / "a.hdf5", "a") as file:
        del file["terminals"]
        file["terminals"] = np.zeros((7, 1))
    with pytest.raises(data.DataError, match=r"terminals has shape \(7, 1\), expected \(7,\)"):
        list(read_hdf5(tmp_path / "a.hdf5"))
    with h5py.File(tmp_path / "a.hdf5", "a") as file:
        del file["timeouts"]
    with pytest.raises(data.DataError, match="a.hdf5: no timeouts; there are: actions"):
        list(read_hdf5(tmp_path / "a.hdf5"))


@pytest.mark.parametrize("flags, message", [
    (("import", "nothing", "own"), "nothing: neither minari:ID nor an .hdf5 file nor a folder of .npz files"),
    (("import", "npz", "own"), "npz does not name its environment: give --env-id"),
    (("import", "npz", "own", "--env-id", "Nowhere-v0"), "environment 'Nowhere-v0' cannot be made"),
    (("import", "npz", "own", "--env-id", "CartPole-v1"), "CartPole-v1: its actions are Discrete"),
    (("import", "npz", "own", "--env-id", "MountainCarContinuous-v0"), r"npz, episode 0: obs has shape \(4, 3\), expected \(4, 2\)"),
    (("import", "npz", "full", "--env-id", "Pendulum-v1"), "full/Pendulum-v1 exists already"),
    (("mix", "both", "full", "--shares", "0.5", "0.5"), "one for each of the 1 data sets"),
    (("export", "full/Pendulum-v1", "npz"), "npz exists already"),
])
def test_what_cannot_be_converted_says_why(tmp_path, monkeypatch, flags, message):
    monkeypatch.chdir(tmp_path)
    pendulum(tmp_path / "npz")
    write_task(tmp_path / "full" / "Pendulum-v1", [3])
    with pytest.raises(SystemExit, match=f"data.py: .*{message}"):
        run_cli(monkeypatch, *flags)
    assert not (tmp_path / "own" / "Pendulum-v1").exists()


def test_a_damaged_npz_is_named_and_a_retry_works(tmp_path, monkeypatch):
    episodes = pendulum(tmp_path / "npz")
    good = (tmp_path / "npz" / "1.npz").read_bytes()
    (tmp_path / "npz" / "1.npz").write_bytes(good[:100])
    flags = "import", tmp_path / "npz", tmp_path / "own", "--env-id", "Pendulum-v1"
    with pytest.raises(SystemExit, match="npz/1.npz: the file is damaged or lacks an array"):
        run_cli(monkeypatch, *flags)
    (tmp_path / "npz" / "1.npz").write_bytes(good)
    run_cli(monkeypatch, *flags)
    assert_same(data.Task(tmp_path / "own" / "Pendulum-v1"), episodes)


def test_a_missing_package_names_its_install(tmp_path, monkeypatch):
    write_task(tmp_path / "a", [3])
    monkeypatch.setitem(sys.modules, "h5py", None)  # as if it were not installed
    with pytest.raises(SystemExit, match="this needs `pip install h5py`"):
        run_cli(monkeypatch, "export", tmp_path / "a", tmp_path / "a.hdf5")


def test_mix_is_a_union_of_shares(tmp_path, monkeypatch):
    write_task(tmp_path / "one" / "a", [3] * 10), write_task(tmp_path / "one" / "b", [2] * 4)
    write_task(tmp_path / "two" / "a", [7] * 5)
    flags = tmp_path / "one", tmp_path / "two", "--shares", 0.5, 1
    run_cli(monkeypatch, "mix", tmp_path / "both", *flags), run_cli(monkeypatch, "mix", tmp_path / "same", *flags)
    a, b = data.open_tasks(tmp_path / "both")
    a.verify(), b.verify()
    assert a.episodes["length"].tolist() == [3] * 5 + [7] * 5 and len(b.episodes) == 2
    assert len({e.obs[0, 0] for e in list(a)[:5]}) == 5  # without replacement
    assert [source["episodes"] for source in a.meta["sources"]] == [5, 5]
    assert a.meta["checksum"] == data.Task(tmp_path / "same" / "a").meta["checksum"]
