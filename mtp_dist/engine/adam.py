"""The fastest AdamW there is on this machine."""

from collections.abc import Callable
from functools import partial

import torch

BuildAdamW = Callable[..., torch.optim.Optimizer]


def adamw_class(device: torch.device) -> BuildAdamW:
    """Return NVIDIA Apex's fused AdamW on a GPU if it is installed, PyTorch's fused one if not; unfused on a CPU.

    All of them decouple the weight decay.
    """
    if device.type == "cuda":
        return _apex_fused_adam() or partial(torch.optim.AdamW, fused=True)
    return torch.optim.AdamW


def _apex_fused_adam() -> BuildAdamW | None:
    """Return None without Apex's compiled kernels."""
    try:
        import amp_C  # noqa: F401, the kernels: a build of Apex without them has the class, which then raises
        from apex.optimizers import FusedAdam
    except Exception:  # the package called `apex` on PyPI is an unrelated one, which may raise anything
        return None
    return FusedAdam
