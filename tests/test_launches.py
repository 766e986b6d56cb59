"""An update as a GPU would get it: the host waits for nothing and launches little; and as a graph.

No GPU is needed. Fake tensors have shapes and no values, so that whatever asks for a value raises;
and the kernels are chosen as on a GPU, since their operators take fake tensors too.
"""

import copy
import json
from collections import Counter
from functools import partial

import pytest
import torch
from torch._subclasses.fake_tensor import (DataDependentOutputException, FakeCopyMode,
                                           FakeTensorMode)
from torch.utils._python_dispatch import TorchDispatchMode

from kernels import attention, categorical_projection, graph, task_linear, triton_support
from kernels.graph import Graphs
from learner import NonFinite
from model import computes_in_bf16, config_for
from studies import gpu
from studies.gpu import metas, new_learner
from studies.kernels import Traffic

# What an update of PAC at size `small` launches, the choice of its rows and the optimiser included:
# 96 matrix products, 45 of LayerNorm and the rest in small steps (studies/speed.md has the parts).
# Fewer is better.
LAUNCHES = 432

needs_triton = pytest.mark.skipif(triton_support.triton is None, reason="triton is not installed")


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """Whatever a kernel can take, it takes; the optimiser and its clip work on lists of tensors."""
    monkeypatch.setattr(triton_support, "find_target", lambda device: "sm_90")
    for module in (attention, categorical_projection, task_linear):
        monkeypatch.setattr(module, "use_kernel", lambda name, backend, device, limit: not limit)
    clip = partial(torch.nn.utils.clip_grad_norm_, foreach=True)
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", clip)


def faked(mode, size, algo="pac"):
    """A learner and candidates without values, that behave as on a GPU."""
    made = new_learner(size, 128, algo, torch.device("cpu"))
    with FakeCopyMode(mode):
        learner, candidates = copy.deepcopy(made)
    learner.waits = learner.with_metrics = False
    return learner, candidates


@needs_triton
@pytest.mark.parametrize("algo", ["pac", "pacv", "bc"])
@pytest.mark.parametrize("warm", [True, False])
def test_the_host_waits_for_nothing_in_an_update(as_on_a_gpu, algo, warm):
    mode = FakeTensorMode()
    learner, candidates = faked(mode, "tiny", algo)
    learner.warmup_updates = 10 * warm
    with mode:
        for _ in range(2):
            metrics = learner.update_from(candidates, torch.Generator())
        assert learner.updates == 2
        with pytest.raises(DataDependentOutputException):  # what asks for a value is seen
            learner.check(metrics)


@needs_triton
def test_an_update_launches_no_more_than_it_did(as_on_a_gpu):
    mode = FakeTensorMode()
    learner, candidates = faked(mode, "small")
    with mode, Traffic() as traffic:
        learner.update_from(candidates, torch.Generator())
    assert traffic.launches <= LAUNCHES


@pytest.mark.parametrize("size, device, has_bf16, wanted", [
    ("medium", "cuda", True, False), ("large", "cuda", True, True), ("l", "cuda", True, True),
    ("l", "cuda", False, False), ("l", "cpu", True, False)])
def test_large_models_compute_in_bf16_on_a_gpu(monkeypatch, size, device, has_bf16, wanted):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: has_bf16)
    assert computes_in_bf16(config_for(size, metas()), torch.device(device)) == wanted


class Casts(TorchDispatchMode):
    """Counts how often each tensor is converted to another type."""

    def __init__(self):
        super().__init__()
        self.of = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function._schema.name == "aten::_to_copy":
            self.of[id(args[0])] += 1
        return function(*args, **(kwargs or {}))


@needs_triton
def test_autocast_makes_one_copy_of_the_weights_an_update(as_on_a_gpu, monkeypatch):
    monkeypatch.setattr("learner.in_bf16", lambda *_: torch.autocast("cpu", torch.bfloat16))
    mode = FakeTensorMode()
    learner, candidates = faked(mode, "small")
    with mode, Casts() as casts:
        learner.update_from(candidates, torch.Generator())
    counts = {}
    for what, model in (("model", learner.model), ("target", learner.target_model)):
        for name, weight in model.named_parameters():
            counts[f"{what}.{name}"] = casts.of[id(weight)]
    assert counts["model.q_head.1.weight"] == counts["target.q_head.1.weight"] == 1
    twice = [name for name, count in counts.items() if count > 1]
    assert twice == ["target.encoder.to_kv.weight"]  # of the words, and of the observation


