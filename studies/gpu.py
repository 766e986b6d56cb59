"""What only a GPU can tell, in one script for the first GPU at hand.

    python -m studies.gpu                      all stages, in seven minutes; then the score
    python -m studies.gpu --cpu                without a GPU: the numerics alone, interpreted
    python -m studies.gpu --stages updates     one stage

    numerics    every kernel at the models' own shapes against float64, its outputs NaN before
    kernels     each kernel against PyTorch's ways: the GPU's time by graph replay, the host's apart
    updates     whole updates at each size: kernels or plain, eager, compiled or graph, bf16 or fp32
    score       train.py --size small to its score, where gymnasium and mujoco are installed

A stage is a process of its own and is ended when its time is up. It goes through its cases, of
which each is a JSON line, appended at once to gpu.jsonl in $OUT, or in results/; what a case raises
is in its line. Only torch, triton, numpy, tqdm, safetensors and matplotlib are needed. Without a
GPU, TRITON_INTERPRET=1 is set for the stage.
"""

import argparse
import gc
import importlib.util
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from contextlib import contextmanager
from datetime import date
from functools import lru_cache, partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile

import learner as learner_module
from data import Batch
from kernels import graph, triton_support
from kernels.attention import attention, attention_plain, attention_reference
from kernels.categorical_projection import bellman_cross_entropy, bellman_cross_entropy_reference
from kernels.graph import Graphs
from kernels.task_linear import task_linear, task_linear_reference
from learner import Learner, settings_for
from model import SIZES, Scalars, config_for
from parallel import flops_per_update, memory
from studies import RESULTS, print_table

SECONDS = {"numerics": 60, "kernels": 150, "updates": 220, "score": 900}  # of each stage
DIMS = {  # the default tasks: observation scalars, action dimensions, words of the instruction
    "HalfCheetah": (17, 6, 11), "Hopper": (11, 3, 7), "Walker2d": (17, 6, 7), "Swimmer": (8, 2, 8),
    "DoublePendulum": (9, 1, 8), "Reacher": (10, 2, 9), "Pusher": (23, 7, 9)}
TOKENS = 8 + 11  # of an observation: its own, and the words of the longest instruction
NAN = float("nan")
GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")


def say(**row):
    """Print a result, and append it to gpu.jsonl."""
    line = json.dumps(row)
    print(line, flush=True)
    with open(Path(os.environ.get("OUT", RESULTS)) / "gpu.jsonl", "a") as file:
        file.write(line + "\n")


def reason(error):
    return f"{type(error).__name__}: {error}".splitlines()[0][:200]


def is_broken():
    """Whether CUDA works no more, as after an illegal access or a capture that failed."""
    try:
        torch.randn(1, device=DEVICE).item()
    except RuntimeError:
        return True
    return False


def run_cases(stage, cases, first=0):
    """Say a row for each case of a stage, a pair (about, measure), from the `first` on.

    Where a case broke CUDA, this process becomes a new one, for the cases after it.
    """
    for number, (about, measure) in enumerate(cases):
        if number < first:
            continue
        row = {"stage": stage, **about}
        try:
            row |= measure()
        except Exception as error:
            row["refused"] = reason(error)
        say(**row)
        if "refused" in row and is_broken():
            again = ["-m", "studies.gpu", "--stage", stage, "--first", str(number + 1)]
            os.execv(sys.executable, [sys.executable, *again])


# ---------------------------------------------------------------- hand-made inputs

def metas():
    """The default tasks, as a data set would describe them."""
    found = []
    for name, (obs_dim, action_dim, words) in DIMS.items():
        found.append({"name": name, "instruction": " ".join(f"w{i}" for i in range(words)),
                      "obs_dim": obs_dim, "action_dim": action_dim, "discount": 0.99,
                      "return_to_go": [0.0, 1.0]})
    return found


