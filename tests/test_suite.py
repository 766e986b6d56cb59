"""The suite of 132 tasks: its table, its levels, its controllers, and data made of it.

What needs a package that is not in requirements.txt is skipped without it.
"""

import copy
import dataclasses
import importlib.util
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import time
import types
from collections import Counter
from contextlib import nullcontext
from pathlib import Path

import gymnasium
import numpy as np
import pytest
import torch

import behaviors
import envs
import model
import prepare
from behaviors import LEVELS, ars, controllers, search, suite, td3
from behaviors.measure import rollout
from checkpoint import FORMAT, RunError
from data import DataError, Episode, Task, append
from learner import Learner, LossSettings, schedule, settings_for
from studies import ablations, beyond, ladder, peers, runs
from studies.runs import Table
from studies.suite import metas_of, print_weights, random_batch, show, signed_rank, suite_table
from tests.conftest import task_meta, tiny
from train import TrainConfig, parse_args

ROOT = Path(__file__).parent.parent
MEASURED = {row["task"] for row in suite.read("suite_levels.csv")}


# ---------------------------------------------------------------- the table

def test_the_table_has_132_tasks_of_four_domains():
    counts = Counter(row.domain for row in suite.TABLE.values())
    assert counts == {"gymnasium": 11, "metaworld": 50, "dm_control": 50, "robotics": 21}
    assert list(counts) == list(suite.PACKAGES)


def test_a_model_can_tell_the_tasks_apart_by_their_instructions():
    instructions = [row.instruction for row in suite.TABLE.values()]
    assert len(set(instructions)) == len(instructions)
    assert all(instruction.strip() for instruction in instructions)


def test_each_row_can_be_used():
    for row in suite.TABLE.values():
        assert re.fullmatch(r"\w[\w.-]*", row.task)  # what a folder may be called
        assert row.behavior in ("levels", "scripted", "td3", "ars"), row.task
        own = row.task in behaviors.TASKS + behaviors.UNSEEN
        assert (row.behavior == "levels") == own, row.task
        assert not own or row.instruction == behaviors.INSTRUCTIONS[row.task], row.task
        assert row.success in ("", "success", "is_success"), row.task
        assert int(row.obs_dim) > 0 < int(row.action_dim), row.task
        assert (row.behavior == "levels") or float(row.expert_from) > 0, row.task


@pytest.mark.parametrize("texts, count, first, last", [
    (None, 132, "HalfCheetah-v5", "AntMaze_MediumDense-v5"),
    (["all"], 132, "HalfCheetah-v5", "AntMaze_MediumDense-v5"),
    (["metaworld:1", "all"], 132, "metaworld-reach", "AntMaze_MediumDense-v5"),
    (["metaworld:10"], 10, "metaworld-reach", "metaworld-window-close"),
    (["metaworld"], 50, "metaworld-reach", "metaworld-sweep"),
    (["Hopper-v5", "gymnasium:2"], 2, "Hopper-v5", "HalfCheetah-v5"),  # none twice
])
def test_tasks_are_chosen_by_name_or_domain(texts, count, first, last):
    names = suite.chosen(texts)
    assert (len(names), names[0], names[-1]) == (count, first, last)


@pytest.mark.parametrize("text, message", [
    ("nowhere", "no such task or domain; the domains are gymnasium, metaworld, dm_control"),
    ("nowhere:3", "no such task or domain"),
    ("Hopper-v5:3", "no such task or domain"),
    ("metaworld:", "behind the colon stands a number"),
    ("metaworld:0", "behind the colon stands a number"),
    ("metaworld:-1", "behind the colon stands a number"),
    ("metaworld:51", "metaworld has 50 tasks"),
])
def test_what_cannot_be_chosen_says_why(tmp_path, capsys, text, message):
    with pytest.raises(SystemExit) as stopped:
        prepare.main(["suite", "--tasks", text, "--out", str(tmp_path / "new")])
    said = capsys.readouterr().err
    assert stopped.value.code == 2
    assert said.startswith(f"prepare.py: --tasks {text}: ") and message in said
    assert not (tmp_path / "new").exists()


def test_a_missing_package_names_its_install(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)  # as if there were none
    with pytest.raises(SystemExit) as stopped:
        prepare.main(["suite", "--tasks", "dm_control:1", "--out", str(tmp_path / "new")])
    line = "the tasks of dm_control need `pip install dm_control==1.0.28 shimmy==2.0.1`"
    assert stopped.value.code == 2
    assert capsys.readouterr().err == f"prepare.py: {line}\n"
    assert not (tmp_path / "new").exists()


# ---------------------------------------------------------------- the levels

def leaning(control, lean):
    low, high = np.array([-1.0, 0.0]), np.array([1.0, 4.0])
    return suite.Leaning(low, high, control, np.array(lean))


def test_a_level_leans_and_stays_in_its_box():
    rng = np.random.default_rng(0)
    still = leaning(lambda obs: obs, [0.25, -0.5])
    np.testing.assert_allclose(still(np.zeros(2), rng), [0.25, 1.0])
    np.testing.assert_allclose(still(np.array([9.0, -9.0]), rng), [1.0, 0.0])  # cut off first
    actions = np.array([still(np.zeros(2), rng, noise=1.0) for _ in range(500)])
    assert (actions >= [-1, 0]).all() and (actions <= [1, 4]).all()
    assert actions.std(0).min() > 0.3


def test_the_mean_of_a_level_s_actions_keeps_its_lean():
    """Else cloning would take the error away, and every level were an expert to it."""
    rng = np.random.default_rng(0)
    for lean in ([0.0, 0.0], [0.3, -0.3]):
        level = leaning(lambda obs: obs, lean)
        unit = np.mean([level(np.zeros(2), rng, 0.1) for _ in range(2000)], axis=0) - [0, 2]
        np.testing.assert_allclose(unit / [1, 2], lean, atol=0.02)


