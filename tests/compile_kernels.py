"""Compiles every launch that kernels/ ships for the targets named, without a GPU, and prints what it uses.

    python -m tests.compile_kernels sm_90 gfx942

One JSON line a build: registers, spills, stack and shared memory in bytes, and the instructions that
multiply. A process of its own, since Triton cannot compile where TRITON_INTERPRET=1 was set.
"""

import json
import re
import subprocess
import sys
import tempfile

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from kernels import attention, categorical_projection, latent_block

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
POINTERS = {torch.bfloat16: "*bf16", torch.float32: "*fp32"}  # arguments whose names end in _ptr, but for:
FIXED_TYPES = {
    "mask_ptr": "*u8",
    **dict.fromkeys(("lse_ptr", "partial_ptr", "loss_ptr", "gradient_ptr"), "*fp32"),
    **dict.fromkeys(("next_probs_ptr", "shift_ptr", "scale_ptr", "returns_ptr"), "*fp32"),
    **dict.fromkeys(("scale", "eps", "mc_share"), "fp32"),
}
INSTRUCTIONS = ("wgmma.mma", "tcgen05.mma", "mma.sync", "tf32", "v_mfma")


def builds(target):
    """(name, kernel, dtype, constants, num_warps, num_stages) of every row of the launch tables."""
    for (name, dtype), rows in attention.LAUNCHES[target].items():
        for width, (block_q, block_k, *options) in rows.items():
            constants = {"HAS_MASK": True, "D": width, "BLOCK_Q": block_q, "BLOCK_K": block_k}
            for extra in [{}] if name == "forward" else [{"ONE_PASS": True}, {"ONE_PASS": False}]:
                yield f"attention {name}", attention.KERNELS[name], dtype, {**constants, **extra}, *options
    for name, rows in latent_block.LAUNCHES[target].items():
        for width, (head_width, block, *options) in rows.items():
            constants = {"W": width, "D": head_width, "ROWS": block}
            yield f"latent_block {name}", latent_block.KERNELS[name], torch.bfloat16, constants, *options
    for atoms, (sources, *options) in categorical_projection.LAUNCHES[target].items():
        constants = {"ATOMS": atoms, "SOURCES": sources}
        kernel = categorical_projection.cross_entropy_kernel
        for dtype in (torch.bfloat16, torch.float32):
            yield "bellman_cross_entropy", kernel, dtype, constants, *options


def compile_for(target, kernel, dtype, constants, num_warps, num_stages):
    signature, attributes = {}, {}
    for position, parameter in enumerate(kernel.params):
        name = parameter.name
        if name in constants:
            signature[name] = "constexpr"
            continue
        usual = POINTERS[dtype] if name.endswith("_ptr") else "i32"
        signature[name] = FIXED_TYPES.get(name, usual)
        # What the launcher sees at run time: pointers and strides are multiples of 16, lengths are not.
        if signature[name] != "fp32" and not parameter.do_not_specialize:
            attributes[position,] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constants, attributes)
    options = {"num_warps": num_warps, "num_stages": num_stages}
    return triton.compile(source, target=TARGETS[target], options=options)


def usage(compiled):
    shared = compiled.metadata.shared
    if "amdgcn" in compiled.asm:
        text = compiled.asm["amdgcn"]
        registers, spills, stack = (
            int(re.search(rf"\.{field}:\s+(\d+)", text).group(1))
            for field in ("vgpr_count", "vgpr_spill_count", "private_segment_fixed_size")
        )
    else:
        text = compiled.asm["ptx"]
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(compiled.asm["cubin"])
            file.flush()
            command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
            report = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        registers, stack, spills = (
            int(re.search(rf"{field}:(\d+)", report).group(1)) for field in ("REG", "STACK", "LOCAL")
        )
    found = [instruction for instruction in INSTRUCTIONS if instruction in text]
    return dict(registers=registers, spills=spills, stack=stack, shared=shared, instructions=found)


if __name__ == "__main__":
    for target in sys.argv[1:]:
        for name, kernel, dtype, constants, num_warps, num_stages in builds(target):
            compiled = compile_for(target, kernel, dtype, constants, num_warps, num_stages)
            row = dict(target=target, kernel=name, dtype=str(dtype), num_warps=num_warps, **constants)
            print(json.dumps({**row, **usage(compiled)}), flush=True)
