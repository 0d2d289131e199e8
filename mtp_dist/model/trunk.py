"""The shared trunk: token embedding and `trunk_layers` transformer layers."""

import torch.nn.functional as F
from megatron.core.parallel_state import get_tensor_model_parallel_group
from megatron.core.tensor_parallel.layers import VocabParallelEmbedding
from megatron.core.tensor_parallel.mappings import (
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from torch import Tensor, nn

from mtp_dist.config import Config
from mtp_dist.model.layers import DecoderLayer, transformer_config


class TokenEmbedding(nn.Module):
    """Tokens `[B, S]` -> hidden `[S, B, D]` (`[S/TP, B, D]` under sequence parallelism)."""

    global_prefix = "embedding"

    def __init__(self, config: Config, padded_vocab_size: int) -> None:
        super().__init__()
        self.sequence_parallel = config.parallel.sequence
        self.lookup = VocabParallelEmbedding(
            padded_vocab_size,
            config.model.hidden_size,
            init_method=nn.init.zeros_,
            reduce_scatter_embeddings=self.sequence_parallel,
            config=transformer_config(config),
        )

    @property
    def weight(self) -> nn.Parameter:
        """This rank's rows `[V/TP, D]`."""
        return self.lookup.weight

    def forward(self, tokens: Tensor) -> Tensor:
        hidden: Tensor = self.lookup(tokens)
        return hidden if self.sequence_parallel else hidden.transpose(0, 1).contiguous()


def embed_tokens(weight: Tensor, tokens: Tensor, sequence_parallel: bool) -> Tensor:
    """What TokenEmbedding with that weight `[V/TP, D]` gives for tokens `[B, S]`."""
    rows = tokens - get_tensor_model_parallel_group().rank() * len(weight)
    elsewhere = (rows < 0) | (rows >= len(weight))
    partial = F.embedding(rows.masked_fill(elsewhere, 0), weight).masked_fill(elsewhere.unsqueeze(-1), 0.0)
    partial = partial.transpose(0, 1).contiguous()
    to_all = (
        reduce_scatter_to_sequence_parallel_region if sequence_parallel else reduce_from_tensor_model_parallel_region
    )
    hidden: Tensor = to_all(partial)
    return hidden


class TrunkLayer(DecoderLayer):
    """Layer `index` of the trunk, counted from 0."""

    def __init__(self, config: Config, index: int) -> None:
        super().__init__(config, layer_number=index + 1)
        self.global_prefix = f"trunk.{index}"