def test_a_task_always_leans_to_the_same_side():
    side = suite.side("metaworld-push", 4)
    assert set(np.abs(side)) == {1.0}
    np.testing.assert_array_equal(side, suite.side("metaworld-push", 4))
    sides = {tuple(suite.side(task, 4)) for task in suite.TABLE}
    assert len(sides) == 2**4


def test_what_was_measured_has_all_levels_and_a_best_one():
    found = [tuple(suite.measured(task)[level]["mean_return"] for level in LEVELS)
             for task in MEASURED]
    found = [returns for returns in found if len(set(returns)) > 1]  # else nothing was found
    assert len(set(found)) == len(found)  # else two names stand for one environment
    for task in MEASURED:
        rows = suite.measured(task)
        assert set(rows) == set(LEVELS), task
        assert rows["random"]["lean"] == "" and float(rows["expert"]["lean"]) == 0, task
        assert float(rows["medium"]["lean"]) <= float(rows["weak"]["lean"]), task
        assert (rows["expert"]["success"] == "") == (suite.TABLE[task].success == ""), task


def test_what_has_levels_of_its_own_has_no_others():
    with np.load(suite.POLICIES, allow_pickle=False) as arrays:
        searched = {key.rpartition("/")[0] for key in arrays}
    assert {suite.TABLE[task].behavior for task in searched} <= {"ars", "td3"}
    assert "levels" not in {suite.TABLE[task].behavior for task in MEASURED}


def test_what_was_not_measured_names_the_command(monkeypatch):
    monkeypatch.setattr(suite, "read", lambda name: [])
    with pytest.raises(DataError, match="python -m behaviors.search --tasks metaworld-reach`"):
        suite.describe("metaworld-reach", 0.99)
    names = suite.chosen(["Hopper-v5", "metaworld"])
    with pytest.raises(DataError, match=r"lacks 50 of these 51 tasks.*metaworld-push .* \.\.\."):
        suite.need_levels(names)


@pytest.mark.parametrize("width", [0.02, 0.1, 0.5])
def test_leans_are_found_however_far_a_task_bears_one(width):
    """Of a controller whose return falls in a straight line, to nothing at a lean of `width`."""
    leans = search.choose_leans(lambda lean: max(0.0, 1 - lean / width))
    assert leans["expert"] == 0
    assert 1 - leans["medium"] / width == pytest.approx(0.6, abs=0.2)
    assert 1 - leans["weak"] / width == pytest.approx(0.275, abs=0.2)


def test_a_task_that_bears_any_lean_has_levels_all_the_same():
    leans = search.choose_leans(lambda lean: 1.0)
    assert 0 < leans["medium"] <= leans["weak"]


# ---------------------------------------------------------------- controllers and searches

def test_the_way_through_a_maze_is_a_shortest_one():
    cells = [[1, 1, 1, 1, 1],
             [1, 0, 0, 0, 1],
             [1, 0, 1, 0, 1],
             [1, "g", 1, 0, 1],
             [1, 1, 1, 1, 1]]
    ways = controllers.steps_to(cells, (3, 1))
    cell, steps = (3, 3), 0
    while cell != (3, 1):
        cell, steps = ways[cell], steps + 1
        assert cells[cell[0]][cell[1]] != 1
    assert steps == 6
    assert (1, 0) not in ways


def test_the_gripper_is_moved_towards_the_goal():
    obs = np.zeros(16)
    obs[3:6], obs[6:9] = [0.1, 0, -0.1], [0, 0.1, 0]
    np.testing.assert_array_equal(np.sign(controllers.fetch_reach(obs)), [1, -1, -1, 0])


def test_a_block_is_pushed_from_behind():
    """The goal lies to the right of the block: right of it, the hand rises; left, it pushes."""
    obs = np.zeros(31)
    obs[3:6] = [0.3, 0, 0]
    obs[6:9] = [0.05, 0, 0]
    np.testing.assert_array_equal(controllers.fetch_push(obs), [0, 0, 1, 0])
    obs[6:9] = [-0.05, 0, 0]
    np.testing.assert_array_equal(controllers.fetch_push(obs), [1, 0, 0, 0])


def test_ars_climbs_on_any_environment():
    env = gymnasium.make("InvertedPendulum-v5")  # its reward is 1 a step that the pole stands
    settings = ars.Settings(8, 4, 0.05, 0.1, 12_000, 0, 6)
    *_, (_, policy) = ars.climb(env, settings, 0)
    rng = np.random.default_rng(0)
    total, _ = rollout(env, policy, rng, seed=1)
    uniform, _ = rollout(env, behaviors.Policy(policy.low, policy.high), rng, seed=1)
    assert total > 3 * uniform


def test_td3_learns_on_any_environment():
    env = gymnasium.make("Pendulum-v1")  # its time limit is the environment's own
    settings = td3.Settings(steps=260, discount=0.9, warmup=200, batch=16, every=2)
    found = list(td3.learn(env, settings, 10**6, 0))
    assert len(found) >= 3
    assert all(200 < steps <= 260 for steps, _ in found)
    action = found[-1][1](np.zeros(3), None)
    assert action.shape == (1,) and abs(action) <= 2


# ---------------------------------------------------------------- the data

@pytest.mark.parametrize("name", ["Reacher-v5", "InvertedPendulum-v5"])
def test_a_task_with_levels_of_its_own_is_the_same_in_the_suite(tmp_path, name):
    prepare.main(["suite", "--part", "switching", "--tasks", name, "--transitions", "200",
                  "--out", str(tmp_path / "suite")])
    prepare.build(tmp_path / "build", ["switching"], [name], 200)
    one, two = (Task(tmp_path / made / "switching" / name) for made in ("suite", "build"))
    assert one.meta == two.meta


