"""The arithmetic of the Triton kernels: how fast could they be at best?

    python -m studies.kernels    a table

What a kernel has to compute and to move says how fast an H100 could be. studies/gpu.py measures.
"""

import argparse

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from kernels.attention import attention_reference
from kernels.categorical_projection import bellman_cross_entropy_reference
from studies import print_table

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


if __name__ == "__main__":
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    print_arithmetic(arithmetic())