def new_learner(size, batch_size, algo="pac", device=DEVICE):
    """-> a Learner past its warm-up, and a Batch of candidates that is made up"""
    tasks = metas()
    settings = settings_for(algo, warmup=0.0)
    learner = Learner(config_for(size, tasks), settings, tasks, 1000, device)
    obs_dim, action_dim = [max(meta[name] for meta in tasks) for name in ("obs_dim", "action_dim")]
    count = batch_size * learner.pool
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(count, settings.n_step + 1, obs_dim + action_dim + 3, generator=generator)
    rows = rows.clamp(-1, 1)
    rows[..., -1] = 0  # ordinary steps
    worth = torch.rand(count, generator=generator)
    return learner, Batch(rows, obs_dim, torch.arange(count) % len(tasks), worth=worth).to(device)


class Shape(NamedTuple):
    """Of one attention in a model."""
    size: str
    what: str
    heads: int
    queries: int
    keys: int
    width: int
    masked: bool


def shapes(sizes):
    for size in sizes:
        model = SIZES[size]
        heads, latents = model["heads"], model["latents"]
        width = model["width"] // heads
        for what, queries, keys, masked in (("encoder", latents, TOKENS, True),
                                            ("latents", latents, latents, False),
                                            ("policy", 8, latents, False),
                                            ("one action", 1, latents, False)):
            yield Shape(size, what, heads, queries, keys, width, masked)


def attention_inputs(shape, batch_size, dtype):
    """q, k and v as a model makes them, views of (B, L, H, D), and a mask, or None."""
    inputs = []
    for length in (shape.queries, shape.keys, shape.keys):
        x = torch.randn(batch_size, length, shape.heads, shape.width, device=DEVICE, dtype=dtype)
        inputs.append(x.transpose(1, 2).requires_grad_())
    if not shape.masked:
        return inputs, None
    lengths = torch.randint(9, shape.keys + 1, (batch_size, 1), device=DEVICE)
    return inputs, torch.arange(shape.keys, device=DEVICE) < lengths


def bellman_inputs(batch_size, atoms=101):
    """The logits to learn, and the target's parts."""
    logits = torch.randn(batch_size, atoms, device=DEVICE, requires_grad=True)
    probs = torch.softmax(torch.randn(batch_size, atoms, device=DEVICE), dim=-1)
    return logits, [probs, *torch.rand(3, batch_size, device=DEVICE)]


def task_inputs(what, size, batch_size):
    """weight and bias to learn; x and task; the other arguments, of the encoder of a model."""
    obs = what == "observations"
    dims = [obs_dim if obs else action_dim for obs_dim, action_dim, _ in DIMS.values()]
    encoder = Scalars(dims, 8 if obs else 1, SIZES[size]["width"]).to(DEVICE)
    each = () if obs else (8,)  # actions drawn at a state
    x = torch.randn(batch_size, *each, max(dims), device=DEVICE)
    task = torch.randint(len(dims), (batch_size,), device=DEVICE)
    statistics_of_tasks = (None, None)
    if obs:
        statistics_of_tasks = torch.randn(2, len(dims), max(dims), device=DEVICE).exp()
    tables = (encoder.heights, encoder.scales, *statistics_of_tasks)
    return [encoder.weight, encoder.bias], (x, task), tables


# ---------------------------------------------------------------- numerics

@contextmanager
def poisoned():
    """Every new output of a kernel starts as NaN, so that what is not written shows."""
    new_empty = torch.Tensor.new_empty

    def filled(*args, **kwargs):
        tensor = new_empty(*args, **kwargs)
        return tensor.fill_(NAN) if tensor.is_floating_point() else tensor

    torch.Tensor.new_empty = filled
    try:
        yield
    finally:
        torch.Tensor.new_empty = new_empty


def run(function, inputs, seed=0):
    """The function's value and its gradients, for a fixed incoming gradient."""
    out = function(*inputs)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(seed)).to(out)
    return [out.detach(), *torch.autograd.grad(out, inputs, grad)]


def worst(results, exacts):
    """The largest relative error, by norms."""
    errors = []
    for result, exact in zip(results, exacts):
        errors.append((result.double() - exact).norm() / exact.norm().clamp(min=1e-30))
    return max(float(error) for error in errors)


def doubled(tensor):
    """In float64 and detached, if it is a tensor of numbers."""
    if not isinstance(tensor, torch.Tensor) or not tensor.is_floating_point():
        return tensor
    return tensor.detach().double()


