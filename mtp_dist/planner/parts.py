"""The costs of a pipeline's stages, from those of their parts: FLOPs, bytes, or measured seconds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


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
    head_1: Passes
    """Head 1 with its losses."""
    later_head: Passes
    """Each head from head 2 on."""
    num_heads: int
    backward_passes: int = 1
    """Backward passes through a stage without heads: one for each tensor that it sends."""
    input_grad: float = 0
    """What the backward pass of the first layer spares if it is on the first stage, where nothing before it is trained:
    the gradient of its input."""

    @property
    def heads(self) -> Passes:
        """All heads."""
        return self.stage(Stage(0, self.num_heads))

    def scaled(self, factor: float) -> Parts:
        """Return the costs in another unit."""
        return self._replace(
            embedding=self.embedding.scaled(factor),
            layer=self.layer.scaled(factor),
            head_1=self.head_1.scaled(factor),
            later_head=self.later_head.scaled(factor),
            input_grad=self.input_grad * factor,
        )

    def stage(self, stage: Stage, is_first: bool = False, has_head_1: bool = True) -> Passes:
        """Return the costs of a stage. has_head_1: whether head 1 is one of its heads, if it has heads."""
        layers, heads = stage
        head_1 = 1 if has_head_1 and heads else 0
        later = heads - head_1
        forward = is_first * self.embedding.forward + layers * self.layer.forward
        forward += head_1 * self.head_1.forward + later * self.later_head.forward
        trunk = is_first * self.embedding.backward + layers * self.layer.backward
        if is_first and layers:
            trunk -= self.input_grad
        passes = 1 if heads else self.backward_passes
        return Passes(forward, passes * trunk + head_1 * self.head_1.backward + later * self.later_head.backward)

    def stages(self, stages: Sequence[Stage]) -> list[Passes]:
        """Return the costs of all stages of a pipeline. Head 1 is on the first stage with heads."""
        with_head_1 = next(index for index, stage in enumerate(stages) if stage.heads)
        return [self.stage(stage, index == 0, index == with_head_1) for index, stage in enumerate(stages)]
