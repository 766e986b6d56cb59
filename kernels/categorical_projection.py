"""The distributional Bellman target and its cross-entropy.

The maths. A value is a distribution over M atoms z_i = i / (M - 1) on [0, 1]; delta = 1 / (M - 1).
The Bellman operator moves atom j to z'_j = clip(shift + scale * z_j, 0, 1), off the grid. C51
(Bellemare et al. 2017, arXiv 1707.06887, eq. 7) splits its mass linearly between two neighbours:

    (project p)_i = sum_j p_j hat(i, z'_j),     hat(i, z) = max(0, 1 - |z - z_i| / delta)

The target mixes the bootstrapped distribution with the observed return R, a point mass:

    Gamma = (1 - mc_share) project(p) + mc_share hat(., clip(R, 0, 1))
    loss  = -sum_i Gamma_i log softmax(q_logits)_i,   dloss / dq_logits = softmax(q_logits) - Gamma

The kernel holds a row's target in registers: a program sums the hats of all M atoms over all M
destinations, and leaves the loss and its gradient, so that the backward pass is one product with
the incoming gradient. In PyTorch the same is about thirty launches, which move almost nothing.
"""

from typing import NamedTuple

import torch
from torch.autograd.function import once_differentiable

from kernels.triton_support import device_limit, jit, operator, target_of, tl, use_kernel


# ---------------------------------------------------------------- the plain reference


def project(probs, shift, scale):
    """The distribution of clip(shift + scale * z, 0, 1), z ~ probs, back on the atoms.

    probs: (B, M); shift, scale: (B,). Returns (B, M), of the same total mass.

    Adding each atom's mass to its two neighbours costs O(M) a row; the sum over hats, O(M^2), is
    what the kernel does, since a GPU computes hats faster than it scatters.
    """
    num_atoms = probs.shape[-1]
    atoms = torch.linspace(0, 1, num_atoms, dtype=probs.dtype, device=probs.device)  # (M,)
    # Where each atom goes, counted in atoms: (B, M).
    moved = (shift[:, None] + scale[:, None] * atoms).clamp(0, 1) * (num_atoms - 1)
    lower = moved.floor().clamp(max=num_atoms - 2)  # the last atom is its neighbour's upper end
    to_upper = probs * (moved - lower)
    lower = lower.long().clamp(0, num_atoms - 2)  # NaN is no index; its mass stays NaN
    target = torch.zeros_like(probs).scatter_add(-1, lower, probs - to_upper)
    return target.scatter_add(-1, lower + 1, to_upper)


def point_mass(value, num_atoms):
    """All mass at clip(value, 0, 1), split between its two neighbours. value: (B,) -> (B, M)."""
    index = torch.arange(num_atoms, dtype=value.dtype, device=value.device)
    position = value.clamp(0, 1) * (num_atoms - 1)
    return (1 - (position[:, None] - index).abs()).clamp(min=0)


def bellman_target(next_probs, shift, scale, returns, mc_share):
    """Gamma, the mixture of the bootstrapped distribution and the observed return: (B, M)."""
    bootstrapped = project(next_probs, shift, scale)
    return (1 - mc_share) * bootstrapped + mc_share * point_mass(returns, next_probs.shape[-1])


def bellman_cross_entropy_reference(q_logits, next_probs, shift, scale, returns, mc_share):
    """The cross-entropy (B,) of softmax(q_logits) to Gamma; see bellman_cross_entropy."""
    with torch.no_grad():  # the target is a constant
        gamma = bellman_target(next_probs, shift, scale, returns, mc_share)
    precise = torch.promote_types(q_logits.dtype, torch.float32)
    return -(gamma * torch.log_softmax(q_logits, dim=-1, dtype=precise)).sum(-1)  # (B,)


# ---------------------------------------------------------------- the kernel


@jit()
def clip(x, highest):
    """x, but at least 0 and at most `highest`. The hardware's max and min would lose a NaN."""
    x = tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)
    return tl.minimum(x, highest, propagate_nan=tl.PropagateNan.ALL)


@jit("num_atoms")
def cross_entropy_kernel(
    q_logits_ptr, next_probs_ptr, shift_ptr, scale_ptr, returns_ptr, loss_ptr, gradient_ptr,
    num_atoms, mc_share,
    ATOMS: tl.constexpr, SOURCES: tl.constexpr,
):  # fmt: skip
    """One row. ATOMS: a power of two, at least M. SOURCES: how many j are moved at once."""
    row = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, ATOMS)
    exists = i < num_atoms
    last = (num_atoms - 1).to(tl.float32)  # positions are counted in atoms: z * (M - 1)

    shift = tl.load(shift_ptr + row) * last
    scale = tl.load(scale_ptr + row)
    bootstrapped = tl.zeros((ATOMS,), tl.float32)
    for start in range(0, num_atoms, SOURCES):
        j = start + tl.arange(0, SOURCES)
        probs = tl.load(next_probs_ptr + row * num_atoms + j, mask=j < num_atoms, other=0.0)
        moved = clip(shift + scale * j, last)
        hat = clip(1.0 - tl.abs(moved[:, None] - i[None, :]), 1.0)  # (SOURCES, ATOMS)
        bootstrapped += tl.sum(probs[:, None] * hat, 0)
    returns = clip(tl.load(returns_ptr + row), 1.0) * last
    observed = clip(1.0 - tl.abs(returns - i), 1.0)
    gamma = tl.where(exists, (1.0 - mc_share) * bootstrapped + mc_share * observed, 0.0)

    logits = tl.load(q_logits_ptr + row * num_atoms + i, mask=exists, other=float("-inf"))
    logits = logits.to(tl.float32)
    logits -= tl.max(logits, 0)
    total = tl.sum(tl.exp(logits), 0)
    log_prob = tl.where(exists, logits - tl.log(total), 0.0)
    tl.store(loss_ptr + row, -tl.sum(gamma * log_prob, 0))
    mass = tl.sum(gamma, 0)  # 1, if next_probs sums to 1
    gradient = mass * tl.exp(logits) / total - gamma
    tl.store(gradient_ptr + row * num_atoms + i, gradient, mask=exists)


