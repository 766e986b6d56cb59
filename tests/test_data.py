"""What is written is what is read; windows stay inside episodes; no half-written set is used."""

import contextlib
import itertools
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

import data
from data import FINAL_OBS, FLAG, REWARD, RETURN, TERMINATED, TRUNCATED, row_width
from learner import data_weights
from prepare import merged_metas, open_sources, verify
from tests.conftest import numbered, task_meta, write_task

ROOT = Path(__file__).parent.parent
needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")


def rng(seed=0):
    return np.random.default_rng(seed)


def episode(reward=(1.0, 1.0), **changes):
    """An Episode for the tasks of `write_task`."""
    length = len(reward)
    obs, action = np.ones((length + 1, 2)), np.zeros((length, 1))
    arrays = dict(obs=obs, action=action, reward=np.array(reward), terminated=True)
    return data.Episode(**{**arrays, **changes})


def write_in_parts(folder, lengths, parts):
    """As write_task(folder, lengths), but by several appends."""
    cuts = np.linspace(0, len(lengths), parts + 1).astype(int)
    for part, (first, last) in enumerate(zip(cuts, cuts[1:])):
        episodes = [numbered(number, lengths[number]) for number in range(first, last)]
        data.append(folder, episodes, task_meta() if part == 0 else None)
    return data.Task(folder)


def rest(task):
    """How many bytes of rows.bin do not count."""
    size = (task.folder / "rows.bin").stat().st_size
    return size - task.meta["rows"] * row_width(task.meta) * 4


# ---------------------------------------------------------------- what is written is what is read

def test_round_trip(tmp_path):
    task = write_task(tmp_path / "a", [3, 1, 4])
    rows = task.rows()
    assert task.meta["episodes"] == 3
    assert task.meta["transitions"] == 8
    assert task.meta["rows"] == len(rows) == 11
    start, length, total, _ = task.episodes[2]
    assert (start, length, total) == (6, 4, 0 + 1 + 2 + 3)
    np.testing.assert_array_equal(rows[6:11, 1], [0, 1, 2, 3, 4])
    np.testing.assert_array_equal(rows[6:11, FLAG], [0, 0, 0, TRUNCATED, FINAL_OBS])
    np.testing.assert_array_equal(task.episode_rows(2), rows[6:11])
    verify([task])


def test_what_meta_says_of_the_returns(tmp_path):
    """Three episodes, with rewards 0; 0, 1, 2; and 0, 1. The discount is 0.9."""
    task = write_task(tmp_path / "a", [1, 3, 2], terminated=True)
    found = {"mean": 4 / 3, "std": (14 / 9) ** 0.5, "min": 0.0, "max": 3.0}
    assert task.meta["return"] == pytest.approx(found)
    low, high = task.meta["return_to_go"]
    assert low == 0  # the first episode's only reward
    assert high == pytest.approx(1 + 0.9 * 2)  # at the second episode's second step
    assert task.rows()[2, RETURN] == pytest.approx(0.9 * 1 + 0.81 * 2)


@st.composite
def sets_of_episodes(draw):
    """obs_dim, action_dim, and random episodes."""
    obs_dim, action_dim = draw(st.integers(2, 5)), draw(st.integers(1, 4))
    random = rng(draw(st.integers(0, 99)))
    ends = st.tuples(st.integers(1, 12), st.booleans())
    episodes = []
    for length, terminated in draw(st.lists(ends, min_size=1, max_size=8)):
        obs = random.normal(size=(length + 1, obs_dim)).astype(np.float32)
        action = random.uniform(-1, 1, (length, action_dim)).astype(np.float32)
        reward = random.normal(size=length).astype(np.float32)
        episodes.append(data.Episode(obs, action, reward, terminated))
    return obs_dim, action_dim, episodes


def place_of(batch, row, episodes):
    """The (episode, step) that a window's first transition is from; its observations name it."""
    before, after = batch.obs[row, 0], batch.next_obs[row, 0]
    for number, made in enumerate(episodes):
        for t in range(len(made.reward)):
            if np.array_equal(made.obs[t], before) and np.array_equal(made.obs[t + 1], after):
                return number, t
    raise AssertionError(f"window {row} begins with a transition that no episode has")


def check_window(batch, row, written, t, steps):
    """Window `row` of the batch is the steps t, t + 1, ... of the episode `written`, no more."""
    length = len(written.reward)
    at = np.arange(t, t + steps)
    valid, last = at < length, at == length - 1
    np.testing.assert_array_equal(batch.valid[row], valid)
    np.testing.assert_array_equal(batch.obs[row], written.obs[np.minimum(at, length)])
    np.testing.assert_array_equal(batch.next_obs[row], written.obs[np.minimum(at + 1, length)])
    np.testing.assert_array_equal(batch.reward[row][valid], written.reward[t:t + steps])
    np.testing.assert_array_equal(batch.action[row][valid], written.action[t:t + steps])
    np.testing.assert_array_equal(batch.terminated[row], last & written.terminated)
    np.testing.assert_array_equal(batch.truncated[row], last & (not written.terminated))
    assert (batch.reward[row][~valid] == 0).all()
    assert (batch.action[row][~valid] == 0).all()


