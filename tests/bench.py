"""Benchmarks.

    python -m tests.bench kernels    the fused kernels: measured on a GPU, by arithmetic without one
    python -m tests.bench step       an update, beside plainer ways to write it and other projects' trunks
    python -m tests.bench data       the sampler, beside raw memory and other projects' loaders
"""

import argparse
import json
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from kernels import triton_support
from kernels.attention import attention, attention_reference
from kernels.categorical_projection import bellman_cross_entropy, bellman_cross_entropy_reference
from kernels.latent_block import latent_block, latent_block_reference

RESULTS = Path(__file__).parent.parent / "results"

# ---------------------------------------------------------------- kernels: the arithmetic

H100 = {"flops": 989e12, "bytes": 3.35e12}  # dense bf16 products and memory traffic, per second

# name: B, H, Lq, Lk, D
ATTENTION = {
    "16 latents, 30 inputs": (256, 4, 16, 30, 32),
    "64 latents, 300 inputs": (256, 4, 64, 300, 64),
    "256 latents, 2000 inputs": (64, 8, 256, 2000, 64),
    "256 latents, themselves": (64, 8, 256, 256, 64),
    "1000 actions, 32 latents": (256, 4, 1000, 32, 32),
}
BLOCKS = {  # name: B, L, W, H
    "block, 8 latents of 64": (256, 8, 64, 4),
    "block, 16 latents of 128": (256, 16, 128, 4),
    "block, 32 latents of 128": (256, 32, 128, 4),
}
BELLMAN = {"Bellman target": (256, 101)}  # B, M


class Traffic(TorchDispatchMode):
    """Counts the operations of eager PyTorch that are launches, and the bytes they read and write."""

    def __init__(self):
        super().__init__()
        self.launches = self.bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        tensors = [leaf for leaf in tree_leaves((args, kwargs, out)) if isinstance(leaf, torch.Tensor)]
        moves_nothing = function.is_view or function._schema.name in ("aten::detach", "aten::_unsafe_view")
        allocates = function._schema.name.split("::")[1] in ("empty_like", "new_empty_strided")
        if tensors and not moves_nothing and not allocates:
            self.launches += 1
            self.bytes += sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        return out


def traffic(function, inputs):
    """(launches, bytes) of the function's forward pass, and of its backward pass, in eager PyTorch."""
    with Traffic() as forward:
        out = function(*inputs)
    grad = torch.ones_like(out)
    with Traffic() as backward:
        out.backward(grad)
    return (forward.launches, forward.bytes), (backward.launches, backward.bytes)


def attention_costs(batch, heads, len_q, len_k, width):
    """Two rows, forward and backward: FLOPs, and launches and bytes, fused and written out; in bf16."""
    queries, keys = 2 * batch * heads * len_q * width, 2 * batch * heads * len_k * width  # bytes of a tensor
    lse = 4 * batch * heads * len_q
    product = 2 * batch * heads * len_q * len_k * width
    empty = lambda length: torch.empty(batch, heads, length, width, dtype=torch.bfloat16, device="meta")
    inputs = [empty(length).requires_grad_() for length in (len_q, len_k, len_k)]
    written_out = traffic(attention_reference, inputs)
    read = 3 * queries + 2 * keys + lse  # q, out and dout; k and v
    if min(len_q, len_k) <= 64:
        backward = (5 * product, (1, read + queries + 2 * keys))
    else:
        backward = (7 * product, (2, 2 * read + queries + 2 * keys))
    return [
        (2 * product, (1, 2 * queries + 2 * keys + lse), written_out[0]),
        (*backward, written_out[1]),
    ]


