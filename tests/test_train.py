"""Whole runs: every algorithm end to end, resumed to the bit, and what a user sees of an error."""

import dataclasses
import importlib.util
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

import checkpoint
import train
from checkpoint import LOGGERS, RunError, find_checkpoint, read_config
from data import MERITS, append
from learner import ALGORITHMS, CRITICS, RENAMED, LossSettings, settings_for
from model import SIZES
from tests.conftest import numbered, task_meta

ROOT = Path(__file__).parent.parent


def run(data, out, *flags, steps=20):
    train.main(["--size", "tiny", "--data", str(data), "--out", str(out), "--steps", str(steps),
                "--batch-size", "32", "--eval-every", "0", "--episodes", "0", "--log-every", "10",
                "--save-every", "10", *flags])


def tensors(out):
    return load_file(next(find_checkpoint(out).glob("*.safetensors")))


def log(out):
    lines = [json.loads(line) for line in Path(out, "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        del line["seconds"]
    return lines


def assert_same_end(one, other):
    """To the bit: weights, optimiser, target network, log."""
    a, b = tensors(one), tensors(other)
    assert a.keys() == b.keys()
    assert [name for name in a if not torch.equal(a[name], b[name])] == []
    assert log(one) == log(other)


# ---------------------------------------------------------------- the flags are the dataclasses'

@pytest.mark.parametrize("file, table", [("train.py", train.TrainConfig),
                                         ("learner.py", LossSettings)])
def test_the_flags_read_as_text_are_the_dataclasses_fields(file, table):
    read = {name: rest for name, *rest in train.fields_of(file, table.__name__)}
    fields = {field.name: field for field in dataclasses.fields(table)}
    assert list(read) == list(fields)
    for name, (kind, default, comment) in read.items():
        assert eval(kind) == fields[name].type and comment
        value = eval(default)
        assert value == fields[name].default and type(value) is type(fields[name].default)


def test_a_setting_of_ones_own_is_a_flag_if_it_has_a_comment(monkeypatch):
    """The README invites to change the loss; a reader's first new line is such a setting."""
    source = (ROOT / "learner.py").read_text()

    def with_setting(line):
        text = source.replace("    alpha: float", f"    {line}\n    alpha: float", 1)
        monkeypatch.setattr(train, "source_of",
                            lambda file: text if file == "learner.py" else
                            (ROOT / file).read_text())

    with_setting("rho: float = 0.7  # of mine")
    assert train.parse_args(["--rho", "-2.5"]).loss == {"rho": -2.5}
    with pytest.raises(SystemExit):
        train.parse_args(["--rho", "inf"])
    for line in ("rho: float = 0.7", "rho: float | None = None  # of mine",
                 "rho: Optional[float] = None  # of mine", "rho: dict = None  # of mine"):
        with_setting(line)
        with pytest.raises(SystemExit, match="LossSettings.rho is to be a flag, so it needs"):
            train.parse_args([])


def test_a_name_of_ones_own_is_a_choice_whatever_its_letters(monkeypatch):
    source = (ROOT / "learner.py").read_text()
    text = source.replace('    "pac": dict(),', '    "pac": dict(),\n    "crr-b+": {"critic": "q"},')
    monkeypatch.setattr(train, "source_of", lambda file: text)
    names = train.names_of("learner.py", "ALGORITHMS")
    assert list(names) == [*ALGORITHMS, "crr-b+"]


@pytest.mark.parametrize("command", ["train.py", "eval.py", "prepare.py"])
def test_flags_are_read_wherever_text_is_not_utf_8(command):
    """On Windows, and with LC_ALL=C: the sources hold other signs than ASCII's."""
    ascii = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    ran = subprocess.run([sys.executable, command, "--help"], cwd=ROOT, env=ascii,
                         capture_output=True)
    assert ran.returncode == 0, ran.stderr


def test_the_names_read_as_text_are_the_tables_keys():
    assert list(train.names_of("model.py", "SIZES")) == list(SIZES)
    assert list(train.names_of("learner.py", "ALGORITHMS")) == list(ALGORITHMS)
    assert list(train.names_of("checkpoint.py", "LOGGERS")) == list(LOGGERS)
    assert list(train.names_of("data.py", "MERITS")) == list(MERITS)
    assert train.names_of("learner.py", "RENAMED") == RENAMED
    assert train.names_of("learner.py", "CRITICS") == CRITICS


def test_flags_set_their_own_fields():
    flags = train.parse_args(["--batch-size", "8", "--no-verify", "--data", "a", "b", "--shard",
                              "--alphas", "1", "0.5", "--learning-rate", "1e-4", "--n-step", "2"])
    assert flags.run == {"batch_size": 8, "verify": False, "data": ["a", "b"], "shard": True,
                         "alphas": [1.0, 0.5]}
    assert flags.loss == {"learning_rate": 1e-4, "n_step": 2}
    assert (flags.resume, flags.at, flags.dry_run) == (None, None, False)


def test_help_shows_every_flag_with_its_comment_and_default(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "500")
    with pytest.raises(SystemExit):
        train.parse_args(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    for name, _, _, comment in train.fields_of("train.py", "TrainConfig"):
        flag = train.flag(name)
        assert f"{flag} {name.upper()}" in text or f"{flag}, --no-{flag[2:]}" in text
        assert comment in text
    for name, _, default, comment in train.fields_of("learner.py", "LossSettings"):
        assert f"{train.flag(name)} {name.upper()} {comment}" in text
        assert f"(pac: {default})" in text


@pytest.mark.parametrize("command", ["train.py", "eval.py", "prepare.py"])
def test_a_typing_error_is_answered_before_torch_is_imported(command):
    script = ("import runpy, sys; sys.modules['torch'] = None; sys.argv = sys.argv[1:]; "
              "runpy.run_path(sys.argv[0], run_name='__main__')")
    result = subprocess.run([sys.executable, "-c", script, command, "--sise"], cwd=ROOT,
                            capture_output=True, text=True)
    assert result.returncode == 2 and "error: " in result.stderr
    assert "Traceback" not in result.stderr


# ---------------------------------------------------------------- whole runs

@pytest.mark.parametrize("algo", ALGORITHMS)
def test_every_algorithm_end_to_end(small_data, tmp_path, algo, capsys):
    out = tmp_path / "run"
    run(small_data, out, "--algo", algo, "--episodes", "1", "--eval-every", "100",
        "--eval-episodes", "1", steps=200)
    printed = capsys.readouterr().out
    assert "IQM over tasks" in printed and "Hopper-v5" in printed
    assert f"look closer with: python eval.py {out}" in printed.splitlines()[-1]
    first, *_, last = log(out)
    assert last["update"] == 200 and last["policy/clone_loss"] < first["policy/clone_loss"]
    if algo in ("pac", "pacv"):  # the warm-up is over: some actions weigh more than others
        assert last["policy/ess"] < (7.9 if algo == "pac" else 0.99)
    assert any("eval/Hopper-v5/score" in line for line in log(out))
    summary = json.loads((out / "eval.json").read_text())
    assert summary["act"] == settings_for(algo).act
    assert (out / "curve.png").stat().st_size > 10_000


def test_the_curve_is_drawn_without_an_evaluation_too(small_data, tmp_path):
    run(small_data, tmp_path / "run", steps=10)
    assert not (tmp_path / "run" / "eval.json").exists()
    assert (tmp_path / "run" / "curve.png").stat().st_size > 10_000


@pytest.fixture
def signals():
    """Puts back what a run does to the handlers of signals."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


# Of 40 updates 16 are warm-up. Stops: at its last and its first after it, at a save, at an
# evaluation, anywhere, at the end.
@pytest.mark.parametrize("algo, stops", [("bc", [26]), ("pacv", [26, 28]),
                                         ("pac", [20, 25, 28, 29, 33, 40])])
def test_resume_continues_to_the_bit(small_data, tmp_path, algo, stops, monkeypatch, signals):
    flags = ["--algo", algo, "--eval-every", "25", "--eval-episodes", "1"]
    run(small_data, tmp_path / "whole", *flags, steps=40)
    update, out, left = train.Learner.update, tmp_path / "parts", list(stops)

    def interrupted(learner, *args):  # a stop during an update, as Ctrl-C makes it
        if left and learner.updates == left[0] - 1:
            left.pop(0)
            os.kill(os.getpid(), signal.SIGINT)
        return update(learner, *args)

    monkeypatch.setattr(train.Learner, "update", interrupted)
    for number, stop in enumerate(stops):
        ahead = "--prefetch" if number % 2 else "--no-prefetch"  # the order of batches is the same
        with pytest.raises(SystemExit) as stopped:
            if number == 0:
                run(small_data, out, *flags, ahead, steps=40)
            else:
                train.main(["--resume", str(out), ahead])
        assert stopped.value.code == 128 + signal.SIGINT
        assert int(find_checkpoint(out).name) == stop
    before = (out / "metrics.jsonl").read_text()
    train.main(["--resume", str(out)])
    assert (out / "metrics.jsonl").read_text().startswith(before)
    assert_same_end(tmp_path / "whole", out)


# ---------------------------------------------------------------- bad input: one line, exit code 2

def refused(capsys, *flags):
    """The last line that a command writes which ends with exit code 2."""
    with pytest.raises(SystemExit) as error:
        train.main([str(flag) for flag in flags])
    assert error.value.code == 2
    message = capsys.readouterr().err.strip()
    assert "Traceback" not in message
    return message.splitlines()[-1]


@pytest.fixture
def new(small_data, tmp_path):
    """Flags of a new run in tmp_path / "run"."""
    return ["--size", "tiny", "--data", small_data, "--out", tmp_path / "run"]


@pytest.fixture
def done(small_data, tmp_path):
    """The folder of a run of ten updates."""
    run(small_data, tmp_path / "run", steps=10)
    return tmp_path / "run"


def test_unknown_names_list_the_known(capsys, new, tmp_path):
    message = refused(capsys, "--size", "huge")
    assert all(f"'{size}'" in message for size in SIZES)
    message = refused(capsys, "--algo", "dqn")
    assert all(f"'{algo}'" in message for algo in ALGORITHMS) and "'fc'" not in message
    assert "no task 'Ant-v5'; there are: Hopper-v5, Reacher-v5" in refused(
        capsys, *new, "--tasks", "Ant-v5")
    assert "unrecognized arguments: --sise" in refused(capsys, "--sise", "tiny")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("old", RENAMED)
def test_an_old_algorithm_is_refused_with_its_new_name(capsys, new, tmp_path, old):
    assert f"'{old}' is called '{RENAMED[old]}' now" in refused(capsys, *new, "--algo", old)
    assert not (tmp_path / "run").exists()


def test_missing_data_says_how_to_make_it(capsys, tmp_path):
    flags = ["--data", tmp_path / "none", "--out", tmp_path / "run"]
    assert "python prepare.py build" in refused(capsys, *flags)


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_folder_in_use_is_left_alone(capsys, done, new):
    before = contents(done)
    assert "is in use" in refused(capsys, *new)
    assert before == contents(done)


@pytest.mark.parametrize("batch_size, accumulate, tasks, critic, said", [
    (128, 1, 132, "v", "a task has 0 at a time, too few: give --batch-size 1056 or more"),
    (128, 4, 7, "v", "a task has 4 at a time, too few: give --batch-size 224 or more"),
    (128, 1, 7, "v", ""), (128, 1, 132, "q", "")])
def test_more_tasks_than_a_batch_can_tell_of(capsys, batch_size, accumulate, tasks, critic, said):
    config = train.TrainConfig(batch_size=batch_size, accumulate=accumulate)
    train.tell_of_few_rows(config, settings_for("pac", critic=critic), tasks)
    err = capsys.readouterr().err
    assert said in err and bool(said) == bool(err)


def test_a_checkpoint_of_the_warm_up_knows_how_q_spreads(small_data, tmp_path):
    """Also without an evaluation there: pi_imp would have equal weights, and be no improvement."""
    run(small_data, tmp_path / "run", "--warmup", "0.9", "--keep", "9")
    early = tmp_path / "run" / "checkpoints" / "000000010"
    found = load_file(next(early.glob("*.safetensors")))
    spreads, = [found[name] for name in found if name.endswith("q_spread") and "target" in name]
    assert (spreads < 1).all()


def test_checkpoints_without_their_run_are_no_start_of_another(capsys, done, new):
    """The new run's own would be fewer, and the newest of all the old run's."""
    for path in done.iterdir():
        if path.name != "checkpoints":
            path.unlink()
    before = contents(done)
    assert "is in use" in refused(capsys, *new)
    assert before == contents(done)


def test_commands_that_are_told_can_be_pasted(tmp_path):
    with pytest.raises(RunError, match="train with `python train.py --out '.*/my run'`"):
        find_checkpoint(tmp_path / "my run")


def test_resume_names_the_flag_that_differs(capsys, done):
    assert "--batch-size 32, not 64" in refused(capsys, "--resume", done, "--batch-size", "64")
    assert "--eta 2.0, not 0.9" in refused(capsys, "--resume", done, "--eta", "0.9")
    assert "--at goes with --resume" in refused(capsys, "--at", "10")


def test_a_damaged_checkpoint_is_named(capsys, done):
    path, = (done / "checkpoints").glob("*/*.safetensors")
    path.write_bytes(path.read_bytes()[:-100])
    assert f"{path} is damaged" in refused(capsys, "--resume", done)


def test_a_checkpoint_of_another_size_is_refused(capsys, done):
    config = read_config(done)
    config["train"]["size"] = "small"
    (done / "config.json").write_text(json.dumps(config))
    assert "another configuration" in refused(capsys, "--resume", done)


def test_a_run_of_another_format_is_refused(capsys, done):
    config = read_config(done)
    del config["format"]
    (done / "config.json").write_text(json.dumps(config))
    assert "has format None, but this code reads" in refused(capsys, "--resume", done)


def test_a_run_that_weighs_its_data_in_a_way_that_is_no_more_is_refused(capsys, done):
    config = read_config(done)
    config["settings"]["merit"] = "advantage"
    (done / "config.json").write_text(json.dumps(config))
    assert f"{done} weighs its data by advantage, which is no more" in refused(
        capsys, "--resume", done)


def test_a_critic_that_is_no_more_is_refused(capsys, done):
    """As after a diff that added one was taken back: the run went on by PAC's loss."""
    config = read_config(done)
    config["settings"]["critic"] = "awac"
    (done / "config.json").write_text(json.dumps(config))
    assert "no critic 'awac': there are q, v" in refused(capsys, "--resume", done, "--steps", 12)


def test_a_task_whose_environment_is_not_here_is_named_before_training(capsys, small_data,
                                                                      tmp_path, monkeypatch):
    known = train.envs.registered

    def missing(env_id):
        if env_id == "Hopper-v5":
            raise ModuleNotFoundError("No module named 'hopping'")
        return known(env_id)

    monkeypatch.setattr(train.envs, "registered", missing)
    run(small_data, tmp_path / "run", steps=2)  # its episodes are none
    assert "no environment here" not in capsys.readouterr().err
    with pytest.raises(SystemExit):
        run(small_data, tmp_path / "other", "--episodes", "1", steps=2)
    err = capsys.readouterr().err
    assert "no environment here for Hopper-v5, so no scores: ModuleNotFoundError: No mod" in err
    assert err.index("no environment here") < err.index("train:")


def test_a_merit_without_weights_is_refused_if_asked_for(capsys, new, small_data, tmp_path):
    assert "the focus is 0" in refused(capsys, *new, "--algo", "bc", "--merit", "return")
    assert not (tmp_path / "run").exists()
    run(small_data, tmp_path / "run", "--algo", "bc", steps=10)  # a former default, which nobody asked for
    config = read_config(tmp_path / "run")
    config["settings"]["merit"] = "return"
    (tmp_path / "run/config.json").write_text(json.dumps(config))
    train.main(["--resume", str(tmp_path / "run"), "--steps", "12"])


@pytest.mark.parametrize("flags, said", [
    ("--algo bc --eta 1", "--eta 1.0 changes nothing: without a critic"),
    ("--algo rwr --n-step 3", "--n-step 3 changes nothing: without a critic"),
    ("--algo one_step --alpha 0.5", "--alpha 0.5 changes nothing: the warm-up is all of the run"),
    ("--algo pac --warmup 1 --n-step 1", "--n-step 1 changes nothing: the warm-up is all"),
    ("--algo one_step --alphas 0.5", "--alphas: one_step only clones"),
    ("--algo pacv --samples 4", "--samples 4 changes nothing: PAC+V improves on the data's"),
    ("--focus 400", "400: it has to be from 0 to 40")])
def test_a_setting_that_changes_nothing_or_overflows_is_refused(capsys, new, tmp_path, flags, said):
    assert said in refused(capsys, *new, *flags.split())
    assert not (tmp_path / "run").exists()


def test_no_run_to_resume(capsys, tmp_path):
    assert "not a run's folder" in refused(capsys, "--resume", tmp_path)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write")
def test_no_write_permission(capsys, new, tmp_path):
    tmp_path.chmod(0o500)
    assert "Permission denied" in refused(capsys, *new)


# ---------------------------------------------------------------- other loggers

def pretend(monkeypatch, installed):
    """As if the loggers' packages were installed, or as if they were not."""
    find_spec = importlib.util.find_spec

    def found(name, *args):
        return installed if name in LOGGERS else find_spec(name, *args)

    monkeypatch.setattr(importlib.util, "find_spec", found)


@pytest.mark.parametrize("name", LOGGERS)
def test_a_logger_that_is_not_installed_is_named_before_anything_is_written(
        capsys, new, tmp_path, monkeypatch, name):
    pretend(monkeypatch, False)
    assert f"--log {name} needs `pip install {name}`" in refused(capsys, *new, "--log", name)
    assert not (tmp_path / "run").exists()


def test_an_unknown_logger_is_refused_with_the_known(capsys, new):
    message = refused(capsys, *new, "--log", "tensorbord")
    assert all(name in message for name in LOGGERS)


def test_loggers_get_what_metrics_jsonl_gets(small_data, tmp_path, monkeypatch):
    pretend(monkeypatch, True)
    seen = []
    monkeypatch.setitem(LOGGERS, "wandb", lambda *_: lambda *line: seen.append(line))
    run(small_data, tmp_path / "run", "--log", "wandb")
    assert seen == [(line.pop("update"), line) for line in log(tmp_path / "run")]


def test_loggers_know_where_a_run_goes_on_and_which_it_is(tmp_path, monkeypatch):
    """Lines that are made again replace the old ones; two runs of one name are two."""
    asked = []
    stub = SimpleNamespace(SummaryWriter=lambda folder, purge_step: asked.append(purge_step),
                           init=lambda **told: asked.append(told["id"]))
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", stub)
    monkeypatch.setitem(sys.modules, "wandb", stub)
    monkeypatch.setattr(checkpoint, "read_config", lambda run: {})
    LOGGERS["tensorboard"](tmp_path, 20)
    assert asked.pop() == 21
    for folder in ("one/pac-0", "one/pac-0", "two/pac-0"):
        (tmp_path / folder).mkdir(parents=True, exist_ok=True)
        LOGGERS["wandb"](tmp_path / folder, 0)
    assert asked[0] == asked[1] != asked[2] and asked[2].startswith("pac-0-")


def test_what_is_seldom_drawn_has_a_scale_too(tmp_path):
    """Of 20,000 transitions none was of it, and its observations were left as they are."""
    for name in ("often", "seldom"):
        append(tmp_path / name / name, [numbered(3, 50, 11, 3)], task_meta(11, 3))
    out = tmp_path / "run"
    train.main(["--data", str(tmp_path / "often"), str(tmp_path / "seldom"), "--weights", "1",
                "1e-6", "--size", "tiny", "--algo", "bc", "--steps", "1", "--batch-size", "4",
                "--episodes", "0", "--out", str(out)])
    mean = tensors(out)["target.obs_mean"]
    assert mean[1, :2].tolist() == pytest.approx(mean[0, :2].tolist(), abs=1)
    assert mean[1, 0] == 3


def test_one_step_of_improvement_has_weights_at_the_end(new, tmp_path):
    """It is warm-up to its end. With Q's spread left at 1, pi_imp's weights are equal."""
    train.main([*map(str, new), "--algo", "one_step", "--steps", "6"])
    assert (tensors(tmp_path / "run")["target.q_spread"] < 0.5).all()