# ---------------------------------------------------------------- launcher


class Launch(NamedTuple):
    sources: int
    num_warps: int
    num_stages: int


# LAUNCHES[target][M rounded up to a power of two]: what runs, and what the tests compile.
ANYWHERE = {64: Launch(32, 4, 1), 128: Launch(32, 4, 1), 256: Launch(16, 4, 1)}
LAUNCHES = {target: ANYWHERE for target in ("sm_80", "sm_90", "sm_100", "gfx942")}


def padded_atoms(num_atoms):
    return max(64, 1 << (num_atoms - 1).bit_length())


# ---------------------------------------------------------------- autograd


def outputs(q_logits, *_):
    """The loss (B,) and its gradient (B, M), in fp32, still empty."""
    batch, num_atoms = q_logits.shape
    loss = q_logits.new_empty(batch, dtype=torch.float32)
    return loss, q_logits.new_empty(batch, num_atoms, dtype=torch.float32)


@operator(
    "bellman_cross_entropy(Tensor q_logits, Tensor next_probs, Tensor shift, Tensor scale,"
    " Tensor returns, float mc_share) -> (Tensor, Tensor)",
    outputs,
)
def fused_cross_entropy(q_logits, next_probs, shift, scale, returns, mc_share):
    batch, num_atoms = q_logits.shape
    loss, gradient = outputs(q_logits)
    atoms = padded_atoms(num_atoms)
    sources, num_warps, num_stages = LAUNCHES[target_of(q_logits.device)][atoms]
    inputs = [tensor.contiguous() for tensor in (q_logits, next_probs, shift, scale, returns)]
    with torch.cuda.device_of(q_logits):
        cross_entropy_kernel[(batch,)](
            *inputs, loss, gradient, num_atoms, mc_share,
            ATOMS=atoms, SOURCES=sources, num_warps=num_warps, num_stages=num_stages,
        )  # fmt: skip
    return loss, gradient


class FusedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q_logits, *target):
        loss, gradient = fused_cross_entropy(q_logits, *target)
        ctx.dtype = q_logits.dtype
        ctx.save_for_backward(gradient)
        return loss

    @staticmethod
    @once_differentiable  # a second derivative is refused
    def backward(ctx, dloss):
        (gradient,) = ctx.saved_tensors
        return (dloss[:, None] * gradient).to(ctx.dtype), None, None, None, None, None


# ---------------------------------------------------------------- dispatch


def kernel_limit(q_logits, constants):
    """Why the kernel cannot take these tensors, or None."""
    if limit := device_limit(q_logits.device):
        return limit
    dtypes = {tensor.dtype for tensor in constants}
    if q_logits.dtype not in (torch.float32, torch.bfloat16) or dtypes != {torch.float32}:
        return f"takes float32 (q_logits may be bfloat16), not {q_logits.dtype} with {dtypes}"
    batch, num_atoms = q_logits.shape
    if not 2 <= num_atoms <= max(LAUNCHES[target_of(q_logits.device)]) or batch == 0:
        return f"takes 2 to 256 atoms, and no empty batch, not {(batch, num_atoms)}"
    return None


def bellman_cross_entropy(q_logits, next_probs, shift, scale, returns, mc_share, backend=None):
    """-sum_i Gamma_i log softmax(q_logits)_i, one number per row; gradients reach q_logits only.

    q_logits, next_probs: (B, M); shift, scale, returns: (B,), of values normalised to [0, 1];
    mc_share: the return's weight in the target, a float. Returns (B,), in fp32.

    backend: as in attention().
    """
    batch = q_logits.shape[:1]
    shapes = [tuple(tensor.shape) for tensor in (next_probs, shift, scale, returns)]
    if q_logits.dim() != 2 or shapes != [tuple(q_logits.shape), *[tuple(batch)] * 3]:
        given = f"{tuple(q_logits.shape)} and {shapes}"
        raise ValueError(f"shapes {given} must be (B, M), (B, M) and (B,) thrice")
    constants = (next_probs, shift, scale, returns)
    limit = kernel_limit(q_logits, constants)
    if use_kernel("bellman_cross_entropy", backend, q_logits.device, limit):
        return FusedCrossEntropy.apply(q_logits, *constants, mc_share)
    return bellman_cross_entropy_reference(q_logits, *constants, mc_share)
