"""A vector of scalars through its own task's linear map, after the multi-scale normaliser.

The maths, for a row x (D scalars) of task t:

    n     = (x - mean_t) / std_t, or x where there are no statistics
    f     = (clip(n_1, -10, 10), tanh(c_1 n_1), .., tanh(c_S n_1), clip(n_2, ..), ..)
    y     = f W_t + b_t,        W_t is as high as task t has features; those past them are padding
    dW_t  = sum over the rows of task t of f^T dy,       db_t = the same sum of dy

The maps W_t stand below each other in one table. A table as high as the highest for each task would
be mostly padding where tasks differ: six sevenths in a suite of 132.

A batch has rows of every task, in any order. The kernel takes the rows as they come: y is the sum
over tasks t of [row is of t] f W_t, so that a row passes a small product for each task between the
lowest and the highest of its block, all but one of zeros. Where rows stand in the order of their
tasks, as a Sampler's do, these are few. In return nothing is sorted, nothing is counted, and the
host waits for nothing. Features are made in registers, forward and backward, and are never in
memory. In PyTorch the same is some forty launches, or a product for each task, whose sizes the host
must know first.
"""

import functools
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable
from torch.nn.utils.rnn import pad_sequence

from kernels.triton_support import (
    cast,
    device_limit,
    jit,
    operator,
    product,
    target_of,
    tl,
    triton,
    use_kernel,
)


# ---------------------------------------------------------------- the plain reference


def look_up(table, index):
    """table[index], by an embedding, whose backward pass is faster. (T, ...), (B,) -> (B, ...)"""
    return F.embedding(index, table.flatten(1)).view(len(index), *table.shape[1:])


def of_rows(table, task, x):
    """What `table` (T, J) has for the tasks of x (B, ..., any) -> (B, .., J)"""
    return look_up(table, task).view(len(x), *[1] * (x.dim() - 2), -1)


def features(x, task, scales, mean=None, std=None):
    """x (B, ..., D), scales (S,), mean and std (T, D) -> (B, ..., D (1 + S))"""
    if mean is not None:
        x = (x - of_rows(mean, task, x)) / of_rows(std, task, x)
    x = x[..., None]
    x = torch.cat([x.clamp(-10, 10), torch.tanh(x * scales)], dim=-1)
    return x.flatten(-2)


def linear_at_once(x, task, weight, bias, heights):
    """x (B, ..., F), task (B,), the maps of all tasks (sum of heights, W), bias (T, W) -> (B, ...,
    W): each sample by its task's matrix, which takes the first of its features. One product: a
    sample's features stand in its task's place of T, beside zeros.
    """
    maps = pad_sequence(weight.split(heights), batch_first=True)  # (T, F, W)
    mine = of_rows(torch.eye(len(maps), device=x.device, dtype=x.dtype), task, x)  # (B, .., T)
    by_task = (mine[..., None] * x[..., None, :]).flatten(-2)  # (B, .., T F)
    return by_task @ maps.flatten(0, 1) + of_rows(bias, task, x)


def linear_by_turns(x, task, weight, bias, heights):
    """The same, one product for each task: several times faster on a CPU. On a GPU the host would
    have to wait for the counts.
    """
    tasks = torch.arange(len(heights), device=task.device)
    counts = (task == tasks[:, None]).sum(1).tolist()  # bincount does not compile
    order = task.argsort(stable=True)
    parts = x[order].split(counts)
    # split writes the weights' gradient once; a slice for every task would fill a whole one each.
    maps = zip(parts, heights, weight.split(heights), bias.unbind())
    products = [part[..., :height] @ w + b for part, height, w, b in maps]
    return torch.cat(products)[order.argsort()]


def linear_of_task(x, task, weight, bias, heights):
    if x.is_meta:  # a dry run counts the work of one product for each task, of the mean height
        height = len(weight) // len(heights)
        return x[..., :height] @ weight[:height] + bias[0]
    linear = linear_by_turns if x.device.type == "cpu" else linear_at_once
    return linear(x, task, weight, bias, heights)


def task_linear_reference(x, task, weight, bias, heights, scales, mean=None, std=None):
    return linear_of_task(features(x, task, scales, mean, std), task, weight, bias, heights)


