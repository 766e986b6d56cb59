"""What may go wrong while a run is saved, stopped and resumed: kills, full disks, damage, a second process."""

import itertools
import json
import os
import shutil
import signal
import sys
import traceback
from pathlib import Path

import pytest
import torch

import train
from eval import RunError, checkpoints, find_checkpoint, verify
from learner import Learner, NonFinite, settings_for
from tests.conftest import batch, meta, tiny
from tests.test_train import assert_same_end, log, refused, run, tensors

resource = pytest.importorskip("resource", reason="these tests fork and set limits, as only Unix can")


def start_child(function):
    """Call `function` in a fork of this process -> its process id."""
    child = os.fork()
    if child == 0:
        try:
            function()
        except SystemExit as error:
            os._exit(error.code)
        except BaseException:
            traceback.print_exc()
            os._exit(99)
        os._exit(0)
    return child


def wait_for(child):
    """-> its exit code; minus the signal if one ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def in_child(function):
    return wait_for(start_child(function))


def at_update(number, action):
    """Make this process call `action` before the update of that number."""
    update = train.Learner.update

    def changed(learner, *args):
        if learner.updates == number:
            action()
        return update(learner, *args)

    train.Learner.update = changed


@pytest.fixture
def learner():
    metas = [meta("a", 3, 2)]
    return Learner(tiny(metas), settings_for("bc"), metas, 100)


def save_as(updates, run, learner, keep=2):
    """Save a learner whose every weight is `updates`."""
    learner.updates = updates
    with torch.no_grad():
        for parameter in learner.model.parameters():
            parameter.fill_(updates)
    train.save(run, learner, keep)


def loads(run, learner):
    """The newest checkpoint's number of updates, after checking that it can be loaded and is that one."""
    train.restore(find_checkpoint(run), learner)
    assert all((parameter == learner.updates).all() for parameter in learner.model.parameters())
    return learner.updates


# ---------------------------------------------------------------- while it is written

@pytest.mark.parametrize("again", [False, True])  # again: the same update's checkpoint is there, as after --at
def test_a_kill_at_any_write_leaves_a_whole_checkpoint(tmp_path, learner, again):
    for updates in (5, 10, 20) if again else (5, 10):
        save_as(updates, tmp_path / "before", learner, keep=3)
    found = []
    for number in itertools.count():
        run = tmp_path / str(number)
        shutil.copytree(tmp_path / "before", run)

        def killed():
            left = itertools.count(number, -1)

            def hook(event, args):  # Python announces what it is about to do to the disk
                writes = event in ("os.mkdir", "os.rename", "os.remove", "os.rmdir") or \
                    event == "open" and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR)
                if writes and next(left) == 0:
                    os.kill(os.getpid(), signal.SIGKILL)

            sys.addaudithook(hook)
            save_as(20, run, learner)

        end = in_child(killed)
        found.append(loads(run, learner))
        for path in checkpoints(run):  # those that --at would find
            verify(path)
        save_as(30, run, learner)  # what the killed one left is no obstacle, and is cleared
        assert loads(run, learner) == 30 and not list((run / "checkpoints").glob("*.*"))
        if end == 0:
            break
        assert end == -signal.SIGKILL
    assert set(found) == {10, 20} and len(found) > 8
    assert again or found == sorted(found)


@pytest.mark.parametrize("size", [0, 7, 1_000, 50_000])  # of half a checkpoint's file
def test_a_kill_in_the_middle_of_a_write_leaves_the_checkpoint_before(tmp_path, learner, size):
    save_as(10, tmp_path, learner)

    def killed():
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)  # a write past the limit ends the process
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
        save_as(20, tmp_path, learner)

    assert in_child(killed) == -signal.SIGXFSZ
    assert max(path.stat().st_size for path in tmp_path.rglob("*.partial/*")) == size
    assert loads(tmp_path, learner) == 10