@settings(max_examples=25, deadline=None)
@given(sets_of_episodes(), st.integers(1, 9), st.lists(st.integers(1, 3)), st.integers(0, 2**32))
def test_any_set_is_read_as_written_and_sampled_whole(tmp_path_factory, made, steps, parts, seed):
    """Random lengths, dimensions, windows and appends."""
    obs_dim, action_dim, episodes = made
    folder = tmp_path_factory.mktemp("set") / "a"
    waiting, meta = list(episodes), task_meta(obs_dim, action_dim)
    for count in [*parts, len(episodes)]:
        if waiting:
            data.append(folder, waiting[:count], meta)
        waiting, meta = waiting[count:], None
    task = data.Task(folder)
    verify([task])
    assert len(task.episodes) == len(episodes)
    for written, read in zip(episodes, task):
        for name in ("obs", "action", "reward", "terminated"):
            np.testing.assert_array_equal(getattr(read, name), getattr(written, name))
    batch = data.Sampler([task], 64, steps).sample(rng(seed))
    for row in range(64):
        number, t = place_of(batch, row, episodes)
        check_window(batch, row, episodes[number], t, steps)


def test_appends_make_the_same_set_as_one_write(tmp_path):
    one = write_task(tmp_path / "one" / "a", [3, 5, 2, 6, 7])
    many = write_in_parts(tmp_path / "many" / "a", [3, 5, 2, 6, 7], parts=4)
    for name in ("rows.bin", "episodes.npy", "meta.json"):
        assert (one.folder / name).read_bytes() == (many.folder / name).read_bytes()


def test_return_to_go_by_hand():
    reward = np.array([1.0, 2.0, 4.0])
    np.testing.assert_allclose(data.return_to_go(reward, True, 0.5), [1 + 1 + 1, 2 + 2, 4])
    # Truncated: the mean of the last 1 / (1 - 0.5) rewards, 3, goes on for ever: worth 6 after the
    # last step.
    np.testing.assert_allclose(data.return_to_go(reward, False, 0.5)[2], 4 + 0.5 * 6, rtol=1e-6)


# ---------------------------------------------------------------- sampling

@pytest.mark.parametrize("steps", [1, 3, 7])
def test_windows_never_cross_episodes(tmp_path, steps):
    lengths = np.array([1, 2, 5, 30])
    batch = data.Sampler([write_task(tmp_path / "a", lengths)], 512, steps).sample(rng())
    number, step = batch.obs[..., 0], batch.obs[..., 1]
    assert (number == number[:, :1]).all()
    assert (batch.next_obs[..., 0] == number).all()
    # Each valid step moves on by one; the others stay.
    assert (batch.next_obs[..., 1] - step == batch.valid).all()
    assert (batch.reward == step * batch.valid).all()
    assert batch.valid[:, 0].all()
    left = lengths[number[:, 0].long()] - step[:, 0].numpy()
    np.testing.assert_array_equal(batch.valid.sum(1), np.minimum(steps, left))
    np.testing.assert_array_equal(batch.truncated.any(1), left <= steps)
    assert not batch.terminated.any()


@pytest.mark.parametrize("parts", [1, 3])
def test_every_transition_is_equally_likely(tmp_path, parts):
    task = write_in_parts(tmp_path / "a", [1, 2, 5, 2], parts)
    batch = data.Sampler([task], 100_000).sample(rng())
    _, counts = np.unique(batch.obs[:, 0].numpy(), axis=0, return_counts=True)
    assert len(counts) == 10
    # A batch is stratified: its numbers lie at nearly equal distances.
    assert abs(counts - 10_000).max() <= 2


def test_top_keeps_the_best_episodes(tmp_path):
    task = write_task(tmp_path / "a", [2, 9, 3, 4])  # longer episodes have higher returns
    batch = data.Sampler([task], 256, top=0.5).sample(rng())
    assert set(batch.obs[:, 0, 0].tolist()) == {1.0, 3.0}


def test_the_best_of_a_task_are_looked_for_in_all_of_its_sources(tmp_path):
    """A tenth of each source would be poor episodes of the poor one."""
    good = write_task(tmp_path / "good" / "a", [8, 9, 10, 11])
    poor = write_task(tmp_path / "poor" / "a", [2, 3, 4, 7])
    other = write_task(tmp_path / "poor" / "b", [2, 3])
    for top, lengths in ((0.25, {10, 11}), (0.625, {7, 8, 9, 10, 11})):
        sampler = data.Sampler([good, poor, other], 4096, top=top)
        batch = sampler.sample(rng())
        rows = batch.task == 0
        left = batch.obs[rows, 0, 1] + 1  # an episode's last step tells its length
        assert left.max() == 11 and rows.float().mean() > 0.4
        found = {int(final - first) for final, first, source in
                 zip(sampler.final, sampler.first, sampler.source) if source < 2}
        assert found == lengths


@pytest.mark.parametrize("top, weights, tasks, of_two", [
    (0.625, None, (0.75, 0.25), 7 / 45),  # 38 and 7 transitions are chosen
    (0.625, [1, 3], (0.875, 0.125), 3 * 7 / (38 + 3 * 7)),
    (0.25, None, (0.75, 0.25), 0),  # the task keeps the weight of a source that has none of them
    (1, None, (0.75, 0.25), 2 / 3),
])
def test_the_best_of_all_sources_are_drawn_alike(tmp_path, top, weights, tasks, of_two):
    write_task(tmp_path / "one" / "a", [8, 9, 10, 11])
    write_task(tmp_path / "one" / "b", [4, 4])
    write_task(tmp_path / "two" / "a", [2, 3, 4, 7])
    sources = open_sources([tmp_path / "one", tmp_path / "two"], weights=weights)
    sampler = data.Sampler(**sources, batch_size=10_000, top=top)
    share = np.bincount(sampler.source[sampler.draw([rng()])[0]], minlength=3) / 10_000
    np.testing.assert_allclose([share[0] + share[2], share[1]], tasks, atol=1e-3)
    assert share[2] / tasks[0] == pytest.approx(of_two, abs=1e-3)


