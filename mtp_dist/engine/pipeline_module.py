"""The model as layers of DeepSpeed's pipeline: embedding | trunk layers | heads with their loss."""

import contextlib
import io
from collections.abc import Iterator
from itertools import accumulate, chain, islice, product
from typing import Any, NamedTuple

import torch
from deepspeed.pipe import DualPipeVModule, LayerSpec, PipelineModule, TiedLayerSpec
from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from mtp_dist.config import Config
from mtp_dist.distributed.topology import Topology
from mtp_dist.engine.heads_with_loss import EarlierHeads, HeadsWithLoss, InnerHeadsWithLoss
from mtp_dist.engine.stand_ins import new_stand_in, stand_in_names
from mtp_dist.model.layers import AttentionInputs, transformer_config
from mtp_dist.model.parameters import is_trained, named_weights, parameter_shapes
from mtp_dist.model.rope import rope_angles
from mtp_dist.model.sharding import tag_shards
from mtp_dist.model.targets import MicroBatch, TrainBatch, attention_bias
from mtp_dist.model.trunk import HiddenStateWeights, TokenEmbedding, TrunkLayer, add_weighted
from mtp_dist.planner.partition import head_numbers, pipeline_stages
from mtp_dist.planner.weights import heads_have_embedding


def suppress_stdout() -> contextlib.AbstractContextManager[object]:
    """Suppress what DeepSpeed prints while it builds: its topology, partition and memory."""
    return contextlib.redirect_stdout(io.StringIO())


class StageOutput(NamedTuple):
    """Tensors that a pipeline stage sends to the next one, which receives them as a plain tuple."""

    hidden: Tensor
    """`[S, B, D]`, `[S/TP, B, D]` under sequence parallelism."""
    weighted_sum: Tensor | None = None
    """Weighted sum of the hidden states up to this stage, of the same shape; None, and not sent, without it."""
    earlier: EarlierHeads | None = None
    """Results of this stage's and earlier heads; None, and not sent, without heads."""

    @classmethod
    def received(cls, tensors: Tensor | tuple[Tensor, ...], has_weighted_sum: bool) -> "StageOutput":
        """Return the output of the stage before, of which the first one has tokens instead."""
        if isinstance(tensors, Tensor):
            return cls(tensors)
        hidden, *others = tensors
        if has_weighted_sum:
            return cls(hidden, weighted_sum=others[0])
        return cls(hidden, earlier=EarlierHeads(*others) if others else None)


class HeadsInput(NamedTuple):
    """Input of the heads if they use the embedding's weight."""

    hidden: Tensor
    embedding_weight: Tensor


def _add_embedding_weight(embedding: TokenEmbedding, hidden: Tensor) -> HeadsInput:
    """Forward pass of the tied embedding's replica on the heads' stage."""
    return HeadsInput(hidden, embedding.weight)


