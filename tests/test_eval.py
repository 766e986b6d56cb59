"""Acting, scores and their intervals, recording; and that the README's commands exist."""

import json
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import data
import eval as evaluation
import train
from eval import ACTS, act, interval, iqm, normalise, rollout, summarise

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def trained(small_data, tmp_path_factory):
    """A short run of two tasks."""
    out = tmp_path_factory.mktemp("runs") / "run"
    train.main(["--size", "tiny", "--data", str(small_data), "--out", str(out), "--steps", "10", "--batch-size", "32",
                "--eval-every", "0", "--episodes", "0"])
    return out


@pytest.mark.parametrize("how", ACTS)
def test_actions_stay_in_the_box(model, how):
    actions = act(model, torch.randn(6, 5) * 10, torch.tensor([0, 1] * 3), how)
    assert actions.shape == (6, 2) and actions.abs().max() <= 1


def test_improved_and_best_follow_q(model):
    """With Q replaced by the first action dimension, better actions are larger ones."""
    model.q_spread.fill_(0.3)
    model.q = lambda latents, action, task: 20 * action[..., :1] * torch.linspace(-1, 1, model.config.atoms)
    obs, task = torch.randn(64, 5), torch.zeros(64, dtype=torch.long)
    mean, improved, sharp, best = (act(model, obs, task, how, eta)[:, 0].mean().item() for how, eta in
                                   (("mean", 1), ("improved", 1.0), ("improved", 0.05), ("best", 1)))
    assert mean + 0.2 < improved < sharp and best > improved


def test_iqm_by_hand():
    assert iqm([0, 1, 2, 3, 4, 5, 6, 100]) == pytest.approx((2 + 3 + 4 + 5) / 4)
    assert iqm([5, 1, 2, 3, 100, 4, -50]) == pytest.approx((1 + 2 + 3 + 4 + 5) / 5)  # of seven, one is cut at either end


def test_interval_covers_the_mean_nineteen_times_in_twenty():
    rng = np.random.default_rng(0)
    hits = 0
    for trial in range(200):
        low, high = interval([rng.normal(3, 1, 40)], lambda x: x[0].mean(), resamples=200, seed=trial)
        hits += low < 3 < high
    assert 175 <= hits <= 200  # 190 expected


def test_scores_are_scaled_by_the_reference():
    assert normalise([10.0, 20.0, 30.0], {"reference": {"random": 10, "expert": 30}}).tolist() == [0, 0.5, 1]
    assert normalise([10.0], {"reference": None}).tolist() == [10]


def test_summary_of_known_returns():
    metas = [{"name": n, "reference": {"random": 0, "expert": 10}} for n in "abcd"]
    episode = lambda total: data.Episode(None, None, np.array([total / 2, total / 2]), False)
    summary = summarise([[episode(v), episode(v + 2)] for v in (-100, 4, 6, 1000)], metas)
    assert summary["tasks"]["b"]["score"] == pytest.approx(0.5) and summary["tasks"]["b"]["length"] == 2
    assert summary["iqm"] == pytest.approx(0.6)  # of the means -9.9, 0.5, 0.7, 100.1 the middle two


def test_rollouts_are_seeded(trained):
    model, config = evaluation.load_run(trained)
    totals = [[e.reward.sum() for task in rollout(model, config["tasks"], 2, seed)[0] for e in task] for seed in (3, 3, 4)]
    assert totals[0] == totals[1] != totals[2]


def test_the_averaged_weights_are_what_is_loaded(trained):
    model, _ = evaluation.load_run(trained)
    from safetensors.torch import load_file
    stored = load_file(next(evaluation.find_checkpoint(trained).glob("*.safetensors")))
    assert all(torch.equal(v, stored[f"target.{k}"]) for k, v in model.state_dict().items())


class Faulty:
    """An environment of 5 steps; `fault` is called before the third."""
    render_mode = None

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


def crash():
    raise ValueError("the simulation is unstable")


def test_an_environment_that_raises_or_hangs_costs_its_own_episode(model, monkeypatch):
    faults = iter([lambda: None, crash, lambda: time.sleep(60), lambda: None])
    monkeypatch.setattr(evaluation, "make_env", lambda meta, render=False: Faulty(next(faults)))
    monkeypatch.setattr(evaluation, "ENV_SECONDS", 0.2)
    task = {"name": "a", "action_low": [-1.0, -1.0], "action_high": [1.0, 1.0]}
    start = time.monotonic()
    results, _, failed = rollout(model, [task, None], 4, how="mean")
    assert time.monotonic() - start < 30
    assert [len(episode.reward) for episode in results[0]] == [5, 5] and results[1] == []
    assert failed == ["a, episode 1, step 2: ValueError: the simulation is unstable",
                      "a, episode 2, step 2: TimeoutError: no answer within 0.2 s"]
    summary = summarise(results, [task, None], failed)
    assert summary["tasks"]["a"]["returns"] == [5.0, 5.0] and "episode 2" in evaluation.table(summary)


