"""Whole runs: every algorithm end to end, resume to the bit, and what a user sees when something is wrong."""

import json
import os
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import train
from eval import find_checkpoint
from learner import ALGORITHMS


def run(data, out, *flags, steps=20):
    train.main(["--size", "tiny", "--data", str(data), "--out", str(out), "--steps", str(steps), "--batch-size", "32",
                "--eval-every", "0", "--episodes", "0", "--log-every", "10", "--save-every", "10", *flags])


def tensors(out):
    return load_file(next(find_checkpoint(out).glob("*.safetensors")))


def log(out):
    lines = [json.loads(line) for line in Path(out, "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "seconds"} for line in lines]


def assert_same_end(one, other):
    """To the bit: weights, optimiser, target network, log."""
    a, b = tensors(one), tensors(other)
    assert a.keys() == b.keys() and [name for name in a if not torch.equal(a[name], b[name])] == []
    assert log(one) == log(other)


@pytest.mark.parametrize("algo", ALGORITHMS)
def test_every_algorithm_end_to_end(small_data, tmp_path, algo, capsys):
    run(small_data, tmp_path / "run", "--algo", algo, "--episodes", "1", "--eval-every", "100", "--eval-episodes", "1",
        steps=200)
    out = capsys.readouterr().out
    assert "IQM over tasks" in out and "Hopper-v5" in out
    lines = log(tmp_path / "run")
    assert lines[-1]["update"] == 200 and lines[-1]["policy/clone_loss"] < lines[0]["policy/clone_loss"]
    if algo in ("pac", "pacv"):  # the warm-up is over: some actions weigh more than others
        assert lines[-1]["policy/ess"] < (7.9 if algo == "pac" else 0.99)
    assert any("eval/Hopper-v5/score" in line for line in lines)
    summary = json.loads((tmp_path / "run" / "eval.json").read_text())
    assert summary["act"] == ("improved" if algo == "pac" else "mean")
    assert (tmp_path / "run" / "curve.png").stat().st_size > 10_000


@pytest.fixture
def signals():
    """Puts back what a run does to the handlers of signals."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


# Of 40 updates 16 are warm-up. Stops: at its last and its first after it, at a save, at an evaluation, anywhere, at the end.
@pytest.mark.parametrize("algo, stops", [("bc", [26]), ("pacv", [26, 28]), ("pac", [20, 25, 28, 29, 33, 40])])
def test_resume_continues_to_the_bit(small_data, tmp_path, algo, stops, monkeypatch, signals):
    flags = ["--algo", algo, "--eval-every", "25", "--eval-episodes", "1"]
    run(small_data, tmp_path / "whole", *flags, steps=40)
    update = train.Learner.update

    def interrupted(learner, *args):  # a stop during an update, as Ctrl-C makes it
        if stops and learner.updates == stops[0] - 1:
            stops.pop(0)
            os.kill(os.getpid(), signal.SIGINT)
        return update(learner, *args)

    monkeypatch.setattr(train.Learner, "update", interrupted)
    out = tmp_path / "parts"
    while stops:
        stop, ahead = stops[0], "--prefetch" if len(stops) % 2 else "--no-prefetch"  # the order of batches is the same
        with pytest.raises(SystemExit) as stopped:
            train.main(["--resume", str(out), ahead]) if (out / "config.json").exists() else \
                run(small_data, out, *flags, ahead, steps=40)
        assert stopped.value.code == 128 + signal.SIGINT and int(find_checkpoint(out).name) == stop
    train.main(["--resume", str(out)])
    assert_same_end(tmp_path / "whole", out)


# ---------------------------------------------------------------- bad input: one line, exit code 2

def refused(capsys, *flags):
    with pytest.raises(SystemExit) as error:
        train.main([str(flag) for flag in flags])
    assert error.value.code == 2
    message = capsys.readouterr().err.strip()
    assert "Traceback" not in message
    return message.splitlines()[-1]


def test_unknown_names_list_the_known(capsys, small_data, tmp_path):
    assert "there are: tiny, small" in refused(capsys, "--size", "huge")
    assert "there are: bc, fc, bcq, pac, pacv" in refused(capsys, "--algo", "dqn")
    assert "no task 'Ant-v5'; there are: Hopper-v5, Reacher-v5" in refused(
        capsys, "--data", small_data, "--tasks", "Ant-v5", "--out", tmp_path / "run")
    assert "unrecognized arguments: --sise" in refused(capsys, "--sise", "tiny")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("flag", ["--batch-size", "--accumulate", "--pool", "--samples", "--n-step"])
def test_a_count_below_one_is_refused(capsys, small_data, tmp_path, flag):
    assert f"{flag} 0: it has to be 1 at the least" in refused(capsys, "--data", small_data, "--out", tmp_path / "run", flag, "0")
    assert not (tmp_path / "run").exists()


def test_missing_data_says_how_to_make_it(capsys, tmp_path):
    assert "python data.py build" in refused(capsys, "--data", tmp_path / "none", "--out", tmp_path / "run")


def test_a_folder_in_use_is_left_alone(capsys, small_data, tmp_path):
    run(small_data, tmp_path / "run", steps=10)
    before = {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()}
    assert "is in use" in refused(capsys, "--data", small_data, "--out", tmp_path / "run")
    assert before == {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()}


def test_resume_names_the_flag_that_differs(capsys, small_data, tmp_path):
    run(small_data, tmp_path / "run", steps=10)
    assert "--batch-size 32, not 64" in refused(capsys, "--resume", tmp_path / "run", "--batch-size", "64")
    assert "--eta 2.0, not 0.9" in refused(capsys, "--resume", tmp_path / "run", "--eta", "0.9")


def test_a_damaged_checkpoint_is_named(capsys, small_data, tmp_path):
    run(small_data, tmp_path / "run", steps=10)
    path, = (tmp_path / "run" / "checkpoints").glob("*/*.safetensors")
    path.write_bytes(path.read_bytes()[:-100])
    assert f"{path} is damaged" in refused(capsys, "--resume", tmp_path / "run")


def test_a_checkpoint_of_another_size_is_refused(capsys, small_data, tmp_path):
    run(small_data, tmp_path / "run", steps=10)
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    config["train"]["size"] = "small"
    (tmp_path / "run" / "config.json").write_text(json.dumps(config))
    assert "another configuration" in refused(capsys, "--resume", tmp_path / "run")


def test_no_run_to_resume(capsys, tmp_path):
    assert "not a run's folder" in refused(capsys, "--resume", tmp_path)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write everywhere")
def test_no_write_permission(capsys, small_data, tmp_path):
    tmp_path.chmod(0o500)
    assert "Permission denied" in refused(capsys, "--size", "tiny", "--data", small_data, "--out", tmp_path / "run")
