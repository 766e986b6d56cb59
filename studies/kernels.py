"""The Triton kernels against PyTorch's ways to compute the same.

    python -m studies.kernels    with a GPU: results/bench_kernels.json; without: arithmetic alone

The arithmetic counts what a kernel has to compute and to move, and says how fast an H100 could be
at best. What is measured, the median of many runs from a cold cache, is compared with what this GPU
itself reaches on a large product and a large copy.
"""

import argparse
import json

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from kernels import triton_support
from kernels.attention import attention, attention_reference
from kernels.categorical_projection import bellman_cross_entropy, bellman_cross_entropy_reference
from studies import RESULTS, print_table

H100 = {"flops": 989e12, "bytes": 3.35e12}  # dense bf16 products and memory traffic, per second
ATTENTION = {  # name: B, H, Lq, Lk, D
    "16 latents, 30 inputs": (256, 4, 16, 30, 32),
    "64 latents, 300 inputs": (256, 4, 64, 300, 64),
    "256 latents, 2000 inputs": (64, 8, 256, 2000, 64),
    "256 latents, themselves": (64, 8, 256, 256, 64),
    "1000 actions, 32 latents": (256, 4, 1000, 32, 32),
}
BELLMAN = {"Bellman target": (256, 101)}  # B, M
DIRECTIONS = ("forward", "backward")
MC_SHARE = 0.3
# Operations without a launch; scalar_tensor stays on the host.
NO_LAUNCH = ("detach", "_unsafe_view", "empty", "empty_like", "new_empty", "new_empty_strided",
             "scalar_tensor", "prim::device")


# ---------------------------------------------------------------- the arithmetic

class Traffic(TorchDispatchMode):
    """Counts the operations of eager PyTorch that are launches, and the bytes they move."""

    def __init__(self):
        super().__init__()
        self.launches = self.bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        leaves = tree_leaves((args, kwargs, out))
        tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        name = function._schema.name.removeprefix("aten::")
        if tensors and not function.is_view and name not in NO_LAUNCH:
            self.launches += 1
            self.bytes += sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        return out


def traffic(function, inputs):
    """(launches, bytes) of the forward pass in eager PyTorch, and of the backward pass."""
    with Traffic() as forward:
        out = function(*inputs)
    grad = torch.ones_like(out)
    with Traffic() as backward:
        out.backward(grad)
    return (forward.launches, forward.bytes), (backward.launches, backward.bytes)


def attention_costs(batch, heads, len_q, len_k, width):
    """Forward and backward: FLOPs; (launches, bytes) of the kernel, and written out. In bf16."""
    queries, keys = [2 * batch * heads * length * width for length in (len_q, len_k)]  # bytes
    lse = 4 * batch * heads * len_q
    product = 2 * batch * heads * len_q * len_k * width
    inputs = []
    for length in (len_q, len_k, len_k):
        shape = (batch, heads, length, width)
        inputs.append(torch.empty(shape, dtype=torch.bfloat16, device="meta", requires_grad=True))
    forward_unfused, backward_unfused = traffic(attention_reference, inputs)
    read = 3 * queries + 2 * keys + lse  # q, out and dout; k and v
    if min(len_q, len_k) <= 64:
        flops, fused = 5 * product, (1, read + queries + 2 * keys)
    else:
        flops, fused = 7 * product, (2, 2 * read + queries + 2 * keys)
    return [(2 * product, (1, 2 * queries + 2 * keys + lse), forward_unfused),
            (flops, fused, backward_unfused)]


def bellman_costs(batch, atoms):
    """As attention_costs, in fp32. The hats are made on the plain units, in under a microsecond."""
    row, numbers = 4 * batch * atoms, [torch.rand(batch) for _ in range(3)]
    logits = torch.randn(batch, atoms, requires_grad=True)
    probs = torch.softmax(torch.randn(batch, atoms), dim=-1)
    forward_unfused, backward_unfused = traffic(
        lambda *x: bellman_cross_entropy_reference(*x, MC_SHARE), [logits, probs, *numbers])
    return [(6 * batch * atoms**2, (1, 3 * row), forward_unfused),
            (batch * atoms, (1, 2 * row), backward_unfused)]


def arithmetic():
    """A row for each shape and direction; the floors are in microseconds, on an H100."""
    costs = {name: attention_costs(*shape) for name, shape in ATTENTION.items()}
    costs |= {name: bellman_costs(*shape) for name, shape in BELLMAN.items()}
    rows = []
    for name, of_directions in costs.items():
        for direction, (flops, fused, unfused) in zip(DIRECTIONS, of_directions):
            row = {"shape": name, "direction": direction, "flops": flops}
            for design, (launches, moved) in (("fused", fused), ("unfused", unfused)):
                row[f"{design}_launches"] = launches
                row[f"{design}_bytes"] = moved
                row[f"{design}_floor_us"] = floor_us(flops, moved, H100)
            rows.append(row)
    return rows


def floor_us(flops, moved, ceilings):
    """Microseconds that the products or the traffic need at the least."""
    return 1e6 * max(flops / ceilings["flops"], moved / ceilings["bytes"])


def three_digits(number):
    return f"{number:.0f}" if number >= 100 else f"{number:.3g}"


def print_arithmetic(rows):
    print("floor: the larger of FLOPs / 989 TFLOP/s and bytes / 3.35 TB/s, an H100's; in bf16\n")
    head, shown = ["shape", "pass", "GFLOP"], []
    for design in ("fused", "unfused"):
        head += [f"{design}: launches", "MB", "floor, us"]
    for row in rows:
        cells = [row["shape"], row["direction"], three_digits(row["flops"] / 1e9)]
        for design in ("fused", "unfused"):
            moved, floor = row[f"{design}_bytes"] / 1e6, row[f"{design}_floor_us"]
            cells += [row[f"{design}_launches"], three_digits(moved), three_digits(floor)]
        shown.append(cells)
    print_table(head, shown)