def compare(fused, plain, inputs, others):
    """How far a kernel and plain PyTorch are from float64. Only inputs get gradients."""
    with poisoned():
        ours, again = [run(lambda *x: fused(*x, *others), inputs) for _ in range(2)]
    same = run(lambda *x: plain(*x, *others), inputs)
    precise = [doubled(x) for x in others]
    exact = run(lambda *x: plain(*x, *precise), [doubled(x).requires_grad_() for x in inputs])
    error, plain_error = worst(ours, exact), worst(same, exact)
    return {"error": error, "plain_error": plain_error, "ok": error <= 2 * plain_error + 1e-6,
            "same_bits": all(map(torch.equal, ours, again))}


def check_task_linear(what, batch_size):
    learnt, rows, tables = task_inputs(what, "small" if GPU else "tiny", batch_size)

    def by_task(weight, bias, x, task, *tables):
        return task_linear(x, task, weight, bias, *tables, backend="triton")

    def by_task_plainly(weight, bias, x, task, *tables):
        return task_linear_reference(x, task, weight, bias, *tables)

    return compare(by_task, by_task_plainly, learnt, (*rows, *tables))


def check_bellman(batch_size):
    logits, target = bellman_inputs(batch_size)
    return compare(partial(bellman_cross_entropy, backend="triton"),
                   bellman_cross_entropy_reference, [logits], (*target, 0.5))


def check_nan(position):
    """A NaN in any input of the Bellman target has to reach its loss."""
    logits, target = bellman_inputs(4)
    inputs = [logits.detach(), *target]
    inputs[position][1] = NAN
    loss = bellman_cross_entropy(*inputs, 0.5, backend="triton")
    return {"ok": loss.isnan().tolist() == [False, True, False, False]}


def check_attention(shape, batch_size, dtype):
    inputs, mask = attention_inputs(shape, batch_size, dtype)
    return compare(partial(attention, backend="triton"), attention_reference, inputs, (mask,))


def numerics():
    torch.manual_seed(0)
    sizes = SIZES if GPU else ("tiny", "small", "large")
    batch_size = 128 if GPU else 2
    for what in ("observations", "actions"):
        about = {"kernel": "task_linear", "what": what}
        yield about, partial(check_task_linear, what, batch_size)
    yield {"kernel": "bellman", "what": "loss"}, partial(check_bellman, batch_size)
    for position, what in enumerate(("logits", "next_probs", "shift", "scale", "returns")):
        yield {"kernel": "bellman", "what": f"NaN in {what}"}, partial(check_nan, position)
    for shape in shapes(sizes):
        if not GPU:
            shape = shape._replace(heads=2)
        rows = 16 if shape.size == "l" else batch_size
        for dtype in (torch.float32, torch.bfloat16):
            about = {"kernel": "attention", "what": shape.what, "size": shape.size}
            yield about | {"dtype": str(dtype)}, partial(check_attention, shape, rows, dtype)


# ---------------------------------------------------------------- kernels

def graph_us(function, count=20):
    """Microseconds on the GPU of one call among many in a CUDA graph: the host costs nothing."""
    graph.aside(function)
    replay = graph.capture(lambda: [function() for _ in range(count)])
    times = []
    for _ in range(10):
        begin, end = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
        begin.record()
        replay()
        end.record()
        torch.cuda.synchronize()
        times.append(1e3 * begin.elapsed_time(end) / count)
    return statistics.median(times)


def host_us(function, count=100):
    """Microseconds that the host needs to launch one call."""
    torch.cuda.synchronize()
    begin = time.perf_counter()
    for _ in range(count):
        function()
    took = time.perf_counter() - begin
    torch.cuda.synchronize()
    return 1e6 * took / count


def time_contender(function, inputs):
    """How long a contender takes, forward, and forward and backward."""
    grad = torch.randn_like(function(*inputs))  # not every backend takes every shape

    def forward():
        with torch.no_grad():
            function(*inputs)

    def both():
        torch.autograd.grad(function(*inputs), inputs, grad)

    row = {}
    for name, part in (("forward", forward), ("both", both)):
        row[f"{name}_us"], row[f"{name}_host_us"] = graph_us(part), host_us(part)
    return row


