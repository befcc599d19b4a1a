"""CUDA headers that our kernels share: PTX instructions, number formats and routing."""
