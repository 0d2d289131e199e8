"""Kernels and collectives whose results are bitwise identical in every run."""

import os

import torch


def use_deterministic_algorithms() -> None:
    """Let PyTorch, cuBLAS and NCCL compute deterministically. Call it before CUDA and the process groups are used.

    PyTorch then raises an error at an operation without a deterministic kernel.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    os.environ.setdefault("NCCL_ALGO", "Ring")  # not NVLS, whose sums depend on the order of arrival
    torch.use_deterministic_algorithms(True)
