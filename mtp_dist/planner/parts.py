"""The parts of a pipeline's stages and their costs: FLOPs, or measured seconds."""

from __future__ import annotations

from typing import NamedTuple

from mtp_dist.config import Config
from mtp_dist.planner.flops import layer_and_head_flops


class Passes(NamedTuple):
    """Costs of the forward and the backward pass of one micro-batch."""

    forward: float
    backward: float

    @property
    def total(self) -> float:
        return self.forward + self.backward

    def scaled(self, factor: float) -> Passes:
        return Passes(self.forward * factor, self.backward * factor)


class Stage(NamedTuple):
    """The parts of a pipeline stage. The first stage has the embedding, too."""

    layers: int
    """Layers of the trunk."""
    heads: int = 0


class Parts(NamedTuple):
    """Costs of the parts of a model, all in the same unit."""

    embedding: Passes
    layer: Passes
    """One layer of the trunk."""
    heads: Passes
    """All heads with their losses."""
    num_heads: int

    def scaled(self, factor: float) -> Parts:
        """Return the costs in another unit."""
        embedding, layer, heads = (each.scaled(factor) for each in (self.embedding, self.layer, self.heads))
        return Parts(embedding, layer, heads, self.num_heads)

    def stage(self, stage: Stage, is_first: bool) -> Passes:
        """Return the costs of a stage. Some of the heads cost their share of all."""
        share = stage.heads / self.num_heads
        return Passes(
            *(
                is_first * embedding + stage.layers * layer + share * heads
                for embedding, layer, heads in zip(self.embedding, self.layer, self.heads, strict=True)
            )
        )


def part_flops(config: Config) -> Parts:
    """Return the FLOPs per position as they are executed, with what the backward pass recomputes.

    The embedding looks rows up. `heads.loss_mode: eager` runs the backward pass of the heads in the forward pass.
    """
    model, heads, train = config.model, config.heads, config.train
    layer, all_heads = layer_and_head_flops(config, heads.count)
    recomputed = {"none": 0, "selective": 6 * model.hidden_size * model.ffn_size, "full": layer.forward}[
        train.activation_checkpointing
    ]
    blocks = heads.num_blocks - (train.freezes_trunk and heads.traits.first_head_has_block)
    backward = all_heads.backward + blocks * heads.block_layers * recomputed
    by_mode = {
        "eager": Passes(all_heads.forward + backward, 0),
        "recompute": Passes(all_heads.forward, all_heads.forward + backward),
        "naive": Passes(all_heads.forward, backward),
    }
    trained_layer = 0 if train.freezes_trunk else layer.backward + recomputed
    return Parts(Passes(0, 0), Passes(layer.forward, trained_layer), by_mode[heads.loss_mode], heads.count)
