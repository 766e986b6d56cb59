"""The latents' self-attention block in one launch: LayerNorm, QKV, attention, output, residual.

The maths, for one sample (x: L x W; H heads, D = W / H wide; G is the gradient of y):

    n = LayerNorm(x),   [q k v]_h = n Wqkv_h^T,   o_h = softmax(q_h k_h^T / sqrt(D)) v_h
    y = x + sum_h o_h Wout_h^T

    do_h = G Wout_h,   [dq dk dv]_h as in attention.py,   dn = sum_h [dq dk dv]_h Wqkv_h
    dx = G + LayerNorm'(dn),   dWqkv = [dq dk dv]^T n,   dWout = G^T o

At Perceiver sizes each of the five launches this replaces is over before the next has begun. A program
takes as many whole samples as fill ROWS rows, since 64 rows feed the tensor cores and share one reading
of the weights; a row attends to the rows of its own sample. Nothing but x is saved: the backward kernel
recomputes q, k, v and P. Weight gradients sum over all samples, so it writes n, o and [dq dk dv] for two
ordinary matrix products, which is deterministic, where atomics would not be.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F

from kernels.attention import LOG2_E, attention_plain
from kernels.triton_support import INTERPRETED, cast, device_limit, jit, product, target_of, tl, triton, use_kernel

EPS = 1e-5  # of the LayerNorm, PyTorch's default


# ---------------------------------------------------------------- the plain reference


def latent_block_reference(x, ln_weight, ln_bias, qkv_weight, out_weight, num_heads):
    batch, length, width = x.shape
    n = F.layer_norm(x, (width,), ln_weight, ln_bias, EPS)
    qkv = F.linear(n, qkv_weight).view(batch, length, 3, num_heads, width // num_heads)
    q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (B, H, L, D) each
    o = attention_plain(q, k, v).transpose(1, 2).reshape(batch, length, width)
    return x + F.linear(o, out_weight)


# ---------------------------------------------------------------- the kernels
# Rows past the last sample are zeros and form samples of their own: finite, never stored, and without a
# gradient, since G is zero there.


@jit()
def load_weight(pointer, row, column, stride, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The block of a row-major matrix that starts at (row, column): (ROWS, COLUMNS)."""
    rows = row + tl.arange(0, ROWS)[:, None]
    return tl.load(pointer + rows * stride + column + tl.arange(0, COLUMNS)[None, :])


@jit()
def zeros_product(a, b):
    return product(a, b, tl.zeros((a.shape[0], b.shape[1]), tl.float32))


@jit()
def standardise(x, eps, W: tl.constexpr):
    """Each row to mean 0 and variance 1, and what it was divided by, inverted."""
    x = x - tl.sum(x, 1)[:, None] / W
    rstd = tl.rsqrt(tl.sum(x * x, 1) / W + eps)
    return x * rstd[:, None], rstd


@jit()
def softmax_weights(q, k, same_sample, scale):
    s = tl.where(same_sample, zeros_product(q, tl.trans(k)) * (scale * LOG2_E), float("-inf"))
    p = tl.exp2(s - tl.max(s, 1)[:, None])
    return p / tl.sum(p, 1)[:, None]


