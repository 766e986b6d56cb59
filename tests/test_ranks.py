"""Several ranks train as one process does, and end together; and what --dry-run says is so.

The ranks here are forks of this process, joined by torch over gloo, as torchrun's would be; one
test starts torchrun itself.
"""

import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import parallel
import train
from checkpoint import find_checkpoint, load_run
from learner import ALGORITHMS, Learner, settings_for
from model import Policy, config_for
from parallel import flops_per_update, memory, nbytes, report
from tests.conftest import batch, meta, tiny, write_task
from tests.test_checkpoint import in_child, resource, start_child, wait_for
from tests.test_durable import at_update, kill
from tests.test_train import log, run

ROOT = Path(__file__).parent.parent
FLAGS = ("--algo", "pacv")  # draws no actions, which would differ from rank to rank


def on_ranks(folder, function, ranks=2):
    """Call function(rank) in forks that torch can join -> [(exit code, stderr)] of the ranks."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def one(rank):
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank),
                          WORLD_SIZE=str(ranks),
                          GLOO_SOCKET_IFNAME="lo" if sys.platform == "linux" else "lo0")
        parallel.RANK, parallel.RANKS = rank, ranks
        sys.stderr = open(folder / f"stderr{rank}", "w", buffering=1)
        function(rank)

    children = [start_child(lambda rank=rank: one(rank)) for rank in range(ranks)]
    codes = [wait_for(child) for child in children]
    return [(code, (folder / f"stderr{rank}").read_text()) for rank, code in enumerate(codes)]


def assert_same_log(one, other):
    assert [line["update"] for line in one] == [line["update"] for line in other] and one
    for a, b in zip(one, other):
        assert a == pytest.approx(b, rel=2e-3, abs=1e-4)


# ---------------------------------------------------------------- whole runs

# With the warm-up shorter, half of the updates are PAC's own: improvement, a bootstrapped critic.
@pytest.mark.parametrize("flags", [("--algo", "pac", "--warmup", "0.5"), FLAGS,
                                   ("--algo", "bc", "--accumulate", "2")])
def test_two_ranks_train_as_one_process_with_the_whole_batch(small_data, tmp_path, flags,
                                                             monkeypatch):
    sample = Policy.sample

    def same_draws(policy, noise):
        """By the same numbers at every state: then it does not matter which rank has the state."""
        same = torch.rand(1, *noise.shape[1:], generator=torch.Generator().manual_seed(0))
        return sample(policy, same.expand_as(noise))

    monkeypatch.setattr(Policy, "sample", same_draws)
    run(small_data, tmp_path / "one", *flags)
    ends = on_ranks(tmp_path, lambda rank: run(small_data, tmp_path / "two", *flags))
    assert [code for code, _ in ends] == [0, 0], ends
    assert_same_log(log(tmp_path / "one"), log(tmp_path / "two"))
    one, two = (load_run(tmp_path / name)[0].state_dict() for name in ("one", "two"))
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=1e-2, atol=1e-3)


def test_a_run_moves_between_numbers_of_ranks(small_data, tmp_path):
    """Sharded on two ranks, the same again, one process, two with all the weights each: the log of
    one whole run."""
    run(small_data, tmp_path / "one", *FLAGS)
    out = tmp_path / "parts"

    def part(rank, number, *flags):
        """Start or resume the run, and stop it after `number` updates."""
        if rank == 1 or parallel.RANKS == 1:  # a signal to one rank stops both, at the same update
            at_update(number - 1, lambda: kill(signal.SIGTERM))
        if (out / "config.json").exists():
            train.main(["--resume", str(out), *flags])
        else:
            run(small_data, out, *FLAGS, *flags)

    def assert_stopped(codes, number):
        newest = find_checkpoint(out)
        assert set(codes) == {128 + signal.SIGTERM} and int(newest.name) == number
        assert len(list(newest.glob("*.safetensors"))) == len(codes)

    ends = on_ranks(tmp_path, lambda rank: part(rank, 5, "--shard", "--recompute"))
    assert_stopped([code for code, _ in ends], 5)
    ends = on_ranks(tmp_path, lambda rank: part(rank, 11))
    assert_stopped([code for code, _ in ends], 11)
    assert_stopped([in_child(lambda: part(0, 15))], 15)
    ends = on_ranks(tmp_path, lambda rank: part(rank, 99, "--no-shard"))
    assert [code for code, _ in ends] == [0, 0], ends
    assert_same_log(log(tmp_path / "one"), log(out))


def test_a_lost_rank_ends_the_others_with_a_message(small_data, tmp_path):
    def killed(rank):
        if rank == 1:
            at_update(15, kill)
        run(small_data, tmp_path / "run", *FLAGS)

    (code, message), (lost, _) = on_ranks(tmp_path, killed)
    assert lost == -signal.SIGKILL and code == 2
    assert "rank 0 stops, since another rank has ended" in message and "--resume" in message
    assert "Traceback" not in message
    assert find_checkpoint(tmp_path / "run").name == "000000010"


def test_torchrun_on_an_unchanged_command(small_data, tmp_path):
    flags = ["--size", "tiny", "--data", str(small_data), "--steps", "20", "--batch-size", "32",
             "--eval-every", "10", "--eval-episodes", "1", "--episodes", "1", "--log-every", "10",
             "--threads", "1", *FLAGS]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "train.py"]
    train.main(["--out", str(tmp_path / "one"), *flags])
    for name, shard in (("ddp", "--no-shard"), ("fsdp", "--shard")):
        out = tmp_path / name
        ranks = subprocess.run([*torchrun, shard, "--out", str(out), *flags], cwd=ROOT, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        assert ranks.returncode == 0, ranks.stdout[-4000:]
        assert_same_log(log(tmp_path / "one"), log(out))


# ---------------------------------------------------------------- less memory

def gradients(learner, rows, accumulate=1, recompute=False):
    learner.accumulate, learner.model.recompute = accumulate, recompute
    learner.gradient(rows, torch.Generator().manual_seed(0))
    return [p.grad.clone() for p in learner.weights if p.grad is not None]


def test_parts_and_recomputing_leave_the_gradient_as_it_is():
    metas = [meta("a", 3, 2)]
    learner = Learner(tiny(metas), settings_for("bc_q"), metas, 100)
    torch.manual_seed(0)
    obs, action, reward = torch.randn(8, 3), torch.rand(8, 2) * 2 - 1, torch.rand(8)
    rows = batch(obs.tolist(), action.tolist(), reward.tolist())
    plain = gradients(learner, rows)
    in_parts = gradients(learner, rows, accumulate=4)
    recomputed = gradients(learner, rows, recompute=True)
    for other in (in_parts, recomputed):
        for one, two in zip(plain, other, strict=True):
            torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-6)


# ---------------------------------------------------------------- --dry-run

def on_meta(size, algo, metas, **changes):
    """A learner without numbers, as --dry-run makes it."""
    return Learner(config_for(size, metas), settings_for(algo, **changes), metas, 0, "meta")


def steps_of(rows, obs_dim=11, action_dim=3):
    return batch([[0.1] * obs_dim] * rows, [[0.2] * action_dim] * rows, [0.3] * rows)


def own(tensors):
    """The tensors, or of sharded ones this rank's part."""
    return [t.to_local() if hasattr(t, "to_local") else t for t in tensors if t is not None]