@pytest.mark.parametrize("random, best, std, reference, sub_optimal", [
    (3, 3, 0, None, True),  # nothing better than random was found: there are no scores
    (3, 2900, 0, {"random": 3, "expert": 2900}, True),
    (3, 3100, 0, {"random": 3, "expert": 3100}, None),
    (3, 3100, 2440, {"random": 3, "expert": 3100}, None),  # 3097 is 2.007 of sqrt(2 std² / 5)
    (3, 3100, 2450, None, None),  # or is it luck?
    (0, 4e-56, 9e-56, None, True),  # a score of 1e51 is none
])
def test_what_is_no_expert_is_marked(monkeypatch, random, best, std, reference, sub_optimal):
    row = {"mean_return": str(best), "std_return": str(std), "episodes": "5", "success": ""}
    rows = {level: row for level in LEVELS}
    rows["random"] = {**row, "mean_return": str(random)}
    monkeypatch.setattr(suite, "measured", lambda task: rows)
    meta = suite.describe("Ant-v5", 0.99)
    assert meta["reference"] == reference
    assert meta.get("sub_optimal") == sub_optimal


def test_metaworld_s_goals_come_from_the_seed():
    pytest.importorskip("metaworld")
    env = envs.make(suite.environment("metaworld-reach"))
    goals = [env.reset(seed=seed)[0][-3:] for seed in (1, 2, 1)]
    assert not np.array_equal(goals[0], goals[1]) and goals[0].any()
    np.testing.assert_array_equal(goals[0], goals[2])
    assert env.spec.max_episode_steps == 500


def test_metaworld_is_built_and_its_script_succeeds(tmp_path):
    pytest.importorskip("metaworld")
    flags = "--tasks metaworld:1 --transitions 500 --out".split()
    prepare.main(["suite", *flags, str(tmp_path)])
    task = Task(tmp_path / "switching/metaworld-reach")
    prepare.verify([task])
    env = envs.make(task.meta)
    policies, _ = suite.policies_of("metaworld-reach", env)
    obs, _ = env.reset(seed=0)
    for _ in range(150):
        obs, *_, info = env.step(policies["expert"](obs, None))
    assert info["success"] == 1


@pytest.mark.parametrize("task, package", [
    ("metaworld-reach", "metaworld"),
    ("dm-humanoid_CMU-run", "shimmy"),
    ("FetchPushDense-v4", "gymnasium_robotics"),
])
def test_the_table_has_the_dimensions_of_the_environments(task, package):
    pytest.importorskip(package)
    meta = envs.describe(instruction="", **suite.environment(task))
    row = suite.TABLE[task]
    assert (meta["obs_dim"], meta["action_dim"]) == (int(row.obs_dim), int(row.action_dim))


# ---------------------------------------------------------------- studies.suite

@pytest.mark.parametrize("differences, p", [
    ([], 1.0),
    ([0, 0], 1.0),
    ([1, -1], 1.0),
    ([1, 2, 3], 0.25),
    ([0, 1, 2, 3, 4], 0.125),
    ([-1, -2, -3, -4, -5], 0.0625),
    ([-1, 2, 3, 4, 5, 6, 7, 8], 4 / 2**8),
    (range(1, 11), 2 / 2**10),
    (range(1, 21), 2 / 2**20),
    (range(1, 22), 6.0e-5),  # as tables of the normal approximation have it
])
def test_the_signed_rank_test_by_known_values(differences, p):
    assert signed_rank(differences) == pytest.approx(p, rel=0.01)


def test_the_signed_rank_test_with_shared_ranks_counts_all_signs():
    ranks = np.array([1.5, 1.5, 3.5, 3.5, 5, 6])  # of the sizes below
    signs = np.array(list(itertools.product((0, 1), repeat=6)))
    off = abs(signs @ ranks - ranks.sum() / 2)
    seen = abs(ranks[[0, 2, 3, 4, 5]].sum() - ranks.sum() / 2)
    assert signed_rank([1, -1, 2, 2, 3, 4]) == pytest.approx((off >= seen).mean())


@pytest.mark.parametrize("module", ["behaviors.search", "studies.suite"])
def test_an_unknown_task_is_one_line(module, tmp_path):
    words = [sys.executable, "-m", module, "--tasks", "metawrld"]
    if module == "studies.suite":
        words += ["--folder", str(tmp_path / "new")]
    ran = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert ran.returncode == 2 and "no such task or domain" in ran.stderr.splitlines()[-1]
    assert not (tmp_path / "new").exists()


def test_the_study_counts_the_tasks_where_one_is_above_another(tmp_path, capsys):
    table = suite_table(tmp_path)
    tasks = "Hopper-v5", "metaworld-push", "metaworld-reach", "metaworld-sweep"
    for algo, scores in ("bc", [0.1, 0.2, 0.9, ""]), ("pac", [0.3, 0.4, 0.5, ""]):
        for task, score in zip(tasks, scores):
            success = "" if task == "Hopper-v5" or score == "" else float(score > 0.5)
            table.append([{"domain": "all", "task": task, "algo": algo, "seed": 0,
                           "updates": 6000, "episodes": 1, "score": score, "success": success}])
    table.append([{"domain": "all", "task": tasks[0], "algo": "rwr", "seed": 0, "updates": 15000,
                   "episodes": 1, "score": 0.5, "success": ""}])  # is compared with no other
    table.append([{"domain": "all", "task": "dm-point_mass-hard", "algo": "pac", "seed": 0,
                   "updates": 6000, "episodes": 1, "score": 1e51, "success": ""}])  # has none now
    show(table)
    said = capsys.readouterr().out
    assert "| bc | 1 | 3 | 0.400 | 50% | 0 of 3 | 1 | 0 of 0 | 1 |" in said
    assert "| pac | 1 | 3 | 0.400 | 0% | 2 of 3 |" in said
    assert "all, 6,000 updates: gymnasium" in said
    assert "| pac | 1 | 1 | 0.300 |  | 1 of 1 | 1 | 0 of 0 |" in said
    assert "\nall, 15,000 updates\n" in said and "| rwr | 1 | 1 | 0.500 |  | 0 of 0 |" in said
    assert "all, 6,000 updates: metaworld" in said
    assert "| pac | 1 | 2 | 0.450 | 0% | 1 of 2 |" in said


