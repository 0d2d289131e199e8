"""What prediction heads are made of beside transformer layers."""

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel.mappings import copy_to_tensor_model_parallel_region
from torch import Tensor, nn

from mtp_dist.config import Config
from mtp_dist.model.layers import DecoderLayer, RMSNorm, recompute, transformer_config


class ReplicatedLinear(nn.Module):
    """A matrix `[out, in]` without bias, whole on every tensor-parallel rank: hidden `[..., in]` -> `[..., out]`.

    Under sequence parallelism each rank multiplies its own part of the sequence, and the copy-to-region mapping sums
    the weight's gradient over the ranks (see RMSNorm).
    """

    def __init__(self, config: Config, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, inputs))
        self.sequence_parallel = config.parallel.sequence

    def forward(self, hidden: Tensor) -> Tensor:
        weight = copy_to_tensor_model_parallel_region(self.weight) if self.sequence_parallel else self.weight
        return F.linear(hidden, weight)


class TransformerHead(nn.ModuleList):
    """`layers_per_head` transformer layers: hidden `[S, B, D]` -> same (Gloeckle et al. 2024, section 2).

    attention_bias: see CausalAttention.
    """

    def __init__(self, config: Config) -> None:
        first = config.model.trunk_layers + 1
        super().__init__(DecoderLayer(config, first + depth) for depth in range(config.heads.layers_per_head))

    def forward(self, hidden: Tensor, attention_bias: Tensor | None) -> Tensor:
        for layer in self:
            hidden = layer(hidden, attention_bias)
        return hidden


class LinearHead(nn.Module):
    """One matrix: W x (the linear heads of Gloeckle et al. 2024, table S4)."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.linear = ReplicatedLinear(config, config.model.hidden_size, config.model.hidden_size)

    def forward(self, hidden: Tensor) -> Tensor:
        output: Tensor = self.linear(hidden)
        return output


class ResidualHead(LinearHead):
    """x + SiLU(W x) on normalized hidden states (Medusa, arXiv:2401.10774, section 2.1.1)."""

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden + F.silu(super().forward(hidden))


class SequentialHead(nn.Module):
    """TRM(M [RMSNorm(Emb(x)); RMSNorm(h)]) (DeepSeek-V3, arXiv:2412.19437, equations 21 and 22).

    The paper writes h first; the columns of `eh_proj` are in the order of its released weights and of Megatron-core.
    """

    def __init__(self, config: Config) -> None:
        super().__init__()
        width, shared = config.model.hidden_size, transformer_config(config)
        self.hnorm = RMSNorm(shared, width, config.model.norm_eps)
        self.enorm = RMSNorm(shared, width, config.model.norm_eps)
        self.eh_proj = ReplicatedLinear(config, 2 * width, width)
        self.layers = TransformerHead(config)
        self.activation_checkpointing = config.train.activation_checkpointing

    def forward(self, hidden: Tensor, embedded: Tensor, attention_bias: Tensor | None) -> Tensor:
        """hidden of the head before and embedded tokens, both `[S, B, D]` -> `[S, B, D]`."""
        whole = self.activation_checkpointing == "full" and torch.is_grad_enabled()
        joined = recompute(self._join, hidden, embedded) if whole else self._join(hidden, embedded)
        output: Tensor = self.layers(joined, attention_bias)
        return output

    def _join(self, hidden: Tensor, embedded: Tensor) -> Tensor:
        joined: Tensor = self.eh_proj(torch.cat([self.enorm(embedded), self.hnorm(hidden)], -1))
        return joined