def held(learner):
    """Bytes that a learner holds in this process, by what for."""
    optimizer = [t for state in learner.optimizer.state.values() for t in state.values()]
    models = [*learner.model.parameters(), *learner.target_model.parameters()]
    return {"weights": nbytes(own(models)),
            "gradients": nbytes(own(p.grad for p in learner.model.parameters())),
            "optimiser": nbytes(own(optimizer))}


@pytest.mark.parametrize("shard", [True, False])
def test_a_rank_has_its_part_of_the_memory(tmp_path, shard):
    """What --dry-run says of two GPUs is what each of two ranks has: half if sharded, or all."""
    metas = [meta("a", 11, 3)]
    need = memory(on_meta("medium", "bc_q", metas), 8)

    def one(rank):
        with parallel.ranks("cpu"):
            learner = Learner(config_for("medium", metas), settings_for("bc_q"), metas, 100)
            parallel.join(learner, shard)
            learner.update(steps_of(8), torch.Generator())
            for name, number in held(learner).items():
                share = need[name] / 2 if shard else need[name]
                assert number == pytest.approx(share, rel=0.05), name

    ends = on_ranks(tmp_path, one)
    assert [code for code, _ in ends] == [0, 0], ends


def test_sharded_blocks_are_gathered_in_bf16_where_they_compute_in_it(tmp_path, monkeypatch):
    """Their shards and gradients stay in float32. A CPU's ranks do so only here."""
    monkeypatch.setattr(parallel, "computes_in_bf16", lambda *_: True)
    monkeypatch.setattr("learner.in_bf16", lambda *_: torch.autocast("cpu", torch.bfloat16))

    def norm(self, x):  # in float32, as by a GPU's autocast
        return torch.layer_norm(x.float(), self.normalized_shape, self.weight.float(),
                                self.bias.float())

    monkeypatch.setattr(torch.nn.LayerNorm, "forward", norm)

    def one(rank):
        with parallel.ranks("cpu"):
            metas, seen = [meta("a", 11, 3)], []
            learner = Learner(config_for("tiny", metas), settings_for("bc_q"), metas, 100)
            parallel.join(learner, True)
            learner.waits = False  # and the rest of what is otherwise on a GPU
            learner.optimizer.param_groups[0]["lr"] = torch.tensor(0.0)
            for block in (learner.model.encoder, learner.model.blocks[0]):
                block.out.register_forward_hook(lambda out, *_: seen.append(out.weight.dtype))
            metrics = learner.update(steps_of(8), torch.Generator())
            learner.check(metrics)
            assert seen == [torch.bfloat16] * 2
            assert metrics["grad_norm"] > 0
            for weight in learner.weights:
                assert weight.dtype == torch.float32
                assert weight.grad is None or weight.grad.dtype == torch.float32

    ends = on_ranks(tmp_path, one)
    assert [code for code, _ in ends] == [0, 0], ends