# ---------------------------------------------------------------- worth

FOCUS = math.log(2)  # a mean deviation doubles a weight


def write_paces(folder, paces, lengths=20):
    """A task whose episodes have one reward all along, each its own."""
    episodes = []
    for number, (pace, length) in enumerate(np.broadcast(paces, lengths)):
        episode = numbered(number, length, terminated=True)
        episode.reward[:] = pace
        episodes.append(episode)
    data.append(folder, episodes, task_meta())
    return data.Task(folder)


def worths(batch):
    """{an episode's number: the worth of its steps}"""
    found = {}
    for number, worth in zip(batch.obs[:, 0, 0].tolist(), batch.worth.tolist()):
        found.setdefault(number, []).append(worth)
    return found


def test_worth_by_step_is_by_the_return_beside_those_at_the_same_step(tmp_path):
    """Returns are as 1 to 2 to 3 at every step: -1.5, 0 and 1.5 mean deviations from their mean."""
    task = write_paces(tmp_path / "a", [1, 2, 3])
    found = worths(data.Sampler([task], 600, focus=FOCUS, merit="step").sample(rng()))
    expected = np.array([2**-1.5, 1, 2**1.5])
    for number, worth in enumerate(expected / expected.mean()):
        assert found[number] == pytest.approx([worth] * 200, rel=1e-4)


def test_worth_by_return_is_what_data_weights_gives_the_whole_task(tmp_path):
    task = write_paces(tmp_path / "a", [1, 2, 3])
    batch = data.Sampler([task], 600, focus=2.0, merit="return").sample(rng())
    expected = data_weights(batch.return_to_go[:, 0], batch.task, 1, 2.0)
    np.testing.assert_allclose(batch.worth, expected, rtol=1e-3)
    found = worths(batch)
    assert max(found[2]) > 1 > min(found[2])  # near its end also the best has little to come


def test_worth_is_of_all_sources_of_a_task_and_of_no_other(tmp_path):
    for folder, paces in (("x", [1]), ("y", [2, 3]), ("z", [100, 300])):
        write_paces(tmp_path / folder / "a", paces)
    one, two, other = (data.Task(tmp_path / folder / "a") for folder in "xyz")
    other.name = "b"
    batch = data.Sampler([one, other, two], 900, focus=FOCUS, merit="step").sample(rng())
    # Drawn are 1 half of the time, 2 and 3 a quarter each: mean 7/4, mean deviation 3/4.
    for task, apart in ((0, (3 - 1) / 0.75), (1, 2.0)):
        here = batch.worth[batch.task == task]
        assert (here.max() / here.min()).item() == pytest.approx(2**apart, rel=1e-4)


def test_where_only_the_good_are_left_their_steps_keep_their_share(tmp_path):
    """Nine episodes fall early, and one goes on. Beside each other, survivors are all alike."""
    task = write_paces(tmp_path / "a", 1, lengths=[10] * 90 + [300] * 10)
    batch = data.Sampler([task], 3900, focus=5.0, merit="step").sample(rng())
    late = batch.obs[:, 0, 1] >= 10
    assert batch.worth[late].mean().item() == pytest.approx(1, abs=0.02)
    assert batch.worth[~late].mean().item() == pytest.approx(1, abs=0.05)


def test_a_late_reward_leaves_weight_for_the_way_there(tmp_path):
    """Half of the episodes have a reward, in the end. By return alone their last steps have all of
    the weight; by step, all of their steps have as much."""
    task = write_paces(tmp_path / "a", [0] * 50)
    good = [numbered(50 + number, 20, terminated=True) for number in range(50)]
    for episode in good:
        episode.reward[:] = 0
        episode.reward[-1] = 1
    data.append(task.folder, good)
    shares = {}
    for merit in ("return", "step"):
        sampler = data.Sampler([data.Task(task.folder)], 2000, focus=5.0, merit=merit)
        batch = sampler.sample(rng())
        first = (batch.obs[:, 0, 1] < 5) & (batch.obs[:, 0, 0] >= 50)
        shares[merit] = (batch.worth[first].sum() / batch.worth.sum()).item()
    assert shares["return"] < 0.05 and shares["step"] == pytest.approx(0.25, abs=0.01)


@pytest.mark.parametrize("merit, length", [("step", 40), ("step", 1), ("return", 1)])
def test_returns_that_are_alike_but_for_rounding_count_alike(tmp_path, merit, length):
    paces = 0.3 * (1 + 1e-7 * rng().normal(size=50))
    task = write_paces(tmp_path / "a", paces, lengths=length)
    batch = data.Sampler([task], 50 * length, focus=5.0, merit=merit).sample(rng())
    assert (batch.worth - 1).abs().max() < 0.05
    assert data.Sampler([task], 64).sample(rng()).worth is None


