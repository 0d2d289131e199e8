"""Linear layers: replicated over the tensor-parallel ranks, and sharded ones with a low-rank adapter."""

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.tensor_parallel.mappings import copy_to_tensor_model_parallel_region
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from mtp_dist.config import LowRankConfig


class ReplicatedLinear(nn.Module):
    """A matrix `[out, in]` without bias that every tensor-parallel rank holds in full: `[..., in]` -> `[..., out]`.

    Under sequence parallelism each rank multiplies its own part of the sequence, and the copy-to-region mapping sums
    the weight's gradient over the ranks (see RMSNorm).
    """

    def __init__(self, megatron: TransformerConfig, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, inputs))
        self.sequence_parallel = megatron.sequence_parallel

    def forward(self, hidden: Tensor) -> Tensor:
        weight = copy_to_tensor_model_parallel_region(self.weight) if self.sequence_parallel else self.weight
        return F.linear(hidden, weight)


class AdaptedColumnLinear(ColumnParallelLinear):  # type: ignore[misc]
    """W x + scale * B A x (LoRA, Hu et al. 2021) with the rows of W and of B sharded over the tensor-parallel ranks.

    What is summed over the ranks in the backward pass, or gathered under sequence parallelism, is A x of `rank`
    channels, by the column-parallel B.
    """

    def __init__(
        self, inputs: int, outputs: int, *, config: TransformerConfig, low_rank: LowRankConfig, **kwargs: Any
    ) -> None:
        super().__init__(inputs, outputs, config=config, **kwargs)
        self.lora_A = ReplicatedLinear(config, inputs, low_rank.rank)
        self.lora_B = ColumnParallelLinear(
            low_rank.rank, outputs, config=config, init_method=nn.init.zeros_, bias=False, gather_output=False
        )
        self.scale = low_rank.scale

    def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        output, bias = super().forward(hidden, *args, **kwargs)
        return output + self.scale * self.lora_B(self.lora_A(hidden))[0], bias


class RowLinear(RowParallelLinear):  # type: ignore[misc]
    """W x, and the bias that every tensor-parallel rank holds in full and adds to its own part of the sequence.

    Under sequence parallelism the copy-to-region mapping sums the bias's gradient over the ranks (see RMSNorm).
    """

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor | None]:
        output, bias = super().forward(hidden)
        if bias is not None and self.sequence_parallel:
            bias = copy_to_tensor_model_parallel_region(bias)
        return output, bias


class AdaptedRowLinear(RowLinear):
    """W x + scale * B A x with the columns of W and of A sharded over the tensor-parallel ranks.

    What is summed over the ranks in the forward pass, or scattered under sequence parallelism, is again A x, by the
    row-parallel A.
    """

    def __init__(
        self, inputs: int, outputs: int, *, config: TransformerConfig, low_rank: LowRankConfig, **kwargs: Any
    ) -> None:
        super().__init__(inputs, outputs, config=config, **kwargs)
        self.lora_A = RowParallelLinear(
            inputs,
            low_rank.rank,
            config=config,
            init_method=nn.init.zeros_,
            bias=False,
            input_is_parallel=True,
            skip_bias_add=True,
        )
        self.lora_B = ReplicatedLinear(config, low_rank.rank, outputs)
        self.scale = low_rank.scale

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor | None]:
        output, bias = super().forward(hidden)
        return output + self.scale * self.lora_B(self.lora_A(hidden)[0]), bias
