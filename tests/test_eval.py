"""Acting, scores and their intervals, what is written; and that the READMEs' commands exist."""

import json
import re
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import gymnasium
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import envs
import eval as evaluation
import plots
import prepare
import train
from checkpoint import find_checkpoint, load_run
from envs import Play
from eval import ACTS, act, evaluate, interval, iqm, normalise, rollout, summarise

ROOT = Path(__file__).parent.parent
HOPPER, REACHER = "Hopper-v5", "Reacher-v5"


@pytest.fixture(scope="module")
def original(small_data, tmp_path_factory):
    """A short run of two tasks."""
    out = tmp_path_factory.mktemp("runs") / "run"
    train.main(["--size", "tiny", "--data", str(small_data), "--out", str(out), "--steps", "10",
                "--batch-size", "32", "--eval-every", "0", "--episodes", "0"])
    return out


@pytest.fixture
def trained(original, tmp_path):
    """A copy of it, to write in."""
    return shutil.copytree(original, tmp_path / "run")


def command(*flags):
    """python eval.py FLAGS, within this process."""
    evaluation.main(evaluation.parse_args([str(flag) for flag in flags]))


def ends_with(code, *flags):
    with pytest.raises(SystemExit) as end:
        command(*flags)
    assert end.value.code == code


# ---------------------------------------------------------------- acting

@pytest.mark.parametrize("how", ACTS)
def test_actions_stay_in_the_box(model, how):
    actions = act(model, torch.randn(6, 5) * 10, torch.tensor([0, 1] * 3), how)
    assert actions.shape == (6, 2) and actions.abs().max() <= 1


def test_improved_and_best_follow_q(model):
    """With Q replaced by the first action dimension, better actions are larger ones."""
    ramp = torch.linspace(-1, 1, model.config.atoms)
    model.q_spread.fill_(0.3)
    model.q = lambda latents, action, task: 20 * action[..., :1] * ramp
    obs, task = torch.randn(64, 5), torch.zeros(64, dtype=torch.long)

    def first(how, eta=1.0):
        return act(model, obs, task, how, eta)[:, 0].mean()

    assert first("mean") + 0.2 < first("improved") < first("improved", 0.05)
    assert first("best") > first("improved")


def test_sharpened_is_improved_without_q(model):
    """The mean of so many draws, 64 for each of 2,000 rows of one state, is that of the policy."""
    model.q = lambda latents, action, task: torch.zeros(*action.shape[:2], model.config.atoms)
    model.policy_head[-1].weight.data.mul_(20)  # far from uniform, whose mean is 0 anyhow
    obs, task = torch.ones(2000, 5), torch.zeros(2000, dtype=torch.long)
    drawn = act(model, obs, task, "improved").mean(0)
    sharpened = act(model, obs[:1], task[:1], "sharpened")[0]
    torch.testing.assert_close(drawn, sharpened, atol=0.01, rtol=0)
    assert (sharpened - act(model, obs[:1], task[:1], "mean")[0]).abs().max() > 0.03


# ---------------------------------------------------------------- statistics

def test_iqm_by_hand():
    assert iqm([0, 1, 2, 3, 4, 5, 6, 100]) == pytest.approx((2 + 3 + 4 + 5) / 4)
    of_seven = [5, 1, 2, 3, 100, 4, -50]  # one is cut at either end
    assert iqm(of_seven) == pytest.approx((1 + 2 + 3 + 4 + 5) / 5)


def test_interval_covers_the_mean_nineteen_times_in_twenty():
    rng = np.random.default_rng(0)
    hits = 0
    for trial in range(200):
        sample = rng.normal(3, 1, 40)
        low, high = interval([sample], lambda x: x[0].mean(), resamples=200, seed=trial)
        hits += low < 3 < high
    assert 175 <= hits <= 200  # 190 expected


def test_scores_are_scaled_by_the_reference():
    meta = {"reference": {"random": 10, "expert": 30}}
    assert normalise([10.0, 20.0, 30.0], meta).tolist() == [0, 0.5, 1]
    assert normalise([10.0], {"reference": None}) is None