def block_costs(batch, length, width, heads):
    """As attention_costs. Unfused: attention is one fused launch each way, as SDPA's best would be."""
    rows = 2 * batch * length * width  # bytes of x
    weights = 2 * 4 * width**2
    linear, attending = 8 * batch * length * width**2, 4 * batch * length**2 * width
    # LayerNorm 2, QKV 4, attention 4, output 2, sum 3: each reads and writes so many tensors like x.
    forward = (linear + attending, (1, 2 * rows + weights), (5, 15 * rows + weights))
    # Fused: x, dy -> dx, n, o, dqkv; dWqkv reads dqkv, n; dWout reads dy, o; then the LayerNorm's partial
    # gradients are summed and rounded. q, k, v, S and o are computed once more. Unfused: output 4,
    # attention 8, QKV 8, LayerNorm 3, sum 3.
    fused = (5, (8 + 6) * rows + 2 * weights)
    backward = (2 * linear + linear * 3 // 4 + attending * 3 + attending // 2, fused, (7, 26 * rows + 2 * weights))
    return [forward, backward]


def bellman_costs(batch, atoms):
    row, numbers = 4 * batch * atoms, [torch.rand(batch) for _ in range(3)]
    inputs = [torch.randn(batch, atoms, requires_grad=True), torch.softmax(torch.randn(batch, atoms), -1), *numbers]
    written_out = traffic(lambda *x: bellman_cross_entropy_reference(*x, 0.3), inputs)
    hats = 6 * batch * atoms**2  # on the plain units of fp32, not on the tensor cores: less than a microsecond
    return [(hats, (1, 3 * row), written_out[0]), (batch * atoms, (1, 2 * row), written_out[1])]


def arithmetic():
    """One dictionary per shape and direction; the floors are in microseconds, on an H100."""
    rows = []
    cases = [(ATTENTION, attention_costs), (BLOCKS, block_costs), (BELLMAN, bellman_costs)]
    for shapes, costs in cases:
        for name, shape in shapes.items():
            for direction, (flops, fused, unfused) in zip(("forward", "backward"), costs(*shape)):
                row = dict(shape=name, direction=direction, flops=flops)
                for design, (launches, moved) in (("fused", fused), ("unfused", unfused)):
                    floor = 1e6 * max(flops / H100["flops"], moved / H100["bytes"])
                    row |= {f"{design}_launches": launches, f"{design}_bytes": moved, f"{design}_floor_us": floor}
                rows.append(row)
    return rows


def three_digits(number):
    return f"{number:.0f}" if number >= 100 else f"{number:.3g}"


def print_arithmetic(rows):
    print("floor: the larger of FLOPs / 989 TFLOP/s and bytes / 3.35 TB/s, an H100's figures; bf16\n")
    print("| shape | pass | GFLOP | fused: launches | MB | floor, us | unfused: launches | MB | floor, us |")
    print("|---|---|---|---|---|---|---|---|---|")
    for row in rows:
        cells = [row["shape"], row["direction"], three_digits(row["flops"] / 1e9)]
        for design in ("fused", "unfused"):
            moved, floor = row[f"{design}_bytes"] / 1e6, row[f"{design}_floor_us"]
            cells += [str(row[f"{design}_launches"]), three_digits(moved), three_digits(floor)]
        print(f"| {' | '.join(cells)} |")


# ---------------------------------------------------------------- kernels: the measurement


def median_us(function):
    """Microseconds on the GPU, its cache flushed before each of many runs."""
    return 1e3 * triton_support.triton.testing.do_bench(function, warmup=50, rep=200, return_mode="median")


def measured_ceilings(device, size=8192):
    """What this GPU reaches: a large bf16 product, and a large copy, which reads and writes."""
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    big = torch.empty(4 * size * size, device=device, dtype=torch.uint8)
    other = torch.empty_like(big)
    return {
        "flops": 2 * size**3 / (1e-6 * median_us(lambda: a @ b)),
        "bytes": 2 * big.numel() / (1e-6 * median_us(lambda: other.copy_(big))),
    }


def with_sdpa(backend):
    def attend(q, k, v):
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v)

    return attend


def flex_attention():
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention)


def attention_case(device, batch, heads, len_q, len_k, width):
    """The contenders, by name, and their inputs. Lengths may differ; there is no mask."""
    new = lambda length: torch.randn(batch, length, heads, width, device=device, dtype=torch.bfloat16)
    inputs = [new(length).transpose(1, 2).requires_grad_() for length in (len_q, len_k, len_k)]
    contenders = {"triton": lambda *x: attention(*x, backend="triton")}
    contenders |= {f"sdpa {backend.name.lower()}": with_sdpa(backend) for backend in (
        SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH
    )}  # fmt: skip
    contenders |= {"flex": flex_attention(), "compiled": torch.compile(attention_reference)}
    return contenders, inputs


