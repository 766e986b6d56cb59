"""Several ranks train as one process does, save shards that any number of ranks can read, and end together.

The ranks here are forks of this process, joined by torch over gloo, as torchrun's would be; `pytest -m slow`
also starts torchrun itself.
"""

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import train
from eval import find_checkpoint, load_run
from learner import ALGORITHMS, Learner, flops_per_update, join, memory, report, settings_for
from model import config_for, sample_actions
from tests.conftest import batch, meta, spec, tiny
from tests.test_durable import at_update, in_child, start_child, wait_for
from tests.test_train import log, run

resource = pytest.importorskip("resource")
ROOT = Path(__file__).parent.parent
FLAGS = ("--algo", "pacv")  # draws no actions, which would differ from rank to rank


def on_ranks(folder, function, ranks=2):
    """Call function(rank) in forks that torch can join -> [(exit code, stderr)] of the ranks."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def one(rank):
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(ranks),
                          GLOO_SOCKET_IFNAME="lo" if sys.platform == "linux" else "lo0")
        train.RANK, train.RANKS = rank, ranks
        sys.stderr = open(folder / f"stderr{rank}", "w", buffering=1)
        function(rank)

    children = [start_child(lambda rank=rank: one(rank)) for rank in range(ranks)]
    return [(wait_for(child), (folder / f"stderr{rank}").read_text()) for rank, child in enumerate(children)]


def assert_same_log(one, other):
    assert [line["update"] for line in one] == [line["update"] for line in other] and one
    for a, b in zip(one, other):
        assert a == pytest.approx(b, rel=2e-3, abs=1e-4)


def same_draws(policy, noise):
    """sample_actions, by the same random numbers at every state, so that it does not matter which rank has the state."""
    return sample_actions(policy, torch.rand(1, *noise.shape[1:], generator=torch.Generator().manual_seed(0)).expand_as(noise))


# With the warm-up shorter, half of the updates are PAC's own: improvement, and a bootstrapped critic.
@pytest.mark.parametrize("flags", [["--algo", "pac", "--warmup", "0.5"], FLAGS, ["--algo", "bc", "--accumulate", "2"]])
def test_two_ranks_train_as_one_process_with_the_whole_batch(small_data, tmp_path, flags, monkeypatch):
    monkeypatch.setattr("learner.sample_actions", same_draws)
    run(small_data, tmp_path / "one", *flags)
    ends = on_ranks(tmp_path, lambda rank: run(small_data, tmp_path / "two", *flags))
    assert [code for code, _ in ends] == [0, 0], ends
    assert_same_log(log(tmp_path / "one"), log(tmp_path / "two"))
    one, two = (load_run(tmp_path / name)[0].state_dict() for name in ("one", "two"))
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=1e-2, atol=1e-3)


def test_a_run_moves_between_numbers_of_ranks(small_data, tmp_path):
    """Sharded on two ranks, the same again, one process, then two with all the weights each: the log of one whole run."""
    run(small_data, tmp_path / "one", *FLAGS)
    out = tmp_path / "parts"

    def part(number, *flags):
        """Start or resume the run, and stop it after `number` updates."""
        def of_rank(rank):
            if rank == 1 or train.RANKS == 1:  # a signal to one rank stops both, at the same update
                at_update(number - 1, lambda: os.kill(os.getpid(), signal.SIGTERM))
            train.main(["--resume", str(out), *flags]) if (out / "config.json").exists() else \
                run(small_data, out, *FLAGS, *flags)
        return of_rank

    for number, ranks, flags in ((5, 2, ["--shard", "--recompute"]), (11, 2, []), (15, 1, [])):
        ends = on_ranks(tmp_path, part(number, *flags)) if ranks == 2 else [(in_child(lambda: part(number)(0)), "")]
        assert [code for code, _ in ends] == [128 + signal.SIGTERM] * ranks, ends
        newest = find_checkpoint(out)
        assert int(newest.name) == number and len(list(newest.glob("*.safetensors"))) == ranks
    ends = on_ranks(tmp_path, part(99, "--no-shard"))
    assert [code for code, _ in ends] == [0, 0], ends
    assert_same_log(log(tmp_path / "one"), log(out))


def test_a_lost_rank_ends_the_others_with_a_message(small_data, tmp_path):
    def killed(rank):
        if rank == 1:
            at_update(15, lambda: os.kill(os.getpid(), signal.SIGKILL))
        run(small_data, tmp_path / "run", *FLAGS)

    (code, message), (lost, _) = on_ranks(tmp_path, killed)
    assert lost == -signal.SIGKILL and code == 2
    assert "rank 0 stops, since another rank has ended" in message and "--resume" in message
    assert "Traceback" not in message and find_checkpoint(tmp_path / "run").name == "000000010"


def test_a_rank_has_its_part_of_the_memory(tmp_path):
    """What --dry-run says of two GPUs is what each of two ranks has: half if sharded, all of it otherwise."""
    metas = [meta("a", 11, 3)]
    config, settings = config_for("medium", [spec(metas[0])]), settings_for("bcq")
    need = memory(config, settings, metas, 8)[1]

    def one(rank, shard):
        with train.ranks("cpu"):
            learner = Learner(config, settings, metas, 100)
            join(learner, shard)
            learner.update(batch([[0.1] * 11] * 8, [[0.2] * 3] * 8, [0.3] * 8), torch.Generator())
            size = lambda tensors: sum((t.to_local() if hasattr(t, "to_local") else t).nbytes for t in tensors)
            weights = list(learner.model.parameters())
            has = {"weights": size(weights) + size(learner.target_model.parameters()),
                   "gradients": size(weight.grad for weight in weights if weight.grad is not None),
                   "optimiser": sum(size(state.values()) for state in learner.optimizer.state.values())}
            for name, number in has.items():
                assert number == pytest.approx(need[name] / 2 if shard else need[name], rel=0.05), name

    for shard in (True, False):
        ends = on_ranks(tmp_path, lambda rank: one(rank, shard))
        assert [code for code, _ in ends] == [0, 0], ends


def test_torchrun_on_an_unchanged_command(small_data, tmp_path):
    flags = ["--size", "tiny", "--data", str(small_data), "--steps", "20", "--batch-size", "32", "--eval-every", "10",
             "--eval-episodes", "1", "--episodes", "1", "--log-every", "10", "--threads", "1", *FLAGS]
    train.main(["--out", str(tmp_path / "one"), *flags])
    for name, shard in (("ddp", "--no-shard"), ("fsdp", "--shard")):
        subprocess.run([sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "train.py", shard,
                        "--out", str(tmp_path / name), *flags], cwd=ROOT, check=True)
        assert_same_log(log(tmp_path / "one"), log(tmp_path / name))


# ---------------------------------------------------------------- less memory

def gradients(learner, rows, accumulate=1, recompute=False):
    learner.accumulate, learner.model.recompute = accumulate, recompute
    learner.settings.max_grad_norm = 1e9
    learner.optimizer.step = lambda: None
    learner.update(rows, torch.Generator().manual_seed(0))
    return [p.grad.clone() for p in learner.model.parameters() if p.grad is not None]


def test_parts_and_recomputing_leave_the_gradient_as_it_is():
    metas = [meta("a", 3, 2)]
    learner = Learner(tiny(metas), settings_for("bcq"), metas, 100)
    torch.manual_seed(0)
    rows = batch(torch.randn(8, 3).tolist(), (torch.rand(8, 2) * 2 - 1).tolist(), torch.rand(8).tolist())
    plain = gradients(learner, rows)
    for other in (gradients(learner, rows, accumulate=4), gradients(learner, rows, recompute=True)):
        for a, b in zip(plain, other, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


# ---------------------------------------------------------------- --dry-run

def test_memory_is_what_an_update_really_takes():
    metas = [meta("a", 11, 3), meta("b", 17, 6)]
    config, settings = config_for("medium", [spec(m) for m in metas]), settings_for("pac", warmup=0.0)
    count, need = memory(config, settings, metas, batch_size=64)
    learner = Learner(config, settings, metas, 100)
    rows = batch(torch.randn(64, 17).tolist(), (torch.rand(64, 6) * 2 - 1).tolist(), torch.rand(64).tolist(), task=[0, 1] * 32)
    learner.update(rows, torch.Generator().manual_seed(0))
    size = lambda tensors: sum(tensor.nbytes for tensor in tensors)
    assert count == sum(p.numel() for p in learner.model.parameters())
    assert need["weights"] == size(learner.model.parameters()) + size(learner.target_model.parameters())
    assert need["gradients"] == size(p.grad for p in learner.model.parameters() if p.grad is not None)
    assert need["optimiser"] == sum(size(state.values()) for state in learner.optimizer.state.values())
    kept = {}  # what autograd holds until the backward pass, each memory once

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss, _ = learner.loss(rows, learner.noise(rows, None), False)
    for parameter in learner.model.parameters():
        kept.pop(parameter.untyped_storage().data_ptr(), None)
    assert 1 / 2 < sum(kept.values()) / need["activations"] < 2
    less = memory(config, settings, metas, batch_size=64, recompute=True)[1]
    assert less["activations"] < 0.7 * need["activations"] and less["weights"] == need["weights"]


@pytest.mark.slow
@pytest.mark.parametrize("size, rows, recompute", [("xxs", 16, False), ("large", 64, False), ("large", 64, True)])
def test_the_peak_of_the_memory_is_what_the_dry_run_adds_up_to(tmp_path, size, rows, recompute):
    """Of a whole process, as the system counts it. The peak is above the sum by what one operation needs."""
    metas = [meta("a", 11, 3)]
    settings = settings_for("pac", warmup=0.0)
    need = sum(memory(config_for(size, [spec(metas[0])]), settings, metas, rows, recompute)[1].values())

    def updates(size):
        learner = Learner(config_for(size, [spec(metas[0])]), settings, metas, 100)
        learner.model.recompute = recompute
        for _ in range(2):
            learner.update(batch([[0.1] * 11] * rows, [[0.2] * 3] * rows, [0.3] * rows), torch.Generator())
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1024 if sys.platform == "linux" else 1)

    def measure():
        before = updates("tiny")  # what torch itself takes
        (tmp_path / "bytes").write_text(str(updates(size) - before))

    assert in_child(measure) == 0
    assert 0.9 < int((tmp_path / "bytes").read_text()) / need < 1.6  # 1.45 to 1.57 of the recomputing one


@pytest.mark.parametrize("algo", ALGORITHMS)
def test_the_operations_are_those_of_an_update(algo):
    metas = [meta("a", 11, 3)]
    config, settings = config_for("medium", [spec(metas[0])]), settings_for(algo, warmup=0.0)
    learner = Learner(config, settings, metas, 100)
    rows = batch([[0.1] * 11] * 16, [[0.2] * 3] * 16, [0.3] * 16)
    with FlopCounterMode(display=False) as counter:
        learner.update(rows, torch.Generator())
    assert flops_per_update(config, settings, 16) == pytest.approx(counter.get_total_flops(), rel=0.1)


def test_dry_run_of_a_large_size(capsys):
    """python train.py --size l --dry-run, with a batch that 256 GPUs can share"""
    train.main(["--size", "l", "--dry-run", "--batch-size", "256"])
    text = capsys.readouterr().out
    header, *rows = (line.split() for line in text.splitlines()[-10:])
    assert header[:7] == ["GPUs", "batch", "weights", "gradients", "optimiser", "activations", "sum"]
    assert header[7:] == ["H100", "A100", "RTX", "4090"] and "30% of the peak" in text
    assert "Sharded (FSDP)" in text and "to recompute activations" in text  # the large sizes' defaults
    parameters = int(text.split()[0].replace(",", ""))
    assert 0.9e9 < parameters < 1.1e9 and " TFLOP an update of 256 transitions" in text
    assert [(int(gpus), int(share)) for gpus, share, *_ in rows] == [(2**k, 256 // 2**k) for k in range(9)]
    for gpus, _, *row in rows:
        weights, gradients, optimiser, activations, total = map(float, row[:5])
        assert weights == pytest.approx(8 * parameters / 1e9 / int(gpus), abs=1e-3)  # the model and its target
        assert total == pytest.approx(weights + gradients + optimiser + activations, abs=3e-3)
    assert rows[0][-1] == "-" and rows[-1][-1] != "-"  # one RTX 4090 is too small


def test_dry_run_leaves_the_disk_alone_and_shares_the_work(small_data, tmp_path, capsys):
    train.main(["--size", "tiny", "--data", str(small_data), "--out", str(tmp_path / "run"), "--dry-run"])
    lines = capsys.readouterr().out.splitlines()
    assert not (tmp_path / "run").exists()
    assert [tuple(map(int, line.split()[:2])) for line in lines[-9:-1]] == [(2**k, 128 // 2**k) for k in range(8)]
    assert lines[-1].split()[0] == "256" and "a batch of 128 has no equal parts" in lines[-1]
    metas = [meta("a", 11, 3)]
    config = config_for("medium", [spec(metas[0])])
    one, two = (line.split() for line in report(config, settings_for("pac"), metas, 256, shard=True).splitlines()[-9:-7])
    for a, b in zip(one[2:], two[2:]):  # memory and time are halved
        assert float(b) == pytest.approx(float(a) / 2, abs=2e-3)
    flops = flops_per_update(config, settings_for("pac"), 256)
    assert float(one[-2]) == pytest.approx(flops / (0.3 * 312e12), abs=1e-4)  # on an A100