class MultiTokenPipeline(PipelineModule):  # type: ignore[misc]
    """The layers of this rank's stage. Their weights are uninitialized until the engine sets them."""

    num_phases = 1
    """Stages of this rank, through which each micro-batch passes one after the other."""
    active_phase = 0
    """Index of the stage that runs."""

    def __init__(self, config: Config, topology: Topology) -> None:
        self.config = config
        self.device = topology.device
        self.micro_batches: dict[tuple[int, int], MicroBatch] = {}
        """Micro-batches that wait for a forward pass, by phase and index."""
        self._indices = [0] * self.num_phases
        """Index of the next micro-batch, by phase."""
        axes = PipeModelDataParallelTopology(num_pp=topology.pp_size, num_mp=topology.tp_size, num_dp=topology.dp_size)
        # Without no_grad the broadcast of tied weights would enter their graph, which warns in every run.
        with suppress_stdout(), torch.no_grad():
            super().__init__([*chain.from_iterable(_stage_specs(config))], topology=axes)
        tag_shards(self)
        for name, weight in named_weights(self):
            weight.requires_grad_(is_trained(config, name))
        self.trunk_is_frozen = config.train.freezes_trunk
        shapes = parameter_shapes(config)
        self.stand_in_names = stand_in_names(config)
        self.stand_ins = nn.ParameterList(new_stand_in(len(shapes[name])) for name in self.stand_in_names)
        self._window_bias: Tensor | None = None
        """Mask of the sliding window if documents do not matter, once a micro-batch has passed."""
        self._rope_angles = rope_angles(config.model, config.train.sequence_length).to(self.device)

    def _partition_layers(self, method: str = "") -> None:
        """Override of DeepSpeed's, which balances parameters or layers and disregards the heads."""
        self.parts = [0, *accumulate(map(len, _stage_specs(self.config)))]
        self._set_bounds(start=self.parts[self.stage_id], stop=self.parts[self.stage_id + 1])

    @property
    def phase_stages(self) -> tuple[int, ...]:
        """Stages of this rank, by phase."""
        return self.config.parallel.rank_stages(self.stage_id)

    def stage_of(self, name: str) -> int:
        """Return the stage of this rank that has a weight, given by global name; the last one of a weight in both."""
        return self.stage_id

    def enqueue(self, batch: TrainBatch) -> None:
        """Let the micro-batches wait for their forward passes, of which each phase runs them in this order."""
        assert not self.micro_batches, "micro-batches of the last batch were never used"
        self._indices = [0] * self.num_phases
        waiting = product(range(self.num_phases), enumerate([part.to(self.device) for part in batch.micro_batches]))
        self.micro_batches = {(phase, index): part for phase, (index, part) in waiting}

    def load(self, _: None) -> tuple[Tensor, tuple[()]]:
        """Return the tokens `[B, S]` of the next forward pass, in the form of DeepSpeed's `batch_fn`.

        DeepSpeed calls it before each forward pass of the first and the last stage, with `dualpipev` of the first one
        only. Its data iterator yields placeholders only: the waiting micro-batches are the one way into the model.
        """
        samples = self.micro_batches[0, self._indices[0]].samples
        return samples[:, : self.config.train.sequence_length], ()

    def forward(self, inputs: Tensor | tuple[Tensor, ...]) -> Tensor | tuple[Tensor, ...]:
        """Map the tokens `[B, S]`, or another stage's output, to this stage's output; to a scalar if it has the loss.

        Override of DeepSpeed's, whose layers get only the output of the layer before. The rest of the micro-batch
        does not travel through the pipeline, whose receive buffers ignore dtype.
        """
        phase = self.active_phase
        micro_batch = self.micro_batches.pop((phase, self._indices[phase]), None)
        self._indices[phase] += 1
        attention = AttentionInputs(self._rope_angles, self._attention_bias(micro_batch))
        output, weighted_sum, earlier = StageOutput.received(inputs, self.config.heads.weighted_hidden_states)
        if self.trunk_is_frozen:
            output = output.detach()  # received tensors require a gradient
        # Once, not per layer: under sequence parallelism their gradient is a collective.
        weights = next((layer() for layer in self.forward_funcs if isinstance(layer, HiddenStateWeights)), None)
        for layer in self.forward_funcs:
            if isinstance(layer, TrunkLayer):
                output = layer(output, attention)
                weighted_sum = self._add_state(weighted_sum, output, layer.index + 1, weights)
            elif isinstance(layer, TokenEmbedding):
                output = layer(output)
                weighted_sum = self._add_state(None, output, 0, weights)
            elif isinstance(layer, HeadsWithLoss):
                return layer(output, micro_batch, attention, weighted_sum, earlier)
            elif not isinstance(layer, HiddenStateWeights):
                output = layer(output)
        if torch.is_grad_enabled() and not self.trunk_is_frozen:
            output.requires_grad_()  # DeepSpeed runs backward through a frozen embedding alone, too
        return (output,) if weighted_sum is None else (output, weighted_sum)

    def _attention_bias(self, micro_batch: MicroBatch | None) -> Tensor | None:
        length, window = self.config.train.sequence_length, self.config.model.sliding_window
        dtype = next(self.parameters()).dtype
        if not self.config.data.attention_across_documents:
            assert micro_batch and micro_batch.documents is not None, "every stage reads the documents"
            return attention_bias(micro_batch.documents[:, :length].to(self.device), dtype, window)
        if window is not None and window < length and self._window_bias is None:
            one_document = torch.zeros(1, length, dtype=torch.long, device=self.device)
            self._window_bias = attention_bias(one_document, dtype, window)
        return self._window_bias

    def _add_state(self, total: Tensor | None, hidden: Tensor, layer: int, weights: Tensor | None) -> Tensor | None:
        """Return the weighted sum of the hidden states so far, None at the first, with that of a layer added.

        layer: 0 is the embedding, 1 the trunk's first layer. With `heads.detach` only the weights get a gradient.
        """
        if weights is None:
            return None
        return add_weighted(total, hidden.detach() if self.config.heads.detach else hidden, weights[layer])

    def trained_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield the parameters that the optimizer gets, a stand-in by the name of a weight of its group."""
        yield from ((name, weight) for name, weight in named_weights(self) if weight.requires_grad)
        yield from zip(self.stand_in_names, self.stand_ins, strict=True)

    def _index_tied_modules(self) -> dict[str, Any]:
        """Override of DeepSpeed's, which takes every weight of a tied module for a replica; heads have others, too."""
        comms: dict[str, Any] = super()._index_tied_modules()
        for comm in comms.values():
            tied = [comm["module"].get_parameter(name) for name in comm["weight_attr"]]
            for param in comm["module"].parameters():
                param.ds_pipe_replicated &= any(param is weight for weight in tied)
        return comms

    def get_tied_weights_and_groups(self) -> list[tuple[nn.Parameter, ProcessGroup]]:
        """Override of DeepSpeed's, which reduces the gradients of these weights: frozen ones have none."""
        return [(weight, group) for weight, group in super().get_tied_weights_and_groups() if weight.requires_grad]

    @property
    def heads(self) -> HeadsWithLoss:
        """The heads, on the rank that has them."""
        return next(layer for layer in self.modules() if isinstance(layer, HeadsWithLoss))


