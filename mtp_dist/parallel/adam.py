"""The fastest AdamW there is on this machine."""

from collections.abc import Callable

import torch

BuildAdamW = Callable[..., torch.optim.Optimizer]


def adamw_class(device: torch.device) -> BuildAdamW:
    """On a GPU NVIDIA Apex's fused AdamW, else DeepSpeed's where it compiles; else PyTorch's.

    All three decouple the weight decay.
    """
    if device.type == "cuda":
        return _apex_fused_adam() or _deepspeed_fused_adam() or torch.optim.AdamW
    return torch.optim.AdamW


def _apex_fused_adam() -> BuildAdamW | None:
    """None without Apex's compiled kernels."""
    try:
        import amp_C  # noqa: F401, the kernels: a build of Apex without them has the class, which then raises
        from apex.optimizers import FusedAdam
    except Exception:  # the package called `apex` on PyPI is an unrelated one, which may raise anything
        return None
    return FusedAdam


def _deepspeed_fused_adam() -> BuildAdamW | None:
    """None where its kernel does not compile, as on a machine without the CUDA toolkit."""
    from deepspeed.ops.adam import FusedAdam
    from deepspeed.ops.op_builder import FusedAdamBuilder

    try:
        FusedAdamBuilder().load(verbose=False)
    except Exception:  # whatever its search for a compiler, or the compiler, raises
        return None
    return FusedAdam
