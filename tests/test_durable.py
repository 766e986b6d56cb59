"""What may go wrong in a run: kills, full disks, damage, a second process, bad numbers."""

import json
import os
import shutil
import signal
import sys
from pathlib import Path

import pytest
import torch

import data
import parallel
import prepare
import train
from checkpoint import find_checkpoint, learner_tensors
from learner import POOL, Learner, NonFinite, settings_for
from tests.conftest import batch, meta, tiny
from tests.test_checkpoint import in_child, resource
from tests.test_train import assert_same_end, log, refused, run, tensors


def at_update(number, action):
    """Make this process call `action` before the update of that number."""
    update = Learner.update

    def changed(learner, *args):
        if learner.updates == number:
            action()
        return update(learner, *args)

    Learner.update = changed


def kill(number=signal.SIGKILL):
    os.kill(os.getpid(), number)


# ---------------------------------------------------------------- kills, full disks, damage

def test_a_full_disk_ends_a_run_with_a_message(small_data, tmp_path):
    run(small_data, tmp_path / "whole")

    def limited():
        at_update(15, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, -1)))
        sys.stderr = open(tmp_path / "stderr", "w", buffering=1)
        run(small_data, tmp_path / "run")

    assert in_child(limited) == 2
    message = (tmp_path / "stderr").read_text().splitlines()[-1]
    assert message.startswith("train.py: ")
    assert "File too large" in message and "000000020 could not be written" in message
    train.main(["--resume", str(tmp_path / "run")])
    assert_same_end(tmp_path / "whole", tmp_path / "run")


def test_the_checkpoint_before_is_used_when_asked(capsys, small_data, tmp_path):
    out = tmp_path / "run"
    run(small_data, out, steps=30)
    shutil.copytree(out, tmp_path / "whole")
    path = next(find_checkpoint(out).glob("*.safetensors"))
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    message = refused(capsys, "--resume", out)
    assert f"{path} is damaged" in message and f"--resume {out} --at 20" in message
    assert "there are: 20, 30" in refused(capsys, "--resume", out, "--at", "10")
    train.main(["--resume", str(out), "--at", "20"])
    assert_same_end(tmp_path / "whole", out)


def test_a_run_killed_between_two_checkpoints_makes_those_updates_again(small_data, tmp_path):
    run(small_data, tmp_path / "whole", "--log-every", "1")
    out = tmp_path / "run"

    def killed():
        at_update(17, kill)
        run(small_data, out, "--log-every", "1")

    assert in_child(killed) == -signal.SIGKILL
    assert find_checkpoint(out).name == "000000010" and log(out)[-1]["update"] == 17
    with open(out / "metrics.jsonl", "a") as file:
        file.write('{"update": 18, "lo')  # what a kill in the middle of a line leaves
    train.main(["--resume", str(out)])
    assert_same_end(tmp_path / "whole", out)


def test_a_run_killed_at_its_very_start_can_be_started_again(small_data, tmp_path):
    out = tmp_path / "run"
    (out / "checkpoints").mkdir(parents=True)
    for name in (".lock", "config.json.partial"):
        (out / name).touch()
    run(small_data, out, steps=10)
    whole = tensors(out)
    shutil.rmtree(out / "checkpoints")  # killed before its first checkpoint
    train.main(["--resume", str(out)])
    for name, tensor in tensors(out).items():
        assert torch.equal(tensor, whole[name])


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_one_signal_saves_and_two_leave_at_once(small_data, tmp_path, number):
    def once():
        at_update(13, lambda: kill(number))
        run(small_data, tmp_path / "once")

    def twice():
        parallel.REPEATED = 0  # seconds
        at_update(13, lambda: [kill(number), kill(number)])
        run(small_data, tmp_path / "twice")

    assert in_child(once) == 128 + number
    assert find_checkpoint(tmp_path / "once").name == "000000014"
    assert in_child(twice) == -number
    assert find_checkpoint(tmp_path / "twice").name == "000000010"


# ---------------------------------------------------------------- who writes, and from what

def test_a_second_process_is_refused_and_a_dead_one_does_not_block(capsys, small_data, tmp_path):
    out = tmp_path / "run"
    run(small_data, out, steps=10)
    with data.only_writer(out):
        assert f"{out}: another process is writing here" in refused(capsys, "--resume", out)

    def die():
        with data.only_writer(out):
            kill()

    assert in_child(die) == -signal.SIGKILL
    train.main(["--resume", str(out)])


def test_other_data_than_the_runs_is_refused(capsys, small_data, tmp_path):
    shutil.copytree(small_data, tmp_path / "data")
    run(tmp_path / "data", tmp_path / "run", steps=10)
    path = tmp_path / "data" / "Hopper-v5" / "meta.json"
    path.write_text(path.read_text().replace('"discount": 0.99', '"discount": 0.95'))
    assert "is not the data" in refused(capsys, "--resume", tmp_path / "run")