def test_a_full_disk_leaves_the_checkpoint_before(tmp_path, learner):
    save_as(10, tmp_path, learner)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))  # the write fails half-way, as on a full disk
    try:
        with pytest.raises(RunError, match="000000020 could not be written .*File too large.*--resume"):
            save_as(20, tmp_path, learner)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert loads(tmp_path, learner) == 10
    save_as(20, tmp_path, learner)  # there is room again
    assert loads(tmp_path, learner) == 20


def test_a_full_disk_ends_a_run_with_a_message(small_data, tmp_path):
    run(small_data, tmp_path / "whole")

    def limited():
        at_update(15, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, -1)))
        sys.stderr = open(tmp_path / "stderr", "w", buffering=1)
        run(small_data, tmp_path / "run")

    assert in_child(limited) == 2
    message = (tmp_path / "stderr").read_text().splitlines()[-1]
    assert message.startswith("train.py: ") and "File too large" in message and "000000020 could not be written" in message
    train.main(["--resume", str(tmp_path / "run")])
    assert_same_end(tmp_path / "whole", tmp_path / "run")


def test_a_read_only_folder_leaves_the_checkpoint_before(tmp_path, learner):
    save_as(10, tmp_path, learner)
    (tmp_path / "checkpoints").chmod(0o500)
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)  # root may write everywhere
    try:
        with pytest.raises(RunError, match="could not be written .*Permission denied"):
            save_as(20, tmp_path, learner)
    finally:
        os.seteuid(user)
        (tmp_path / "checkpoints").chmod(0o700)
    assert loads(tmp_path, learner) == 10


def test_keep(tmp_path, learner):
    for updates in (10, 20, 30, 40):
        save_as(updates, tmp_path, learner, keep=3)
    assert [int(path.name) for path in checkpoints(tmp_path)] == [20, 30, 40]
    save_as(25, tmp_path, learner, keep=1)  # as after --at 20: the newer ones are not this save's to drop
    assert [int(path.name) for path in checkpoints(tmp_path)] == [25, 30, 40]


# ---------------------------------------------------------------- when it is read