def test_memory_is_what_an_update_really_takes():
    metas = [meta("a", 11, 3), meta("b", 17, 6)]
    without_numbers = on_meta("medium", "pac", metas, warmup=0.0)
    need = memory(without_numbers, 64)
    learner = Learner(without_numbers.model.config, without_numbers.settings, metas, 100)
    rows = steps_of(64, 17, 6)
    rows.task[::2] = 1
    learner.update(rows, torch.Generator().manual_seed(0))
    for name, number in held(learner).items():
        assert number == need[name]
    kept = {}  # what autograd holds until the backward pass, each memory once

    def keep(tensor):
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss, _ = learner.loss(rows, learner.noise(rows, None), 0.5)
    for parameter in learner.model.parameters():
        kept.pop(parameter.untyped_storage().data_ptr(), None)
    assert 1 / 2 < sum(kept.values()) / need["activations"] < 2
    less = memory(without_numbers, 64, recompute=True)
    assert less["activations"] < 0.7 * need["activations"] and less["weights"] == need["weights"]


@pytest.mark.slow
@pytest.mark.parametrize("size, rows, recompute", [("xxs", 16, False), ("large", 64, False),
                                                   ("large", 64, True)])
def test_the_peak_of_the_memory_is_what_the_dry_run_adds_up_to(tmp_path, size, rows, recompute):
    """Of a process, as the system counts it. The peak is above by what one operation needs."""
    metas, settings = [meta("a", 11, 3)], settings_for("pac", warmup=0.0)
    need = sum(memory(on_meta(size, "pac", metas, warmup=0.0), rows, recompute).values())

    def peak(size):
        learner = Learner(config_for(size, metas), settings, metas, 100)
        learner.model.recompute = recompute
        for _ in range(2):
            learner.update(steps_of(rows), torch.Generator())
        unit = 1024 if sys.platform == "linux" else 1
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit

    def measure():
        before = peak("tiny")  # what torch itself takes
        (tmp_path / "bytes").write_text(str(peak(size) - before))

    assert in_child(measure) == 0
    # 1.45 to 1.57 of the recomputing one
    assert 0.9 < int((tmp_path / "bytes").read_text()) / need < 1.6