def play(index, *reward):
    """A Play of a task in whose scores a return of 10 counts 1."""
    meta = {"name": "abcd"[index], "action_low": [-1.0], "action_high": [1.0],
            "reference": {"random": 0, "expert": 10}}
    made = Play(index, 0, meta, keep=False, render=False)
    made.reward, made.total = list(reward), sum(reward)
    return made


def test_summary_of_known_returns():
    plays = []
    for index, total in enumerate((-100, 4, 6, 1000)):
        plays += [play(index, total / 2, total / 2), play(index, total, 2)]
    failed = play(1, 50)
    failed.failed = "b, episode 2"
    summary = summarise([*plays, failed])
    b = summary["tasks"]["b"]
    assert b["returns"] == [4, 6] and b["score"] == pytest.approx(0.5) and b["length"] == 2
    assert b["return"] == 5 and b["return_std"] == 1
    assert summary["iqm"] == pytest.approx(0.6)  # of -9.9, 0.5, 0.7 and 100.1 the middle two
    assert summary["failed"] == ["b, episode 2"]


# ---------------------------------------------------------------- roll-outs

def test_rollouts_are_seeded(original):
    model, config = load_run(original)

    def totals(seed):
        return [sum(play.reward) for play in rollout(model, config["tasks"], 2, seed)]

    assert totals(3) == totals(3) != totals(4)
    assert len(set(totals(3))) == 4  # each episode is another


def test_every_seed_has_episodes(model, monkeypatch):
    """NumPy's RandomState, which dm_control draws from, takes seeds of 32 bits alone."""
    taken = []

    class Control(Faulty):
        def reset(self, seed):
            np.random.RandomState(seed)
            taken.append(seed)
            return super().reset(seed)

    monkeypatch.setattr(envs, "make", lambda meta, render: Control(nothing))
    meta = {"name": "a", "obs_dim": 3, "action_low": [-1.0, -1.0], "action_high": [1.0, 1.0]}
    for seed in (0, 1, 429_496, 429_497, 2**32 - 1, 2**40 + 5):
        plays = rollout(model, [meta, None], 2, seed, how="mean")
        assert [play.failed for play in plays] == [None, None]
    assert taken[:6] == [0, 1, 10_000, 10_001, 4_294_960_000, 4_294_960_001]  # as they always were
    assert taken[6:8] == [4_294_970_000 - 2**32, 4_294_970_001 - 2**32]
    assert len(set(taken)) == 12


def test_the_averaged_weights_are_what_is_loaded(original):
    model, _ = load_run(original)
    stored = load_file(next(find_checkpoint(original).glob("*.safetensors")))
    for name, value in model.state_dict().items():
        assert torch.equal(value, stored[f"target.{name}"])


class Faulty:
    """An environment of 5 steps; `fault` is called before the third."""
    spec = None

    def __init__(self, fault):
        self.fault, self.steps = fault, 0

    def reset(self, seed):
        return np.zeros(3, np.float32), {}

    def step(self, action):
        self.steps += 1
        if self.steps == 3:
            self.fault()
        return np.zeros(3, np.float32), 1.0, self.steps == 5, False, {}

    def close(self):
        pass


def nothing():
    pass


def crash():
    raise ValueError("the simulation is unstable")


def hang():
    time.sleep(60)


def test_an_environment_that_raises_or_hangs_costs_its_own_episode(model, monkeypatch):
    faults = iter([nothing, crash, hang, nothing])
    monkeypatch.setattr(envs, "make", lambda meta, render: Faulty(next(faults)))
    monkeypatch.setattr(envs, "ENV_SECONDS", 0.2)
    meta = {"name": "a", "obs_dim": 3, "action_low": [-1.0, -1.0], "action_high": [1.0, 1.0]}
    start = time.monotonic()
    plays = rollout(model, [meta, None], 4, how="mean")
    assert time.monotonic() - start < 30
    assert [len(play.reward) for play in plays if not play.failed] == [5, 5]
    summary = summarise(plays)
    assert summary["failed"] == ["a, episode 1, step 2: ValueError: the simulation is unstable",
                                 "a, episode 2, step 2: TimeoutError: no answer within 0.2 s"]
    assert summary["tasks"]["a"]["returns"] == [5.0, 5.0]
    # a line a task, however many of its episodes failed
    assert evaluation.table(summary).splitlines()[-1] == (
        f"failed, and left out: {summary['failed'][0]} (and 1 more of this task)")
    assert evaluation.failures({"failed": summary["failed"][1:]}) == [
        f"failed, and left out: {summary['failed'][1]}"]