def test_many_episodes_are_read_at_equal_distances(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "EPISODES_READ", 5)
    task = write_paces(tmp_path / "a", np.arange(41), lengths=1)
    usual, deviation, _ = data.Worth([(task, task.episodes, 1)], 1.0, "return").usual[0]
    assert (usual, deviation) == pytest.approx((20, 12))  # of 0, 10, 20, 30 and 40


@pytest.mark.parametrize("weights", [None, (1, 9), (9, 1)])
@pytest.mark.parametrize("merit", ["step", "return"])
def test_worth_has_mean_1_over_what_is_drawn(tmp_path, weights, merit):
    """Also where a task's sources are unlike, and are not drawn alike."""
    one = write_paces(tmp_path / "one" / "a", np.linspace(0, 1, 40))
    two = write_paces(tmp_path / "two" / "a", np.linspace(-3, 0.5, 5))
    batch = data.Sampler([one, two], 9_000, weights=weights, focus=2.0, merit=merit).sample(rng())
    assert batch.worth.mean().item() == pytest.approx(1, abs=0.01)


def test_returns_are_compared_with_those_that_are_learnt_from(tmp_path):
    """Of the best tenth, not of all: there a focus would do nothing beside it."""
    task = write_paces(tmp_path / "a", np.linspace(0, 1, 100))
    batch = data.Sampler([task], 4_000, top=0.1, focus=2.0).sample(rng())
    assert batch.worth.mean().item() == pytest.approx(1, abs=0.01)
    assert batch.worth.max() > 4 and batch.worth.min() < 0.1


def test_steps_that_no_episode_has_which_was_read(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "EPISODES_READ", 2)
    task = write_paces(tmp_path / "a", [1, 1, 1], lengths=[3, 9, 3])
    usual = data.Worth([(task, task.episodes, 1)], 1.0, "step").usual
    assert usual.shape == (9, 3) and (usual[3:] == usual[2]).all()


def test_tasks_are_padded_and_actions_scaled(tmp_path):
    narrow = write_task(tmp_path / "a", [5], obs_dim=2)
    wide = write_task(tmp_path / "b", [5], obs_dim=4, action_dim=3)
    wide.meta.update(action_low=[0.0] * 3, action_high=[0.04] * 3)
    batch = data.Sampler([narrow, wide], 64).sample(rng())
    assert batch.obs.shape == (64, 1, 4)
    assert batch.action.shape == (64, 1, 3)
    of_narrow = batch.take(batch.task == 0)
    of_wide = batch.take(batch.task == 1)
    assert len(of_narrow.task) == len(of_wide.task) == 32
    assert (of_narrow.obs[..., 2:] == 0).all()
    assert (of_narrow.action[..., 1:] == 0).all()
    assert (of_narrow.action[..., 0] == of_narrow.obs[..., 1] / 100).all()
    assert (of_narrow.obs[..., 1] > 0).any()
    # Step 0 has action 0, which is the box's lower end; step 4 has 0.04, its upper end.
    expected = of_wide.obs[..., 1] / 2 - 1
    np.testing.assert_allclose(of_wide.action[..., 0], expected, atol=1e-6)


def by_hand(window, meta, obs_dim, action_dim):
    """Rows as on disk (T+1, width) -> as in a Batch: columns moved apart, actions in [-1, 1]."""
    O, A = meta["obs_dim"], meta["action_dim"]
    rows = np.zeros((len(window), obs_dim + action_dim + 3), np.float32)
    for t, row in enumerate(window):
        rows[t, :O] = row[:O]
        for a in range(A):
            low, high = np.float32(meta["action_low"][a]), np.float32(meta["action_high"][a])
            scaled = (row[O + a] - (low + high) / 2) / ((high - low) / 2)
            rows[t, obs_dim + a] = min(max(scaled, -1), 1)
        rows[t, REWARD:] = row[O + A:]
    return rows


def sample_plainly(sampler, rng):
    """The windows of sampler.sample(rng), one by one: slow and obvious.

    -> a list of (task's index, rows (T+1, width) as on disk: neither padded nor scaled)
    """
    windows = []
    for part, number in enumerate(rng.random(sampler.batch_size)):
        number = (part + number) / sampler.batch_size
        episode = next(k for k, end in enumerate(sampler.ends) if number < end)
        left = int((sampler.ends[episode] - number) * sampler.density[episode]) + 1
        source, final = sampler.sources[sampler.source[episode]], sampler.final[episode]
        steps = [min(final - left + t, final) for t in range(sampler.steps + 1)]
        windows.append((source.task, source.data.rows()[steps]))
    return windows


