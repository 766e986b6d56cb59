"""What users of this field's software reported, tried on ours: scores, flags and runs.

Each kind of report has a test of the right outcome, mostly with more than one case. Those of data
sets are in test_reports.py.
"""

import dataclasses
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.spaces import Box

import checkpoint
import data
import envs
import eval as evaluation
import parallel
import plots
import prepare
import train
from checkpoint import RunError, checkpoints, find_checkpoint, read_config
from envs import Play
from eval import rollout, summarise
from learner import ALGORITHMS, LossSettings, settings_for
from tests.conftest import numbered, task_meta
from tests.test_checkpoint import in_child
from tests.test_durable import at_update, kill
from tests.test_train import log, refused, tensors

ROOT = Path(__file__).parent.parent


# ---------------------------------------------------------------- environments with one oddity each

class Odd(gymnasium.Env):
    """20 steps of three numbers; `odd` says what is odd about it. Its start is its own seed's, its
    rewards come from the global generators."""
    metadata = {"render_modes": ["rgb_array"]}
    observation_space = Box(-np.inf, np.inf, (3,), np.float32)
    action_space = Box(-1, 1, (2,), np.float32)
    alive = most = 0

    def __init__(self, odd="", render_mode=None):
        self.odd, self.render_mode = odd, render_mode
        Odd.alive += 1
        Odd.most = max(Odd.most, Odd.alive)

    def close(self):
        Odd.alive -= 1
        if self.odd == "close":
            raise OSError("closed twice")

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        self.steps, self.start = 0, self.np_random.normal()
        return self.obs(), {}

    def obs(self):
        obs = np.array([self.start, self.steps / 20, 0.5], np.float32)
        others = {"short": obs[:2], "long": np.append(obs, 7), "nested": obs[None], "text": "left",
                  "nan observation": obs * np.nan, "list": obs.tolist(),
                  "tensor": torch.tensor(obs), "float64": obs.astype(np.float64),
                  "big endian": obs.astype(">f4")}
        return others.get(self.odd, obs)

    def step(self, action):
        self.steps += 1
        reward = random.random() + np.random.random()
        others = {"nan": np.nan, "infinite": np.inf, "too large": 1e38, "an array": np.ones(1),
                  "two rewards": np.ones(2)}
        if self.steps > 5:
            reward = others.get(self.odd, reward)
        info = {"success": self.steps == 3} if self.odd == "success" else {}
        if self.odd == "success is rare" and self.steps == 3 and self.start > 0:
            info = {"is_success": True}
        return self.obs(), reward, False, self.steps == 20, info

    def render(self):
        if self.odd in UNSEEN:
            return UNSEEN[self.odd][0]
        size = 16 if self.odd == "small" else 32
        return np.full((size, size, 3), self.steps, np.uint8)


# What render() gives that is no picture, and what is said of it.
UNSEEN = {"nothing": (None, "NoneType"), "a list": ([[[0, 0, 0]]], "list"),
          "grey": (np.zeros((8, 8), np.uint8), "uint8 of shape (8, 8)"),
          "transparent": (np.zeros((8, 8, 4), np.uint8), "uint8 of shape (8, 8, 4)"),
          "floats": (np.zeros((8, 8, 3)), "float64 of shape (8, 8, 3)")}

gymnasium.register("Odd-v0", Odd)
REFERENCE = {"random": 0.0, "expert": 40.0}


def write(folder, reference=REFERENCE, number=0):
    """A task of four episodes of Odd-v0."""
    rng = np.random.default_rng(number)
    episodes = [data.Episode(rng.normal(size=(21, 3)), rng.uniform(-1, 1, (20, 2)),
                             rng.random(20), False) for _ in range(4)]
    data.append(folder, episodes, envs.describe("Odd-v0", "go", 0.9, reference))


FLAGS = ["--size", "tiny", "--algo", "bc", "--batch-size", "8", "--eval-every", "0", "--episodes",
         "0", "--log-every", "2", "--save-every", "2", "--no-verify"]


def run(out, *flags, steps=4, folder=None):
    folder = folder or out.parent / "own"
    if not folder.exists():
        write(folder / "a")
        write(folder / "b")
    train.main([*FLAGS, "--data", str(folder), "--steps", str(steps), "--out", str(out),
                *map(str, flags)])


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    out = tmp_path_factory.mktemp("made") / "run"
    run(out)
    return out


@pytest.fixture
def trained(made, tmp_path):
    """The folder of a run of two tasks, a and b, with the data beside it."""
    shutil.copytree(made.parent, tmp_path, dirs_exist_ok=True)
    return tmp_path / "run"


@pytest.fixture
def oddity(monkeypatch):
    """Call it with what is odd about task a; b is sound."""
    def change(odd, tasks="a"):
        monkeypatch.setattr(envs, "make", lambda meta, render=False:
                            Odd(odd if meta.get("name", "-") in tasks else "", "rgb_array"))
    return change


