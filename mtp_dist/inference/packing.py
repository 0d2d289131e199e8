"""Linear layers on a CPU with their weights in the order in which oneDNN multiplies them.

Decoding multiplies every weight by a few tokens. With PyTorch's own order of weights, MKL copies each of them first.
"""

import torch
from torch import Tensor, nn

MIN_WEIGHTS = 200_000
"""Size of the smallest matrix to pack: a call of oneDNN takes 10 microseconds more than one of MKL."""


class PackedLinear(nn.Module):
    """A linear layer for inference on a CPU."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        # Neither a parameter nor a buffer: such a tensor can be neither moved nor saved.
        self.packed = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach())
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, "none", [], "")
        return output


def pack_linear_layers(model: nn.Module) -> None:
    """Replace the larger linear layers of a model on a CPU, which is then for inference only and cannot be saved."""
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Linear) and child.weight.numel() >= MIN_WEIGHTS:
                setattr(module, name, PackedLinear(child))


def can_pack(weight: Tensor) -> bool:
    """Return whether oneDNN multiplies weights of this sort on this machine."""
    if weight.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    supported: bool = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return weight.dtype == torch.float32 or (weight.dtype == torch.bfloat16 and supported)