@pytest.mark.parametrize("top", [1.0, 0.4])
@pytest.mark.parametrize("steps", [1, 3, 12])
def test_a_sample_is_what_the_plain_sampler_draws(tmp_path, steps, top):
    """Two sources of one task, tasks of other widths and boxes, windows past the episodes' ends."""
    narrow = task_meta(obs_dim=2, action_dim=1)
    wide = {**task_meta(5, 3), "action_low": [-0.02, 0.0, -4.0], "action_high": [0.04, 0.03, 4.0]}
    long = {**task_meta(3, 2), "action_low": [0.0, 0.0], "action_high": [0.05, 0.2]}
    random, tasks = rng(7), []
    for folder, meta in (("one/a", narrow), ("one/b", wide), ("two/c", long), ("two/a", narrow)):
        episodes = []
        for number in range(10):
            dims = meta["obs_dim"], meta["action_dim"]
            made = numbered(number, random.integers(1, 9), *dims, terminated=number % 2 == 0)
            made.reward[:] = random.normal(size=len(made.reward))
            episodes.append(made)
        data.append(tmp_path / folder, episodes, meta)
        tasks.append(data.Task(tmp_path / folder))
    sampler = data.Sampler(tasks, 200, steps, top, weights=[1, 3, 2, 2])
    metas = merged_metas(tasks)
    assert [meta["name"] for meta in metas] == ["a", "b", "c"]
    for seed in range(3):
        batch = sampler.sample(rng(seed))
        windows = sample_plainly(sampler, rng(seed))
        assert len(windows) == 200
        for row, (task, window) in enumerate(windows):
            assert batch.task[row] == task
            expected = by_hand(window, metas[task], batch.obs_dim, 3)
            np.testing.assert_allclose(batch.rows[row], expected, rtol=1e-6, atol=1e-7)
        past_end = ~batch.valid[:, -1]
        assert past_end.any() == (steps > 1)  # such windows were among those compared


def test_the_plain_sampler_by_hand(tmp_path):
    """Four parts of [0, 1], a number in the middle of each: 1/8, 3/8, 5/8 and 7/8.

    The three transitions of the first task share [0, 1/2], the one of the second has the rest.
    """
    tasks = [write_task(tmp_path / "a", [1, 2]), write_task(tmp_path / "b", [1], obs_dim=3)]
    sampler = data.Sampler(tasks, 4)

    class Middle:
        def random(self, size):
            return np.full(size, 0.5)

    found = []
    for task, rows in sample_plainly(sampler, Middle()):
        number, step = rows[0, :2]
        found.append((task, number, step))
    assert found == [(0, 0, 0), (0, 1, 1), (1, 0, 0), (1, 0, 0)]


def test_sources_have_weights_and_alphas_and_share_their_tasks(tmp_path):
    tasks = [
        write_task(tmp_path / "one" / "a", [5]),
        write_task(tmp_path / "two" / "b", [5]),
        write_task(tmp_path / "two" / "a", [50]),
    ]
    sampler = data.Sampler(tasks, 10_000, weights=[6, 1, 1], alphas=[0.1, 0.2, 0.3])
    batch = sampler.sample(rng())
    for alpha, task, share in ((0.1, 0, 0.75), (0.2, 1, 0.125), (0.3, 0, 0.125)):
        drawn = torch.isclose(batch.alpha, torch.tensor(alpha))
        assert abs(drawn.float().mean() - share) < 0.001
        assert (batch.task[drawn] == task).all()
    assert (batch.obs[batch.alpha < 0.15][..., 1] < 5).all()
    assert (batch.obs[batch.alpha > 0.25][..., 1] > 5).any()


@pytest.mark.parametrize("weights, drawn", [
    ([0, 1, 2], {1, 2}),
    ([1, 0, 0], {0}),
    ([0, 1, 0], {1}),
])
def test_what_has_no_weight_is_not_drawn(tmp_path, weights, drawn):
    tasks = [write_task(tmp_path / name, [1, 3, 1]) for name in "abc"]
    batch = data.Sampler(tasks, 1000, weights=weights).sample(rng())
    assert set(batch.task.tolist()) == drawn


def test_every_draw_is_a_transition_at_the_ends_of_its_episodes_interval_too(tmp_path):
    """The numbers drawn are put on all the intervals' ends, and next to them."""
    lengths = np.array([1, 7, 2, 1, 1, 1, 300, 1, 5])
    sampler = data.Sampler([write_task(tmp_path / "a", lengths)], 1, 3, weights=[3])
    ends = np.array([0, *np.cumsum(lengths)]) / lengths.sum()
    below, above = np.nextafter(ends[1:], 0), np.nextafter(ends[:-1], 1)
    points = np.concatenate([below, ends, above])
    waiting = iter(points)

    class Numbers:
        def random(self, out):
            out.fill(next(waiting))

    number, begin, left = sampler.draw([Numbers()] * len(points))  # batches of one: number as it is
    first = sampler.final - lengths
    assert (left >= 1).all()
    assert (begin + left == sampler.final[number]).all()
    assert set(number) == set(range(9))
    assert (np.searchsorted(first, begin, "right") - 1 == number).all()


def test_ranks_share_one_batch(tmp_path):
    tasks = [write_task(tmp_path / "a", [2] * 7), write_task(tmp_path / "b", [5, 3], obs_dim=4)]
    sampler = data.Sampler(tasks, 30, 3)
    batch = sampler.sample(rng())
    for rank in range(3):
        share = sampler.sample(rng(), rank, 3)
        assert torch.equal(share.rows, batch.rows[rank::3])
        assert torch.equal(share.task, batch.task[rank::3])


@pytest.mark.parametrize("rank, ranks", [(0, 1), (1, 2)])
@pytest.mark.parametrize("count", [1, 4, 11])
def test_batches_made_at_once_are_those_made_one_by_one(tmp_path, rank, ranks, count):
    tasks = []
    for name, width in (("a", 1), ("b", 2)):
        tasks.append(write_task(tmp_path / name, [5, 3, 9, 2], action_dim=width))
    sampler = data.Sampler(tasks, 10, 3, alphas=[0.1, 0.2])
    sampler.at_once = 4
    batches = list(sampler.batches((rng(seed) for seed in range(count)), rank, ranks))
    assert len(batches) == count
    for seed, batch in enumerate(batches):
        alone = sampler.sample(rng(seed), rank, ranks)
        for name in ("rows", "task", "alpha"):
            assert torch.equal(getattr(batch, name), getattr(alone, name))