def test_any_changed_byte_is_refused(tmp_path, learner):
    save_as(10, tmp_path, learner)
    folder = find_checkpoint(tmp_path)
    for path in folder.iterdir():
        content = bytearray(path.read_bytes())
        for place in range(0, len(content), 1 + len(content) // 40):
            content[place] ^= 1
            path.write_bytes(content)
            with pytest.raises(RunError) as refusal:
                verify(folder)
            # A changed checksum or name in checkpoint.json looks like a file that is not what it lists.
            assert str(folder if path.suffix == ".json" else path) in str(refusal.value)
            content[place] ^= 1
        path.write_bytes(content)
    verify(folder)


def test_the_checkpoint_before_is_used_when_asked(capsys, small_data, tmp_path):
    run(small_data, tmp_path / "run", steps=30)
    shutil.copytree(tmp_path / "run", tmp_path / "whole")
    path = next(find_checkpoint(tmp_path / "run").glob("*.safetensors"))
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    message = refused(capsys, "--resume", tmp_path / "run")
    assert f"{path} is damaged" in message and f"--resume {tmp_path / 'run'} --at 20" in message
    assert "there are: 20, 30" in refused(capsys, "--resume", tmp_path / "run", "--at", "10")
    train.main(["--resume", str(tmp_path / "run"), "--at", "20"])
    assert_same_end(tmp_path / "whole", tmp_path / "run")


class Bomb:
    def __reduce__(self):
        return os.mkdir, (os.environ["BOMB"],)


def test_a_pickle_is_refused_unread(tmp_path, learner, monkeypatch):
    monkeypatch.setenv("BOMB", str(tmp_path / "exploded"))
    save_as(10, tmp_path, learner)
    folder = find_checkpoint(tmp_path)
    path = next(folder.glob("*.safetensors"))
    torch.save(Bomb(), path)
    stored = json.loads((folder / "checkpoint.json").read_text())
    stored["crc32"][path.name] = train.crc32(path)  # so that nothing but its form gives it away
    (folder / "checkpoint.json").write_text(json.dumps(stored))
    with pytest.raises(RunError, match=f"{path} is not a safetensors file"):
        train.restore(folder, learner)
    assert not (tmp_path / "exploded").exists()


# ---------------------------------------------------------------- who writes

def test_a_second_process_is_refused_and_a_dead_one_does_not_block(capsys, small_data, tmp_path):
    run(small_data, tmp_path / "run", steps=10)
    with train.data.only_writer(tmp_path / "run"):
        assert f"{tmp_path / 'run'}: another process is writing here" in refused(capsys, "--resume", tmp_path / "run")

    def die():
        with train.data.only_writer(tmp_path / "run"):
            os.kill(os.getpid(), signal.SIGKILL)

    assert in_child(die) == -signal.SIGKILL
    train.main(["--resume", str(tmp_path / "run")])


def test_a_run_killed_between_two_checkpoints_makes_those_updates_again(small_data, tmp_path):
    flags = ["--log-every", "1"]
    run(small_data, tmp_path / "whole", *flags)

    def killed():
        at_update(17, lambda: os.kill(os.getpid(), signal.SIGKILL))
        run(small_data, tmp_path / "run", *flags)

    assert in_child(killed) == -signal.SIGKILL
    assert find_checkpoint(tmp_path / "run").name == "000000010" and log(tmp_path / "run")[-1]["update"] == 17
    with open(tmp_path / "run" / "metrics.jsonl", "a") as file:
        file.write('{"update": 18, "lo')  # what a kill in the middle of a line leaves
    train.main(["--resume", str(tmp_path / "run")])
    assert_same_end(tmp_path / "whole", tmp_path / "run")


def test_a_run_killed_at_its_very_start_can_be_started_again(small_data, tmp_path):
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    for name in (".lock", "config.json.partial"):
        (tmp_path / "run" / name).touch()
    run(small_data, tmp_path / "run", steps=10)
    whole = tensors(tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints")  # killed before its first checkpoint
    train.main(["--resume", str(tmp_path / "run")])
    assert all(torch.equal(tensor, whole[name]) for name, tensor in tensors(tmp_path / "run").items())


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_one_signal_saves_and_two_leave_at_once(small_data, tmp_path, number):
    for times in (1, 2):
        out = tmp_path / str(times)

        def signalled():
            at_update(13, lambda: [os.kill(os.getpid(), number) for _ in range(times)])
            run(small_data, out)

        end = in_child(signalled)
        assert end == (128 + number if times == 1 else -number)
        assert find_checkpoint(out).name == ("000000014" if times == 1 else "000000010")


def test_other_data_than_the_runs_is_refused(capsys, small_data, tmp_path):
    shutil.copytree(small_data, tmp_path / "data")
    run(tmp_path / "data", tmp_path / "run", steps=10)
    path = tmp_path / "data" / "Hopper-v5" / "meta.json"
    path.write_text(path.read_text().replace('"discount": 0.99', '"discount": 0.95'))
    assert "is not the data" in refused(capsys, "--resume", tmp_path / "run")


# ---------------------------------------------------------------- numbers that are not sound

def test_a_loss_that_is_not_finite_stops_the_run_before_the_update(capsys, small_data, tmp_path, monkeypatch):
    seen, loss, choose = [], train.Learner.loss, train.Learner.choose

    def watched(learner, candidates, generator):
        seen.append(candidates)
        return choose(learner, candidates, generator)

    def broken(learner, *args):
        value, metrics = loss(learner, *args)
        return (value * float("nan"), {**metrics, "loss": value * float("nan")}) if learner.updates == 15 else (value, metrics)

    monkeypatch.setattr(train.Learner, "loss", broken)
    monkeypatch.setattr(train.Learner, "choose", watched)
    with pytest.raises(SystemExit) as stopped:
        run(small_data, tmp_path / "run")
    message = capsys.readouterr().err
    assert stopped.value.code == 2 and "update 15: the loss is nan" in message and "--learning-rate" in message
    assert find_checkpoint(tmp_path / "run").name == "000000010"
    report = json.loads((tmp_path / "run" / "nonfinite.json").read_text())
    assert report["update"] == 15 and report["metrics"]["policy/entropy"] > 0
    first = 0
    for task in train.data.open_tasks(small_data):  # the rows named are those that the batch was chosen from
        rows = report["rows"][str(task.folder / "rows-000.bin")]
        dims = task.meta["obs_dim"]
        assert torch.equal(seen[15].obs[first:first + len(rows), 0, :dims], torch.from_numpy(task.shard(0)[rows, :dims]))
        first += len(rows)
    assert first == 32 * train.LossSettings().pool


def test_a_gradient_that_is_not_finite_stops_before_the_update(learner):
    loss = learner.loss

    def steep(*args):  # adds 0, with the slope of a root at 0
        value, metrics = loss(*args)
        return value + (0 * learner.model.latents).square().sum().sqrt(), metrics

    learner.forward = steep
    before = {name: tensor.clone() for name, tensor in train.checkpoint_tensors(learner).items()}
    with pytest.raises(NonFinite, match="update 0: the loss is [0-9.]+ and its gradient's norm nan; .*Only the back"):
        learner.update(batch([[0.0] * 3] * 4, [[0.0] * 2] * 4, [0.0] * 4), torch.Generator())
    assert all(torch.equal(before[name], tensor) for name, tensor in train.checkpoint_tensors(learner).items())


def test_the_likely_cause(learner):
    good = batch([[0.0] * 3] * 4, [[0.0] * 2] * 4, [0.0] * 4)
    bad = batch([[float("inf")] * 3] * 4, [[0.0] * 2] * 4, [0.0] * 4)
    finite, infinite = {"loss": torch.tensor(1.0)}, {"loss": torch.tensor(float("nan"))}
    assert "batch's obs" in learner.likely_cause(bad, infinite)
    assert "backward pass" in learner.likely_cause(good, finite)
    assert "weights have grown" in learner.likely_cause(good, infinite)
    with torch.no_grad():
        learner.model.latents[0, 0, 0] = float("nan")
    assert "latents was not finite" in learner.likely_cause(good, infinite)


def test_warnings_of_a_collapsed_entropy_and_a_runaway_q_are_given_once(small_data, tmp_path, monkeypatch, capsys):
    update = train.Learner.update

    def unsound(learner, *args):
        metrics = update(learner, *args)
        if learner.updates == 20:
            metrics["policy/entropy"] = torch.tensor(0.05)
        if learner.updates >= 30:
            metrics["critic/value"] = metrics["critic/observed"] + 0.3
        return metrics

    monkeypatch.setattr(train.Learner, "update", unsound)
    run(small_data, tmp_path / "run", steps=40)
    found = [line for line in "".join(capsys.readouterr()).replace("\r", "\n").splitlines() if "warning: " in line]
    assert ["update 20" in found[0] and "entropy has collapsed" in found[0],
            "update 30" in found[1] and "critic overestimates" in found[1]] == [True, True] and len(found) == 2


def test_deterministic_asks_for_the_same_bits_and_is_documented(small_data, tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    try:
        run(small_data, tmp_path / "run", "--deterministic", steps=10)
        assert torch.are_deterministic_algorithms_enabled() and os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    finally:
        torch.use_deterministic_algorithms(False)
        os.environ.pop("CUBLAS_WORKSPACE_CONFIG", None)
    readme = " ".join((Path(__file__).parent.parent / "README.md").read_text().split())
    assert "On a GPU that holds only with `--deterministic`" in readme