# ---------------------------------------------------------------- the kernels
# Names: r counts rows (a sample has one, or one for each of its actions), f features, o outputs.


@jit()
def load_features(
    x_ptr, first_ptr, scales_ptr, mean_ptr, std_ptr, r, task, f, num_rows,
    HAS_STATISTICS: tl.constexpr, DIMS: tl.constexpr, SCALES: tl.constexpr,
):  # fmt: skip
    """Features f of rows r, 0 past the task's own. r and task are of shape (R, 1) and f (1, F), or
    the other way round."""
    dim, scale = f // (SCALES + 1), f % (SCALES + 1)
    of_task = task * DIMS + dim
    own = f < tl.load(first_ptr + task + 1) - tl.load(first_ptr + task)
    here = own & (r < num_rows)
    x = tl.load(x_ptr + r.to(tl.int64) * DIMS + dim, mask=here, other=0.0)
    if HAS_STATISTICS:
        x -= tl.load(mean_ptr + of_task, mask=own, other=0.0)
        x /= tl.load(std_ptr + of_task, mask=own, other=1.0)
    c = tl.load(scales_ptr + scale - 1, mask=own & (scale > 0), other=0.0)
    tanh = 1.0 - 2.0 / (tl.exp(2.0 * c * x) + 1.0)
    itself = tl.clamp(x, -10.0, 10.0, propagate_nan=tl.PropagateNan.ALL)
    return tl.where(here, tl.where(scale == 0, itself, tanh), 0.0)