def test_updates_are_a_flag_of_the_study(monkeypatch, capsys, tmp_path):
    """They are in its table's key; behind the -- they would be in none."""
    monkeypatch.setattr(sys, "argv", ["suite", "--folder", str(tmp_path), "--", "--steps", "20"])
    with pytest.raises(SystemExit) as ended:
        importlib.import_module("studies.suite").main()
    assert ended.value.code == 2 and "--steps behind the --" in capsys.readouterr().err


def test_what_weights_by_returns_weigh(tmp_path, capsys):
    """Returns of 0 but at an episode's last steps: these have all of the weight."""
    reward = np.zeros(10, np.float32)
    reward[-1] = 1
    episode = Episode(np.zeros((11, 2)), np.zeros((10, 1)), reward, True)
    append(tmp_path / "a", [episode] * 3, {**task_meta(), "discount": 0.5})
    print_weights(tmp_path)
    assert capsys.readouterr().out.splitlines()[-2:] == [
        "| a | step | 20% | 20% | 20% | 20% | 20% |", "| a | return | 0% | 0% | 0% | 0% | 100% |"]


def test_weights_of_no_data_are_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["suite", "--weights", str(tmp_path / "none")])
    with pytest.raises(SystemExit) as end:
        importlib.import_module("studies.suite").main()
    assert end.value.code == 2 and "none: no data set here" in capsys.readouterr().err


def test_a_model_of_many_tasks_is_updated():
    metas = metas_of(suite.chosen(["gymnasium:3", "metaworld:2", "dm_control:1"]))
    learner = Learner(tiny(metas), settings_for("bc"), metas, 10, "cpu")
    batch = random_batch(metas, 12)
    assert set(batch.task.tolist()) == set(range(6))
    metrics = learner.update(batch, None)
    assert np.isfinite(metrics["loss"].item())


def test_an_episode_ends_where_the_physics_breaks_down():
    class PhysicsError(RuntimeError):
        pass

    class Breaks(gymnasium.Env):
        observation_space = action_space = gymnasium.spaces.Box(-1, 1, (1,))
        steps = 0

        def reset(self, seed=None, options=None):
            return np.zeros(1), {}

        def step(self, action):
            self.steps += 1
            if self.steps == 2:
                raise PhysicsError("mjWARN_BADQACC")
            if self.steps == 3:
                raise KeyError("another fault")
            return np.ones(1), 0.5, False, False, {"a": 1}

    env = suite.Breakable(Breaks())
    env.reset(seed=0)
    assert env.step(None) == (1, 0.5, False, False, {"a": 1})
    assert env.step(None) == (1, 0.0, True, False, {})
    with pytest.raises(KeyError):
        env.step(None)


# ---------------------------------------------------------------- studies.ablations

def test_a_scalar_critic_is_one_at_every_size(monkeypatch):
    """A trial is `-- --size tiny`."""
    monkeypatch.setattr(model, "SIZES", copy.deepcopy(model.SIZES))
    ablations.two_atoms()
    assert {model.config_for(size, metas_of(["Hopper-v5"])).atoms for size in model.SIZES} == {2}


# ---------------------------------------------------------------- studies.peers

def test_a_specialist_is_played_at_each_mark_and_playing_takes_none_of_its_time(monkeypatch):
    now = [0.0]

    def fit():
        while True:
            now[0] += 8.0
            yield

    def play(algo, meta, seed):
        now[0] += 1000.0
        return now[0] / 10_000

    monkeypatch.setitem(sys.modules, "d3rlpy", types.SimpleNamespace(seed=lambda _: None))
    opened = []
    monkeypatch.setattr(peers.data, "Task",
                        lambda folder: opened.append(folder) or types.SimpleNamespace(meta={}))
    monkeypatch.setattr(peers, "training", lambda method, task: (None, fit()))
    monkeypatch.setattr(peers, "play", play)
    monkeypatch.setattr(peers.time, "monotonic", lambda: now[0])
    rows = peers.run((("beyond", "iql", 0, "Hopper-v5"), [5, 1]))
    assert [(row["minutes"], row["seconds"], row["updates"]) for row in rows] == [
        (1, 64.0, 800), (5, 304.0, 3800)]  # chunks of 100 updates, eight seconds each
    assert rows[0]["score"] == 0.1064 and rows[0]["part"] == "beyond"
    assert opened == ["datasets/beyond/Hopper-v5"]


# ---------------------------------------------------------------- studies.beyond

@pytest.fixture(scope="module")
def corridor(tmp_path_factory):
    """Two steps. The first, from (0, 0) to (1, 0), has no reward whatever is done; the data's are
    between -0.5 and 0. The second's reward is its action; those of the data are from 0 to 0.5."""
    folder, rng = tmp_path_factory.mktemp("corridor") / "walk", np.random.default_rng(0)
    obs = np.array([[0, 0], [1, 0], [1, 0]], np.float32)
    episodes = []
    for actions in rng.uniform([[-0.5], [0]], [[0], [0.5]], (2000, 2, 1)):
        episodes.append(Episode(obs, actions, np.array([0, actions[1, 0]]), terminated=True))
    append(folder, episodes, task_meta())
    return Task(folder)


def trained(way, task, monkeypatch):
    """A small Specialist, after 600 fast updates."""
    monkeypatch.setattr(beyond, "HIDDEN", 64)
    monkeypatch.setattr(beyond, "BATCH", 64)
    monkeypatch.setattr(beyond, "RATE", 3e-3)
    monkeypatch.setattr(beyond, "TARGET_RATE", 0.02)
    monkeypatch.setattr(beyond, "SIZE", "tiny")
    monkeypatch.setattr(beyond, "UPDATES", 600)
    learner = beyond.Specialist(dataclasses.replace(beyond.WAYS[way], strength=3.0), task, seed=0)
    rng = np.random.default_rng(0)
    for batch in learner.sampler.batches(itertools.repeat(rng, beyond.UPDATES)):
        learner.update(batch)
    return learner


