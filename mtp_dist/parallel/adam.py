"""The fastest AdamW there is on this machine."""

import importlib.util
from collections.abc import Callable

import torch


def adamw_class(device: torch.device) -> tuple[str, Callable[..., torch.optim.Optimizer]]:
    """Its name and class. On a GPU NVIDIA Apex's fused one, else DeepSpeed's where it compiles; else PyTorch's.

    All three decouple the weight decay.
    """
    if device.type == "cuda":
        # The package called `apex` on PyPI is an unrelated one without `apex.optimizers`.
        if importlib.util.find_spec("apex") and importlib.util.find_spec("apex.optimizers"):
            from apex.optimizers import FusedAdam as ApexAdam

            return "Apex FusedAdam", ApexAdam
        from deepspeed.ops.op_builder import FusedAdamBuilder

        if FusedAdamBuilder().is_compatible(verbose=False):
            from deepspeed.ops.adam import FusedAdam

            return "DeepSpeed FusedAdam", FusedAdam
    return "torch AdamW", torch.optim.AdamW