def test_evaluation_computes_as_training_does(monkeypatch):
    evaluation = pytest.importorskip("eval")  # it imports gymnasium
    learner, batch = new_learner("tiny", 1, "bc_q", torch.device("cpu"))
    obs, task = batch.obs[:, 0], batch.task
    noise = torch.rand(len(obs), *evaluation.draws(learner.model, "improved"))
    precise = evaluation.act(learner.model, obs, task, "improved", noise=noise)
    monkeypatch.setattr("eval.in_bf16", lambda *_: torch.autocast("cpu", torch.bfloat16))
    rounded = evaluation.act(learner.model, obs, task, "improved", noise=noise)
    assert not torch.equal(precise, rounded)
    torch.testing.assert_close(precise, rounded, atol=0.2, rtol=0)


# ---------------------------------------------------------------- updates that failed

def test_an_update_that_failed_unseen_changes_nothing_and_is_named_later():
    learner, candidates = new_learner("tiny", 8, device=torch.device("cpu"))
    learner.waits, generator = False, torch.Generator()
    metrics = learner.update_from(candidates, generator)
    learner.check(metrics)
    before = copy.deepcopy(learner.model.state_dict()), copy.deepcopy(learner.optimizer.state)
    broken = candidates.map(torch.clone)
    broken.rows[:, 0, -3] = float("nan")  # a reward
    learner.update_from(broken, generator)
    metrics = learner.update_from(candidates, generator)  # a good one after it
    after = learner.model.state_dict(), learner.optimizer.state
    for name, tensor in before[0].items():
        assert torch.equal(tensor, after[0][name])
    for state, now in zip(before[1].values(), after[1].values(), strict=True):
        assert all(torch.equal(state[key], now[key]) for key in state)
    with pytest.raises(NonFinite, match="update 1: ") as caught:
        learner.check(metrics)
    assert caught.value.update == 1


# ---------------------------------------------------------------- graphs

def captured(function):
    """As a CUDA graph would: nothing runs at first; then the same work, to the same places."""
    places = {}

    def replay():
        for name, value in function().items():
            places.setdefault(name, value.clone()).copy_(value)
        return places

    return replay


def test_replayed_updates_are_eager_updates_to_the_bit(monkeypatch):
    """The logic around a graph: what is copied to it, drawn for it and read from it."""
    monkeypatch.setattr(graph, "capture", captured)
    monkeypatch.setattr(graph, "aside", lambda function: function())
    results = []
    for wrap in (lambda learner: learner, Graphs):
        learner, candidates = new_learner("tiny", 8, device=torch.device("cpu"))
        learner.settings.target_rate = 0.5  # constant from the second update on
        learner.warmup_updates = 5
        updates, found = wrap(learner), []
        for seed in range(10):
            rows = torch.randn(len(candidates.task), generator=torch.Generator().manual_seed(seed))
            changed = candidates.take(rows.argsort())
            metrics = updates.update_from(changed, torch.Generator().manual_seed(seed))
            found.append({name: value.item() for name, value in metrics.items()})
        assert learner.updates == 10
        weights = [*learner.model.state_dict().values(), *learner.target_weights]
        results.append((found, weights))
    (eager, weights), (replayed, others) = results
    assert eager == replayed
    assert all(map(torch.equal, weights, others))
    assert len(updates.replays) == 2  # one for the warm-up


def test_a_graph_is_refused_on_a_cpu(tmp_path, capsys):
    train = pytest.importorskip("train")  # it imports gymnasium
    with pytest.raises(SystemExit) as ended:
        train.main(["--graph", "--device", "cpu", "--out", str(tmp_path / "run")])
    assert ended.value.code == 2
    assert "--graph is for one GPU" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("flags, by_default", [
    ({}, True), ({"device": "cpu"}, False), ({"graph": False}, False), ({"compile": True}, False),
    ({"recompute": True}, False), ({"deterministic": True}, False), ({"accumulate": 2}, True)])
def test_one_gpu_trains_by_graphs_unless_told_otherwise(flags, by_default, monkeypatch):
    train = pytest.importorskip("train")
    config = train.TrainConfig(**{"device": "cuda", **flags})
    assert train.by_graph(config, [{}]) is by_default
    assert not train.by_graph(config, [{}, {"frame": [64, 64, 3]}])  # a graph reads no pictures
    monkeypatch.setattr(train.parallel, "RANKS", 2)
    assert not train.by_graph(config, [{}])