@jit("num_rows", "length", "rows_each")
def forward_kernel(
    x_ptr, ln_weight_ptr, ln_bias_ptr, qkv_ptr, out_weight_ptr, y_ptr,
    num_rows, length, rows_each, scale, eps,
    W: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    local = tl.arange(0, ROWS)
    same_sample = (local // length)[:, None] == (local // length)[None, :]
    row = tl.program_id(0).to(tl.int64) * rows_each + local
    real = ((local < rows_each) & (row < num_rows))[:, None]
    columns = tl.arange(0, W)[None, :]
    offsets = row[:, None] * W + columns

    x = tl.load(x_ptr + offsets, mask=real, other=0.0)
    normal, _ = standardise(x.to(tl.float32), eps, W)
    n = normal * tl.load(ln_weight_ptr + columns).to(tl.float32) + tl.load(ln_bias_ptr + columns).to(tl.float32)
    n = cast(n, x.dtype)
    out = tl.zeros((ROWS, W), tl.float32)
    for start in range(0, W, D):  # head by head
        q = cast(zeros_product(n, tl.trans(load_weight(qkv_ptr, start, 0, W, D, W))), n.dtype)
        k = cast(zeros_product(n, tl.trans(load_weight(qkv_ptr, W + start, 0, W, D, W))), n.dtype)
        v = cast(zeros_product(n, tl.trans(load_weight(qkv_ptr, 2 * W + start, 0, W, D, W))), n.dtype)
        p = softmax_weights(q, k, same_sample, scale)
        o = cast(zeros_product(cast(p, n.dtype), v), n.dtype)
        out = product(o, tl.trans(load_weight(out_weight_ptr, 0, start, W, W, D)), out)
    x = tl.load(x_ptr + offsets, mask=real, other=0.0).to(tl.float32)  # again: cheaper than W registers
    tl.store(y_ptr + offsets, cast(x + out, x_ptr.dtype.element_ty), mask=real)


@jit("num_rows", "length", "rows_each")
def backward_kernel(
    x_ptr, ln_weight_ptr, ln_bias_ptr, qkv_ptr, out_weight_ptr, dy_ptr,
    dx_ptr, n_ptr, o_ptr, dqkv_ptr, partial_ptr,
    num_rows, length, rows_each, scale, eps,
    W: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    local = tl.arange(0, ROWS)
    same_sample = (local // length)[:, None] == (local // length)[None, :]
    row = tl.program_id(0).to(tl.int64) * rows_each + local
    real = ((local < rows_each) & (row < num_rows))[:, None]
    columns = tl.arange(0, W)[None, :]
    offsets = row[:, None] * W + columns

    x = tl.load(x_ptr + offsets, mask=real, other=0.0)
    normal, _ = standardise(x.to(tl.float32), eps, W)
    ln_weight = tl.load(ln_weight_ptr + columns).to(tl.float32)
    n = cast(normal * ln_weight + tl.load(ln_bias_ptr + columns).to(tl.float32), x.dtype)
    tl.store(n_ptr + offsets, n, mask=real)
    dy = tl.load(dy_ptr + offsets, mask=real, other=0.0)
    dn = tl.zeros((ROWS, W), tl.float32)
    for start in range(0, W, D):
        wq = load_weight(qkv_ptr, start, 0, W, D, W)
        wk = load_weight(qkv_ptr, W + start, 0, W, D, W)
        wv = load_weight(qkv_ptr, 2 * W + start, 0, W, D, W)
        q = cast(zeros_product(n, tl.trans(wq)), n.dtype)
        k = cast(zeros_product(n, tl.trans(wk)), n.dtype)
        v = cast(zeros_product(n, tl.trans(wv)), n.dtype)
        p = softmax_weights(q, k, same_sample, scale)
        o = zeros_product(cast(p, n.dtype), v)
        head = row[:, None] * W + start + tl.arange(0, D)[None, :]
        tl.store(o_ptr + head, cast(o, n.dtype), mask=real)

        do = zeros_product(dy, load_weight(out_weight_ptr, 0, start, W, W, D))
        delta = tl.sum(do * o, 1)
        do = cast(do, n.dtype)
        dv = cast(zeros_product(tl.trans(cast(p, n.dtype)), do), n.dtype)
        ds = cast(p * (zeros_product(do, tl.trans(v)) - delta[:, None]) * scale, n.dtype)
        dq = cast(zeros_product(ds, k), n.dtype)
        dk = cast(zeros_product(tl.trans(ds), q), n.dtype)
        head = row[:, None] * (3 * W) + start + tl.arange(0, D)[None, :]
        tl.store(dqkv_ptr + head, dq, mask=real)
        tl.store(dqkv_ptr + head + W, dk, mask=real)
        tl.store(dqkv_ptr + head + 2 * W, dv, mask=real)
        dn = product(dq, wq, dn)
        dn = product(dk, wk, dn)
        dn = product(dv, wv, dn)

    x = tl.load(x_ptr + offsets, mask=real, other=0.0)  # again: cheaper than W registers
    normal, rstd = standardise(x.to(tl.float32), eps, W)
    partial = partial_ptr + tl.program_id(0) * 2 * W + tl.arange(0, W)
    tl.store(partial, tl.sum(dn * normal, 0))  # of the LayerNorm's weight
    tl.store(partial + W, tl.sum(dn, 0))  # and of its bias
    dn = dn * ln_weight
    dx = dn - tl.sum(dn, 1)[:, None] / W - normal * (tl.sum(dn * normal, 1)[:, None] / W)
    dy = tl.load(dy_ptr + offsets, mask=real, other=0.0).to(tl.float32)
    tl.store(dx_ptr + offsets, cast(dy + dx * rstd[:, None], dx_ptr.dtype.element_ty), mask=real)


# ---------------------------------------------------------------- launcher


class Launch(NamedTuple):
    head_width: int
    rows: int
    num_warps: int
    num_stages: int


KERNELS = {"forward": forward_kernel, "backward": backward_kernel}

# LAUNCHES[target][kernel][width], in bfloat16: what runs, and what tests/test_kernels.py compiles for
# every target. None spills registers. Wider blocks do: the README says why they could not win anyway.
NARROW = {32: Launch(16, 64, 4, 1), 64: Launch(16, 64, 4, 1)}
LAUNCHES = {
    "sm_80": {
        "forward": {**NARROW, 128: Launch(32, 32, 8, 1)},
        "backward": {**NARROW, 128: Launch(32, 32, 8, 1)},
    },
    "sm_90": {
        "forward": {**NARROW, 128: Launch(32, 64, 8, 1)},
        "backward": {**NARROW, 128: Launch(32, 32, 8, 1)},
    },
    "sm_100": {
        "forward": {**NARROW, 128: Launch(32, 64, 8, 1)},
        "backward": {**NARROW, 128: Launch(32, 64, 8, 1)},
    },
    "gfx942": {
        "forward": {**NARROW, 128: Launch(32, 64, 8, 1)},
        "backward": {**NARROW, 128: Launch(32, 32, 4, 1)},
    },
}


def programs_of(name, x):
    """How many programs a launch takes, and how many rows, of whole samples, each has."""
    rows_each = LAUNCHES[target_of(x.device)][name][x.shape[2]].rows // x.shape[1] * x.shape[1]
    return triton.cdiv(x.shape[0] * x.shape[1], rows_each), rows_each


def launch(name, tensors, x):
    batch, length, width = x.shape
    programs, rows_each = programs_of(name, x)
    head_width, rows, num_warps, num_stages = LAUNCHES[target_of(x.device)][name][width]
    tensors = [tensor.contiguous() for tensor in tensors]  # the outputs are already
    KERNELS[name][(programs,)](
        *tensors, batch * length, length, rows_each, head_width**-0.5, EPS,
        W=width, D=head_width, ROWS=rows, num_warps=num_warps, num_stages=num_stages,
    )  # fmt: skip


# ---------------------------------------------------------------- autograd


@torch.library.custom_op("perceiver::latent_block", mutates_args=())
def latent_block_forward(
    x: torch.Tensor,
    ln_weight: torch.Tensor,
    ln_bias: torch.Tensor,
    qkv_weight: torch.Tensor,
    out_weight: torch.Tensor,
) -> torch.Tensor:
    y = x.new_empty(x.shape)  # contiguous, whatever x is
    launch("forward", (x, ln_weight, ln_bias, qkv_weight, out_weight, y), x)
    return y


@latent_block_forward.register_fake
def _(x, ln_weight, ln_bias, qkv_weight, out_weight):
    return x.new_empty(x.shape)


@torch.library.custom_op("perceiver::latent_block_backward", mutates_args=())
def latent_block_backward(
    dy: torch.Tensor,
    x: torch.Tensor,
    ln_weight: torch.Tensor,
    ln_bias: torch.Tensor,
    qkv_weight: torch.Tensor,
    out_weight: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """dx, the LayerNorm's two gradients (2, W), and the gradients of the two matrices."""
    batch, length, width = x.shape
    dx, n, o = x.new_empty(x.shape), x.new_empty(x.shape), x.new_empty(x.shape)
    dqkv = x.new_empty(batch * length, 3 * width)
    partial = x.new_empty(programs_of("backward", x)[0], 2, width, dtype=torch.float32)
    tensors = (x, ln_weight, ln_bias, qkv_weight, out_weight, dy, dx, n, o, dqkv, partial)
    launch("backward", tensors, x)
    d_ln = partial.sum(0).to(ln_weight.dtype)  # (2, W)
    d_qkv_weight = dqkv.T @ n.view(-1, width)  # (3W, W)
    d_out_weight = dy.reshape(-1, width).T @ o.view(-1, width)  # (W, W)
    return dx, d_ln, d_qkv_weight, d_out_weight


@latent_block_backward.register_fake
def _(dy, x, ln_weight, ln_bias, qkv_weight, out_weight):
    d_ln = ln_weight.new_empty(2, x.shape[2])
    return x.new_empty(x.shape), d_ln, qkv_weight.new_empty(qkv_weight.shape), out_weight.new_empty(out_weight.shape)


def save_for_backward(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def backward(ctx, dy):
    dx, d_ln, d_qkv_weight, d_out_weight = latent_block_backward(dy, *ctx.saved_tensors)
    return dx, d_ln[0], d_ln[1], d_qkv_weight, d_out_weight


latent_block_forward.register_autograd(backward, setup_context=save_for_backward)


# ---------------------------------------------------------------- dispatch


def kernel_limit(x, weights, num_heads):
    """Why the kernels cannot take these tensors, or None."""
    if limit := device_limit(x.device):
        return limit
    dtypes = {x.dtype, *(weight.dtype for weight in weights)}
    # Exact float32 would have no tensor cores, and lose: only the interpreter takes it, to be tested.
    if dtypes != {torch.bfloat16} and not (INTERPRETED and dtypes == {torch.float32}):
        return f"takes bfloat16 only, not {', '.join(sorted(map(str, dtypes)))}"
    length, width = x.shape[1:]
    table = LAUNCHES[target_of(x.device)]
    sizes = {W: row.head_width for W, row in table["forward"].items()}
    if sizes.get(width) != width // num_heads:
        return f"takes these widths with these head widths: {sizes}, not {width} with {width // num_heads}"
    longest = min(table[name][width].rows for name in table)
    if length > longest or x.numel() == 0:
        return f"takes 1 to {longest} latents of width {width}, and no empty batch, not {tuple(x.shape)}"
    return None


def latent_block(x, ln_weight, ln_bias, qkv_weight, out_weight, num_heads, backend=None):
    """x + Wout attention(Wqkv LayerNorm(x)), without biases in the linear layers.

    x: (B, L, W); ln_weight, ln_bias: (W,); qkv_weight: (3W, W), the rows of q, k and v in turn, each
    head by head; out_weight: (W, W). Returns (B, L, W). backend: as in attention().
    """
    width = x.shape[2]
    weights = (ln_weight, ln_bias, qkv_weight, out_weight)
    shapes = [(width,), (width,), (3 * width, width), (width, width)]
    if [tuple(weight.shape) for weight in weights] != shapes:
        raise ValueError(f"the weights' shapes must be {shapes}, not {[tuple(w.shape) for w in weights]}")
    if width % num_heads:
        raise ValueError(f"{num_heads} heads do not divide a width of {width}")
    if use_kernel("latent_block", backend, x.device, kernel_limit(x, weights, num_heads)):
        return latent_block_forward(x, *weights)
    return latent_block_reference(x, *weights, num_heads)
