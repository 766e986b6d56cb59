"""Compiles every launch of kernels/ for the targets named, without a GPU, and prints what it uses.

    python -m tests.compile_kernels sm_90 gfx942

One JSON line a build: registers, spills, stack and shared memory in bytes, and the instructions
that multiply. A process of its own, since Triton cannot compile where TRITON_INTERPRET=1 was set.
"""

import json
import re
import subprocess
import sys
import tempfile
from itertools import product

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from kernels import attention, categorical_projection, task_linear

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
# Arguments whose names end in _ptr, but for the fixed types below.
POINTERS = {torch.bfloat16: "*bf16", torch.float32: "*fp32"}
FIXED_TYPES = {
    "mask_ptr": "*u8",
    "task_ptr": "*i64",
    "first_ptr": "*i32",
    **dict.fromkeys(("lse_ptr", "loss_ptr", "gradient_ptr"), "*fp32"),
    **dict.fromkeys(("next_probs_ptr", "shift_ptr", "scale_ptr", "returns_ptr"), "*fp32"),
    **dict.fromkeys(("scale", "mc_share"), "fp32"),
}
INSTRUCTIONS = ("wgmma.mma", "tcgen05.mma", "mma.sync", "tf32", "xf32", "v_mfma")


def builds(target):
    """(name, kernel, dtype, constants, num_warps, num_stages) of every row of the launch tables."""
    for (name, dtype), rows in attention.LAUNCHES[target].items():
        kernel = attention.KERNELS[name]
        passes = [{}] if name == "forward" else [{"ONE_PASS": True}, {"ONE_PASS": False}]
        for width, (block_q, block_k, *options) in rows.items():
            tile = {"D": width, "BLOCK_Q": block_q, "BLOCK_K": block_k}
            for has_mask, variant in product((True, False), passes):
                constants = {"HAS_MASK": has_mask, **tile, **variant}
                yield f"attention {name}", kernel, dtype, constants, *options
    for atoms, (sources, *options) in categorical_projection.LAUNCHES[target].items():
        constants = {"ATOMS": atoms, "SOURCES": sources}
        kernel = categorical_projection.cross_entropy_kernel
        for dtype in (torch.bfloat16, torch.float32):
            yield "bellman_cross_entropy", kernel, dtype, constants, *options
    for name, tile in task_linear.LAUNCHES[target].items():
        kernel = task_linear.KERNELS[name]
        block_r, block_f, block_o, *options = tile
        constants = {"DIMS": 23, "SCALES": 3, "WIDTH": 512}  # observations at size small
        constants |= {"BLOCK_R": block_r, "BLOCK_F": block_f, "BLOCK_O": block_o}
        for has in (True, False):
            constants = {**constants, "HAS_STATISTICS": has}
            yield f"task_linear {name}", kernel, torch.float32, constants, *options


def compile_for(target, kernel, dtype, constants, num_warps, num_stages):
    signature, attributes = {}, {}
    for position, parameter in enumerate(kernel.params):
        name = parameter.name
        if name in constants:
            signature[name] = "constexpr"
            continue
        usual = POINTERS[dtype] if name.endswith("_ptr") else "i32"
        signature[name] = FIXED_TYPES.get(name, usual)
        # As at run time, where pointers and strides are multiples of 16, and lengths are not.
        if signature[name] != "fp32" and not parameter.do_not_specialize:
            attributes[position,] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constants, attributes)
    options = {"num_warps": num_warps, "num_stages": num_stages}
    return triton.compile(source, target=TARGETS[target], options=options)


def field(pattern, text):
    """The number that a report gives for a field."""
    return int(re.search(pattern + r"(\d+)", text)[1])


def resources(compiled):
    """-> registers, spilled registers, bytes of stack"""
    if "amdgcn" in compiled.asm:
        names = ("vgpr_count", "vgpr_spill_count", "private_segment_fixed_size")
        return [field(rf"\.{name}:\s+", compiled.asm["amdgcn"]) for name in names]
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        report = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return [field(f"{name}:", report) for name in ("REG", "LOCAL", "STACK")]


def usage(compiled):
    text = compiled.asm["amdgcn" if "amdgcn" in compiled.asm else "ptx"]
    registers, spills, stack = resources(compiled)
    return {
        "registers": registers,
        "spills": spills,
        "stack": stack,
        "shared": compiled.metadata.shared,
        "instructions": [instruction for instruction in INSTRUCTIONS if instruction in text],
        "loses_nan": "min.f32" in text,  # NVIDIA's min.NaN.f32 keeps it
    }


if __name__ == "__main__":
    for target in sys.argv[1:]:
        for name, kernel, dtype, constants, warps, stages in builds(target):
            compiled = compile_for(target, kernel, dtype, constants, warps, stages)
            row = {"target": target, "kernel": name, "dtype": str(dtype), "num_warps": warps}
            print(json.dumps({**row, **constants, **usage(compiled)}), flush=True)
