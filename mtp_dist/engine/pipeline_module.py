"""The model as DeepSpeed's pipeline sees it: embedding | trunk layers | heads with their loss."""

import contextlib
import io
from collections import deque
from collections.abc import Iterator, Sequence

import torch
from deepspeed.pipe import LayerSpec, PipelineModule, TiedLayerSpec
from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology
from torch import Tensor

from mtp_dist.config import Config
from mtp_dist.distributed.topology import Topology
from mtp_dist.engine.heads_with_loss import HeadsWithLoss
from mtp_dist.model.parameters import padded_vocab_size
from mtp_dist.model.sharding import tag_shards
from mtp_dist.model.targets import MicroBatch, document_attention_bias
from mtp_dist.model.trunk import TokenEmbedding, TrunkLayer
from mtp_dist.planner.partition import trunk_layers_per_stage


@contextlib.contextmanager
def suppress_stdout() -> Iterator[None]:
    """Drop what DeepSpeed prints while it builds: its topology, partition and memory."""
    with contextlib.redirect_stdout(io.StringIO()):
        yield


def _heads_have_embedding(config: Config) -> bool:
    """Whether the last stage holds the embedding too: to unembed with it, or to embed the tokens that heads read."""
    return config.model.tie_embeddings or config.heads.kind == "sequential"


def _with_weight(embedding: TokenEmbedding, hidden: Tensor) -> tuple[Tensor, Tensor]:
    """The shared embedding's second place in the pipeline: hands its weight to the heads beside the hidden states."""
    return hidden, embedding.weight


class MultiTokenPipeline(PipelineModule):  # type: ignore[misc]
    """The layers of this rank's stage. Their weights have no values yet: the engine sets them."""

    def __init__(self, config: Config, vocab_size: int, topology: Topology) -> None:
        self.config = config
        self.device = topology.device
        self.queue: deque[MicroBatch] = deque()
        self.bounds = _stage_bounds(config, vocab_size)
        axes = PipeModelDataParallelTopology(num_pp=topology.pp_size, num_mp=topology.tp_size, num_dp=topology.dp_size)
        # Without no_grad the broadcast of shared weights would get into their graph, which warns in every run.
        with suppress_stdout(), torch.no_grad():
            super().__init__(_layer_specs(config, vocab_size), topology=axes)
        tag_shards(self)

    def _partition_layers(self, method: str = "") -> None:
        """Override of DeepSpeed's: it balances parameters, or layers, and knows nothing of the heads."""
        self.parts = self.bounds
        self._set_bounds(start=self.bounds[self.stage_id], stop=self.bounds[self.stage_id + 1])

    def enqueue(self, batch: Sequence[MicroBatch]) -> None:
        """Queue the micro-batches of a batch in the order of the forward passes."""
        assert not self.queue, "micro-batches of the last batch were never used"
        self.queue.extend(batch)

    def forward(self, inputs: Tensor) -> Tensor:
        """Tokens `[B, S]` on the first stage, hidden `[S, B, D]` on the others -> hidden; a scalar on the last one.

        Override of DeepSpeed's, whose layers see nothing but the output of the layer before. What else they need of
        the micro-batch does not travel through the pipeline, whose receive buffers ignore dtype: it waits in a queue.
        """
        micro_batch = self.queue.popleft() if self.queue else None
        bias = None
        if not self.config.data.attention_across_documents:
            assert micro_batch and micro_batch.documents is not None, "every stage reads the documents"
            documents = micro_batch.documents[:, : self.config.train.sequence_length]
            bias = document_attention_bias(documents.to(self.device), next(self.parameters()).dtype)
        output = inputs
        for layer in self.forward_funcs:
            if isinstance(layer, TrunkLayer):
                output = layer(output, bias)
            elif isinstance(layer, HeadsWithLoss):
                output = layer(output, micro_batch, bias)
            else:
                output = layer(output)
        return output

    @property
    def heads(self) -> HeadsWithLoss:
        """The last stage's heads."""
        layer = self.forward_funcs[-1]
        assert isinstance(layer, HeadsWithLoss), "only the last stage has the heads"
        return layer


def _layer_specs(config: Config, vocab_size: int) -> list[LayerSpec]:
    padded = padded_vocab_size(vocab_size, config.parallel.tensor)
    trunk = [LayerSpec(TrunkLayer, config, index) for index in range(config.model.trunk_layers)]
    heads = LayerSpec(HeadsWithLoss, config, vocab_size, padded)
    if not _heads_have_embedding(config):
        return [LayerSpec(TokenEmbedding, config, padded), *trunk, heads]

    def tied(**kwargs: object) -> TiedLayerSpec:
        return TiedLayerSpec("embedding", TokenEmbedding, config, padded, tied_weight_attr=["lookup.weight"], **kwargs)

    return [tied(), *trunk, tied(forward_fn=_with_weight), heads]


def _stage_bounds(config: Config, vocab_size: int) -> list[int]:
    """Index of each stage's first pipeline layer, and the number of layers at the end."""
    bounds = [0]
    for layers in trunk_layers_per_stage(config, vocab_size):
        bounds.append(bounds[-1] + layers)
    last_layers = 2 if _heads_have_embedding(config) else 1
    return [0, *(bound + 1 for bound in bounds[1:-1]), 1 + config.model.trunk_layers + last_layers]