@pytest.mark.parametrize("way, low, high", [("clone", 0.2, 0.3)] + [
    (way, 0.4, 1.0) for way in beyond.WAYS if way != "clone"])
def test_each_way_but_cloning_improves_on_the_data(corridor, monkeypatch, way, low, high):
    action = trained(way, corridor, monkeypatch).predict(np.array([[1, 0]], np.float32)).item()
    assert low <= action <= high


def test_weights_draw_a_clone_to_what_returned_more(corridor, monkeypatch):
    monkeypatch.setitem(beyond.WAYS, "rwr", beyond.Way("", improve="", focus=5.0))
    action = trained("rwr", corridor, monkeypatch).predict(np.array([[1, 0]], np.float32)).item()
    assert action > 0.4  # the mean is 0.25, the best 0.5


@pytest.mark.parametrize("way, looks", [("gradient", True), ("data", True), ("observed", False)])
def test_observed_returns_need_no_next_values(corridor, way, looks):
    learner = beyond.Specialist(beyond.WAYS[way], corridor, seed=0)
    batch = learner.sampler.sample(np.random.default_rng(0))
    obs, next_obs = learner.normalised(batch.obs[:, 0]), learner.normalised(batch.next_obs[:, 0])
    before = learner.critic_loss(batch, obs, next_obs)
    learner.target[1].last.bias[0] += 10.0
    assert (learner.critic_loss(batch, obs, next_obs) != before) == looks


@pytest.mark.parametrize("way, low, high", [
    ("gradient", 0.35, 0.5), ("data", 0.15, 0.3), ("observed", 0.15, 0.3)])
def test_the_critic_looks_forward_to_the_policys_actions_or_to_the_datas(
        corridor, monkeypatch, way, low, high):
    """The policy's second reward is near 0.5, the data's 0.25 on the mean; the discount is 0.9."""
    learner = trained(way, corridor, monkeypatch)
    obs = learner.normalised(torch.zeros(1, 2))
    q = learner.expected(learner.critic(obs, torch.full((1, 1, 1), -0.25))).item()
    assert low <= q * learner.range + learner.low <= high


@pytest.mark.parametrize("way, perceivers, trains",
                         [("own", 2, True), ("shared", 1, True), ("detached", 1, False)])
def test_the_actor_trains_the_latents_that_it_reads_unless_detached(corridor, way, perceivers,
                                                                    trains):
    learner = beyond.Specialist(beyond.WAYS[way], corridor, seed=0)
    for actor, critic in (learner.live, learner.target):
        assert len({id(actor.perceiver), id(critic.perceiver)}) == perceivers
    learner.actor_loss(torch.zeros(4, 2), torch.zeros(4, 1)).mean().backward()
    perceiver = learner.actor.perceiver
    assert perceiver.policy_query.grad is not None
    assert (perceiver.latents.grad is not None) == trains
    assert learner.critic.perceiver.action_encoder.weight.grad is None


def test_a_perceiver_has_no_critic_that_is_a_number(corridor):
    way = dataclasses.replace(beyond.WAYS["own"], scalar=True)
    with pytest.raises(ValueError, match="a distribution here"):
        beyond.Specialist(way, corridor, seed=0)


def test_a_perceiver_trains_at_the_learners_rate_and_a_long_gradient_is_cut(corridor):
    learner = beyond.Specialist(beyond.WAYS["detached"], corridor, seed=0)
    batch = learner.sampler.sample(np.random.default_rng(0))
    for _ in range(2):
        learner.update(batch)
    rate = LossSettings.learning_rate * schedule(1, beyond.UPDATES)
    assert learner.optimizer.param_groups[0]["lr"] == rate == pytest.approx(3e-5)
    for weight in learner.weights:
        weight.grad = torch.full_like(weight, 10.0)
    learner.as_pac_trains()
    norm = torch.stack([weight.grad.norm() for weight in learner.weights]).norm()
    assert norm.item() == pytest.approx(LossSettings.max_grad_norm, rel=1e-4)


def test_work_in_processes_comes_as_it_ends_and_ctrl_c_is_one_line():
    """Each process is new, and sleeps as long as its job says."""
    program = ("import time; from studies.runs import in_processes\n"
               "if __name__ == '__main__':\n"
               "    for number in in_processes(2, abs, [-3, -4]): print(number, flush=True)\n"
               "    list(in_processes(2, time.sleep, [60, 60]))\n")
    process = subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                               start_new_session=True)
    assert sorted(process.stdout.readline() + process.stdout.readline()) == ["\n", "\n", "3", "4"]
    time.sleep(2)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    _, error = process.communicate(timeout=30)
    assert process.returncode == 130
    assert error == f"{runs.GOES_ON}\n"


# ---------------------------------------------------------------- tables of all studies

STUDIES = ("ablations", "beyond", "ladder", "peers", "pixels", "quality", "suite", "words")


@pytest.mark.parametrize("name", STUDIES)
def test_a_table_without_rows_is_named_and_no_figure_drawn(tmp_path, monkeypatch, name):
    monkeypatch.setattr(sys, "argv", [name, "--table", "--folder", str(tmp_path / "new")])
    with pytest.raises(SystemExit, match="new/.*csv has no row yet: run this without --table"):
        importlib.import_module(f"studies.{name}").main()
    assert not (tmp_path / "new").exists()


def test_the_old_merit_is_a_flag_of_a_runs_name(tmp_path, monkeypatch):
    """`pac_return` is `pac` with --merit return, and keeps a name of its own in the table."""
    asked = []
    summary = {"iqm": 1.0, "episodes": 2, "failed": [], "tasks": {"a": {"score": 1.0}}}
    monkeypatch.setattr(runs, "result_of", lambda path, command: asked.append(command) or summary)
    monkeypatch.setattr(Table, "keep_config", lambda *_: None)
    table = ladder.study1(tmp_path)
    for algo in ("pac_return", "pac"):
        job = "switching", algo, 0
        runs.train(table, job, runs.flags_of(job, tmp_path, []))
    old, new = [list(map(str, command)) for command in asked]
    assert old[old.index("--algo") + 1] == new[new.index("--algo") + 1] == "pac"
    assert old[old.index("--merit") + 1] == "return" and "--merit" not in new
    assert [row["algo"] for row in table.rows()] == ["pac_return", "pac"]