def test_a_batch_is_stratified(tmp_path):
    """Half of a batch is of the task with half of the weight; no part of an episode is left out."""
    tasks = [write_task(tmp_path / "a", [100]), write_task(tmp_path / "b", [100], obs_dim=3)]
    for seed in range(20):
        batch = data.Sampler(tasks, 40).sample(rng(seed))
        assert (batch.task == torch.arange(2).repeat_interleave(20)).all()
        assert (batch.obs[:, 0, 1] // 5 == torch.arange(20).repeat(2)).all()


def test_same_rng_same_batch(tmp_path):
    sampler = data.Sampler([write_task(tmp_path / "a", [50])], 32)
    one, two, other = (sampler.sample(rng(seed)).obs for seed in (1, 1, 2))
    assert (one == two).all()
    assert not (one == other).all()


def test_constants_give_finite_inputs(tmp_path):
    """Dimensions, actions, rewards and an action box that never change."""
    constant = episode([0.0] * 9, action=np.full((9, 1), 0.5))
    meta = {**task_meta(), "action_low": [0.5], "action_high": [0.5]}
    data.append(tmp_path / "a", [constant] * 2, meta)
    batch = data.Sampler([data.Task(tmp_path / "a")], 16, 3).sample(rng())
    assert torch.isfinite(batch.rows).all()
    assert (batch.action[batch.valid] == 0).all()


def test_parts_of_a_batch_keep_what_belongs_together(tmp_path):
    tasks = [write_task(tmp_path / "a", [9]), write_task(tmp_path / "b", [9])]
    batch = data.Sampler(tasks, 8, alphas=[0.1, 0.2]).sample(rng())
    part = batch.take(slice(1, None, 4))
    assert torch.equal(part.obs, batch.obs[[1, 5]])
    assert part.task.tolist() == [0, 1]
    assert torch.equal(part.alpha, torch.tensor([0.1, 0.2]))
    assert part.worth is None
    assert part.obs_dim == 2


# ---------------------------------------------------------------- made ahead

def test_prefetch_gives_the_same_in_the_same_order():
    made = []

    def numbers():
        for number in range(10):
            made.append(number)
            yield number

    ahead = data.prefetch(numbers(), 3)
    assert next(ahead) == 0
    assert len(made) <= 4  # the first, and at most three more
    assert [*ahead] == list(range(1, 10))


def test_prefetch_raises_what_failed_in_its_thread():
    def numbers():
        yield 0
        raise data.DataError("the disk is gone")

    ahead = data.prefetch(numbers(), 2)
    assert next(ahead) == 0
    with pytest.raises(data.DataError, match="the disk is gone"):
        next(ahead)


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


def killed_at(count, work):
    """Do `work`, and end this process before the count-th line of data.py that it runs."""
    seen = 0

    def trace(frame, event, _):
        nonlocal seen
        code = frame.f_code
        if code.co_filename != data.__file__ or code.co_name == "return_to_go":
            return None  # that one loops for long
        seen += event == "line"
        if seen == count:
            os.kill(os.getpid(), signal.SIGKILL)
        return trace

    sys.settrace(trace)
    work()


def after_each_kill(start, work):
    """Yield after each kill of `work`, at later and later lines, until it ends unharmed."""
    for count in itertools.count(1, 3):  # every third line, for forks cost
        start()
        status = fork(lambda: killed_at(count, work))
        if status == 0:
            return
        assert status == -signal.SIGKILL
        yield count


@needs_fork
def test_an_append_killed_at_any_line_leaves_what_was_there(tmp_path):
    folder = tmp_path / "a"
    more = [episode([7.0]), episode([7.0] * 2000)]  # 48 KB, more than a file keeps back in memory
    kills, counts, rests = 0, set(), set()

    def anew():
        shutil.rmtree(folder, ignore_errors=True)
        write_task(folder, [2, 3])

    for _ in after_each_kill(anew, lambda: data.append(folder, more)):
        task = data.Task(folder)
        verify([task])
        assert task.rows()[0, REWARD] == 0
        kills += 1
        counts.add(len(task.episodes))
        rests.add(rest(task))
        data.append(folder, [episode([7.0])])  # a retry
        task = data.Task(folder)
        verify([task])
        assert task.episodes["return"][-1] == 7
        assert rest(task) == 0
    assert kills > 30
    assert counts in ({2}, {2, 4})  # 4: killed when meta.json was in its place already
    assert 0 in rests
    assert max(rests) > 48_000  # killed when the rows were on the disk, and did not count yet


@needs_fork
def test_a_first_write_killed_at_any_line_is_not_believed(tmp_path):
    folder, kills = tmp_path / "a", 0
    more = [episode([7.0]), episode([7.0] * 2000)]

    def clear():
        shutil.rmtree(folder, ignore_errors=True)

    for _ in after_each_kill(clear, lambda: data.append(folder, more, task_meta())):
        kills += 1
        if (folder / "meta.json").exists():  # killed after the last step: all of it is there
            verify([data.Task(folder)])
            continue
        with pytest.raises(data.DataError, match="no data set here"):
            data.Task(folder)
        data.append(folder, more, task_meta())  # a retry
        task = data.Task(folder)
        verify([task])
        assert task.episodes["return"].tolist() == [7, 14_000]
        assert rest(task) == 0
    assert kills > 30


def test_the_next_writer_cuts_off_what_a_killed_one_left(tmp_path):
    write_task(tmp_path / "a", [3, 4])
    with open(tmp_path / "a" / "rows.bin", "ab") as file:
        file.write(b"half an episode")
    task = data.Task(tmp_path / "a")
    verify([task])  # readers ignore it
    assert len(task.rows()) == 9
    assert rest(task) == 15
    data.append(tmp_path / "a", [episode()])
    task = data.Task(tmp_path / "a")
    verify([task])
    assert rest(task) == 0
    assert task.meta["episodes"] == 3
    assert task.rows()[9:, FLAG].tolist() == [0, TERMINATED, FINAL_OBS]


def test_a_new_set_does_not_begin_with_what_a_killed_writer_left(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "rows.bin").write_bytes(b"half an episode")
    task = write_task(tmp_path / "a", [3])
    verify([task])
    assert rest(task) == 0


def test_a_table_that_a_killed_writer_left_longer_is_cut(tmp_path):
    """It replaced episodes.npy, and died before meta.json."""
    short = write_task(tmp_path / "a", [3, 4])
    meta = (tmp_path / "a" / "meta.json").read_bytes()
    data.append(tmp_path / "a", [episode()])
    (tmp_path / "a" / "meta.json").write_bytes(meta)
    task = data.Task(tmp_path / "a")
    verify([task])
    assert task.episodes.tolist() == short.episodes.tolist()


def test_a_failed_append_keeps_what_was_there(tmp_path):
    write_task(tmp_path / "a", [3, 4])
    with pytest.raises(data.DataError, match="episode 3: reward is not finite at step 1"):
        data.append(tmp_path / "a", [episode(), episode([1.0, np.nan])])
    task = data.Task(tmp_path / "a")
    verify([task])
    assert task.meta["episodes"] == 2


def test_a_set_is_not_started_twice_nor_without_episodes(tmp_path):
    write_task(tmp_path / "a", [3])
    with pytest.raises(data.DataError, match="there is a data set already"):
        data.append(tmp_path / "a", [episode()], task_meta())
    with pytest.raises(data.DataError, match="there are no episodes"):
        data.append(tmp_path / "b", [], task_meta())
    with pytest.raises(data.DataError, match="there are no episodes"):
        data.append(tmp_path / "a", [])
    assert data.Task(tmp_path / "a").meta["episodes"] == 1
    assert not (tmp_path / "b" / "meta.json").exists()


def test_a_second_writer_refuses(tmp_path):
    task = write_task(tmp_path / "a", [3])

    def episodes():
        with pytest.raises(data.DataError, match="another process is writing here"):
            data.append(tmp_path / "a", [episode()])
        yield episode()

    data.append(tmp_path / "a", episodes())
    assert data.Task(tmp_path / "a").meta["episodes"] == 2
    assert len(task.episodes) == 1


def test_a_reader_keeps_its_episodes_while_a_writer_appends(tmp_path):
    task = write_task(tmp_path / "a", [3, 4])
    sampler = data.Sampler([task], 32)
    before = sampler.sample(rng())
    data.append(tmp_path / "a", [episode()] * 5)
    assert torch.equal(before.obs, sampler.sample(rng()).obs)
    assert len(task.rows()) == 9


def test_a_reader_keeps_its_episodes_when_a_killed_writers_rest_goes(tmp_path):
    """The reader has mapped the bytes that the next writer cuts off: 24 pages of them."""
    write_task(tmp_path / "a", [3, 4])
    with open(tmp_path / "a" / "rows.bin", "ab") as file:
        file.write(bytes(100_000))
    task = data.Task(tmp_path / "a")
    sampler = data.Sampler([task], 32)
    before = sampler.sample(rng())
    data.append(tmp_path / "a", [episode()])
    assert torch.equal(before.obs, sampler.sample(rng()).obs)


# ---------------------------------------------------------------- what is refused

@pytest.mark.parametrize("changes, message", [
    (dict(reward=np.zeros((2, 1))), r"episode 1: reward has shape \(2, 1\), expected \(2,\)"),
    (dict(terminated=np.zeros((2, 1), bool)),
     r"episode 1: terminated has shape \(2, 1\), expected \(\)"),
    (dict(obs=np.ones((2, 2))), r"episode 1: obs has shape \(2, 2\), expected \(3, 2\)"),
    (dict(obs=np.ones((3, 5))), r"obs has shape \(3, 5\), expected \(3, 2\)"),
    (dict(action=np.array([["left"], ["right"]])), "action has dtype <U5, expected numbers"),
    (dict(obs=np.array([[1, 2], [1, None], [0, 0]])), "obs has dtype object, expected numbers"),
    (dict(action=np.array([[0.0], [np.inf]])), "action is not finite at step 1"),
    # float32 cannot hold the next one
    (dict(obs=np.array([[0, 0], [0, 1e39], [0, 0]])), "obs is not finite at step 1"),
    (dict(reward=np.zeros(0), action=np.zeros((0, 1)), obs=np.zeros((1, 2))), "no transitions"),
])
def test_a_wrong_episode_is_refused(tmp_path, changes, message):
    write_task(tmp_path / "a", [3])
    with pytest.raises(data.DataError, match=message):
        data.append(tmp_path / "a", [episode(**changes)])
    assert data.Task(tmp_path / "a").meta["episodes"] == 1


def test_actions_are_cut_off_at_the_box_as_environments_do(tmp_path):
    data.append(tmp_path / "a", [episode(action=np.array([[3.0], [-0.5]]))], task_meta())
    made, = data.Task(tmp_path / "a")
    assert made.action.tolist() == [[1.0], [-0.5]]


def cut_to(size):
    return lambda path: path.write_bytes(path.read_bytes()[:size])


def flip_last_bit(path):
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)