def test_failed_episodes_are_an_exit_code(trained, small_data, tmp_path, monkeypatch, capsys):
    make = envs.make

    def broken(meta, render=False):
        return crash() if meta["name"] == REACHER else make(meta, render)

    monkeypatch.setattr(envs, "make", broken)
    ends_with(evaluation.EPISODES_FAILED, trained, "--episodes", 1)
    assert evaluation.EPISODES_FAILED == 3
    summary = json.loads((trained / "eval.json").read_text())
    assert list(summary["tasks"]) == [HOPPER] and len(summary["failed"]) == 1
    assert f"{REACHER}, episode 0, step 0: ValueError" in capsys.readouterr().out
    out = tmp_path / "new"
    with pytest.raises(SystemExit) as end:  # training itself goes on
        train.main(["--size", "tiny", "--data", str(small_data), "--out", str(out),
                    "--steps", "10", "--batch-size", "32", "--eval-every", "5",
                    "--eval-episodes", "1", "--episodes", "1"])
    assert end.value.code == 3 and find_checkpoint(out).name == "000000010"
    assert (out / "curve.png").exists()


def test_recorded_actions_replay_to_the_recorded_observations(original):
    """What is recorded is what the environment was given, in its own units."""
    model, config = load_run(original)
    meta = config["tasks"][1]
    played, = rollout(model, [None, meta], 1, seed=5, how="sample", keep=True)
    episode, env = played.episode(), envs.make(meta)
    assert not episode.terminated  # Reacher-v5 is cut off after 50 steps
    obs, _ = env.reset(seed=50_000)
    for step, action in enumerate(episode.action):
        np.testing.assert_allclose(obs, episode.obs[step], atol=1e-6)
        obs = env.step(action)[0]


def test_actions_are_scaled_to_the_environments_box():
    given, meta = [], {"name": "a", "action_low": [-2.0, 0.0], "action_high": [2.0, 1.0]}
    made = Play(0, 0, {**meta, "obs_dim": 1}, keep=True, render=False)
    made.rng, made.env = np.random.default_rng(0), Faulty(nothing)
    made.env.step = lambda action: given.append(action.tolist()) or ([0], 1.0, False, False, {})
    made.step(np.array([-1.0, 0.5, 0.9], np.float32))  # the last is padding
    assert given == [[-2.0, 0.75]]


# ---------------------------------------------------------------- what is written

def test_record_and_evaluate_from_the_run_alone(trained, tmp_path, capsys):
    flags = [trained, "--tasks", REACHER, "--record", tmp_path / "own"]
    command(*flags, "--episodes", 2)
    command(*flags, "--episodes", 3, "--act", "sample")
    task, = prepare.open_tasks(tmp_path / "own")
    prepare.verify([task])
    assert task.meta["episodes"] == 5 and task.meta["transitions"] == 250
    summary = json.loads((trained / f"eval-sample-of-{REACHER}.json").read_text())
    recorded = summary["tasks"][REACHER]["returns"]
    np.testing.assert_allclose(task.episodes["return"][2:], recorded, rtol=1e-5)
    printed = capsys.readouterr().out
    assert "IQM over tasks" in printed
    assert f"wrote 3 episodes to {tmp_path / 'own' / REACHER}" in printed