def score(*flags):
    """python eval.py FLAGS, in this process -> its exit code"""
    try:
        evaluation.main(evaluation.parse_args([str(flag) for flag in flags]))
    except SystemExit as end:
        return end.code
    return 0


def strict(path):
    """What a file of strict JSON holds: no NaN, no Infinity."""
    def refuse(constant):
        raise AssertionError(f"{path} holds {constant}")
    return json.loads(path.read_text(), parse_constant=refuse)


@pytest.fixture(autouse=True)
def no_curve(monkeypatch):
    """To draw it takes most of the time of a run this short."""
    monkeypatch.setattr(train, "curve", lambda run: None)


# ---------------------------------------------------------------- scores: episodes that failed

@pytest.mark.parametrize("odd, said", [
    ("nan", "step 6: ValueError: the return is nan"),
    ("infinite", "step 6: ValueError: the return is inf"),
    ("too large", "the return is 4"),
    ("two rewards", "ValueError"),
    ("short", "step 0: ValueError: an observation of shape (2,)"),
    ("long", "an observation of shape (4,)"),
    ("nested", "an observation of shape (1, 3)"),
    ("nan observation", "with 0 finite numbers"),
    ("text", "ValueError"),
])
def test_what_is_no_number_costs_its_own_episodes(trained, oddity, capsys, odd, said):
    oddity(odd)
    assert score(trained, "--episodes", 2) == 3
    assert said in capsys.readouterr().out
    summary = strict(trained / "eval.json")
    assert len(summary["failed"]) == 2 and list(summary["tasks"]) == ["b"]
    assert summary["iqm"] == pytest.approx(summary["tasks"]["b"]["score"])


@pytest.mark.parametrize("odd", ["list", "tensor", "float64", "big endian", "an array", "close"])
def test_numbers_in_another_form_are_numbers(trained, oddity, odd):
    oddity(odd)
    assert score(trained, "--episodes", 2) == 0
    assert 5 < strict(trained / "eval.json")["tasks"]["a"]["return"] < 40


def test_where_every_episode_fails_there_is_no_iqm(trained, oddity, capsys):
    oddity("nan", "ab")
    assert score(trained, "--episodes", 1) == 3
    assert strict(trained / "eval.json")["iqm"] is None
    assert "IQM over tasks" in capsys.readouterr().out


def test_a_log_holds_no_bare_nan(tmp_path):
    one = checkpoint.Log(tmp_path, 0, None)
    one.write(1, {"eval/iqm": float("nan"), "loss": 0.5})
    one.file.close()
    line = strict(tmp_path / "metrics.jsonl")
    assert line["eval/iqm"] is None and line["loss"] == 0.5


def test_training_goes_on_where_evaluations_on_the_way_fail(tmp_path, oddity):
    oddity("nan", "ab")
    with pytest.raises(SystemExit) as end:
        run(tmp_path / "run", "--eval-every", 2, "--episodes", 1)
    assert end.value.code == 3
    plots.curve(tmp_path / "run")
    assert log(tmp_path / "run")[0]["eval/failed"] == 6


# ---------------------------------------------------------------- scores: what is counted

def played(index, reference, *returns):
    meta = {"name": "abc"[index], "action_low": [-1.0], "action_high": [1.0],
            "reference": reference}
    plays = [Play(index, number, meta, False, False) for number in range(len(returns))]
    for play, total in zip(plays, returns):
        play.reward, play.total = [total], total
    return plays


def test_scores_and_returns_never_meet_in_one_iqm():
    summary = summarise([*played(0, REFERENCE, 20.0, 20.0), *played(1, None, 3000.0, 3100.0)])
    assert summary["iqm"] == pytest.approx(0.5)
    assert summary["tasks"]["b"]["score"] is None
    assert 3000 <= summary["tasks"]["b"]["interval"][0] <= 3100
    alone = summarise(played(0, None, 3000.0, 3100.0))
    assert alone["iqm"] is None and "3050.0" in evaluation.table(alone)


def test_one_episode_has_no_interval():
    summary = summarise(played(0, REFERENCE, 20.0))
    assert summary["interval"] is None and summary["tasks"]["a"]["interval"] is None
    assert "[" not in evaluation.table(summary)


def test_success_at_any_step_is_counted(trained, oddity, capsys):
    oddity("success")
    assert score(trained, "--episodes", 2) == 0
    tasks = strict(trained / "eval.json")["tasks"]
    assert tasks["a"]["success"] == 1 and "success" not in tasks["b"]
    assert "success 100%" in capsys.readouterr().out


def test_an_episode_that_says_nothing_of_success_has_failed(trained, oddity):
    """Where others speak of it: many environments do when they succeed, and only then."""
    oddity("success is rare")
    score(trained, "--episodes", 12, "--record", trained.parent / "new")
    starts = [episode.obs[0, 0] for episode in data.Task(trained.parent / "new/a")]
    assert 0 < np.mean(np.array(starts) > 0) < 1
    success = strict(trained / "eval.json")["tasks"]["a"]["success"]
    assert success == pytest.approx(np.mean(np.array(starts) > 0))


