"""Fused Triton kernels for the hot path, each beside its plain PyTorch reference. See README.md."""