def test_a_table_shows_the_mean_of_seeds_over_tasks_beside_the_iqm(capsys):
    runs.print_scores({"pac": np.array([[0.0, 1.0, 1.0, 1.0], [0.4, 1.0, 1.0, 1.0]])}, "abcd")
    said = capsys.readouterr().out
    assert "| a | 0.20 ± 0.20 |" in said and "| **IQM** | **1.000** [1.000, 1.000] |" in said
    assert said.endswith("| mean over tasks | 0.800 ± 0.050 |\n")


def test_a_long_part_is_a_default_part_with_returns_of_a_longer_horizon(tmp_path, monkeypatch):
    built, ran = [], []
    monkeypatch.setattr(runs.prepare, "build", lambda *args, **more: built.append((args, more)))
    monkeypatch.setattr(ladder, "train", lambda table, job, flags, *_: ran.append(
        (job, flags[flags.index("--data") + 1])))
    monkeypatch.setattr(sys, "argv", ["ladder", "--folder", str(tmp_path), "--seeds", "0", "--part",
                                      "long-levels", "unseen", "--algo", "bc", "rwr", "pac"])
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="no row yet"):
        ladder.main()
    long, unseen = Path("datasets/long"), Path("datasets/unseen")
    assert built == [((long, ["levels"], behaviors.TASKS, 300_000), {"discount": 0.997}),
                     ((unseen, ["switching"], behaviors.UNSEEN, 300_000), {"discount": 0.99})]
    assert [job[:2] for job, data in ran if data == long / "levels"] == [
        ("long-levels", "rwr"), ("long-levels", "pac")]  # cloning sees no returns
    assert [job[:2] for job, data in ran if data == unseen / "switching"] == [
        ("unseen", "bc"), ("unseen", "rwr"), ("unseen", "pac")]


def test_a_study_refuses_data_by_another_discount_and_less_data(small_data, capsys):
    """The rows would come among the others, and be of other returns."""
    tasks = ("Hopper-v5", "Reacher-v5")
    runs.need_data(small_data, tasks, 2_000)
    for more, said in (((2_000, 0.995), "with a discount of 0.99 and not 0.995"),
                       ((300_000,), "and not 300,000")):
        with pytest.raises(SystemExit) as stopped:
            runs.need_data(small_data, tasks, *more)
        assert stopped.value.code == 2
        assert said in capsys.readouterr().err


def test_a_run_that_lacks_its_other_rows_is_made_again_and_no_row_twice(tmp_path, monkeypatch):
    """bc and rwr are played by two ways; a table may have the rows of the first alone."""
    scores = {"eval.json": 0.5, "eval-sharpened.json": 0.6}
    monkeypatch.setattr(runs, "result_of", lambda path, _: {
        "iqm": 1.0, "episodes": 2, "failed": [], "tasks": {"a": {"score": scores[path.name]}}})
    monkeypatch.setattr(Table, "keep_config", lambda *_: None)
    table = ladder.study1(tmp_path)
    table.append([{"part": "levels", "algo": algo, "seed": 0, "task": "a", "score": 0.4}
                  for algo in ("bc", "rwr", "rwr-sharpened", "pac")])
    jobs = [("levels", algo, 0) for algo in ("bc", "rwr", "pac", "one_step")]
    flags = lambda job: runs.flags_of(job, tmp_path, [])
    left = runs.unfinished(table, jobs, flags, [], runs.OTHER_ACTS)
    assert left == [("levels", "bc", 0), ("levels", "one_step", 0)]
    runs.train(table, left[0], flags(left[0]), "sharpened")
    rows = [(row["algo"], row["score"]) for row in table.rows()]
    assert rows == [("bc", 0.4), ("rwr", 0.4), ("rwr-sharpened", 0.4), ("pac", 0.4),
                    ("bc-sharpened", 0.6)]


@pytest.mark.parametrize("flags, said", [
    ("--size tiny --steps 20", None),
    ("--size tiny --steps 20 --threads 2 --save-every 5", None),  # how, not what, is computed
    ("--size tiny --steps 20 --merit step", None),  # a kept config of before that flag
    ("--size tiny --steps 30", "has rows of levels-pac-0 by steps 20, and not 30"),
    ("--size small --steps 20", "by size tiny, and not small"),
    ("", "by size tiny, and not small"),  # as the study itself has it
    ("--size tiny", "by steps 20, and not 600"),
    ("--size tiny --steps 20 --eta 3", "by eta 2.0, and not 3.0"),
    ("--size tiny --steps 20 --episodes 1", "by episodes 20, and not 1"),
    ("--algo bc", "--algo behind the -- is what the study gives"),
    ("--data datasets/own", "--data behind the -- is what the study gives"),
    ("--seed 5", "--seed behind the -- is what the study gives"),
])
@pytest.mark.parametrize("seed", [0, 2])  # another seed would be averaged with it
def test_rows_by_other_flags_are_not_taken_for_these(tmp_path, capsys, flags, said, seed):
    table = ladder.study1(tmp_path)
    train = TrainConfig(size="tiny", steps=20, episodes=20, data=["datasets/levels"])
    settings = dataclasses.asdict(settings_for("pac"))
    del settings["merit"]
    config = {"train": dataclasses.asdict(train), "settings": settings}
    table.append([{"part": "levels", "algo": "pac", "seed": 0, "task": "a", "score": 0.4}])
    table.configs.write_text(json.dumps({"levels-pac-0": config}))
    jobs = [("levels", "pac", seed), ("levels", "bc", 0)]
    flags = flags.split()
    with pytest.raises(SystemExit) if said else nullcontext() as ended:
        left = runs.unfinished(table, jobs,
                               lambda job: runs.flags_of(job, "datasets/levels", flags), flags)
        assert left == (jobs[1:] if seed == 0 else jobs)
    error = capsys.readouterr().err
    if said:
        assert ended.value.code == 2 and said in error and error.count("\n") == 1