@pytest.fixture
def model_and_metas(trained, oddity):
    oddity("")
    model, config = checkpoint.load_run(trained)
    return model, config["tasks"]


def test_more_episodes_do_not_change_the_first_ones(model_and_metas):
    """Nor do other tasks: neither starts, nor draws, nor what is drawn from global generators."""
    few, many = (rollout(*model_and_metas, count, 1, "sample", keep=True) for count in (2, 5))
    alone = rollout(model_and_metas[0], [None, model_and_metas[1][1]], 2, 1, "sample", keep=True)
    for one, same in [*zip(few[:2], many[:2]), *zip(few[2:], many[5:7]), *zip(few[2:], alone)]:
        assert one.reward == same.reward
        np.testing.assert_array_equal(one.obs, same.obs)
        np.testing.assert_allclose(one.action, same.action, atol=1e-4)
    assert len({play.total for play in many}) == 10


def test_so_many_environments_live_at_once_and_no_more(model_and_metas, monkeypatch):
    whole = [play.total for play in rollout(*model_and_metas, 4, 1, "mean")]
    Odd.alive = Odd.most = 0
    monkeypatch.setattr(evaluation, "ALIVE", 3)
    assert [play.total for play in rollout(*model_and_metas, 4, 1, "mean")] == whole
    assert (Odd.alive, Odd.most) == (0, 3)


def test_recorded_twice_are_other_episodes(trained, oddity, tmp_path):
    oddity("")
    for count in (3, 2):
        flags = ["--episodes", count, "--tasks", "a", "--record", tmp_path / "new"]
        assert score(trained, *flags) == 0
    task = data.Task(tmp_path / "new/a")
    assert len(set(task.episodes["checksum"].tolist())) == 5


def test_two_that_record_at_once_do_not_leave_the_same_episodes_twice(trained, oddity, tmp_path,
                                                                      monkeypatch, capsys):
    oddity("")
    flags = [trained, "--episodes", 2, "--tasks", "a", "--record", tmp_path / "new"]
    play = evaluation.rollout

    def while_another_records(*args, **kwargs):
        monkeypatch.setattr(evaluation, "rollout", play)
        assert score(*flags) == 0
        return play(*args, **kwargs)

    monkeypatch.setattr(evaluation, "rollout", while_another_records)
    assert score(*flags) == 2
    assert "another process has recorded here meanwhile" in capsys.readouterr().err
    assert len(data.Task(tmp_path / "new/a").episodes) == 2


# ---------------------------------------------------------------- scores: what is written

def test_eval_json_is_replaced_by_a_full_evaluation_alone(trained, oddity, tmp_path):
    oddity("")
    score(trained, "--episodes", 4)
    full = (trained / "eval.json").read_text()
    for flags in (["--episodes", 1], ["--episodes", 1, "--tasks", "a", "--act", "sample"],
                  ["--episodes", 4, "--act", "mode"], ["--episodes", 5, "--tasks", *["a"] * 60],
                  ["--episodes", 1, "--video", tmp_path / "v.gif"]):
        assert score(trained, *flags) == 0
        assert (trained / "eval.json").read_text() == full, flags
    oddity("nan")
    assert score(trained, "--episodes", 4) == 3  # half of it failed
    assert (trained / "eval.json").read_text() == full
    oddity("")
    train.main(["--resume", str(trained), "--episodes", "2"])  # nothing is left to train
    assert (trained / "eval.json").read_text() == full
    train.main(["--resume", str(trained), "--episodes", "2", "--steps", "6"])  # another checkpoint
    assert strict(trained / "eval.json")["checkpoint"] == "000000006"


@pytest.mark.parametrize("error", [PermissionError(13, "Permission denied"),
                                   OSError(30, "Read-only file system")])
def test_a_run_that_may_only_be_read_is_scored(trained, oddity, monkeypatch, capsys, error):
    def refuse(*_):
        raise error
    oddity("")
    monkeypatch.setattr(data, "write_file", refuse)
    assert score(trained, "--episodes", 1) == 0
    printed = capsys.readouterr().out
    assert "IQM over tasks" in printed and error.strerror in printed