def with_sdpa(backend, mask):
    attend = None if mask is None else mask[:, None, None, :]

    def attend_by(q, k, v):
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v, attn_mask=attend)

    return attend_by


def compiled(function):
    """Compiled for these shapes alone; what was compiled before is forgotten."""
    torch._dynamo.reset()
    return torch.compile(function, dynamic=False)


def kernels(batch_size=128, sizes=("small", "large", "s")):
    from torch.nn.attention.flex_attention import flex_attention
    cases = []
    for shape in shapes(sizes):
        about = {"kernel": "attention", **shape._asdict(), "B": batch_size}
        cases.append((about, *attention_inputs(shape, batch_size, torch.bfloat16)))
    for about, inputs, mask in cases:
        contenders = {"ours": partial(attention, mask=mask, backend="triton"),
                      "sdpa, its choice": partial(attention_plain, mask=mask)}
        for name in ("FLASH_ATTENTION", "CUDNN_ATTENTION", "EFFICIENT_ATTENTION"):
            contenders[f"sdpa {name.lower()}"] = with_sdpa(getattr(SDPBackend, name), mask)
        for name, contender in contenders.items():
            yield about | {"contender": name}, partial(time_contender, contender, inputs)
    for size in sizes:
        for what in ("observations", "actions"):
            learnt, (x, task), tables = task_inputs(what, size, batch_size)
            about = {"kernel": "task_linear", "size": size, "what": what, "B": batch_size}
            for name in ("triton", "plain"):
                contender = lambda *learnt: task_linear(x, task, *learnt, *tables, backend=name)
                yield about | {"contender": name}, partial(time_contender, contender, learnt)
    logits, target = bellman_inputs(batch_size)
    for name in ("triton", "plain"):
        contender = lambda x: bellman_cross_entropy(x, *target, 0.5, backend=name)
        about = {"kernel": "bellman", "B": batch_size, "contender": name}
        yield about, partial(time_contender, contender, [logits])
    for about, inputs, mask in cases:  # last, since compiling takes seconds each
        written_out = compiled(partial(attention_reference, mask=mask))
        yield about | {"contender": "compiled"}, partial(time_contender, written_out, inputs)
        if mask is None:
            flex = compiled(flex_attention)
            yield about | {"contender": "flex"}, partial(time_contender, flex, inputs)


# ---------------------------------------------------------------- updates

class Way(NamedTuple):
    """How an update is made."""
    kernels: bool = True
    graph: bool = False
    compile: bool = False
    bf16: bool = False


WAYS = {
    "kernels, fp32": Way(),
    "kernels, fp32, graph": Way(graph=True),
    "plain, fp32": Way(kernels=False),
    "plain, fp32, graph": Way(kernels=False, graph=True),
    "kernels, bf16": Way(bf16=True),
    "kernels, bf16, graph": Way(graph=True, bf16=True),
    "plain, bf16, graph": Way(kernels=False, graph=True, bf16=True),
}
COMPILED = {"kernels, bf16, compiled": Way(compile=True, bf16=True)}
# In this order, as time may run out: compiling takes a minute.
ORDER = ([("small", name) for name in WAYS] +
         [("s", "kernels, bf16, graph"), ("s", "plain, bf16, graph"), ("s", "kernels, bf16")] +
         [(size, name) for size in ("large", "tiny", "medium", "xxs")
          for name in ("kernels, fp32, graph", "kernels, bf16, graph", "plain, bf16, graph",
                       "kernels, bf16")] +
         [("small", name) for name in COMPILED])


@contextmanager
def made(way):
    """Kernels or none, bf16 or fp32, whatever a model would choose."""
    find_target, in_bf16 = triton_support.find_target, learner_module.in_bf16
    if not way.kernels:
        triton_support.find_target = lambda device: None
    learner_module.in_bf16 = lambda config, device: torch.autocast(device.type, torch.bfloat16,
                                                             enabled=way.bf16)
    try:
        yield
    finally:
        triton_support.find_target, learner_module.in_bf16 = find_target, in_bf16