def test_a_setting_that_changes_nothing_is_no_difference():
    """eta had another default once, and a clone has no use for it."""
    config = {"train": {}, "settings": dataclasses.asdict(settings_for("bc", eta=1.0))}
    assert runs.differences(config, parse_args(["--algo", "bc"])) == {}
    config["settings"]["learning_rate"] = 1.0
    assert runs.differences(config, parse_args(["--algo", "bc"])) == {"learning_rate": (1.0, 3e-3)}


def test_rows_without_a_kept_config_are_not_taken_for_a_trials(tmp_path, capsys):
    table = ladder.study1(tmp_path)
    table.append([{"part": "levels", "algo": "pac", "seed": 0, "task": "a", "score": 0.4}])
    jobs, flags = [("levels", "pac", 0)], lambda job: []
    assert runs.unfinished(table, jobs, flags, []) == []
    with pytest.raises(SystemExit):
        runs.unfinished(table, jobs, flags, ["--size", "tiny"])
    assert "rows of levels-pac-0 whose settings were not kept" in capsys.readouterr().err


def test_rows_of_study_1_bring_their_config_along(tmp_path):
    quality = importlib.import_module("studies.quality")
    source = ladder.study1(tmp_path)
    source.append([{"part": "levels", "algo": "bc", "seed": 0, "task": "a", "score": 0.4}])
    source.configs.write_text(json.dumps({"levels-bc-0": {"train": {"steps": 3}, "settings": {}}}))
    table = Table("study3", ("expert_share", "algo", "seed", "task", "score"),
                  ("expert_share", "algo", "seed"), tmp_path)
    quality.copy_of_study1(table, [("0.1", "bc", 0), ("0.5", "bc", 0)], tmp_path)
    assert [row["expert_share"] for row in table.rows()] == ["0.1"]
    assert table.kept_configs() == {"0.1-bc-0": {"train": {"steps": 3}, "settings": {}}}


def test_what_an_ablation_sets_is_set_last():
    flags = ablations.flags_of("eta", "switching", 0, ["--eta", "7"])
    assert flags[-2:] == ["--eta", 1e6]


@pytest.mark.parametrize("module, job, name", [
    ("ablations", ("2026-11-27", "switching", "eta", 0), "2026-11-27-switching-eta-0"),
    ("words", ("pac, focus 0", 0), "pac-focus-0-0")])
def test_a_table_of_other_columns_tells_rows_by_other_flags_too(module, job, name, tmp_path, capsys,
                                                               monkeypatch):
    """Their keys are no (group, algorithm, seed)."""
    study = importlib.import_module(f"studies.{module}")
    key = study.KEY if module == "ablations" else ("algo", "seed")
    table = Table(module, study.COLUMNS, key, tmp_path)
    table.append([dict(zip(key, job)) | {"task": "a", "told": "own", "words": "go", "score": 0.5}])
    config = {"train": {"steps": 5000}, "settings": {}}
    table.configs.write_text(json.dumps({name: config}))
    monkeypatch.setattr(study, "need_data", lambda *_, **__: None, raising=False)
    only = ["--only", "eta"] if module == "ablations" else ["--algo", "pac, focus 0"]
    monkeypatch.setattr(sys, "argv", [module, "--folder", str(tmp_path), *only, "--seeds", "0",
                                      "--", "--steps", "20"])
    with pytest.raises(SystemExit) as ended:
        study.main()
    assert ended.value.code == 2
    assert f"rows of {name} by steps 5000, and not 20" in capsys.readouterr().err


def test_a_task_without_a_reference_has_a_row_and_no_score(tmp_path, capsys):
    table = suite_table(tmp_path)
    tasks = {"Hopper-v5": {"score": 0.5}, "dm-lqr-lqr_2_1": {"score": None}}
    summary = {"iqm": 0.5, "episodes": 2, "failed": ["one"], "tasks": tasks}
    table.append(runs.rows_of(summary, table, ("all", "pac", 0, 10)))
    assert [row["score"] for row in table.rows()] == [0.5, None]
    assert "IQM 0.500, episodes failed: 1" in capsys.readouterr().out
    summary = {"iqm": None, "episodes": 2, "failed": [], "tasks": {"b": {"score": None}}}
    table.append(runs.rows_of(summary, table, ("all", "pac", 1, 10)))
    assert table.rows()[-1]["score"] is None


@pytest.mark.parametrize("code, said", [
    (0, None), (3, None), (2, "has failed; .*log says why"), (1, "has failed; .*log says why"),
    (130, "was stopped"), (143, "was stopped")])
def test_a_study_goes_on_after_failed_episodes_alone(tmp_path, code, said):
    """Exit code 3: the run was trained, and some episodes of its evaluation failed."""
    with pytest.raises(RunError, match=said) if said else nullcontext():
        runs.call(["-c", f"raise SystemExit({code})"], tmp_path / "log")


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_a_run_that_a_signal_has_ended_was_stopped(tmp_path, name):
    code = f"import os, signal; signal.signal(signal.{name}, signal.SIG_DFL); "
    with pytest.raises(RunError, match="was stopped"):
        runs.call(["-c", code + f"os.kill(os.getpid(), signal.{name})"], tmp_path / "log")


def test_ctrl_c_starts_no_other_run_and_waits_for_those_in_hand():
    """It is pressed twice, as people do."""
    code = """if True:
        import os, signal, time
        from studies import runs

        def work(job):
            for _ in range(2):
                os.kill(os.getpid(), signal.SIGINT)
                time.sleep(0.5)
            print("saved", job)

        runs.at_a_time(1, work, [0, 1, 2])
    """
    ran = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert ran.returncode == 130
    assert ran.stdout == "3 runs, 1 at a time\nsaved 0\n"
    assert ran.stderr == "stopped: the study goes on when it is started again\n"


