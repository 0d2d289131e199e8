"""The shared trunk: token embedding and `trunk_layers` transformer layers."""

from megatron.core.tensor_parallel.layers import VocabParallelEmbedding
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


class TrunkLayer(DecoderLayer):
    """Layer `index` of the trunk, counted from 0."""

    def __init__(self, config: Config, index: int) -> None:
        super().__init__(config, layer_number=index + 1)
        self.global_prefix = f"trunk.{index}"
