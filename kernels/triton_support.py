"""What the kernels share: the one guarded import of Triton, and when to use a kernel.

Triton has no wheels for macOS and Windows. There, `triton` below is None, the kernels' bodies are
never compiled, and every function of this folder takes its plain path.
"""

import functools
import os
import warnings
from types import SimpleNamespace

import torch

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None
    tl = SimpleNamespace(constexpr=lambda value: value)  # annotations, and the constants below

# TRITON_INTERPRET=1, set before Triton is imported, runs kernels in NumPy on CPU tensors.
INTERPRETED = triton is not None and os.environ.get("TRITON_INTERPRET") == "1"
INTERPRET = tl.constexpr(INTERPRETED)  # the same, readable inside a kernel

# Compute capability -> the target whose launch table it uses; nothing else has been compiled for.
# 8.6 and 8.9, the consumer cards, have 8.0's registers and instructions, and less shared memory.
NVIDIA_TARGETS = {
    (8, 0): "sm_80",
    (8, 6): "sm_80",
    (8, 9): "sm_80",
    (9, 0): "sm_90",
    (10, 0): "sm_100",
}
AMD_TARGETS = {"gfx942": "gfx942"}


def jit(*unspecialised):
    """@triton.jit, or nothing at all without Triton.

    unspecialised: integer arguments, such as lengths, whose values must not compile a kernel each.
    """
    if triton is None:
        return lambda function: function
    return triton.jit(do_not_specialize=list(unspecialised))


def mend_loop_bounds():
    """Triton 3.6's interpreter has loop bounds as one-element arrays: no integers to NumPy 2.5."""
    from triton.runtime import interpreter
    patch = interpreter._patch_lang_tensor

    def patch_and_mend(tensor, scope):
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    interpreter._patch_lang_tensor = patch_and_mend


if INTERPRETED and triton.__version__.startswith("3.6."):
    mend_loop_bounds()


@jit()
def product(a, b, total):
    """total + a @ b in fp32, without TF32. The interpreter would multiply bf16 as raw integers."""
    if INTERPRET:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, total, input_precision="ieee")


@jit()
def cast(x, dtype: tl.constexpr):
    """x.to(dtype), to nearest as the hardware does. The interpreter would cut fp32 off to bf16."""
    if INTERPRET:
        if dtype == tl.bfloat16:
            bits = x.to(tl.int32, bitcast=True)
            x = (bits + 0x7FFF + ((bits >> 16) & 1)).to(tl.float32, bitcast=True)
    return x.to(dtype)


@functools.lru_cache
def find_target(device):
    if device.type == "cpu":
        return "sm_90" if INTERPRETED else None
    if device.type != "cuda" or triton is None:
        return None
    if torch.version.hip:
        name = torch.cuda.get_device_properties(device).gcnArchName.split(":")[0]
        return AMD_TARGETS.get(name)
    return NVIDIA_TARGETS.get(torch.cuda.get_device_capability(device))


@torch.compiler.assume_constant_result
def target_of(device):
    """The launch table's name for this device, or None where no kernel can run."""
    return find_target(device)


def device_limit(device):
    """Why no kernel can run on this device, or None."""
    if triton is None:
        return "needs the package triton (Linux only)"
    if target_of(device) is None:
        known = ", ".join(dict.fromkeys([*NVIDIA_TARGETS.values(), *AMD_TARGETS.values()]))
        if device.type == "cuda":
            return f"is built for {known}, not for {torch.cuda.get_device_name(device)}"
        return f"is built for {known}, not for {device}; TRITON_INTERPRET=1 runs it on a CPU"
    return None


def operator(schema, fake):
    """Register a function as torch.ops.perceiver.NAME, which torch.compile takes whole -> that

    fake: makes empty outputs for the same arguments. Autograd stands outside, in a Function: this
    way costs the host about half of what torch.library.custom_op does.
    """
    name, arguments = schema.split("(", 1)

    def register(function):
        torch.library.define(f"perceiver::{name}", f"({arguments}")
        torch.library.impl(f"perceiver::{name}", ("cpu", "cuda"))(function)
        torch.library.register_fake(f"perceiver::{name}", fake)
        return getattr(torch.ops.perceiver, name).default

    return register


@functools.lru_cache
def warn_once(message):
    warnings.warn(message, stacklevel=4)


def use_kernel(name, backend, device, limit):
    """Whether to launch the kernel. backend: None chooses, "triton" insists, "plain" declines.

    limit: why the kernel cannot take these arguments, or None.
    """
    if backend not in (None, "triton", "plain"):
        raise ValueError(f"backend {backend!r} is unknown; choose None, 'triton' or 'plain'")
    if backend == "triton" and limit:
        raise ValueError(f"{name}: the Triton kernel {limit}")
    if backend is None and limit and device.type == "cuda" and not torch.compiler.is_compiling():
        name = "kernels" if limit == device_limit(device) else name  # one warning, not one each
        warn_once(f"{name}: using plain PyTorch, since the Triton kernel {limit}")
    wanted = backend == "triton" or (backend is None and device.type == "cuda")
    return wanted and limit is None