def test_a_graph_of_pictures_is_refused():
    train = pytest.importorskip("train")
    config = train.TrainConfig(device="cuda", graph=True)
    assert train.by_graph(config, [{}])
    with pytest.raises(train.RunError, match="cannot read pictures"):
        train.by_graph(config, [{"frame": [64, 64, 3]}])


# ---------------------------------------------------------------- the script for a GPU

@pytest.fixture
def cpu_as_gpu(monkeypatch, tmp_path):
    """What studies.gpu asks of CUDA, answered by the CPU -> a function that gives its lines"""
    monkeypatch.setenv("OUT", str(tmp_path))
    monkeypatch.setattr(graph, "capture", captured)
    monkeypatch.setattr(graph, "aside", lambda function: function())
    for name in ("synchronize", "empty_cache", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda: None)
    monkeypatch.setattr(torch._C, "_cuda_clearCublasWorkspaces", lambda: None, raising=False)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 0)
    monkeypatch.setattr(gpu, "graph_us", lambda function, count=20: function() is None)
    monkeypatch.setattr(gpu, "host_us", lambda function, count=100: function() is None)
    monkeypatch.setattr(gpu, "matrix_rate", lambda dtype: 1e12)
    monkeypatch.setattr(gpu, "compiled", lambda function: function)
    monkeypatch.setattr(gpu, "time_updates", partial(gpu.time_updates, seconds=0))
    return lambda: [json.loads(line) for line in open(tmp_path / "gpu.jsonl")]


def test_the_kernels_stage_leaves_a_line_a_contender(cpu_as_gpu):
    gpu.run_cases("kernels", gpu.kernels(2, ("tiny",)))
    lines = cpu_as_gpu()
    ran = [line for line in lines if "refused" not in line]
    assert {"sdpa, its choice", "plain", "compiled"} <= {line["contender"] for line in ran}
    assert all("both_host_us" in line for line in ran)
    refused = [line["refused"] for line in lines if line["contender"] in ("ours", "triton")]
    assert len(refused) == 4 + 2 + 1  # here, since this is no GPU
    assert all("the Triton kernel" in text for text in refused)


def test_the_updates_stage_leaves_a_line_a_way(cpu_as_gpu):
    order = [("tiny", name) for name in gpu.WAYS]
    gpu.run_cases("updates", gpu.updates(8, order))
    _, same, *lines = cpu_as_gpu()
    assert same["graph"] == same["eager"] == 0  # on a CPU
    assert [line["way"] for line in lines] == list(gpu.WAYS)
    for line in lines:
        assert line["updates_per_s"] > 0 and line["dry_run_GB"] > 0, line


def test_a_stage_ends_when_its_time_is_up(cpu_as_gpu, monkeypatch):
    monkeypatch.setitem(gpu.SECONDS, "updates", 0.1)
    assert not gpu.run_stage("updates", False)
    assert cpu_as_gpu()[-1]["ended"] == "out of time"


def test_what_a_case_raises_is_in_its_line_and_the_others_run(cpu_as_gpu, monkeypatch):
    def out_of_memory():
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 2 TB")

    begun = []
    monkeypatch.setattr("os.execv", lambda _, command: begun.append(command[-2:]))
    for broken in (False, True):
        monkeypatch.setattr(gpu, "is_broken", lambda: broken)
        cases = [({"way": 0}, lambda: {"ms": 1}), ({"way": 1}, out_of_memory),
                 ({"way": 2}, lambda: {"ms": 2})]
        gpu.run_cases("updates", cases, first=broken)
    lines = [(line["way"], line.get("ms", line.get("refused"))) for line in cpu_as_gpu()]
    refused = (1, "OutOfMemoryError: CUDA out of memory.")
    assert lines == [(0, 1), refused, (2, 2), refused, (2, 2)]
    assert begun == [["--first", "2"]]  # where CUDA was broken, a new process has the rest


def test_numerics_that_did_not_run_are_not_sound():
    assert gpu.is_sound({"stage": "updates", "refused": "no memory"})
    assert not gpu.is_sound({"stage": "numerics", "refused": "an illegal access"})
    assert not gpu.is_sound({"stage": "numerics", "ok": False})
    assert gpu.is_sound({"stage": "numerics", "ended": "exit code 0"})
