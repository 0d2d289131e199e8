"""The model as DeepSpeed's pipeline sees it: embedding | trunk layers | heads with their loss."""

import contextlib
import io
from collections import deque
from collections.abc import Iterator

import torch
from deepspeed.pipe import LayerSpec, PipelineModule, TiedLayerSpec
from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology
from torch import Tensor

from mtp_dist.config import Config
from mtp_dist.loss.heads import Heads, HeadSums, Objective, naive_heads_loss
from mtp_dist.loss.linear_cross_entropy import Vocabulary
from mtp_dist.loss.sequential import sequential_heads_loss
from mtp_dist.model.heads import PredictionHeads
from mtp_dist.model.targets import IGNORE_INDEX
from mtp_dist.model.trunk import TokenEmbedding, TrunkLayer
from mtp_dist.model.weights import (
    cut,
    initial_weight,
    named_weights,
    padded_vocab_size,
    parameter_shapes,
    tag_shards,
)
from mtp_dist.parallel.partition import trunk_layers_per_stage
from mtp_dist.parallel.topology import Topology, tensor_group


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Drop what DeepSpeed prints while it builds: its topology, partition and memory."""
    with contextlib.redirect_stdout(io.StringIO()):
        yield


class HeadsWithLoss(PredictionHeads):
    """The heads as the pipeline's last layer: z in, this micro-batch's share of the loss out.

    The loss is inside the layer because DeepSpeed's bf16 optimizer gives no update to a parameter that is used only
    in `loss_fn`. The targets do not travel through the pipeline, whose receive buffers ignore dtype: the engine loads
    each micro-batch on this stage too, and `expect_targets` queues its targets in the order of the forward passes.
    """

    def __init__(self, config: Config, vocab_size: int, padded_vocab_size: int) -> None:
        super().__init__(config, vocab_size, padded_vocab_size)
        self.config = config
        self.vocab_size = vocab_size
        self.queue: deque[Tensor] = deque()
        self.scales = torch.zeros(config.heads.count)
        self.sums = HeadSums.zeros(config.heads.count, self.scales.device)

    def begin(self, scales: Tensor) -> None:
        """Start a batch whose loss is sum_k scales[k-1] * (sum of head k's cross-entropies); scales `[n]`, fp32."""
        assert not self.queue, "targets of the last batch were never used"
        self.scales = scales
        self.sums = HeadSums.zeros(len(scales), scales.device)

    def expect_targets(self, targets: Tensor) -> None:
        """Queue the targets `[n, B, S]` of one micro-batch."""
        self.queue.append(targets)

    def forward(self, inputs: Tensor | tuple[Tensor, Tensor]) -> Tensor:
        """z `[S, B, D]`, or (z, tied weight `[V/TP, D]`), -> a scalar."""
        trunk_output, tied_weight = inputs if isinstance(inputs, tuple) else (inputs, None)
        heads, objective = self._heads(tied_weight), self._objective(self.queue.popleft())
        mode = self.config.heads.loss_mode
        if mode == "naive":
            return naive_heads_loss(heads, trunk_output, objective, self.sums)
        return sequential_heads_loss(mode, heads, trunk_output, objective, self.sums)

    def _heads(self, tied_weight: Tensor | None) -> Heads:
        modules = [self.unembedding_of(distance) for distance in range(1, self.config.heads.count + 1)]
        return Heads(
            hidden=self.hidden,
            logits=lambda distance, hidden: modules[distance - 1](hidden, tied_weight),
            weights=[w for part in (self.heads, self.final_norm) for w in part.parameters() if w.requires_grad],
            unembeddings=[module.weight if tied_weight is None else tied_weight for module in modules],
        )

    def _objective(self, targets: Tensor) -> Objective:
        return Objective(
            targets=targets,
            scales=self.scales,
            vocabulary=Vocabulary(self.vocab_size, IGNORE_INDEX, tensor_group()),
            z_loss=self.config.heads.z_loss,
            chunk_tokens=self.config.heads.chunk_tokens,
            sequence_parallel=self.config.parallel.sequence,
        )


def _with_weight(embedding: TokenEmbedding, hidden: Tensor) -> tuple[Tensor, Tensor]:
    """The tied embedding's second place in the pipeline: hands its weight to the heads beside the hidden states."""
    return hidden, embedding.weight


class MultiTokenPipeline(PipelineModule):  # type: ignore[misc]
    """The layers of this rank's stage, with the initial weights of their global names."""

    def __init__(self, config: Config, vocab_size: int, topology: Topology) -> None:
        self.bounds = _stage_bounds(config, vocab_size)
        axes = PipeModelDataParallelTopology(num_pp=topology.pipeline, num_mp=topology.tensor, num_dp=topology.data)
        with quiet():
            super().__init__(_layer_specs(config, vocab_size), topology=axes)
        tag_shards(self)
        self._initialize(config, vocab_size, topology)

    def _partition_layers(self, method: str = "") -> None:
        """Override of DeepSpeed's: it balances parameters, or layers, and knows nothing of the heads."""
        self.parts = self.bounds
        self._set_bounds(start=self.bounds[self.stage_id], stop=self.bounds[self.stage_id + 1])

    @torch.no_grad()
    def _initialize(self, config: Config, vocab_size: int, topology: Topology) -> None:
        shapes = parameter_shapes(config, vocab_size)
        for name, weight in named_weights(self):
            whole = initial_weight(config, name, shapes[name])
            weight.copy_(cut(whole, weight, topology.tensor_rank, topology.tensor))

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
    if not config.model.tie_embeddings:
        return [LayerSpec(TokenEmbedding, config, padded), *trunk, heads]

    def tied(**kwargs: object) -> TiedLayerSpec:
        return TiedLayerSpec("embedding", TokenEmbedding, config, padded, tied_weight_attr=["lookup.weight"], **kwargs)

    return [tied(), *trunk, tied(forward_fn=_with_weight), heads]


def _stage_bounds(config: Config, vocab_size: int) -> list[int]:
    """Index of each stage's first pipeline layer, and the number of layers at the end."""
    bounds = [0]
    for layers in trunk_layers_per_stage(config, vocab_size):
        bounds.append(bounds[-1] + layers)
    last_layers = 2 if config.model.tie_embeddings else 1
    return [0, *(bound + 1 for bound in bounds[1:-1]), 1 + config.model.trunk_layers + last_layers]
