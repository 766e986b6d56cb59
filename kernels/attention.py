"""Attention for a Perceiver: few latents over many inputs, or many action queries over few latents.

The maths, for one head of one sample (q: Lq x D; k, v: Lk x D; dO is the gradient of O):

    S = q k^T / sqrt(D)                          scores; -inf where the key is padding
    P = exp(S - lse),   lse_i = log sum_j exp(S_ij)
    O = P v

    dV = P^T dO,   dP = dO v^T,   dS = P * (dP - delta),   delta_i = sum_d O_id dO_id
    dQ = dS k / sqrt(D),   dK = dS^T q / sqrt(D)

The kernels walk over tiles of P and keep none of them (FlashAttention, Dao et al. 2022, arXiv
2205.14135): the forward pass saves lse alone, 4 bytes a query, and the backward pass recomputes P.
Backward, dQ sums over keys, and dK and dV over queries. A program that owns all queries of a head
and walks over its keys finishes all three: five products. Where neither side fits one tile, one
kernel per side does seven, and neither needs atomics.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

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

LOG2_E = tl.constexpr(1.4426950408889634)  # exp(x) = 2 ** (x * LOG2_E): the hardware has exp2


# ---------------------------------------------------------------- the plain reference


def attention_reference(q, k, v, mask=None):
    """softmax(q k^T / sqrt(D)) v, written out. A row whose keys are all padding gives zeros."""
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)  # (B, H, Lq, Lk)
    if mask is not None:
        padding = ~mask[:, None, None, :]  # (B, 1, 1, Lk)
        # The lowest finite number, not -inf: a row of -inf alone would be 0 / 0 = NaN.
        scores = scores.masked_fill(padding, torch.finfo(scores.dtype).min)
    weights = torch.softmax(scores, dim=-1, dtype=torch.promote_types(scores.dtype, torch.float32))
    if mask is not None:
        weights = weights.masked_fill(padding, 0.0)
    return weights.to(v.dtype) @ v  # (B, H, Lq, D)


def attention_short(q, k, v, mask=None):
    """The same, keys before heads and queries: a CPU vectorises this softmax where keys are few."""
    scores = ((k * q.shape[-1] ** -0.5) @ q.transpose(-2, -1)).transpose(1, 2)  # (B, Lk, H, Lq)
    padding = None if mask is None else ~mask[:, :, None, None]  # (B, Lk, 1, 1)
    if mask is not None:
        scores = scores.masked_fill(padding, torch.finfo(scores.dtype).min)
    weights = torch.softmax(scores.contiguous(), dim=1)
    if mask is not None:
        weights = weights.masked_fill(padding, 0.0)
    return weights.permute(0, 2, 3, 1) @ v  # (B, H, Lq, D)


def attention_plain(q, k, v, mask=None):
    """The fastest plain PyTorch: SDPA, with two exceptions on a CPU.

    Its backward pass is slow there in half precision, and attention_short is faster for few keys.
    """
    if q.device.type == "cpu" and q.dtype in (torch.bfloat16, torch.float16):
        return attention_reference(q, k, v, mask)
    if q.device.type == "cpu" and q.shape[2] >= 4 and k.shape[2] <= 24:
        return attention_short(q, k, v, mask)
    attend = None if mask is None else mask[:, None, None, :]  # (B, 1, 1, Lk)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=attend)


# ---------------------------------------------------------------- the kernels
# Names: i counts queries, j keys, `head` the B * H heads. A tile's rows past the end are zeros: a
# query there has dO = 0 and gives nothing, and a key there is not attended to. What the kernels
# write, and dO, lies in memory as (B, L, H, D), the layout of the linear layers on either side. The
# inputs q, k and v bring their strides.


@jit()
def load_tile(pointer, start, stride, length, BLOCK: tl.constexpr, D: tl.constexpr):
    """Rows start .. start + BLOCK of one head: (BLOCK, D)."""
    rows = start + tl.arange(0, BLOCK)
    offsets = rows[:, None] * stride + tl.arange(0, D)[None, :]
    return tl.load(pointer + offsets, mask=rows[:, None] < length, other=0.0)


@jit()
def store_tile(pointer, tile, start, stride, length, BLOCK: tl.constexpr, D: tl.constexpr):
    rows = start + tl.arange(0, BLOCK)
    offsets = rows[:, None] * stride + tl.arange(0, D)[None, :]
    tl.store(pointer + offsets, cast(tile, pointer.dtype.element_ty), mask=rows[:, None] < length)


@jit()
def load_attend(mask_ptr, start, len_k, BLOCK_K: tl.constexpr, HAS_MASK: tl.constexpr):
    """Which of the keys start .. start + BLOCK_K exist and are no padding: (BLOCK_K,)."""
    j = start + tl.arange(0, BLOCK_K)
    attend = j < len_k
    if HAS_MASK:
        attend = attend & (tl.load(mask_ptr + j, mask=attend, other=0) != 0)
    return attend


@jit("num_heads", "len_q", "len_k")
def forward_kernel(
    q_ptr, k_ptr, v_ptr, mask_ptr, out_ptr, lse_ptr,
    q_b, q_h, q_l, k_b, k_h, k_l, v_b, v_h, v_l, mask_b,  # strides
    num_heads, len_q, len_k, scale,
    HAS_MASK: tl.constexpr, D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """A program owns BLOCK_Q queries of one head, and walks over the keys. out (B, Lq, H, D); lse
    (B, H, Lq): log2 of the sum of exp(score), by which the backward pass makes weights again."""
    num_tiles = tl.cdiv(len_q, BLOCK_Q)
    head = (tl.program_id(0) // num_tiles).to(tl.int64)  # 64 bits: offsets can pass 2 ** 31
    b, h = head // num_heads, head % num_heads
    start_q = (tl.program_id(0) % num_tiles) * BLOCK_Q
    width = num_heads * D
    k_ptr += b * k_b + h * k_h
    v_ptr += b * v_b + h * v_h

    q = load_tile(q_ptr + b * q_b + h * q_h, start_q, q_l, len_q, BLOCK_Q, D)
    # The maximum starts finite, so that -inf minus it is -inf and a row without keys gives zeros.
    highest = tl.full((BLOCK_Q,), -1e30, tl.float32)
    total = tl.zeros((BLOCK_Q,), tl.float32)
    out = tl.zeros((BLOCK_Q, D), tl.float32)
    for start_k in range(0, len_k, BLOCK_K):
        k = load_tile(k_ptr, start_k, k_l, len_k, BLOCK_K, D)
        attend = load_attend(mask_ptr + b * mask_b, start_k, len_k, BLOCK_K, HAS_MASK)
        s = product(q, tl.trans(k), tl.zeros((BLOCK_Q, BLOCK_K), tl.float32)) * (scale * LOG2_E)
        s = tl.where(attend[None, :], s, float("-inf"))
        new_highest = tl.maximum(highest, tl.max(s, 1))
        shrink = tl.exp2(highest - new_highest)
        p = tl.exp2(s - new_highest[:, None])
        total = total * shrink + tl.sum(p, 1)
        v = load_tile(v_ptr, start_k, v_l, len_k, BLOCK_K, D)
        out = product(cast(p, v.dtype), v, out * shrink[:, None])
        highest = new_highest

    total = tl.where(total == 0.0, 1.0, total)
    out_ptr += b * len_q * width + h * D
    store_tile(out_ptr, out / total[:, None], start_q, width, len_q, BLOCK_Q, D)
    i = start_q + tl.arange(0, BLOCK_Q)
    lse = highest + tl.log2(total)  # in bits, like s
    tl.store(lse_ptr + head * len_q + i, lse, mask=i < len_q)


@jit("num_heads", "len_q", "len_k")
def backward_by_queries_kernel(
    q_ptr, k_ptr, v_ptr, mask_ptr, out_ptr, lse_ptr, dout_ptr, dq_ptr, dk_ptr, dv_ptr,
    q_b, q_h, q_l, k_b, k_h, k_l, v_b, v_h, v_l, mask_b,
    num_heads, len_q, len_k, scale,
    ONE_PASS: tl.constexpr,  # this tile holds every query, so that dK and dV are complete too
    HAS_MASK: tl.constexpr, D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """A program owns a tile of queries and walks over the keys."""
    num_tiles = tl.cdiv(len_q, BLOCK_Q)
    head = (tl.program_id(0) // num_tiles).to(tl.int64)
    b, h = head // num_heads, head % num_heads
    start_q = (tl.program_id(0) % num_tiles) * BLOCK_Q
    width = num_heads * D
    q_side = b * len_q * width + h * D
    k_side = b * len_k * width + h * D
    k_ptr += b * k_b + h * k_h
    v_ptr += b * v_b + h * v_h

    q = load_tile(q_ptr + b * q_b + h * q_h, start_q, q_l, len_q, BLOCK_Q, D)
    dout = load_tile(dout_ptr + q_side, start_q, width, len_q, BLOCK_Q, D)
    out = load_tile(out_ptr + q_side, start_q, width, len_q, BLOCK_Q, D)
    delta = tl.sum(out.to(tl.float32) * dout.to(tl.float32), 1)
    i = start_q + tl.arange(0, BLOCK_Q)
    lse = tl.load(lse_ptr + head * len_q + i, mask=i < len_q, other=0.0)
    dq = tl.zeros((BLOCK_Q, D), tl.float32)
    for start_k in range(0, len_k, BLOCK_K):
        k = load_tile(k_ptr, start_k, k_l, len_k, BLOCK_K, D)
        v = load_tile(v_ptr, start_k, v_l, len_k, BLOCK_K, D)
        attend = load_attend(mask_ptr + b * mask_b, start_k, len_k, BLOCK_K, HAS_MASK)
        s = product(q, tl.trans(k), tl.zeros((BLOCK_Q, BLOCK_K), tl.float32)) * (scale * LOG2_E)
        p = tl.exp2(tl.where(attend[None, :], s, float("-inf")) - lse[:, None])
        dp = product(dout, tl.trans(v), tl.zeros((BLOCK_Q, BLOCK_K), tl.float32))
        ds = cast(p * (dp - delta[:, None]), k.dtype)
        dq = product(ds, k, dq)
        if ONE_PASS:
            dv = product(tl.trans(cast(p, v.dtype)), dout, tl.zeros((BLOCK_K, D), tl.float32))
            store_tile(dv_ptr + k_side, dv, start_k, width, len_k, BLOCK_K, D)
            dk = product(tl.trans(ds), q, tl.zeros((BLOCK_K, D), tl.float32))
            store_tile(dk_ptr + k_side, dk * scale, start_k, width, len_k, BLOCK_K, D)
    store_tile(dq_ptr + q_side, dq * scale, start_q, width, len_q, BLOCK_Q, D)


@jit("num_heads", "len_q", "len_k")
def backward_by_keys_kernel(
    q_ptr, k_ptr, v_ptr, mask_ptr, out_ptr, lse_ptr, dout_ptr, dq_ptr, dk_ptr, dv_ptr,
    q_b, q_h, q_l, k_b, k_h, k_l, v_b, v_h, v_l, mask_b,
    num_heads, len_q, len_k, scale,
    ONE_PASS: tl.constexpr,  # this tile holds every key, so that dQ is complete too
    HAS_MASK: tl.constexpr, D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """A program owns a tile of keys and walks over the queries. Scores are (keys, queries)."""
    num_tiles = tl.cdiv(len_k, BLOCK_K)
    head = (tl.program_id(0) // num_tiles).to(tl.int64)
    b, h = head // num_heads, head % num_heads
    start_k = (tl.program_id(0) % num_tiles) * BLOCK_K
    width = num_heads * D
    q_side = b * len_q * width + h * D
    k_side = b * len_k * width + h * D
    q_ptr += b * q_b + h * q_h

    k = load_tile(k_ptr + b * k_b + h * k_h, start_k, k_l, len_k, BLOCK_K, D)
    v = load_tile(v_ptr + b * v_b + h * v_h, start_k, v_l, len_k, BLOCK_K, D)
    attend = load_attend(mask_ptr + b * mask_b, start_k, len_k, BLOCK_K, HAS_MASK)
    dk = tl.zeros((BLOCK_K, D), tl.float32)
    dv = tl.zeros((BLOCK_K, D), tl.float32)
    for start_q in range(0, len_q, BLOCK_Q):
        q = load_tile(q_ptr, start_q, q_l, len_q, BLOCK_Q, D)
        dout = load_tile(dout_ptr + q_side, start_q, width, len_q, BLOCK_Q, D)
        out = load_tile(out_ptr + q_side, start_q, width, len_q, BLOCK_Q, D)
        delta = tl.sum(out.to(tl.float32) * dout.to(tl.float32), 1)
        i = start_q + tl.arange(0, BLOCK_Q)
        lse = tl.load(lse_ptr + head * len_q + i, mask=i < len_q, other=0.0)
        s = product(k, tl.trans(q), tl.zeros((BLOCK_K, BLOCK_Q), tl.float32)) * (scale * LOG2_E)
        p = tl.exp2(tl.where(attend[:, None], s, float("-inf")) - lse[None, :])
        dv = product(cast(p, v.dtype), dout, dv)
        dp = product(v, tl.trans(dout), tl.zeros((BLOCK_K, BLOCK_Q), tl.float32))
        ds = cast(p * (dp - delta[None, :]), k.dtype)
        dk = product(ds, q, dk)
        if ONE_PASS:
            dq = product(tl.trans(ds), k, tl.zeros((BLOCK_Q, D), tl.float32))
            store_tile(dq_ptr + q_side, dq * scale, start_q, width, len_q, BLOCK_Q, D)
    store_tile(dk_ptr + k_side, dk * scale, start_k, width, len_k, BLOCK_K, D)
    store_tile(dv_ptr + k_side, dv, start_k, width, len_k, BLOCK_K, D)


# ---------------------------------------------------------------- launcher


class Launch(NamedTuple):
    block_q: int
    block_k: int
    num_warps: int
    num_stages: int


KERNELS = {
    "forward": forward_kernel,
    "by_queries": backward_by_queries_kernel,
    "by_keys": backward_by_keys_kernel,
}
BF16, FP32 = torch.bfloat16, torch.float32

# LAUNCHES[target][kernel, dtype][head width]: what runs, and what tests/test_kernels.py compiles
# for every target. None spills registers; 64 rows are the least that wgmma and tcgen05 multiply.
# Exact fp32 is plain arithmetic on registers, so its tiles are small. Where the tile of by_queries
# (by_keys) covers all queries (keys), the backward pass is one pass.
WIDTHS = (16, 32, 64)  # of heads
FP32_LAUNCHES = {
    ("forward", FP32): dict.fromkeys(WIDTHS, Launch(32, 32, 8, 1)),
    ("by_queries", FP32): {**dict.fromkeys(WIDTHS, Launch(32, 16, 8, 1)), 64: Launch(16, 16, 8, 1)},
    ("by_keys", FP32): {**dict.fromkeys(WIDTHS, Launch(16, 32, 8, 1)), 32: Launch(32, 32, 8, 1)},
}
LAUNCHES = {
    "sm_80": {  # at most 99 KB of shared memory, so that it fits the consumer cards 8.6 and 8.9 too
        ("forward", BF16): dict.fromkeys(WIDTHS, Launch(64, 64, 4, 3)),
        ("by_queries", BF16): dict.fromkeys(WIDTHS, Launch(64, 32, 8, 2)),
        ("by_keys", BF16): dict.fromkeys(WIDTHS, Launch(32, 64, 8, 2)),
        **FP32_LAUNCHES,
    },
    "sm_90": {
        ("forward", BF16): dict.fromkeys(WIDTHS, Launch(64, 64, 4, 3)),
        ("by_queries", BF16): dict.fromkeys(WIDTHS, Launch(64, 64, 8, 2)),
        ("by_keys", BF16): dict.fromkeys(WIDTHS, Launch(64, 64, 8, 2)),
        **FP32_LAUNCHES,
    },
    "sm_100": {
        ("forward", BF16): dict.fromkeys(WIDTHS, Launch(64, 64, 4, 3)),
        ("by_queries", BF16): dict.fromkeys(WIDTHS, Launch(64, 64, 8, 2)),
        ("by_keys", BF16): {
            **dict.fromkeys(WIDTHS, Launch(64, 64, 8, 2)),
            16: Launch(64, 64, 4, 2),
        },
        **FP32_LAUNCHES,
    },
    "gfx942": {
        ("forward", BF16): dict.fromkeys(WIDTHS, Launch(64, 64, 8, 1)),
        ("by_queries", BF16): dict.fromkeys(WIDTHS, Launch(64, 32, 8, 1)),
        ("by_keys", BF16): dict.fromkeys(WIDTHS, Launch(32, 64, 8, 1)),
    },
}


def strides(*tensors):
    return [stride for tensor in tensors for stride in tensor.stride()[:3]]


def rows_contiguous(tensor):
    """The kernels read a row of D numbers as one piece; all other strides are free."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def new_heads(q, length):
    """An uninitialised (B, H, length, D), stored (B, length, H, D): heads merge without a copy."""
    batch, heads, _, width = q.shape
    return q.new_empty(batch, length, heads, width).transpose(1, 2)


