"""Triton kernels, one a file, each beside its plain PyTorch twin."""
