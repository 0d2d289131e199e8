"""Linear layers on a CPU with their weights in the order in which oneDNN multiplies them.

Decoding multiplies every weight by a few tokens. With PyTorch's own order of weights, MKL copies each of them first.
"""

import torch
from torch import Tensor, nn


class PackedLinear(nn.Module):
    """A linear layer without bias, for inference on a CPU."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        # Neither a parameter nor a buffer: such a tensor can be neither moved nor saved.
        self.packed = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach())

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = torch.ops.mkldnn._linear_pointwise(x, self.packed, None, "none", [], "")
        return output


def pack_linear_layers(model: nn.Module) -> None:
    """Replace the linear layers of a model on a CPU, which can then only be used for inference and not be saved."""
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Linear) and child.bias is None:
                setattr(module, name, PackedLinear(child))


def can_pack(weight: Tensor) -> bool:
    """Return whether oneDNN multiplies weights of this sort on this machine."""
    if weight.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    supported: bool = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return weight.dtype == torch.float32 or (weight.dtype == torch.bfloat16 and supported)