def launch(name, tensors, q, k, v, mask, **constants):
    """One launch of a kernel. tensors: its pointers after the mask, in order."""
    (batch, heads, len_q, width), len_k = q.shape, k.shape[2]
    q, k, v = rows_contiguous(q), rows_contiguous(k), rows_contiguous(v)
    mask_bytes = q if mask is None else rows_contiguous(mask).view(torch.uint8)  # q: never read
    block_q, block_k, num_warps, num_stages = LAUNCHES[target_of(q.device)][name, q.dtype][width]
    tiles = triton.cdiv(len_k, block_k) if name == "by_keys" else triton.cdiv(len_q, block_q)
    with torch.cuda.device_of(q):
        KERNELS[name][(batch * heads * tiles,)](
            q, k, v, mask_bytes, *tensors, *strides(q, k, v), mask_bytes.stride(0),
            heads, len_q, len_k, width**-0.5,
            **constants, HAS_MASK=mask is not None, D=width, BLOCK_Q=block_q, BLOCK_K=block_k,
            num_warps=num_warps, num_stages=num_stages,
        )  # fmt: skip


# ---------------------------------------------------------------- autograd


def forward_outputs(q, k, v, mask):
    return new_heads(q, q.shape[2]), q.new_empty(q.shape[:3], dtype=torch.float32)