class TwoStagePipeline(MultiTokenPipeline, DualPipeVModule):  # type: ignore[misc]
    """The layers of rank r's stages r and 2p - 1 - r of DualPipeV: micro-batches pass through stages 0..p-1 on ranks
    0..p-1 in phase 0, and through stages p..2p-1 on ranks p-1..0 in phase 1."""

    num_phases = 2

    def _partition_layers(self, method: str = "") -> None:
        super()._partition_layers()
        self.num_stages *= 2  # read by DeepSpeed's methods of the module; its engine counts the pipeline's ranks
        self.phase_bounds = [(self.parts[stage], self.parts[stage + 1]) for stage in self.phase_stages]

    def stage_of(self, name: str) -> int:
        """Return the stage of this rank that has a weight, given by global name; the last one of a weight in both."""
        layers = (layer for layer in self.phase_funcs[1] if isinstance(layer, nn.Module))
        return self.phase_stages[any(name == other for layer in layers for other, _ in named_weights(layer))]


def _stage_specs(config: Config) -> list[list[LayerSpec]]:
    """Return the layers of each stage."""
    megatron = transformer_config(config)
    trunk = iter([LayerSpec(TrunkLayer, config, megatron, index) for index in range(config.model.trunk_layers)])
    parts = pipeline_stages(config)
    stages = [list(islice(trunk, stage.layers)) for stage in parts]
    if config.heads.weighted_hidden_states:
        for stage, layers in enumerate(stages):
            if layers or stage == 0:
                layers.insert(
                    0, TiedLayerSpec("state_weights", HiddenStateWeights, config, megatron, tied_weight_attr="logits")
                )

    def tied(**kwargs: object) -> TiedLayerSpec:
        return TiedLayerSpec(
            "embedding", TokenEmbedding, config, megatron, tied_weight_attr=["lookup.weight"], **kwargs
        )

    if heads_have_embedding(config):
        stages[0].insert(0, tied())
    else:
        stages[0].insert(0, LayerSpec(TokenEmbedding, config, megatron))
    for layers, numbers in zip(stages, head_numbers(parts), strict=True):
        if numbers and heads_have_embedding(config):
            layers.append(tied(forward_fn=_add_embedding_weight))
        if numbers:
            layers.append(_heads_spec(config, megatron, numbers))
    return stages


def _heads_spec(config: Config, megatron: TransformerConfig, numbers: range) -> LayerSpec:
    """Return the heads of a stage. Those of several stages share the final norm and, unless it is separate or tied to
    the embedding, the unembedding."""
    if config.heads.stages == 1:
        return LayerSpec(HeadsWithLoss, config, megatron)
    shared = ["final_norm.weight"]
    if config.heads.unembedding == "shared" and not config.model.tie_embeddings:
        shared.append("unembedding.weight")
    heads = HeadsWithLoss if config.heads.count in numbers else InnerHeadsWithLoss
    return TiedLayerSpec("heads", heads, config, megatron, numbers, tied_weight_attr=shared)