def test_no_episode_is_recorded_twice_though_some_fail(trained, tmp_path, monkeypatch):
    make, starts = envs.make, []

    class Failing(gymnasium.Wrapper):
        def reset(self, seed=None, options=None):
            starts.append(seed)
            if seed % 5 in (1, 3):
                crash()
            return self.env.reset(seed=seed)

    monkeypatch.setattr(envs, "make", lambda *args: Failing(make(*args)))
    flags = [trained, "--tasks", REACHER, "--record", tmp_path / "own", "--episodes", 5]
    for _ in range(2):
        ends_with(evaluation.EPISODES_FAILED, *flags)
    task, = prepare.open_tasks(tmp_path / "own")
    assert len(set(starts)) == len(starts) == 10
    assert len(set(task.episodes["checksum"])) == len(task.episodes) == 6
    first = json.loads((trained / f"eval-of-{REACHER}.json").read_text())
    second = json.loads((trained / f"eval-of-{REACHER}-from-episode-5.json").read_text())
    assert (first["first"], second["first"]) == (0, 5)
    for summary, mine in ((first, slice(3)), (second, slice(3, 6))):
        returns = summary["tasks"][REACHER]["returns"]
        np.testing.assert_allclose(task.episodes["return"][mine], returns, rtol=1e-5)
    prepare.main(["mix", str(tmp_path / "mixed"), str(tmp_path / "own")])
    assert "played" not in prepare.open_tasks(tmp_path / "mixed")[0].meta


def looks(run):
    """The names of a run's evaluations, and the content of eval.json."""
    names = {path.name for path in run.glob("eval*")}
    return names, json.loads((run / "eval.json").read_text())


def test_only_a_full_evaluation_writes_eval_json(trained, tmp_path, monkeypatch, capsys):
    make = envs.make

    def filmed(meta, render=False):
        env = make(meta)
        env.render = lambda: np.zeros((8, 8, 3), np.uint8)
        return env

    monkeypatch.setattr(envs, "make", filmed)
    command(trained, "--episodes", 2)
    names, full = looks(trained)
    assert names == {"eval.json"} and full["episodes"] == 2
    assert (full["act"], full["eta"], full["seed"]) == ("improved", 2.0, 1)
    assert full["checkpoint"] == "000000010" and list(full["tasks"]) == [HOPPER, REACHER]
    video = tmp_path / "video.gif"
    for flags, name in [
        (["--tasks", HOPPER], f"eval-of-{HOPPER}.json"),
        (["--act", "mean"], "eval-mean.json"),
        (["--eta", 0.5], "eval-eta0.5.json"),
        (["--video", video], "eval-video.json"),
        ([], "eval-1-episodes.json"),
        (["--act", "mean", "--tasks", HOPPER], f"eval-mean-of-{HOPPER}.json"),
    ]:
        command(trained, "--episodes", 1, *flags)
        names.add(name)
        assert looks(trained) == (names, full)
        assert json.loads((trained / name).read_text())["episodes"] == 1
        assert f"wrote {trained / name}" in capsys.readouterr().out
    assert video.stat().st_size > 0
    for flags, name in [([], "eval-seed3.json"), (["--act", "mean"], "eval-mean-seed3.json"),
                        (["--act", "mean", "--seed", 4], "eval-mean-seed4.json")]:
        command(trained, "--episodes", 2, "--seed", 3, *flags)
        names.add(name)
        assert looks(trained) == (names, full)
    command(trained, "--episodes", 1, "--act", "mean", "--seed", 3)  # fewer than there are
    names.add("eval-mean-seed3-1-episodes.json")
    assert looks(trained) == (names, full)
    command(trained, "--episodes", 3)  # more than there were
    assert looks(trained)[1]["episodes"] == 3
    (trained / "eval.json").write_text("half of")
    command(trained, "--episodes", 1)
    assert looks(trained)[1]["episodes"] == 1