@pytest.mark.parametrize("algo", ALGORITHMS)
def test_the_operations_are_those_of_an_update(algo):
    metas = [meta("a", 11, 3)]
    without_numbers = on_meta("medium", algo, metas, warmup=0.0)
    learner = Learner(without_numbers.model.config, without_numbers.settings, metas, 100)
    with FlopCounterMode(display=False) as counter:
        learner.update(steps_of(16), torch.Generator())
    expected = pytest.approx(counter.get_total_flops(), rel=0.1)
    assert flops_per_update(without_numbers, 16) == expected


def test_a_dry_run_is_of_the_data_that_a_run_would_have(tmp_path, monkeypatch, capsys):
    """Another model's numbers, for a wrong path, were taken for those of one's own data."""
    monkeypatch.chdir(tmp_path)

    def parameters(*flags):
        train.main(["--size", "tiny", "--dry-run", *flags])
        return re.search("([0-9,]+) parameters", capsys.readouterr().out)[1]

    default = parameters()
    write_task(tmp_path / "own/a", [3])
    own = parameters("--data", "own")
    assert own != default == parameters("--data", "datasets/tiny/levels")
    assert own != parameters("--data", "own", "datasets/tiny/levels") != default  # of 8 tasks
    for folder in ("onw", "own/a"):
        with pytest.raises(SystemExit) as ended:
            train.main(["--data", folder, "--dry-run"])
        assert ended.value.code == 2 and f"{folder}: no data set here" in capsys.readouterr().err
    (tmp_path / "own/a/meta.json").write_text("{")
    with pytest.raises(SystemExit):
        train.main(["--data", "own", "--dry-run"])
    assert "meta.json: it is damaged" in capsys.readouterr().err


def test_dry_run_of_a_large_size(capsys):
    """python train.py --size l --dry-run, with a batch that 256 GPUs can share"""
    train.main(["--size", "l", "--dry-run", "--batch-size", "256"])
    text = capsys.readouterr().out
    header, *rows = (line.split() for line in text.splitlines()[-10:])
    columns = ["weights", "gradients", "optimiser", "activations", "sum"]
    assert header == ["GPUs", "batch", *columns, "H100", "A100", "RTX", "4090"]
    assert "30% of the peak" in text
    # The large sizes' defaults.
    assert "Sharded (FSDP)" in text and "to recompute activations" in text
    parameters = int(text.split()[0].replace(",", ""))
    assert 0.9e9 < parameters < 1.1e9 and " TFLOP an update of 256 transitions" in text
    assert [(int(row[0]), int(row[1])) for row in rows] == [(2**k, 256 // 2**k) for k in range(9)]
    for gpus, _, *row in rows:
        weights, gradients, optimiser, activations, total = map(float, row[:5])
        share = 8 * parameters / 1e9 / int(gpus)  # the model and its target
        assert weights == pytest.approx(share, abs=1e-3)
        assert total == pytest.approx(weights + gradients + optimiser + activations, abs=3e-3)
    assert rows[0][-1] == "-" and rows[-1][-1] != "-"  # one RTX 4090 is too small


def test_dry_run_leaves_the_disk_alone_and_refuses_unequal_parts(small_data, tmp_path, capsys):
    out = tmp_path / "run"
    train.main(["--size", "tiny", "--data", str(small_data), "--out", str(out), "--dry-run"])
    *_, last = lines = capsys.readouterr().out.splitlines()
    assert not out.exists()
    shares = [tuple(map(int, line.split()[:2])) for line in lines[-9:-1]]
    assert shares == [(2**k, 128 // 2**k) for k in range(8)]
    assert last.split()[0] == "256" and "a batch of 128 has no equal parts" in last


def test_twice_the_gpus_halve_memory_and_time():
    learner = on_meta("medium", "pac", [meta("a", 11, 3)])
    *_, first, second = report(learner, 256, shard=True).splitlines()[:7]
    one, two = first.split()[2:], second.split()[2:]
    for a, b in zip(one, two, strict=True):
        assert float(b) == pytest.approx(float(a) / 2, abs=2e-3)
    seconds_on_an_a100 = flops_per_update(learner, 256) / (0.3 * 312e12)
    assert float(one[-2]) == pytest.approx(seconds_on_an_a100, abs=1e-4)