def block_case(device, batch, length, width, heads):
    shapes = [(batch, length, width), (width,), (width,), (3 * width, width), (width, width)]
    new = lambda shape: torch.randn(shape, device=device, dtype=torch.bfloat16) / width**0.5
    plain = lambda *x: latent_block_reference(*x, heads)
    contenders = {"triton": lambda *x: latent_block(*x, heads, backend="triton")}
    contenders |= {"eager": plain, "compiled": torch.compile(plain)}
    return contenders, [new(shape).requires_grad_() for shape in shapes]


def bellman_case(device, batch, atoms):
    q_logits = torch.randn(batch, atoms, device=device, requires_grad=True)
    target = [torch.softmax(torch.randn(batch, atoms, device=device), -1)]
    target += [torch.rand(batch, device=device) for _ in range(3)]
    plain = lambda q_logits: bellman_cross_entropy_reference(q_logits, *target, 0.3)
    contenders = {"triton": lambda q_logits: bellman_cross_entropy(q_logits, *target, 0.3, backend="triton")}
    contenders |= {"eager": plain, "compiled": torch.compile(plain)}
    return contenders, [q_logits]


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


def measured(rows, device):
    """Adds to each row of the arithmetic the times, ratios and fraction of the measured ceilings."""
    ceilings = measured_ceilings(device)
    by_key = {(row["shape"], row["direction"]): row for row in rows}
    for shapes, case in ((ATTENTION, attention_case), (BLOCKS, block_case), (BELLMAN, bellman_case)):
        for name, shape in shapes.items():
            contenders, inputs = case(device, *shape)
            times = {contender: measure(function, inputs) for contender, function in contenders.items()}
            for direction in ("forward", "backward"):
                row = by_key[name, direction]
                row["us"] = {contender: time.get(direction) for contender, time in times.items()}
                row["refused"] = {contender: time["refused"] for contender, time in times.items() if "refused" in time}
                ours = row["us"]["triton"]
                if ours is None:
                    continue
                others = {contender: time for contender, time in row["us"].items() if time and contender != "triton"}
                floor = 1e6 * max(row["flops"] / ceilings["flops"], row["fused_bytes"] / ceilings["bytes"])
                row["speedup_over"] = {contender: time / ours for contender, time in others.items()}
                row["fraction_of_ceiling"] = floor / ours
    return ceilings


def print_measured(rows, ceilings):
    print(f"\nmeasured: {ceilings['flops'] / 1e12:.0f} TFLOP/s bf16, {ceilings['bytes'] / 1e12:.2f} TB/s\n")
    print("| shape | pass | triton, us | of the ceiling | the others, us (times ours) |\n|---|---|---|---|---|")
    for row in rows:
        if "fraction_of_ceiling" not in row:
            print(f"| {row['shape']} | {row['direction']} | refused: {row['refused']['triton']} | | |")
            continue
        others = (f"{name} {row['us'][name]:.1f} ({ratio:.2f})" for name, ratio in row["speedup_over"].items())
        ours = f"{row['us']['triton']:.1f} | {row['fraction_of_ceiling']:.0%}"
        print(f"| {row['shape']} | {row['direction']} | {ours} | {', '.join(others)} |")


def bench_kernels(args):
    rows = arithmetic()
    print_arithmetic(rows)
    if not torch.cuda.is_available() or triton_support.triton is None:
        print("\nNo GPU with Triton here: the above is arithmetic, and nothing has been measured.")
        return
    ceilings = measured(rows, torch.device("cuda"))
    print_measured(rows, ceilings)
    RESULTS.mkdir(exist_ok=True)
    result = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "ceilings": ceilings, "rows": rows}
    (RESULTS / "bench_kernels.json").write_text(json.dumps(result, indent=2) + "\n")


# ---------------------------------------------------------------- command line


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    kernels = commands.add_parser("kernels", help="the fused kernels against SDPA, FlexAttention and torch.compile")
    kernels.set_defaults(run=bench_kernels)
    from tests import bench_data, bench_step
    bench_step.add_arguments(commands.add_parser("step", help="an update, beside plainer ways to write it and other trunks"))
    bench_data.add_arguments(commands.add_parser("data", help="the sampler, beside raw memory and other projects' loaders"))
    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    main()