def test_no_evaluation_is_overwritten_by_fewer_episodes_or_from_another_seed(tmp_path):
    path, tasks = tmp_path / "eval.json", {"a": 1, "b": 1}

    def evaluated(episodes, seed, checkpoint="000000010"):
        """Where it is written, as eval.py does."""
        summary = {"checkpoint": checkpoint, "episodes": episodes, "seed": seed,
                   "tasks": {name: {"returns": [0.0] * episodes} for name in tasks}}
        kept = evaluation.kept_path(path, summary)
        kept.write_text(json.dumps(summary))
        return kept.name

    for episodes, seed, name in [
        (4, 1, "eval.json"),
        (2, 1, "eval-2-episodes.json"),
        (2, 2, "eval-2-episodes-seed2.json"),
        (2, 3, "eval-2-episodes-seed3.json"),
        (6, 2, "eval-seed2.json"),
        (5, 2, "eval-seed2-5-episodes.json"),
        (6, 3, "eval-seed3.json"),
        (7, 2, "eval-seed2.json"),  # more of the same seed
        (2, 2, "eval-2-episodes-seed2.json"),  # the same again
        (5, 1, "eval.json"),
    ]:
        assert evaluated(episodes, seed) == name
    kept = {file.name: json.loads(file.read_text()) for file in tmp_path.iterdir()}
    assert {name: (summary["episodes"], summary["seed"]) for name, summary in kept.items()} == {
        "eval.json": (5, 1), "eval-2-episodes.json": (2, 1), "eval-2-episodes-seed2.json": (2, 2),
        "eval-2-episodes-seed3.json": (2, 3), "eval-seed2.json": (7, 2),
        "eval-seed2-5-episodes.json": (5, 2), "eval-seed3.json": (6, 3)}
    assert evaluated(1, 9, checkpoint="000000020") == "eval.json"  # of a model that is no more


def test_the_table_is_printed_before_anything_is_written(trained, small_data, tmp_path,
                                                         monkeypatch, capsys):
    def full_disk(path, content):
        raise OSError(f"{path}: no space left")

    with monkeypatch.context() as broken:
        broken.setattr("data.write_file", full_disk)
        ends_with(2, trained, "--episodes", 1)
    printed = capsys.readouterr()
    assert "IQM over tasks" in printed.out and "eval.py: " in printed.err
    monkeypatch.setattr(train, "write_summary", full_disk)
    with pytest.raises(SystemExit):
        train.main(["--size", "tiny", "--data", str(small_data), "--out", str(tmp_path / "new"),
                    "--steps", "1", "--eval-every", "0", "--episodes", "1"])
    printed = capsys.readouterr()
    assert "IQM over tasks" in printed.out and "train.py: " in printed.err


def test_an_evaluation_has_the_runs_number_of_threads(trained, monkeypatch):
    seen = []

    def watched(*args, **kwargs):
        seen.append(torch.get_num_threads())
        return rollout(*args, **kwargs)

    monkeypatch.setattr(evaluation, "rollout", watched)
    torch.set_num_threads(3)
    try:
        command(trained, "--episodes", 1, "--tasks", REACHER)
        config = json.loads((trained / "config.json").read_text())
        config["train"]["threads"] = 2
        (trained / "config.json").write_text(json.dumps(config))
        command(trained, "--episodes", 1, "--tasks", REACHER)
    finally:
        torch.set_num_threads(1)
    assert seen == [1, 2]


def test_comparison_figure(trained, original, tmp_path):
    path = tmp_path / "figure.png"
    other = shutil.copytree(original, tmp_path / "other")
    command(trained, other, "--episodes", 1, "--tasks", REACHER, "--plot", path)
    assert path.stat().st_size > 5_000


@pytest.mark.parametrize("key, value", [
    ("reference", {"random": -50.0, "expert": -5.0}), ("env_id", "Reacher-v4"),
    ("max_episode_steps", 10), ("env_args", {"reward_dist_weight": 10})])