def matrix_rate(dtype, size=8192):
    """FLOP/s that this GPU reaches in a large product."""
    a, b = torch.randn(2, size, size, device=DEVICE, dtype=dtype)
    return 2 * size**3 / (1e-6 * graph_us(lambda: a @ b, count=2))


def launched(update):
    """Launches of an update, and the GPU's milliseconds in them."""
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as found:
        update()
        torch.cuda.synchronize()
    on_gpu = torch.autograd.DeviceType.CUDA
    events = [event for event in found.events() if event.device_type == on_gpu]
    return len(events), sum(event.device_time_total for event in events) / 1e3


def time_updates(update, seconds=2):
    """Seconds of an update, the median of five rounds."""
    torch.cuda.synchronize()
    begin = time.perf_counter()
    update()
    torch.cuda.synchronize()
    count = max(1, round(seconds / 5 / (time.perf_counter() - begin)))
    rounds = []
    for _ in range(5):
        begin = time.perf_counter()
        for _ in range(count):
            update()
        torch.cuda.synchronize()
        rounds.append((time.perf_counter() - begin) / count)
    return statistics.median(rounds)


@lru_cache
def on_paper(size, batch_size):
    """FLOP of an update, and the GB that --dry-run says of it."""
    learner = new_learner(size, 1, device="meta")[0]
    return (flops_per_update(learner, batch_size),
            sum(memory(learner, batch_size).values()) / 1e9)


def measure_way(size, way, rates, batch_size):
    """A row of what updates at a size take, made in a way."""
    gc.collect()  # a learner holds itself
    torch._C._cuda_clearCublasWorkspaces()  # 32 MB for each stream that any case has had
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    learner, candidates = new_learner(size, batch_size)
    generator = torch.Generator(DEVICE)
    learner.updates = learner.total_updates // 2  # theta' is a lagged average by then
    learner.with_metrics = way.graph or way.compile  # as train.py has it
    updates = Graphs(learner) if way.graph else learner
    if way.compile:
        torch._dynamo.reset()
        learner.compile()

    def update():
        generator.manual_seed(0)
        updates.update_from(candidates, generator)

    begin = time.perf_counter()
    for _ in range(3):
        update()
    torch.cuda.synchronize()
    first = time.perf_counter() - begin
    seconds = time_updates(update)
    learner.check({})
    flops, dry_run = on_paper(size, batch_size)
    launches, busy_ms = launched(update)
    return {"ms": 1e3 * seconds, "updates_per_s": 1 / seconds, "first_3_s": first,
            "launches": launches, "busy_ms": busy_ms,
            "of_matrix_rate": flops / seconds / rates[way.bf16],
            "GB": torch.cuda.max_memory_allocated() / 1e9,
            "dry_run_GB": dry_run}


def after_updates(by_graph, count=20):
    """The weights of a `small` model after a few updates, of given random numbers."""
    learner, candidates = new_learner("small", 128)
    generator = torch.Generator(DEVICE)
    learner.updates = learner.total_updates // 2
    updates = Graphs(learner) if by_graph else learner
    for number in range(count):
        generator.manual_seed(number)
        updates.update_from(candidates, generator)
    learner.check({})
    return torch.cat([weight.detach().flatten() for weight in learner.weights])


def compare_graph():
    """The largest difference of a weight: between a graph's and eager updates, and of these twice.

    Adam makes large steps of gradients that are rounding alone: noise of a millionth of the
    gradients' size, added to each on a CPU, moves a weight by 0.0017.
    """
    eager, again, graph = [after_updates(by_graph) for by_graph in (False, False, True)]
    found = {"graph": graph, "eager": again}
    return {name: float((weights - eager).abs().max()) for name, weights in found.items()}


def measure_updates(size, way, *others):
    with made(way):
        return measure_way(size, way, *others)