# ---------------------------------------------------------------- numbers that are not sound

def test_a_loss_that_is_not_finite_stops_the_run_before_the_update(capsys, small_data, tmp_path,
                                                                   monkeypatch):
    seen, loss, choose = [], Learner.loss, Learner.choose

    def watched(learner, candidates, generator):
        seen.append(candidates)
        return choose(learner, candidates, generator)

    def broken(learner, *args):
        value, metrics = loss(learner, *args)
        if learner.updates == 15:
            value = value * float("nan")
        return value, {**metrics, "loss": value}

    monkeypatch.setattr(Learner, "loss", broken)
    monkeypatch.setattr(Learner, "choose", watched)
    with pytest.raises(SystemExit) as stopped:
        run(small_data, tmp_path / "run")
    message = capsys.readouterr().err
    assert stopped.value.code == 2
    assert "update 15: the loss is nan" in message and "--learning-rate" in message
    assert find_checkpoint(tmp_path / "run").name == "000000010"
    report = json.loads((tmp_path / "run" / "nonfinite.json").read_text())
    assert report["update"] == 15 and "grad_norm" in report["metrics"]
    first = 0
    for task in prepare.open_tasks(small_data):  # the rows named are those that were chosen from
        rows, dims = report["rows"][str(task.folder)], task.meta["obs_dim"]
        used = seen[15].obs[first:first + len(rows), 0, :dims]
        assert torch.equal(used, torch.from_numpy(task.rows()[rows, :dims]))
        first += len(rows)
    assert first == 32 * POOL


@pytest.fixture
def learner():
    metas = [meta("a", 3, 2)]
    return Learner(tiny(metas), settings_for("bc"), metas, 100)


def four_steps(number):
    return batch([[number] * 3] * 4, [[0.0] * 2] * 4, [0.0] * 4)


def test_a_gradient_that_is_not_finite_stops_before_the_update(learner):
    loss = learner.loss

    def steep(*args):  # adds 0, with the slope of a root at 0
        value, metrics = loss(*args)
        return value + (0 * learner.model.latents).square().sum().sqrt(), metrics

    learner.forward = steep
    before = {name: tensor.clone() for name, tensor in learner_tensors(learner).items()}
    message = "update 0: the loss is [0-9.]+ and its gradient's norm nan; .*Only the backward"
    with pytest.raises(NonFinite, match=message):
        learner.update(four_steps(0.0), torch.Generator())
    for name, tensor in learner_tensors(learner).items():
        assert torch.equal(before[name], tensor)


def test_the_likely_cause(learner):
    good, bad = four_steps(0.0), four_steps(float("inf"))
    finite, infinite = {"loss": torch.tensor(1.0)}, {"loss": torch.tensor(float("nan"))}
    assert "batch's obs" in learner.likely_cause(bad, infinite)
    assert "backward pass" in learner.likely_cause(good, finite)
    assert "weights have grown" in learner.likely_cause(good, infinite)
    with torch.no_grad():
        learner.model.latents[0, 0, 0] = float("nan")
    assert "latents was not finite" in learner.likely_cause(good, infinite)


def test_warnings_of_a_collapsed_entropy_and_a_runaway_q_are_given_once(small_data, tmp_path,
                                                                        monkeypatch, capsys):
    update = Learner.update

    def unsound(learner, *args):
        metrics = update(learner, *args)
        if learner.updates == 20:
            metrics["policy/entropy"] = torch.tensor(0.05)
        if learner.updates >= 30 and learner.with_metrics:
            metrics["critic/value"] = metrics["critic/observed"] + 0.3
        return metrics

    monkeypatch.setattr(Learner, "update", unsound)
    run(small_data, tmp_path / "run", steps=40)
    lines = "".join(capsys.readouterr()).replace("\r", "\n").splitlines()
    entropy, overestimates = [line for line in lines if "warning: " in line]
    assert "update 20" in entropy and "entropy has collapsed" in entropy
    assert "update 30" in overestimates and "critic overestimates" in overestimates


def test_deterministic_asks_for_the_same_bits(small_data, tmp_path, monkeypatch):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    try:
        run(small_data, tmp_path / "run", "--deterministic", steps=10)
        assert torch.are_deterministic_algorithms_enabled()
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    finally:
        torch.use_deterministic_algorithms(False)
        os.environ.pop("CUBLAS_WORKSPACE_CONFIG", None)


def test_the_readme_says_what_the_same_bits_take():
    assert "--deterministic" in (Path(__file__).parent.parent / "README.md").read_text()