def other_format(path):
    path.write_text(json.dumps({**json.loads(path.read_text()), "format": 1}))


@pytest.mark.parametrize("name, damage, message", [
    ("rows.bin", cut_to(-8), "rows.bin: 208 bytes, expected 216: the file was cut short"),
    ("rows.bin", cut_to(0), "rows.bin: the file is missing or empty"),
    ("rows.bin", Path.unlink, "rows.bin: the file is missing or empty"),
    ("episodes.npy", cut_to(50), "episodes.npy: it is missing or damaged"),
    ("episodes.npy", Path.unlink, "episodes.npy: it is missing or damaged"),
    ("episodes.npy", flip_last_bit, "episodes.npy: wrong checksum"),
    ("episodes.npy", lambda path: np.save(path, np.zeros(2)), "records of float64, expected"),
    ("meta.json", cut_to(40), "meta.json: it is damaged"),
    ("meta.json", other_format, "meta.json: format 1, but this code reads format 3"),
    ("meta.json", Path.unlink, "no data set here"),
])
def test_damage_that_opening_finds_is_named(tmp_path, name, damage, message):
    write_task(tmp_path / "a", [3, 4])
    damage(tmp_path / "a" / name)
    with pytest.raises(data.DataError, match=message):
        data.Task(tmp_path / "a")