def test_failed_episodes_are_an_exit_code(trained, small_data, tmp_path, monkeypatch, capsys):
    make_env = evaluation.make_env
    monkeypatch.setattr(evaluation, "make_env",
                        lambda meta, render=False: crash() if meta["name"] == "Reacher-v5" else make_env(meta, render))
    with pytest.raises(SystemExit) as end:
        cli(monkeypatch, trained, "--episodes", 1)
    assert end.value.code == evaluation.EPISODES_FAILED == 3
    summary = json.loads((trained / "eval.json").read_text())
    assert list(summary["tasks"]) == ["Hopper-v5"] and len(summary["failed"]) == 1
    assert "Reacher-v5, episode 0, step 0: ValueError" in capsys.readouterr().out
    with pytest.raises(SystemExit) as end:  # training itself goes on
        train.main(["--size", "tiny", "--data", str(small_data), "--out", str(tmp_path / "run"), "--steps", "10",
                    "--batch-size", "32", "--eval-every", "5", "--eval-episodes", "1", "--episodes", "1"])
    assert end.value.code == 3 and evaluation.find_checkpoint(tmp_path / "run").name == "000000010"


def cli(monkeypatch, *flags):
    monkeypatch.setattr(sys, "argv", ["eval.py", *map(str, flags)])
    evaluation.main()


def test_record_and_evaluate_from_the_run_alone(trained, tmp_path, monkeypatch, capsys):
    cli(monkeypatch, trained, "--episodes", 2, "--tasks", "Reacher-v5", "--record", tmp_path / "own")
    cli(monkeypatch, trained, "--episodes", 3, "--tasks", "Reacher-v5", "--record", tmp_path / "own", "--act", "sample")
    task, = data.open_tasks(tmp_path / "own")
    task.verify()
    assert task.meta["episodes"] == 5 and task.meta["transitions"] == 250
    recorded = json.loads((trained / "eval.json").read_text())["tasks"]["Reacher-v5"]["returns"]
    np.testing.assert_allclose(task.episodes["score"][2:], recorded, rtol=1e-5)
    assert "IQM over tasks" in capsys.readouterr().out


def test_recorded_actions_replay_to_the_recorded_observations(trained):
    """What is recorded is what the environment was given, in its own units: Pusher's box, say, is [-2, 2]."""
    model, config = evaluation.load_run(trained)
    tasks = [None, config["tasks"][1]]
    (_, (episode,)), *_ = rollout(model, tasks, 1, seed=5, how="sample", keep=True)
    env = evaluation.make_env(tasks[1])
    obs, _ = env.reset(seed=50_000)
    for step, action in enumerate(episode.action):
        np.testing.assert_allclose(obs, episode.obs[step], atol=1e-6)
        obs = env.step(action)[0]


@pytest.mark.parametrize("flags, message", [
    (["nowhere"], "not a run's folder"),
    (["RUN", "--tasks", "Ant-v5"], "no task 'Ant-v5'; it was trained on: Hopper-v5, Reacher-v5"),
])
def test_bad_input_is_one_line(trained, monkeypatch, capsys, flags, message):
    with pytest.raises(SystemExit) as error:
        cli(monkeypatch, *[str(trained) if flag == "RUN" else flag for flag in flags])
    assert error.value.code == 2 and message in capsys.readouterr().err


def test_comparison_figure(trained, tmp_path, monkeypatch):
    cli(monkeypatch, trained, trained, "--episodes", 1, "--tasks", "Reacher-v5", "--plot", tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 5_000


def readme_commands():
    blocks = re.findall(r"^(?:    |```\w*\n)(.*?)$", (ROOT / "README.md").read_text(), re.M)
    return sorted({line.split("#")[0].strip() for line in blocks if re.search(r"python (-m )?[\w.]+", line)})


def test_every_readme_command_parses():
    """Each `python X ...` line of the README is accepted by X's own parser: flags and choices exist."""
    commands = [part.strip() for line in readme_commands() for part in line.split("&&") if "python " in part]
    assert len(commands) > 8
    script = ("import argparse, runpy, sys\n"
              "parse = argparse.ArgumentParser.parse_args\n"
              "def stop(self, *args):\n"
              "    parse(self, *args)\n"
              "    sys.exit(0)\n"
              "argparse.ArgumentParser.parse_args = stop\n"
              "for command in COMMANDS:\n"
              "    sys.argv = command[1:] if command[0] != '-m' else command[1:]\n"
              "    try:\n"
              "        if command[0] == '-m': runpy.run_module(command[1], run_name='__main__', alter_sys=True)\n"
              "        else: sys.argv = command; runpy.run_path(command[0], run_name='__main__')\n"
              "    except SystemExit as error:\n"
              "        assert not error.code, command\n")
    parsed = [shlex.split(command.split("python ", 1)[1]) for command in commands]
    finished = subprocess.run([sys.executable, "-c", f"COMMANDS = {parsed!r}\n{script}"], cwd=ROOT, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr
