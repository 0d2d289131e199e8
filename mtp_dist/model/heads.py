"""The prediction heads on the trunk's output (Gloeckle et al. 2024, section 2)."""

import torch
from megatron.core.tensor_parallel.layers import ColumnParallelLinear
from torch import Tensor, nn

from mtp_dist.config import Config
from mtp_dist.model.layers import DecoderLayer, RMSNorm, transformer_config


class Unembedding(ColumnParallelLinear):  # type: ignore[misc]
    """Hidden `[S, B, D]` -> this rank's logits `[S, B, V/TP]`; padded entries are -inf, so nothing can predict them.

    Under sequence parallelism it gathers its input `[S/TP, B, D]` over the tensor-parallel ranks.
    """

    def __init__(self, config: Config, vocab_size: int, padded_vocab_size: int) -> None:
        super().__init__(
            config.model.hidden_size,
            padded_vocab_size,
            config=transformer_config(config),
            init_method=nn.init.zeros_,
            bias=False,
            skip_weight_param_allocation=config.model.tie_embeddings,
        )
        first_entry = self.tp_group.rank() * self.output_size_per_partition
        entries = torch.arange(first_entry, first_entry + self.output_size_per_partition)
        self.has_padding = bool(entries[-1] >= vocab_size)
        self.register_buffer("padding", entries >= vocab_size, persistent=False)

    def forward(self, hidden: Tensor, tied_weight: Tensor | None) -> Tensor:
        logits, _ = super().forward(hidden, tied_weight)
        return logits.masked_fill(self.padding, float("-inf")) if self.has_padding else logits


class PredictionHeads(nn.Module):
    """n parallel heads: `layers_per_head` transformer layers each, then ONE final norm and the unembedding.

    All heads share the unembedding, or each has its own (`heads.unembedding`).
    """

    global_prefix = ""

    def __init__(self, config: Config, vocab_size: int, padded_vocab_size: int) -> None:
        super().__init__()
        count, depth = config.heads.count, config.heads.layers_per_head
        layer_numbers = range(config.model.trunk_layers + 1, config.model.trunk_layers + depth + 1)
        self.heads = nn.ModuleDict(
            {
                str(k): nn.Sequential(*(DecoderLayer(config, number) for number in layer_numbers))
                for k in range(1, count + 1)
            }
        )
        self.final_norm = RMSNorm(transformer_config(config), config.model.hidden_size, config.model.norm_eps)
        self.separate = config.heads.unembedding == "separate"
        if self.separate:
            self.unembeddings = nn.ModuleDict(
                {str(k): Unembedding(config, vocab_size, padded_vocab_size) for k in range(1, count + 1)}
            )
        else:
            self.unembedding = Unembedding(config, vocab_size, padded_vocab_size)

    def hidden(self, distance: int, trunk_output: Tensor) -> Tensor:
        """Normalized hidden states `[S, B, D]` of the head of that prediction distance (1..n), from z `[S, B, D]`."""
        hidden: Tensor = self.final_norm(self.heads[str(distance)](trunk_output))
        return hidden

    def unembedding_of(self, distance: int) -> Unembedding:
        """What maps the hidden states of the head of that prediction distance to this rank's logits."""
        module = self.unembeddings[str(distance)] if self.separate else self.unembedding
        assert isinstance(module, Unembedding)
        return module