@jit("num_rows", "rows_each", "num_tasks")
def forward_kernel(
    x_ptr, task_ptr, weight_ptr, bias_ptr, first_ptr, scales_ptr, mean_ptr, std_ptr, out_ptr,
    num_rows, rows_each, num_tasks,
    HAS_STATISTICS: tl.constexpr, DIMS: tl.constexpr, SCALES: tl.constexpr, WIDTH: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_O: tl.constexpr,
):  # fmt: skip
    """A program owns BLOCK_R rows and BLOCK_O outputs, and walks over features and tasks."""
    NUM_FEATURES: tl.constexpr = DIMS * (SCALES + 1)
    r = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    o = tl.program_id(1) * BLOCK_O + tl.arange(0, BLOCK_O)
    there = (r[:, None] < num_rows) & (o[None, :] < WIDTH)
    task = tl.load(task_ptr + r // rows_each, mask=r < num_rows, other=0).to(tl.int32)
    # Where rows come sorted by task, as a Sampler's do, those of a block are of a few.
    lowest = tl.min(tl.where(r < num_rows, task, num_tasks), 0)
    end = tl.max(task, 0) + 1
    bias = tl.load(bias_ptr + task[:, None] * WIDTH + o[None, :], mask=there, other=0.0)
    out = bias.to(tl.float32)
    for start in range(0, NUM_FEATURES, BLOCK_F):
        f = start + tl.arange(0, BLOCK_F)
        x = load_features(
            x_ptr, first_ptr, scales_ptr, mean_ptr, std_ptr, r[:, None], task[:, None], f[None, :],
            num_rows, HAS_STATISTICS, DIMS, SCALES,
        )  # fmt: skip
        for t in range(lowest, end):
            rows = (tl.load(first_ptr + t) + f)[:, None].to(tl.int64)
            exists = (rows < tl.load(first_ptr + t + 1)) & (o[None, :] < WIDTH)
            weight = tl.load(weight_ptr + rows * WIDTH + o[None, :], mask=exists, other=0.0)
            mine = tl.where(task[:, None] == t, x, 0.0)
            out = product(mine, weight.to(tl.float32), out)
    places = r[:, None].to(tl.int64) * WIDTH + o[None, :]
    tl.store(out_ptr + places, out, mask=there)


@jit("num_rows", "rows_each")
def backward_kernel(
    x_ptr, task_ptr, dout_ptr, first_ptr, scales_ptr, mean_ptr, std_ptr, dweight_ptr, dbias_ptr,
    num_rows, rows_each,
    HAS_STATISTICS: tl.constexpr, DIMS: tl.constexpr, SCALES: tl.constexpr, WIDTH: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_O: tl.constexpr,
):  # fmt: skip
    """A program owns a tile of one task's gradient, and walks over all rows: no atomics."""
    t = tl.program_id(0)
    first, end = tl.load(first_ptr + t), tl.load(first_ptr + t + 1)
    f = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)
    o = tl.program_id(2) * BLOCK_O + tl.arange(0, BLOCK_O)
    dweight = tl.zeros((BLOCK_F, BLOCK_O), tl.float32)
    dbias = tl.zeros((BLOCK_O,), tl.float32)
    # Where the tile lies below the task's map there is nothing to add up.
    rows_to_read = tl.where(tl.program_id(1) * BLOCK_F < end - first, num_rows, 0)
    for start in range(0, rows_to_read, BLOCK_R):
        r = start + tl.arange(0, BLOCK_R)
        task = tl.load(task_ptr + r // rows_each, mask=r < num_rows, other=-1).to(tl.int32)
        mine = task == t
        places = r[:, None].to(tl.int64) * WIDTH + o[None, :]
        needed = mine[:, None] & (o[None, :] < WIDTH)
        dout = tl.load(dout_ptr + places, mask=needed, other=0.0)
        x = load_features(
            x_ptr, first_ptr, scales_ptr, mean_ptr, std_ptr, r[None, :], t, f[:, None],
            num_rows, HAS_STATISTICS, DIMS, SCALES,
        )  # fmt: skip
        dweight = product(tl.where(mine[None, :], x, 0.0), dout, dweight)
        dbias += tl.sum(dout, 0)
    rows = (first + f)[:, None].to(tl.int64)
    exists = (rows < end) & (o[None, :] < WIDTH)
    tile = cast(dweight, dweight_ptr.dtype.element_ty)
    tl.store(dweight_ptr + rows * WIDTH + o[None, :], tile, mask=exists)
    if tl.program_id(1) == 0:
        row = cast(dbias, dbias_ptr.dtype.element_ty)
        tl.store(dbias_ptr + t * WIDTH + o, row, mask=o < WIDTH)


# ---------------------------------------------------------------- launcher


class Launch(NamedTuple):
    block_r: int
    block_f: int
    block_o: int
    num_warps: int
    num_stages: int


# LAUNCHES[target][kernel]: what runs, and what tests/test_kernels.py compiles. All in exact fp32.
ANYWHERE = {"forward": Launch(32, 16, 32, 4, 1), "backward": Launch(16, 32, 32, 4, 1)}
LAUNCHES = {target: ANYWHERE for target in ("sm_80", "sm_90", "sm_100", "gfx942")}
# With 4 warps, Triton 3.7 puts 8 bytes a thread on the stack.
LAUNCHES["sm_90"] = {**ANYWHERE, "forward": Launch(32, 16, 32, 8, 1)}
KERNELS = {"forward": forward_kernel, "backward": backward_kernel}


@functools.lru_cache
def first_rows(heights, device):
    """Where in the table each task's map begins, and where the last one ends: (T + 1,)

    Made once: a CUDA graph cannot copy from the host.
    """
    return torch.tensor([0, *heights]).cumsum(0).to(device, torch.int32)


def launch(name, grid, tensors, x, counts, scales, mean):
    """One launch of a kernel. grid: a function of its tile; tensors: its pointers, in order"""
    block_r, block_f, block_o, num_warps, num_stages = LAUNCHES[target_of(x.device)][name]
    with torch.cuda.device_of(x):
        KERNELS[name][grid(block_r, block_f, block_o)](
            *tensors, *counts,
            HAS_STATISTICS=mean is not None, DIMS=x.shape[-1], SCALES=len(scales),
            WIDTH=tensors[-1].shape[-1], BLOCK_R=block_r, BLOCK_F=block_f, BLOCK_O=block_o,
            num_warps=num_warps, num_stages=num_stages,
        )  # fmt: skip


# ---------------------------------------------------------------- autograd


def forward_output(x, task, weight, *_):
    return x.new_empty(*x.shape[:-1], weight.shape[1], dtype=torch.float32)


def backward_outputs(dout, x, task, weight, bias, *_):
    return weight.new_empty(weight.shape), bias.new_empty(bias.shape)


ARGUMENTS = (
    "Tensor x, Tensor task, Tensor weight, Tensor bias, int[] heights, Tensor scales, Tensor? mean,"
    " Tensor? std"
)


def statistics_or(x, mean, std):
    """Pointers to the statistics; without any, to something that is never read."""
    return (x, x) if mean is None else (mean, std)


@operator(f"task_linear({ARGUMENTS}) -> Tensor", forward_output)
def task_linear_forward(x, task, weight, bias, heights, scales, mean, std):
    out = forward_output(x, task, weight)
    x, first = x.contiguous(), first_rows(tuple(heights), x.device)
    num_rows = x.numel() // x.shape[-1]

    def grid(block_r, block_f, block_o):
        return triton.cdiv(num_rows, block_r), triton.cdiv(weight.shape[1], block_o)

    tables = (first, scales, *statistics_or(x, mean, std))
    tensors = (x, task, weight.contiguous(), bias, *tables, out)
    counts = (num_rows, num_rows // len(task), len(heights))
    launch("forward", grid, tensors, x, counts, scales, mean)
    return out


@operator(f"task_linear_backward(Tensor dout, {ARGUMENTS}) -> (Tensor, Tensor)", backward_outputs)
def task_linear_backward(dout, x, task, weight, bias, heights, scales, mean, std):
    """-> dweight, dbias"""
    dweight, dbias = backward_outputs(dout, x, task, weight, bias)
    x, dout = x.contiguous(), dout.contiguous()
    first, num_rows = first_rows(tuple(heights), x.device), x.numel() // x.shape[-1]

    def grid(block_r, block_f, block_o):
        tiles = triton.cdiv(max(heights), block_f), triton.cdiv(weight.shape[1], block_o)
        return len(heights), *tiles

    tables = (first, scales, *statistics_or(x, mean, std))
    tensors = (x, task, dout, *tables, dweight, dbias)
    launch("backward", grid, tensors, x, (num_rows, num_rows // len(task)), scales, mean)
    return dweight, dbias


class FusedTaskLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, task, weight, bias, heights, *tables):
        ctx.save_for_backward(x, task, weight, bias, *tables)
        ctx.heights = heights
        return task_linear_forward(x, task, weight, bias, heights, *tables)

    @staticmethod
    @once_differentiable  # a second derivative is refused
    def backward(ctx, dout):
        x, task, weight, bias, *tables = ctx.saved_tensors
        dweight, dbias = task_linear_backward(dout, x, task, weight, bias, ctx.heights, *tables)
        return None, None, dweight, dbias, None, None, None, None


# ---------------------------------------------------------------- dispatch


def kernel_limit(x, weight, bias):
    """Why the kernel cannot take these tensors, or None."""
    if limit := device_limit(x.device):
        return limit
    if x.dtype != torch.float32 or weight.dtype not in (torch.float32, torch.bfloat16):
        return f"takes float32, with weights also of bfloat16, not {x.dtype} and {weight.dtype}"
    if x.requires_grad:
        return "gives no gradient to its input"
    if x.numel() == 0:
        return f"takes no empty tensors, such as {tuple(x.shape)}"
    return None


def task_linear(x, task, weight, bias, heights, scales, mean=None, std=None, backend=None):
    """Each row's features by its task's map; gradients reach weight and bias.

    x: (B, ..., D); task: (B,) int64; weight: (sum of heights, W), the maps of the T tasks below
    each other; bias: (T, W); heights: of each map, (1 + S) times the number of the task's scalars,
    which stand first in x; scales: (S,); mean, std: (T, D), or None. Returns (B, ..., W).
    backend: as in attention().
    """
    heights = tuple(heights)
    features = x.shape[-1] * (1 + len(scales))
    if len(weight) != sum(heights) or len(bias) != len(heights) or features < max(heights):
        shapes = [tuple(tensor.shape) for tensor in (x, weight, bias, scales)]
        raise ValueError(f"shapes of x, weight, bias and scales do not match {heights}: {shapes}")
    inputs = (x, task, weight, bias, heights, scales, mean, std)
    if use_kernel("task_linear", backend, x.device, kernel_limit(x, weight, bias)):
        return FusedTaskLinear.apply(*inputs)
    return task_linear_reference(*inputs)