# ---------------------------------------------------------------- the measurement

def median_us(function):
    """Microseconds on the GPU, its cache flushed before each of many runs."""
    bench = triton_support.triton.testing.do_bench
    return 1e3 * bench(function, warmup=50, rep=200, return_mode="median")


def measured_ceilings(device, size=8192):
    """What this GPU reaches: a large bf16 product, and a large copy, which reads and writes."""
    a, b = torch.randn(2, size, size, device=device, dtype=torch.bfloat16)
    big = torch.empty(4 * size * size, device=device, dtype=torch.uint8)
    other = torch.empty_like(big)
    return {"flops": 2 * size**3 / (1e-6 * median_us(lambda: a @ b)),
            "bytes": 2 * big.numel() / (1e-6 * median_us(lambda: other.copy_(big)))}


def with_sdpa(backend):
    def attend(q, k, v):
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v)

    return attend


def attention_case(device, batch, heads, len_q, len_k, width):
    """The contenders, by name, and their inputs. There is no mask."""
    from torch.nn.attention.flex_attention import flex_attention
    inputs = []
    for length in (len_q, len_k, len_k):
        x = torch.randn(batch, length, heads, width, device=device, dtype=torch.bfloat16)
        inputs.append(x.transpose(1, 2).requires_grad_())
    contenders = {"triton": lambda *x: attention(*x, backend="triton")}
    for name in ("FLASH_ATTENTION", "CUDNN_ATTENTION", "EFFICIENT_ATTENTION", "MATH"):
        contenders[f"sdpa {name.lower()}"] = with_sdpa(getattr(SDPBackend, name))
    contenders["flex"] = torch.compile(flex_attention)
    contenders["compiled"] = torch.compile(attention_reference)
    return contenders, inputs


def bellman_case(device, batch, atoms):
    logits = torch.randn(batch, atoms, device=device, requires_grad=True)
    target = [torch.softmax(torch.randn(batch, atoms, device=device), dim=-1),
              *torch.rand(3, batch, device=device)]

    def eager(logits):
        return bellman_cross_entropy_reference(logits, *target, MC_SHARE)

    def kernel(logits):
        return bellman_cross_entropy(logits, *target, MC_SHARE, backend="triton")

    return {"triton": kernel, "eager": eager, "compiled": torch.compile(eager)}, [logits]


def measure(contender, inputs):
    """Microseconds forward and backward; or why not, since not every backend takes every shape."""
    try:
        out = contender(*inputs)
        grad = torch.randn_like(out)
        forward = median_us(lambda: contender(*inputs))
        backward = median_us(lambda: torch.autograd.grad(out, inputs, grad, retain_graph=True))
    except Exception as error:
        return {"refused": f"{type(error).__name__}: {error}".splitlines()[0][:200]}
    return {"forward": forward, "backward": backward}


def add_times(row, times, ceilings):
    """Put into a row of the arithmetic what its contenders took. times: by contender"""
    direction = row["direction"]
    row["us"] = {name: time.get(direction) for name, time in times.items()}
    row["refused"] = {name: time["refused"] for name, time in times.items() if "refused" in time}
    ours = row["us"]["triton"]
    if ours:
        others = {name: us for name, us in row["us"].items() if us and name != "triton"}
        row["speedup_over"] = {name: us / ours for name, us in others.items()}
        row["fraction_of_ceiling"] = floor_us(row["flops"], row["fused_bytes"], ceilings) / ours


def add_measurements(rows, device):
    """Measure all shapes -> the ceilings of this GPU"""
    ceilings, times = measured_ceilings(device), {}
    cases = {name: attention_case(device, *shape) for name, shape in ATTENTION.items()}
    cases |= {name: bellman_case(device, *shape) for name, shape in BELLMAN.items()}
    for name, (contenders, inputs) in cases.items():
        times[name] = {key: measure(contender, inputs) for key, contender in contenders.items()}
    for row in rows:
        add_times(row, times[row["shape"]], ceilings)
    return ceilings


def print_measured(rows, ceilings):
    flops, moved = ceilings["flops"] / 1e12, ceilings["bytes"] / 1e12
    print(f"\nmeasured: {flops:.0f} TFLOP/s bf16, {moved:.2f} TB/s\n")
    shown = []
    for row in rows:
        ours, share, others = row["refused"].get("triton"), "", []
        if ours is None:
            ours, share = f"{row['us']['triton']:.1f}", f"{row['fraction_of_ceiling']:.0%}"
            for name, ratio in row["speedup_over"].items():
                others.append(f"{name} {row['us'][name]:.1f} ({ratio:.2f})")
        shown.append([row["shape"], row["direction"], ours, share, ", ".join(others)])
    head = ["shape", "pass", "triton, us", "of the ceiling", "the others, us (times ours)"]
    print_table(head, shown)


def main():
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    rows = arithmetic()
    print_arithmetic(rows)
    if not torch.cuda.is_available() or triton_support.triton is None:
        print("\nNo GPU with Triton here: this is arithmetic, and nothing has been measured.")
        return
    ceilings = add_measurements(rows, torch.device("cuda"))
    print_measured(rows, ceilings)
    result = {"device": torch.cuda.get_device_name(), "torch": torch.__version__,
              "ceilings": ceilings, "rows": rows}
    (RESULTS / "bench_kernels.json").write_text(json.dumps(result, indent=2) + "\n")
    print(f"wrote {RESULTS / 'bench_kernels.json'}")


if __name__ == "__main__":
    main()