def test_a_run_that_fails_stops_no_other_and_the_command_ends_with_2(capsys):
    seen = []

    def work(job):
        if job == 1:
            raise RunError("a run has failed")
        seen.append(job)

    with pytest.raises(SystemExit) as ended:
        runs.at_a_time(1, work, [0, 1, 2])
    assert ended.value.code == 2 and seen == [0, 2]
    assert capsys.readouterr().err == "a run has failed\n"


def test_a_command_that_leaves_no_result_is_named(tmp_path):
    with pytest.raises(RunError, match="a run has left no .*eval.json of its last update; .*run.log says"):
        runs.result_of(tmp_path / "run/eval.json", ["-c", "pass"])


def three_rows(table):
    table.append({"part": "levels", "algo": "pac", "seed": seed, "task": "a", "episodes": 1,
                  "score": 0.25} for seed in (0, 1, 2))
    return table.path.read_text()


@pytest.mark.parametrize("damage, line", [
    (lambda text: text[:-8], 4),  # a cell is missing
    (lambda text: text[:-2], 4),  # 0.2 for 0.25
    (lambda text: text[:7], 1),
    (lambda text: text + text, 5),  # the head again
    (lambda text: text + text.splitlines()[1] + "\n", 5),
    (lambda text: text + text.splitlines()[1].replace("0.25", "0.75") + "\n", 5),
    (lambda text: text.replace("pac,1,a", "pac,1,a,a"), 3),
    (lambda text: text.replace("0.25", "0,25"), 2),
    (lambda text: text.replace("pac,1,a", "pac,one,a"), 3)])
def test_a_table_that_is_not_whole_is_named_and_neither_shown_nor_added_to(tmp_path, capsys, damage,
                                                                          line):
    table = ladder.study1(tmp_path)
    damaged = damage(three_rows(table))
    table.path.write_text(damaged)
    for use in (table.need_rows, lambda: table.missing([]), table.rows):
        with pytest.raises(SystemExit) as ended:
            use()
        assert ended.value.code == 2
        assert f"study1.csv, line {line}: it is cut off, or" in capsys.readouterr().err
    assert table.path.read_text() == damaged


def test_a_kill_while_a_row_is_added_leaves_the_table_as_it_was(tmp_path, monkeypatch):
    table = ladder.study1(tmp_path)
    text = three_rows(table)

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        table.append([{"part": "beyond", "algo": "pac", "seed": 0, "task": "a"}])
    assert table.path.read_text() == text


def test_studies_that_end_at_once_lose_none_of_the_others_rows(tmp_path):
    """Four processes, each with a table of its own on one file; and each adds its row twice."""
    code = ("import sys; from pathlib import Path; from studies import ladder\n"
            "table = ladder.study1(Path(sys.argv[1]))\n"
            "for score in (0.5, 0.75):\n"
            "    table.append([dict(part='levels', algo='pac', seed=int(sys.argv[2]), task='a',\n"
            "                       episodes=1, score=score)])\n"
            "table.put_config(sys.argv[2], {})\n")
    started = [subprocess.Popen([sys.executable, "-c", code, tmp_path, str(seed)], cwd=ROOT)
               for seed in range(4)]
    assert [process.wait() for process in started] == [0] * 4
    table = ladder.study1(tmp_path)
    assert sorted((row["seed"], row["score"]) for row in table.rows()) == [
        (seed, 0.5) for seed in range(4)]
    assert sorted(table.kept_configs()) == ["0", "1", "2", "3"]


def test_a_look_at_a_run_on_its_way_is_not_its_result(tmp_path):
    """Nor is one of fewer episodes; the command is run for what is asked."""
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.json").write_text(json.dumps({
        "format": FORMAT, "algo": "pac", "settings": {}, "model": {}, "tasks": [],
        "train": {"steps": 400, "episodes": 20}}))

    def evaluation(updates, episodes):
        return json.dumps({"checkpoint": f"{updates:09d}", "episodes": episodes})

    path = run / "eval.json"
    command = ["-c", f"open({str(path)!r}, 'w').write({evaluation(400, 20)!r})"]
    for updates, episodes in ((82, 20), (400, 1)):
        path.write_text(evaluation(updates, episodes))
        with pytest.raises(RunError, match="has left no .*eval.json of its last update"):
            runs.result_of(path, ["-c", "pass"])
        assert runs.result_of(path, command)["episodes"] == 20
    path.write_text(evaluation(400, 50))
    assert runs.result_of(path, ["-c", "1 / 0"])["episodes"] == 50  # not run


def test_a_runs_folder_of_another_recipe_is_not_taken_for_this_one(tmp_path):
    run = tmp_path / "runs/study1/switching-pac-0"
    run.mkdir(parents=True)
    config = dict.fromkeys(("algo", "model", "tasks"), {})
    made = TrainConfig(seed=3, steps=10_000, out=str(run), eval_every=0, threads=1)
    config |= {"format": FORMAT, "settings": dataclasses.asdict(settings_for("pac")),
               "train": dataclasses.asdict(made)}
    (run / "config.json").write_text(json.dumps(config))
    same = ["--algo", "pac", "--seed", 3]
    assert runs.start_or_resume(run, same) == ["--resume", run]
    assert runs.start_or_resume(run, [*same, "--steps", 10_000]) == ["--resume", run]
    for flags in (["--eta", 3.0], ["--merit", "return"], ["--steps", 20], ["--size", "tiny"],
                  ["--seed", 4], ["--tasks", "Hopper-v5"], ["--data", "datasets/levels"]):
        with pytest.raises(RunError, match=f"{run} is of another recipe than `--algo pac --"):
            runs.start_or_resume(run, [*same, *flags])