def backward_outputs(dout, q, k, v, mask, out, lse):
    return new_heads(q, q.shape[2]), new_heads(q, k.shape[2]), new_heads(q, k.shape[2])


@operator(
    "attention(Tensor q, Tensor k, Tensor v, Tensor? mask) -> (Tensor, Tensor)",
    forward_outputs,
)
def attention_forward(q, k, v, mask):
    """-> the output (B, H, Lq, D), and lse (B, H, Lq)"""
    out, lse = forward_outputs(q, k, v, mask)
    launch("forward", (out, lse), q, k, v, mask)
    return out, lse


@operator(
    "attention_backward(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor? mask,"
    " Tensor out, Tensor lse) -> (Tensor, Tensor, Tensor)",
    backward_outputs,
)
def attention_backward(dout, q, k, v, mask, out, lse):
    """-> dq, dk, dv"""
    # (B, Lq, H, D), as the kernels read them; views where they lie so already
    out, dout = out.transpose(1, 2).contiguous(), dout.transpose(1, 2).contiguous()
    gradients = backward_outputs(dout, q, k, v, mask, out, lse)
    tensors = (out, lse, dout, *gradients)
    table = LAUNCHES[target_of(q.device)]
    if q.shape[2] <= table["by_queries", q.dtype][q.shape[3]].block_q:
        launch("by_queries", tensors, q, k, v, mask, ONE_PASS=True)
    elif k.shape[2] <= table["by_keys", q.dtype][q.shape[3]].block_k:
        launch("by_keys", tensors, q, k, v, mask, ONE_PASS=True)
    else:
        launch("by_queries", tensors, q, k, v, mask, ONE_PASS=False)
        launch("by_keys", tensors, q, k, v, mask, ONE_PASS=False)
    return gradients


class FusedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, mask):
        out, lse = attention_forward(q, k, v, mask)
        ctx.save_for_backward(q, k, v, mask, out, lse)
        return out

    @staticmethod
    @once_differentiable  # a second derivative is refused
    def backward(ctx, dout):
        return *attention_backward(dout, *ctx.saved_tensors), None


# ---------------------------------------------------------------- dispatch


def kernel_limit(q, k, v):
    """Why the kernels cannot take these tensors, or None."""
    if limit := device_limit(q.device):
        return limit
    target = target_of(q.device)
    if ("forward", q.dtype) not in LAUNCHES[target] or not q.dtype == k.dtype == v.dtype:
        known = " or ".join(str(dtype) for name, dtype in LAUNCHES[target] if name == "forward")
        return f"takes {known} on {target}, not {q.dtype}, {k.dtype}, {v.dtype}"
    if q.shape[3] not in WIDTHS:
        return f"takes heads 16, 32 or 64 wide, not {q.shape[3]}"
    if q.numel() == 0 or k.numel() == 0:
        return f"takes no empty tensors, such as {tuple(q.shape)} and {tuple(k.shape)}"
    width = q.shape[1] * q.shape[3]  # of a row of the output
    if max((x.shape[2] + 64) * max(x.stride(2), width) for x in (q, k, v)) >= 2**31:  # 64: a tile
        return "counts a sample's elements in 32 bits: at most 2 ** 31"
    return None


def attention(q, k, v, mask=None, backend=None):
    """Attend from q to k and v, with softmax(q k^T / sqrt(D)).

    q: (B, H, Lq, D); k, v: (B, H, Lk, D); mask: (B, Lk) bool, True = attend. Returns (B, H, Lq, D).
    A sample whose keys are all masked gets zeros.

    backend: None chooses, "triton" or "plain" insists.
    """
    batch, heads, _, width = q.shape
    if k.shape != v.shape or k.shape[:2] != (batch, heads) or k.shape[3] != width:
        shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)} and v {tuple(v.shape)}"
        raise ValueError(f"{shapes} do not match")
    if mask is not None and (mask.dtype != torch.bool or mask.shape != (batch, k.shape[2])):
        given = f"{mask.dtype} {tuple(mask.shape)}"
        raise ValueError(f"mask must be bool {(batch, k.shape[2])}, not {given}")
    if use_kernel("attention", backend, q.device, kernel_limit(q, k, v)):
        return FusedAttention.apply(q, k, v, mask)
    return attention_plain(q, k, v, mask)