def test_runs_whose_scores_mean_other_things_are_not_compared(trained, original, tmp_path, capsys,
                                                              key, value):
    other = shutil.copytree(original, tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    config["tasks"][1][key] = value
    (other / "config.json").write_text(json.dumps(config))
    ends_with(2, trained, other, "--episodes", 1)
    said = capsys.readouterr()
    assert f"eval.py: {REACHER} has {key} {value} in {other}, and " in said.err
    assert not said.out and not (trained / "eval.json").exists()  # nothing was played
    evaluation.refuse_unlike([trained, other], [HOPPER])  # the other task is the same in both


@pytest.mark.parametrize("flags, said", [
    (["b", "--record", "own"], "--record: of one run at a time"),
    (["--plot", "figure"], "--plot figure: a name that ends in .png")])
def test_flags_that_cannot_do_what_they_say_are_refused(trained, capsys, flags, said):
    with pytest.raises(SystemExit) as end:
        command(trained, *flags)
    assert end.value.code == 2 and said in capsys.readouterr().err


def test_figures_of_runs_with_dollars_in_their_names(trained, tmp_path, monkeypatch):
    """matplotlib takes what stands between two for a formula."""
    monkeypatch.chdir(tmp_path)
    for name in ("a$1_$2", "b$x$"):
        shutil.copytree(trained, name)
        plots.curve(name)
    legends = []
    monkeypatch.setattr(plots, "save", lambda figure, path: (
        figure.savefig(path), legends.extend(figure.legends)))
    command("a$1_$2", "b$x$", "--episodes", 1, "--tasks", REACHER)
    assert [text.get_text() for text in legends[0].texts] == [r"a\$1_\$2", r"b\$x\$"]


def test_a_task_that_is_called_as_a_way_to_act_has_a_file_of_its_own():
    assert evaluation.file_of(tasks=["mean"]) != evaluation.file_of(act="mean")
    assert evaluation.file_of(tasks=["video"]) != evaluation.file_of(video="a.gif")


def test_a_figure_has_no_row_without_a_number(monkeypatch):
    shown = []
    monkeypatch.setattr(plots, "compare", lambda methods, names, *_, **__:
                        shown.append((names, methods)))
    row = {"score": 0.5, "interval": None, "return": 1.0}
    other = {"score": None, "interval": None, "return": 2.0}
    about = {"iqm": 0.5, "interval": None}
    evaluation.compare({"a": {"tasks": {"x": row, "y": other}, **about},
                        "b": {"tasks": {"x": row, "y": other}, **about}}, "figure.png")
    names, methods = shown[0]
    assert list(names) == ["x", "IQM over tasks"]
    assert {name: len(points) for name, points in methods.items()} == {"a": 2, "b": 2}


def test_the_legend_names_runs_that_begin_with_an_underline(trained, tmp_path, monkeypatch):
    """matplotlib hides what begins so."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(trained, "_old")
    legends = []
    monkeypatch.setattr(plots, "save", lambda figure, _: legends.extend(figure.legends))
    command("_old", "run", "--episodes", 1, "--tasks", REACHER)
    assert [text.get_text() for text in legends[0].texts] == ["./_old", "run"]


def test_lines_at_0_and_1_are_of_scores_alone(monkeypatch):
    lines = []
    monkeypatch.setattr(plots, "save", lambda figure, _: lines.append(
        [line for line in figure.axes[0].lines if line.get_linestyle() == ":"]))
    for label in (plots.SCORE, "return"):
        plots.compare({"a": [(0.5, 0.4, 0.6)]}, ["task"], "x.png", label=label)
    assert [len(some) for some in lines] == [2, 0]


# ---------------------------------------------------------------- bad input

def test_bad_input_is_one_line(trained, tmp_path, capsys):
    ends_with(2, tmp_path / "nowhere")
    assert "not a run's folder" in capsys.readouterr().err
    ends_with(2, trained, "--tasks", "Ant-v5")
    message = f"no task 'Ant-v5'; it was trained on: {HOPPER}, {REACHER}"
    assert message in capsys.readouterr().err
    ends_with(2, trained, "--act", "mean", "--eta", "3")
    assert "--eta is of --act improved, and this is to act by mean" in capsys.readouterr().err
    config = json.loads((trained / "config.json").read_text())
    config["settings"]["critic"] = "v"
    (trained / "config.json").write_text(json.dumps(config))
    ends_with(2, trained, "--act", "best")
    assert "--act best needs a Q decoder" in capsys.readouterr().err


# ---------------------------------------------------------------- the READMEs' commands

OLD = ("tests.", "data.py")  # in the list of what commands were called before


def code_lines(text):
    """Lines of code: indented by four spaces, or fenced; and code within a line."""
    fenced = False
    for line in text.splitlines():
        if line.startswith("```"):
            fenced = not fenced
        elif fenced or line.startswith("    "):
            yield line
        else:
            yield from re.findall(r"`([^`]+)`", line)


def commands_of(text):
    """What `python` or `torchrun` is given, as lists of words, from the program's name on."""
    for line in code_lines(text):
        for part in re.findall(r"(?:python|torchrun) [^&]+", line):
            words = shlex.split(part, comments=True)[1:]
            while words and words[0] != "-m" and not words[0].endswith(".py"):
                del words[0]
            if words and not any(word.startswith(OLD) for word in words[:2]):
                yield ["1" if word.isupper() else word for word in words]  # SEED, say


# Stops a program as soon as it has read its flags, wherever it does so.
STOP_AFTER_PARSING = """
import argparse, runpy, sys
parse = argparse.ArgumentParser.parse_args
def stop(*args):
    parse(*args)
    sys.exit(0)
argparse.ArgumentParser.parse_args = stop
for command in COMMANDS:
    try:
        if command[0] == "-m":
            sys.argv = command[1:]
            runpy.run_module(command[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv = command
            runpy.run_path(command[0], run_name="__main__")
    except SystemExit as error:
        assert not error.code, command
    else:
        raise AssertionError(f"{command} reads no flags")
"""


@pytest.mark.parametrize("path, least", [
    ("README.md", 5), ("behaviors/README.md", 1), ("kernels/README.md", 1), ("studies/README.md", 5),
    ("studies/recipe.md", 1), ("studies/scaling.md", 4), ("studies/speed.md", 5),
    ("studies/suite.md", 8)])
def test_every_command_of_a_readme_parses(path, least):
    """Each is accepted by its own parser: the flags and choices exist."""
    commands = list(commands_of((ROOT / path).read_text()))
    assert len(commands) >= least
    script = f"COMMANDS = {commands!r}\n{STOP_AFTER_PARSING}"
    finished = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True,
                              text=True)
    assert finished.returncode == 0, finished.stderr


