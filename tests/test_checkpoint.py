"""Checkpoints are written whole or not at all, whatever happens, and nothing damaged is read."""

import itertools
import json
import os
import shutil
import signal
import sys
import traceback

import pytest
import torch

import checkpoint
from checkpoint import RunError, checkpoints, find_checkpoint, verify
from learner import Learner, settings_for
from tests.conftest import meta, tiny

resource = pytest.importorskip("resource", reason="these tests fork and set limits: Unix only")


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
    checkpoint.save(run, learner, keep)


def loads(run, learner):
    """The newest checkpoint's number of updates, after checking that it is whole and that one."""
    checkpoint.restore(find_checkpoint(run), learner)
    for parameter in learner.model.parameters():
        assert (parameter == learner.updates).all()
    return learner.updates


# ---------------------------------------------------------------- while it is written

def writes(event, args):
    """Whether an event, which Python announces to hooks, changes the disk."""
    if event == "open":
        return isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR)
    return event in ("os.mkdir", "os.rename", "os.remove", "os.rmdir")


def kill_at_write(number):
    """End this process before its write of that number."""
    left = itertools.count(number, -1)

    def hook(event, args):
        if writes(event, args) and next(left) == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


@pytest.mark.parametrize("before", [(5, 10), (5, 10, 20)])  # 20 is there already: as after --at
def test_a_kill_at_any_write_leaves_a_whole_checkpoint(tmp_path, learner, before):
    for updates in before:
        save_as(updates, tmp_path / "before", learner, keep=3)
    found, end = [], None
    for number in itertools.count():
        run = tmp_path / str(number)
        shutil.copytree(tmp_path / "before", run)

        def killed():
            kill_at_write(number)
            save_as(20, run, learner)

        end = in_child(killed)
        found.append(loads(run, learner))
        for path in checkpoints(run):  # those that --at would find
            verify(path)
        save_as(30, run, learner)  # what the killed one left is no obstacle, and is cleared
        assert loads(run, learner) == 30 and not (run / "checkpoints" / ".partial").exists()
        if end == 0:
            break
        assert end == -signal.SIGKILL
    assert set(found) == {10, 20} and len(found) > 8
    if 20 not in before:
        assert found == sorted(found)


@pytest.mark.parametrize("size", [0, 7, 1_000, 50_000])  # of half a checkpoint's file
def test_a_kill_in_the_middle_of_a_write_leaves_the_checkpoint_before(tmp_path, learner, size):
    save_as(10, tmp_path, learner)

    def killed():
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)  # a write past the limit ends the process
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
        save_as(20, tmp_path, learner)

    assert in_child(killed) == -signal.SIGXFSZ
    assert max(path.stat().st_size for path in tmp_path.rglob(".partial/*/*")) == size
    assert loads(tmp_path, learner) == 10


def test_a_full_disk_leaves_the_checkpoint_before(tmp_path, learner):
    save_as(10, tmp_path, learner)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))  # fails half-way, as on a full disk
    try:
        with pytest.raises(RunError, match="20 could not be written .*File too large.*--resume"):
            save_as(20, tmp_path, learner)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert loads(tmp_path, learner) == 10
    save_as(20, tmp_path, learner)  # there is room again
    assert loads(tmp_path, learner) == 20


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
    save_as(25, tmp_path, learner, keep=1)  # as after --at 20: newer ones are not its to drop
    assert [int(path.name) for path in checkpoints(tmp_path)] == [25, 30, 40]


# ---------------------------------------------------------------- when it is read

def test_any_changed_byte_is_refused(tmp_path, learner):
    save_as(10, tmp_path, learner)
    folder = find_checkpoint(tmp_path)
    for path in folder.iterdir():
        # A changed checksum or name in checkpoint.json looks like a file that is not what it lists.
        named = folder if path.suffix == ".json" else path
        content = bytearray(path.read_bytes())
        for place in range(0, len(content), 1 + len(content) // 40):
            content[place] ^= 1
            path.write_bytes(content)
            with pytest.raises(RunError) as refusal:
                verify(folder)
            assert str(named) in str(refusal.value)
            content[place] ^= 1
        path.write_bytes(content)
    verify(folder)


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
    stored["crc32"][path.name] = checkpoint.crc32(path)  # nothing but its form gives it away
    (folder / "checkpoint.json").write_text(json.dumps(stored))
    with pytest.raises(RunError, match=f"{path} is not a safetensors file"):
        checkpoint.restore(folder, learner)
    assert not (tmp_path / "exploded").exists()


def test_what_is_saved_is_restored(tmp_path, learner):
    for number, tensor in enumerate(checkpoint.learner_tensors(learner).values()):
        tensor.data.fill_(number)
    learner.updates = 7
    checkpoint.save(tmp_path, learner, keep=1)
    other = Learner(learner.model.config, learner.settings, [meta("a", 3, 2)], 100, seed=1)
    checkpoint.restore(find_checkpoint(tmp_path), other)
    assert other.updates == 7
    for number, tensor in enumerate(checkpoint.learner_tensors(other).values()):
        assert (tensor == number).all()


# ---------------------------------------------------------------- the log

def test_the_log_keeps_its_lines_and_its_clock_when_a_run_goes_on(tmp_path):
    path = tmp_path / "metrics.jsonl"
    written = [{"update": update, "seconds": 10.0 * update, "loss": 0.5} for update in (1, 2, 3)]
    path.write_text("".join(json.dumps(line) + "\n" for line in written) + '{"update": 4, "lo')
    log = checkpoint.Log(tmp_path, 2, None)
    log.write(3, {"loss": 0.25})
    log.file.close()
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert lines[:2] == written[:2]  # later ones are made again, and half a line is dropped
    assert len(lines) == 3 and lines[2]["update"] == 3 and lines[2]["loss"] == 0.25
    assert 20 <= lines[2]["seconds"] < 21