def test_runs_of_the_same_name_are_compared(trained, oddity, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder in ("seed0", "seed1"):
        shutil.copytree(trained, tmp_path / folder / "bc")
    oddity("")
    seen = {}
    monkeypatch.setattr(evaluation.plots, "compare",
                        lambda methods, names, *_, **__: seen.update(methods, names=names))
    write(tmp_path / "other/c")
    run(tmp_path / "third", folder=tmp_path / "other")
    assert score("seed0/bc", "seed1/bc/", "third", "--episodes", 2) == 0
    assert seen.pop("names") == ["a", "b", "c", "IQM over a run's own tasks"]
    assert list(seen) == ["seed0/bc", "seed1/bc", "third"]
    assert [bool(point) for point in seen["third"]] == [False, False, True, True]


@pytest.mark.parametrize("reference", [REFERENCE, None])
def test_the_comparison_is_drawn_and_its_exit_code_is_of_all_runs(trained, oddity, tmp_path,
                                                                  reference):
    write(tmp_path / "other/c", reference)
    run(tmp_path / "second", folder=tmp_path / "other")
    figure = tmp_path / "figure.png"
    oddity("nan")
    assert score(trained, tmp_path / "second", "--episodes", 1, "--plot", figure) == 3
    assert figure.stat().st_size > 5_000
    assert score(tmp_path / "nowhere", tmp_path / "second", "--episodes", 1, "--plot", figure) == 2


def test_figures_of_runs_without_references_are_of_returns(trained, oddity, tmp_path,
                                                            monkeypatch):
    oddity("")
    write(tmp_path / "other/c", None)
    run(tmp_path / "second", "--eval-every", 2, folder=tmp_path / "other")
    drawn = []
    monkeypatch.setattr(plots, "draw_metric", lambda ax, lines, name, *_, **__: drawn.append(name))
    plots.curve(tmp_path / "second")
    assert "eval/c/return" in drawn
    assert score(tmp_path / "second", "--episodes", 2, "--plot", tmp_path / "figure.png") == 0
    assert (tmp_path / "figure.png").stat().st_size > 5_000
    assert strict(tmp_path / "second/eval.json")["iqm"] is None


def test_a_video_of_any_environment_that_renders(trained, oddity, tmp_path):
    oddity("small")  # task a's pictures are smaller than b's
    assert score(trained, "--episodes", 1, "--video", tmp_path / "v.gif") == 0
    assert (tmp_path / "v.gif").stat().st_size > 100


def test_a_video_of_one_that_does_not_render_is_one_line(trained, monkeypatch, capsys, tmp_path):
    def blind(meta, render=False):
        raise gymnasium.error.Error("no rgb_array")
    monkeypatch.setattr(envs, "make", blind)
    assert score(trained, "--episodes", 1, "--video", tmp_path / "v.gif") == 2
    assert "nothing was filmed" in capsys.readouterr().err


@pytest.mark.parametrize("odd", UNSEEN)
def test_what_is_no_picture_costs_its_own_film_and_is_one_line(trained, oddity, capsys, tmp_path,
                                                               odd):
    said = f"render() gave {UNSEEN[odd][1]}, and it has to give uint8 of shape (height, width, 3)"
    oddity(odd)
    assert score(trained, "--episodes", 2, "--video", tmp_path / "v.gif") == 3
    assert f"a, episode 0, step 1: DataError: {said}\n" in capsys.readouterr().out
    summary = strict(trained / "eval-video.json")
    assert [len(summary["tasks"][name]["returns"]) for name in "ab"] == [1, 2]
    assert (tmp_path / "v.gif").stat().st_size > 100  # of b
    with pytest.raises(RunError, match=r"a cannot be filmed here \(DataError: render\(\) gave"):
        plots.frames_figure(plots.Scene(trained, "a"))


def test_a_film_that_fails_costs_no_recorded_episode(trained, oddity, capsys, tmp_path):
    oddity("nothing", "ab")
    flags = ["--episodes", 3, "--record", tmp_path / "new", "--video"]
    assert score(trained, *flags, tmp_path / "v.gif") == 2
    assert "nothing was filmed" in capsys.readouterr().err
    assert [len(data.Task(tmp_path / "new" / name).episodes) for name in "ab"] == [2, 2]


def test_a_film_without_a_folder_is_refused_before_anything_is_played(trained, capsys, tmp_path,
                                                                      monkeypatch):
    monkeypatch.setattr(evaluation, "rollout", None)
    assert score(trained, "--video", tmp_path / "nowhere/v.gif") == 2
    assert capsys.readouterr().err == (f"eval.py: --video {tmp_path}/nowhere/v.gif: there is no "
                                       f"folder {tmp_path}/nowhere\n")


@pytest.mark.parametrize("env_id", ["Hopper-v5", "HalfCheetah-v5"])
def test_the_camera_follows_the_robot(env_id):
    """Seen without a screen: where the chosen camera stands after the robot has gone 5 m."""
    env = envs.make({"env_id": env_id, "name": env_id}, render=True)
    env.reset(seed=0)
    inner, places = env.unwrapped, []
    for distance in (0, 5):
        inner.set_state(inner.data.qpos + distance * np.eye(inner.model.nq)[0], inner.data.qvel)
        places.append(inner.data.cam_xpos[inner.mujoco_renderer.camera_id][0])
    assert inner.mujoco_renderer.camera_id >= 0
    assert places[1] - places[0] == pytest.approx(5, abs=0.1)
    env.close()


def test_a_checkpoint_that_a_live_run_has_replaced_is_looked_for_again(trained, monkeypatch):
    folder, verify = trained / "checkpoints", checkpoint.verify

    def late(path):
        if path.name == "000000004":  # meanwhile the run has saved, and dropped it
            content = json.loads((path / "checkpoint.json").read_text())
            path.rename(folder / "000000006")
            content["updates"] = 6
            (folder / "000000006/checkpoint.json").write_text(json.dumps(content))
        verify(path)

    monkeypatch.setattr(checkpoint, "verify", late)
    _, config = checkpoint.load_run(trained)
    assert config["checkpoint"] == "000000006"


# ---------------------------------------------------------------- flags

@pytest.mark.parametrize("flags", [
    "--critic Q", "--alpha 2", "--alpha -0.1", "--eta -1", "--eta 0", "--eta nan", "--eta inf",
    "--top 0", "--top 1.5", "--warmup 2", "--weights 0", "--weights 1 -1", "--alphas 1 2",
    "--samples 1", "--samples 0", "--n-step 0", "--batch-size 0", "--accumulate 0", "--keep 0",
    "--save-every -1", "--log-every -1", "--eval-every -1", "--eval-episodes 0", "--episodes -1",
    "--steps 0", "--steps -5", "--steps 1e3", "--device gpu", "--threads -1", "--threads 0",
    "--seed -1", "--seed 4294967296", "--learning-rate 0", "--learning-rate nan", "--focus -1",
    "--beta -1", "--max-grad-norm -1", "--act greedy", "--target-rate 0",
])
def test_a_setting_that_cannot_be_meant_is_refused_in_one_line(capsys, tmp_path, flags):
    message = refused(capsys, "--out", tmp_path / "run", *flags.split())
    assert f"error: argument {flags.split()[0]}: " in message
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("flags", ["--eta 0", "--eta nan", "--episodes 0", "--episodes -1",
                                   "--seed -1", "--device gpu", "--act greedy",
                                   "--video film.avi"])
def test_eval_refuses_them_too(capsys, tmp_path, flags):
    assert score(tmp_path, *flags.split()) == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert flags.split()[0] in message


def test_every_number_has_a_range_and_its_default_lies_in_it():
    fields = [*dataclasses.fields(train.TrainConfig), *dataclasses.fields(LossSettings)]
    numbers = [field for field in fields if field.type in (int, float)]
    assert len(numbers) > 15
    for field in numbers:
        read = train.number(field.name, field.type)
        if field.default is not None:
            assert read(str(field.default)) == field.default
    for algo in ALGORITHMS:
        for name, value in dataclasses.asdict(settings_for(algo)).items():
            if isinstance(value, (int, float)):
                assert train.number(name, type(value))(str(value)) == value


@pytest.mark.parametrize("flags", ["--beta 0", "--beta 0 --alpha 1"])
def test_no_policy_is_improved_by_a_critic_that_is_not_trained(capsys, tmp_path, flags):
    write(tmp_path / "own/a")
    message = refused(capsys, "--size", "tiny", "--data", tmp_path / "own", "--out",
                      tmp_path / "run", *flags.split())
    assert "critic" in message and not (tmp_path / "run").exists()


def test_an_alpha_beside_alphas_is_refused(capsys):
    with pytest.raises(SystemExit) as stopped:
        train.main(["--data", "one", "two", "--alphas", "1", "0.5", "--alpha", "0.1"])
    assert stopped.value.code == 2
    assert "--alpha 0.1 changes nothing: --alphas has one" in capsys.readouterr().err


def test_tasks_that_nothing_tells_apart_are_refused_and_equal_returns_are_said(tmp_path, capsys):
    for name, words in (("left", "Go  there"), ("right", "go there"), ("up", "go up")):
        episode = numbered(0, 5, 3, 2, terminated=True)
        episode.reward[:] = 0
        data.append(tmp_path / "arm" / name, [episode],
                    {**task_meta(3, 2), "instruction": words, "embodiment": "arm"})
    with pytest.raises(SystemExit) as stopped:
        run(tmp_path / "run", folder=tmp_path / "arm")
    assert stopped.value.code == 2 and not (tmp_path / "run/config.json").exists()
    said = capsys.readouterr().err
    assert "left and right are of one embodiment, arm, and both are told 'go there'" in said
    run(tmp_path / "one", "--no-embodiments", folder=tmp_path / "arm")
    run(tmp_path / "two", "--tasks", "left", "up", "--algo", "pac", folder=tmp_path / "arm")
    said = capsys.readouterr().err
    assert said.count("left: all returns are 0, so nothing tells its good actions") == 1


def test_observations_that_are_taken_for_constants_are_named(tmp_path, capsys):
    """In tesla or farads a signal can be as small. One that never varies needs no word."""
    episode = numbered(0, 5, 3, 2, terminated=True)
    episode.obs[:, 1] *= 1e-9
    episode.obs[:, 2] = 7
    data.append(tmp_path / "arm" / "coil", [episode], task_meta(3, 2))
    run(tmp_path / "run", folder=tmp_path / "arm")
    assert "coil: observations [1] vary by less than 1e-06" in capsys.readouterr().err
    other = numbered(0, 5, 3, 2, terminated=True)  # of one body with it, where nothing is so small
    for name, one in ("coil", episode), ("rod", other):
        meta = {**task_meta(3, 2), "embodiment": "arm", "instruction": name}
        data.append(tmp_path / "arms" / name, [one], meta)
    run(tmp_path / "two", folder=tmp_path / "arms")
    assert "vary by less" not in capsys.readouterr().err


def test_zero_means_never(tmp_path):
    out = tmp_path / "run"
    run(out, "--save-every", 0, "--log-every", 0, "--eval-every", 0)
    assert [path.name for path in checkpoints(out)] == ["000000004"]
    assert [line["update"] for line in log(out)] == [4]


@pytest.mark.parametrize("flags", [["--tasks", "Hopper"], ["--tasks", "Ant-v5"],
                                   ["--tasks", "Hopper-v5", "hopper-v5"],
                                   ["--tasks", "Hopper", "--dry-run"]])
def test_an_unknown_task_lists_the_known_before_data_is_made(capsys, tmp_path, monkeypatch, flags):
    monkeypatch.chdir(tmp_path)
    message = refused(capsys, "--size", "tiny", *flags)
    assert f"no task {flags[-1 if len(flags) > 2 and 'dry' not in flags[-1] else 1]!r}" in message
    assert "Hopper-v5" in message and not list(tmp_path.iterdir())


def test_a_gpu_that_is_not_there_is_one_line(capsys, tmp_path, trained, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "no GPU" in refused(capsys, "--device", "cuda", "--out", tmp_path / "new")
    assert score(trained, "--device", "cuda") == 2
    assert "no GPU" in capsys.readouterr().err


# ---------------------------------------------------------------- what a run owns

@pytest.mark.parametrize("name", ["000000002.best", "000000002.old", "paper.v1", "20260101",
                                  ".DS_Store/", "notes.txt/", ".nfs0001/", "000000009/"])
def test_what_lies_beside_the_checkpoints_stays(tmp_path, name):
    """A folder with a file in it; with a slash at its end, a file."""
    mine = tmp_path / "run/checkpoints" / name.rstrip("/")
    mine.parent.mkdir(parents=True)
    if name.endswith("/"):
        mine.touch()
    else:
        mine.mkdir()
        (mine / "notes.txt").write_text("mine")
    run(tmp_path / "run", "--keep", 1)
    assert find_checkpoint(tmp_path / "run").name == "000000004"
    assert mine.exists() and mine.is_dir() == (not name.endswith("/"))
    assert {path.name for path in mine.parent.iterdir()} == {mine.name, "000000004"}


@pytest.mark.parametrize("fails", ["rmtree", "rename"])
def test_an_old_checkpoint_that_cannot_be_deleted_is_a_warning(tmp_path, monkeypatch, capsys,
                                                               fails):
    def protected(path, *_, ignore_errors=False, **__):
        if not ignore_errors:
            raise PermissionError(1, "Operation not permitted", str(path))

    if fails == "rmtree":
        monkeypatch.setattr(shutil, "rmtree", protected)
    else:
        rename = Path.rename
        monkeypatch.setattr(Path, "rename", lambda path, to: protected(path) if "dropped" in to.name
                            else rename(path, to))
    run(tmp_path / "run", "--keep", 1)
    assert "000000002 cannot be deleted" in capsys.readouterr().err
    assert find_checkpoint(tmp_path / "run").name == "000000004"
    monkeypatch.undo()
    train.main(["--resume", str(tmp_path / "run"), "--steps", "6"])
    left = [path.name for path in (tmp_path / "run/checkpoints").iterdir()]
    assert left == ["000000006"]


def test_at_sets_the_newer_branch_aside(tmp_path, capsys):
    out = tmp_path / "run"
    run(out, "--keep", 10, steps=10)
    before = log(out)

    def stopped():
        at_update(5, lambda: kill(signal.SIGINT))
        train.main(["--resume", str(out), "--at", "4"])

    assert in_child(stopped) == 130
    assert [int(path.name) for path in checkpoints(out)] == [2, 4, 6]
    aside = out / "aside-1"
    assert [int(path.name) for path in checkpoints(aside)] == [6, 8, 10] and log(aside) == before
    assert checkpoint.load_run(aside)[1]["checkpoint"] == "000000010"
    train.main(["--resume", str(out)])  # the advice that was printed
    assert log(out) == before  # without gaps
    train.main(["--resume", str(out), "--at", "2"])
    assert (out / "aside-2").exists() and log(out) == before
    shutil.rmtree(aside)  # for space; the next takes its number
    train.main(["--resume", str(out), "--at", "2"])
    assert {path.name for path in out.glob("aside-*")} == {"aside-1", "aside-2"}
    for name, tensor in tensors(out).items():
        assert torch.equal(tensor, tensors(aside)[name])


def test_at_sets_the_evaluations_of_the_newer_branch_aside(tmp_path, oddity):
    """They are not of the model that is trained instead, whose checkpoints have the same names."""
    out = tmp_path / "run"
    run(out)
    oddity("")
    for flags in (["--episodes", 4], ["--episodes", 2], ["--episodes", 1, "--act", "mode"]):
        assert score(out, *flags) == 0
    (out / "curve.png").write_text("the curve")
    (out / "figures/a").mkdir(parents=True)
    (out / "figures/a/q.png").write_text("its Q")
    drawn = ("curve.png", "figures/a/q.png")
    before = {name: (out / name).read_text()
              for name in (*drawn, *(path.name for path in out.glob("eval*")))}
    assert len(before) == 5
    train.main(["--resume", str(out), "--at", "4"])  # the newest: nothing is set aside
    assert {name: (out / name).read_text() for name in before} == before
    train.main(["--resume", str(out), "--at", "2"])
    assert {name: (out / "aside-1" / name).read_text() for name in before} == before
    assert not [name for name in before if (out / name).exists()]
    assert find_checkpoint(out).name == find_checkpoint(out / "aside-1").name
    assert score(out, "--episodes", 2) == 0
    assert [path.name for path in out.glob("eval*")] == ["eval.json"]


@pytest.mark.parametrize("part, key, change, said", [
    ("settings", "alpha", None, "lacks 'alpha'"),
    ("settings", "zeta", 1.0, "has 'zeta'"),
    ("train", "zeta", 1, "has 'zeta'"),
    ("model", "zeta", 1, "has 'zeta'"),
])
def test_a_configuration_of_another_version_names_the_key(trained, capsys, part, key, change, said):
    config = read_config(trained)
    if change is None:
        del config[part][key]
    else:
        config[part][key] = change
    (trained / "config.json").write_text(json.dumps(config))
    if part == "model":
        assert score(trained, "--episodes", 1) == 2
        message = capsys.readouterr().err
    else:
        message = refused(capsys, "--resume", trained)
    assert f"config.json {said}" in message


@pytest.mark.parametrize("text", ["[]", "{}", '{"format": 3}', "half", "\udcff"])
def test_a_damaged_configuration_is_one_line(trained, capsys, text):
    (trained / "config.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    assert "config.json" in refused(capsys, "--resume", trained)


@pytest.mark.parametrize("line", ['{"update": 2, "lo', "5", "{}", '{"update": "two"}', "\x00\x00"])
def test_a_damaged_line_of_the_log_is_named_and_left_out(trained, capsys, line):
    path = trained / "metrics.jsonl"
    first, *rest = path.read_text().splitlines()
    path.write_text("\n".join([first, line, *rest, line, line]) + "\n")
    before = log_of([first, *rest])
    train.main(["--resume", str(trained), "--steps", "6", "--log-every", "2"])
    said = capsys.readouterr().err
    assert f"{path}, line 2 is damaged" in said
    assert log(trained)[:2] == before and log(trained)[-1]["update"] == 6


def log_of(lines):
    lines = [json.loads(line) for line in lines]
    for line in lines:
        del line["seconds"]
    return lines


# ---------------------------------------------------------------- signals, terminals

@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGTERM])
def test_a_terminal_that_closes_saves(tmp_path, number):
    def hung_up():
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        at_update(2, lambda: [kill(signal.SIGINT), kill(number), kill(signal.SIGINT)])
        run(tmp_path / "run", steps=9)

    assert in_child(hung_up) == 130  # several signals within seconds are the first one
    assert find_checkpoint(tmp_path / "run").name == "000000003"


def test_nohup_is_respected(tmp_path):
    def ignoring():
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        at_update(2, lambda: kill(signal.SIGHUP))
        run(tmp_path / "run")

    assert in_child(ignoring) == 0
    assert find_checkpoint(tmp_path / "run").name == "000000004"


def test_a_broken_pipe_does_not_end_a_run(tmp_path):
    """Nor keep an evaluation from writing what it found."""
    def piped():
        reader, writer = os.pipe()
        os.close(reader)
        sys.stdout = sys.stderr = open(writer, "w", buffering=1)
        parallel.outlive_readers()
        run(tmp_path / "run", "--eval-every", 2, "--episodes", 1)
        shutil.copy(tmp_path / "run/eval.json", tmp_path)
        (tmp_path / "run/eval.json").unlink()
        assert score(tmp_path / "run", "--episodes", 2) == 0

    assert in_child(piped) == 0
    assert find_checkpoint(tmp_path / "run").name == "000000004"
    assert strict(tmp_path / "run/eval.json")["episodes"] == 2


@pytest.mark.parametrize("command", ["train.py", "eval.py nowhere"])
def test_ctrl_c_while_torch_is_imported_is_no_traceback(tmp_path, command):
    ended = subprocess.run([sys.executable, "-c", INTERRUPTED, *command.split()], cwd=ROOT,
                           capture_output=True, text=True)
    assert ended.returncode == -signal.SIGINT and "Traceback" not in ended.stderr


INTERRUPTED = """
import builtins, os, runpy, signal, sys
imported = builtins.__import__
def interrupt(name, *args):
    if name == "torch":
        os.kill(os.getpid(), signal.SIGINT)
    return imported(name, *args)
builtins.__import__ = interrupt
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


# ---------------------------------------------------------------- resume as people use it

def test_what_does_not_change_the_mathematics_may_change(tmp_path, capsys):
    out, whole = tmp_path / "run", tmp_path / "whole"
    run(whole, steps=8)

    def stopped():
        at_update(3, lambda: kill(signal.SIGINT))
        run(out, steps=8)

    assert in_child(stopped) == 130
    moved = tmp_path / "elsewhere"
    (tmp_path / "own").rename(moved / "data" if moved.mkdir() else moved / "data")
    out.rename(moved / "run")
    train.main(["--resume", str(moved / "run"), "--episodes", "1", "--eval-every", "6",
                "--eval-episodes", "1", "--log-every", "1", "--save-every", "5", "--keep", "9",
                "--data", str(moved / "data")])
    kept = [int(path.name) for path in checkpoints(moved / "run")]
    assert kept == [2, 4, 5, 8] and (moved / "run/eval.json").exists()
    for name, tensor in tensors(whole).items():
        assert torch.equal(tensor, tensors(moved / "run")[name])
    train.main(["--resume", str(moved / "run")])  # what was given holds from then on
    assert "--batch-size 8, not 9" in refused(capsys, "--resume", moved / "run", "--batch-size", 9)


def test_other_data_is_refused_even_if_it_looks_alike(trained, tmp_path, capsys):
    write(tmp_path / "alike/a", number=1)
    write(tmp_path / "alike/b", number=1)
    config = read_config(trained)
    config["tasks"] = prepare.merged_metas(prepare.open_tasks(tmp_path / "alike"))
    (trained / "config.json").write_text(json.dumps(config))
    message = refused(capsys, "--resume", trained, "--data", tmp_path / "alike", "--steps", 5)
    assert "is not the data" in message
    message = refused(capsys, "--resume", trained, "--data", tmp_path / "own", tmp_path / "alike")
    assert "1 data set(s)" in message


def test_steps_may_grow_and_the_schedule_is_said(tmp_path, capsys):
    out = tmp_path / "run"
    run(out, "--algo", "bc_q", "--warmup", 0.5)
    train.main(["--resume", str(out), "--steps", "16"])
    printed = capsys.readouterr().out
    assert "--steps 4 becomes 16: the learning rate, and the share of observed returns" in printed
    assert find_checkpoint(out).name == "000000016"
    config = read_config(out)
    assert config["settings"]["warmup"] * config["train"]["steps"] == pytest.approx(2)
    assert "the warm-up stays as long as it was" in printed
    assert "they may only become more" in refused(capsys, "--resume", out, "--steps", 4)


@pytest.mark.parametrize("algo, warmup, steps, said, updates", [
    ("one_step", 1.0, 9, "the warm-up is still all of the run", 9),
    ("bc_q", 0.5, 22, "the warm-up stays as long as it was", 8)])  # of 15: 8, by Python's rounding
def test_the_warm_up_is_as_long_as_it_was_when_steps_grow(trained, capsys, algo, warmup, steps, said,
                                                         updates):
    config = read_config(trained)
    config["train"] |= {"algo": algo, "steps": 8 if warmup == 1 else 15}
    config["settings"] = dataclasses.asdict(settings_for(algo, warmup=warmup))
    (trained / "config.json").write_text(json.dumps(config))
    flags = train.parse_args(["--resume", str(trained), "--steps", str(steps)])
    _, settings = train.old_run(flags)
    assert said in capsys.readouterr().out
    assert round(settings.warmup * steps) == updates


def test_runs_started_at_once_wait_for_the_one_that_builds_the_data(tmp_path, monkeypatch):
    monkeypatch.setattr(prepare, "DEFAULT_SETS", {tmp_path / "sets": 300})
    folder, built = tmp_path / "sets/switching", []
    folder.mkdir(parents=True)

    def build():
        prepare.build_default(folder, ["Reacher-v5"])
        built.append(data.Task(folder / "Reacher-v5").meta["transitions"])

    with data.only_writer(folder):  # as the other one does while it builds
        waiting = threading.Thread(target=build)
        waiting.start()
        time.sleep(0.3)
        assert waiting.is_alive() and not built
        shutil.copytree(written(tmp_path / "other"), folder / "Reacher-v5")
    waiting.join()
    assert built == [80]  # what the other one built


def written(folder):
    write(folder)
    return folder


def test_a_run_that_another_process_made_meanwhile_is_left_alone(trained, tmp_path, capsys,
                                                                 monkeypatch):
    before = (trained / "metrics.jsonl").read_text()
    new_run = train.new_run

    def early(flags):  # both looked before either had begun
        shutil.move(trained, tmp_path / "hidden")
        found = new_run(flags)
        shutil.move(tmp_path / "hidden", trained)
        return found

    monkeypatch.setattr(train, "new_run", early)
    message = refused(capsys, *FLAGS, "--data", tmp_path / "own", "--out", trained)
    assert "is in use" in message
    assert (trained / "metrics.jsonl").read_text() == before