def test_all_but_videos_works_without_egl():
    """As in a slim container, where MuJoCo with EGL cannot even be imported."""
    script = """
import ctypes.util, os
find = ctypes.util.find_library
ctypes.util.find_library = lambda name: None if name == "EGL" else find(name)
os.environ.pop("MUJOCO_GL", None)
import envs
env = envs.make({"env_id": "Hopper-v5"}, render=True)
print(env.reset(seed=0)[0].shape)
try:
    envs.picture(env)
except envs.DataError as error:
    print(error)
"""
    finished = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True,
                              text=True)
    assert finished.stdout.startswith("(11,)\nMuJoCo can draw nothing here"), finished


def test_a_film_goes_on_after_another_environment_is_closed():
    """MuJoCo's contexts are one a process: each has to be made current before it draws."""
    one, other = (envs.make({"env_id": name}, render=True) for name in ("Hopper-v5", REACHER))
    for env in (one, other):
        env.reset(seed=0)
    try:
        before = [envs.picture(env) for env in (one, other)][0]
    except Exception as error:  # EGL's are of many kinds
        pytest.skip(f"nothing can be rendered here: {error}")
    other.close()
    for _ in range(10):
        one.step(one.action_space.sample())
    after = envs.picture(one)
    one.close()
    assert before.std() > 10 and after.std() > 10
    assert np.abs(before.astype(int) - after).mean() > 0.5


def test_the_pretrained_model_acts_as_it_did():
    model, config = load_run(ROOT / "results" / "pretrained")
    metas = [meta if meta["name"] == REACHER else None for meta in config["tasks"]]
    summary = evaluate(model, metas, 3, seed=1)
    stored = json.loads((ROOT / "results/pretrained/eval.json").read_text())["tasks"][REACHER]
    assert summary["tasks"][REACHER]["returns"] == pytest.approx(stored["returns"][:3], rel=0.05)