def updates(batch_size=128, order=ORDER):
    rates = {True: matrix_rate(torch.bfloat16), False: matrix_rate(torch.float32)}
    say(stage="updates", bf16_TFLOPs=rates[True] / 1e12, fp32_TFLOPs=rates[False] / 1e12)
    yield {"weights after 20 updates": "largest difference"}, compare_graph
    ways = WAYS | COMPILED
    for size, name in order:
        about = {"size": size, "way": name, "B": batch_size}
        yield about, partial(measure_updates, size, ways[name], rates, batch_size)


# ---------------------------------------------------------------- the score

def train_to_the_end():
    missing = [name for name in ("gymnasium", "mujoco") if not importlib.util.find_spec(name)]
    if missing:
        raise ImportError(f"not installed: {', '.join(missing)}")
    out = Path(os.environ.get("OUT", "runs")) / f"gpu-{int(time.time())}"
    begin = time.perf_counter()
    command = ["train.py", "--size", "small", "--episodes", "20", "--out", out]
    subprocess.run([sys.executable, *command], check=True, cwd=RESULTS.parent)
    summary = json.loads((out / "eval.json").read_text())
    last = json.loads((out / "metrics.jsonl").read_text().splitlines()[-1])
    return {"minutes": (time.perf_counter() - begin) / 60, "training_s": last["seconds"],
            "iqm": summary["iqm"],
            "scores": {name: row["score"] for name, row in summary["tasks"].items()}}


def score():
    yield {}, train_to_the_end


# ---------------------------------------------------------------- one process a stage

STAGES = {"numerics": numerics, "kernels": kernels, "updates": updates, "score": score}


def run_stage(name, on_cpu):
    """Run a stage in a process of its own, and end it with all that it started when time is up."""
    begin, environment = time.perf_counter(), dict(os.environ)
    if on_cpu:
        environment |= {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    process = subprocess.Popen([sys.executable, "-m", "studies.gpu", "--stage", name],
                               cwd=RESULTS.parent, env=environment, start_new_session=True)
    try:
        ended = f"exit code {process.wait(None if on_cpu else SECONDS[name])}"
    except subprocess.TimeoutExpired:
        ended = "out of time"
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    say(stage=name, ended=ended, seconds=time.perf_counter() - begin)
    return ended == "exit code 0"


def is_sound(row):
    """Other stages may refuse a case; of the numerics each has to run."""
    return row.get("ok", row.get("stage") != "numerics" or "refused" not in row)


def print_updates(path, begin):
    """The table of the updates among the lines that a file has from an offset on -> are all sound?
    """
    with open(path) as file:
        file.seek(begin)
        rows = [json.loads(line) for line in file]
    columns = ("size", "way", "updates_per_s", "launches", "busy_ms", "of_matrix_rate", "GB",
               "dry_run_GB")
    shown = []
    for row in rows:
        if "ms" in row:
            cells = [row[column] for column in columns]
            shown.append([cell if isinstance(cell, str) else f"{cell:.3g}" for cell in cells])
    if shown:
        print_table(columns, shown)
    return all(map(is_sound, rows))


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cpu", action="store_true", help="the numerics alone, interpreted")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES))
    parser.add_argument("--stage", choices=STAGES, help=argparse.SUPPRESS)  # in this process
    parser.add_argument("--first", type=int, default=0, help=argparse.SUPPRESS)  # case of the stage
    args = parser.parse_args()
    if args.stage:
        run_cases(args.stage, STAGES[args.stage](), args.first)
        return
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # the stage in hand ends too
    if triton_support.triton is None:
        sys.exit("studies.gpu needs the package triton (Linux only)")
    if not GPU and not args.cpu:
        sys.exit("There is no GPU here; --cpu runs the numerics, interpreted")
    path = Path(os.environ.get("OUT", RESULTS)) / "gpu.jsonl"
    begin = path.stat().st_size if path.exists() else 0
    device = "cpu, interpreted" if args.cpu else torch.cuda.get_device_name()
    say(date=str(date.today()), device=device, torch=torch.__version__,
        triton=triton_support.triton.__version__, python=sys.version.split()[0])
    stages = ["numerics"] if args.cpu else args.stages
    ended = [run_stage(name, args.cpu) for name in stages]
    sound = print_updates(path, begin)
    sys.exit(0 if sound and all(ended) else 1)


if __name__ == "__main__":
    main()