@needs_fork
def test_a_file_cut_short_while_it_is_sampled_is_an_error_not_a_crash(tmp_path):
    """In a process of its own: without the check this is SIGBUS."""
    sampler = data.Sampler([write_task(tmp_path / "a", [3000] * 3)], 64)

    def work():
        os.truncate(tmp_path / "a" / "rows.bin", 4096)
        message = "rows.bin: 4,096 bytes, expected 216,072: the file was cut short"
        with pytest.raises(data.DataError, match=message):
            sampler.sample(rng(1))

    assert fork(work) == 0


# ---------------------------------------------------------------- larger than memory

def sparse_task(folder, transitions, obs_dim=17, action_dim=6, length=1000):
    """A task of zeros whose rows are a hole in a file: it takes no room on the disk."""
    folder.mkdir(parents=True)
    count = transitions // length
    table = np.zeros(count, data.EPISODE)
    table["start"] = np.arange(count) * (length + 1)
    table["length"] = length
    np.save(folder / "episodes.npy", table)
    meta = {
        **task_meta(obs_dim, action_dim, "HalfCheetah-v5"),
        "return_to_go": [0.0, 0.0],
        "rows": count * (length + 1),
        "episodes": count,
        "transitions": count * length,
        "return": {"mean": 0, "std": 0, "min": 0, "max": 0},
        "checksum": zlib.crc32(table),
    }
    (folder / "meta.json").write_text(json.dumps(meta))
    with open(folder / "rows.bin", "wb") as file:
        file.truncate(meta["rows"] * row_width(meta) * 4)


def test_fifty_million_transitions_open_in_a_second(tmp_path):
    sparse_task(tmp_path / "a", 50_000_000)
    began = time.process_time()
    task = data.Task(tmp_path / "a")
    sampler = data.Sampler([task], 64, 5)
    # The first batch, which faults pages in, is not part of opening.
    assert time.process_time() - began < 1
    assert task.meta["transitions"] == 50_000_000
    assert sampler.sample(rng()).valid[:, 0].all()


TRAIN_WITHIN = """
    import json, re, resource, train
    torch = train.torch
    torch.set_num_threads(1)
    resource.setrlimit(resource.RLIMIT_DATA, ({limit}, {limit}))
    update, seen = train.Learner.update, []

    def watched(learner, *args):
        status = open("/proc/self/status").read()
        seen.append(int(re.search(r"RssAnon:\\s+(\\d+)", status)[1]) * 1024)
        return update(learner, *args)

    train.Learner.update = watched
    train.main({flags})
    print(json.dumps(seen))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="/proc and RLIMIT_DATA")
def test_memory_stays_flat_on_a_set_ten_times_its_limit(tmp_path):
    """Training draws from 8 GB while the process may hold 0.8 GB of its own."""
    sparse_task(tmp_path / "HalfCheetah-v5", 77_000_000)
    limit = 800_000_000
    assert (tmp_path / "HalfCheetah-v5" / "rows.bin").stat().st_size > 10 * limit
    flags = f"--size tiny --steps 60 --warmup 0.2 --batch-size 32 --device cpu --no-verify " \
            f"--eval-every 0 --episodes 0 --data {tmp_path} --out {tmp_path / 'run'}"
    script = textwrap.dedent(TRAIN_WITHIN).format(limit=limit, flags=flags.split())
    command = [sys.executable, "-c", script]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    seen = json.loads(ran.stdout.splitlines()[-1])  # bytes, at each update
    assert len(seen) == 60
    assert max(seen) < limit
    assert max(seen[-20:]) - max(seen[20:40]) < 5_000_000
