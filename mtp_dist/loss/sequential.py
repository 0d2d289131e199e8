"""The loss of n heads one after the other, for the memory of one (Gloeckle et al. 2024, section 2)."""

from typing import Any, Literal

import torch
from megatron.core.tensor_parallel.mappings import (
    gather_from_sequence_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed import all_reduce

from mtp_dist.loss.heads import Heads, HeadSums, Objective
from mtp_dist.loss.linear_cross_entropy import GradientRequest, LossSums, accumulation_dtype, linear_cross_entropy


def sequential_heads_loss(
    mode: Literal["eager", "recompute"], heads: Heads, trunk_output: Tensor, objective: Objective, sums: HeadSums
) -> Tensor:
    """The loss, a scalar. Adds the micro-batch's losses, hits and valid targets to `sums`.

    Each head runs from the trunk's output z to the gradient of z before the next one starts. `eager` does that in the
    forward pass and keeps the gradients for the backward pass. `recompute` adds up the losses in the forward pass,
    keeps nothing but z, and starts anew in the backward pass: one more forward pass of the heads.
    """
    if not torch.is_grad_enabled():
        return sums.record(objective, _losses(heads, trunk_output, objective))
    inputs = (trunk_output, *heads.weights, *_trained_unembeddings(heads))
    loss: Tensor = _SequentialLoss.apply(mode, heads, objective, sums, *inputs)  # type: ignore[no-untyped-call]
    return loss


class _SequentialLoss(torch.autograd.Function):
    """Hands the gradients that the heads computed themselves to autograd, times the gradient that arrives.

    As outputs of one function they pass through every hook, loss scale and accumulation as if autograd had found them.
    """

    @staticmethod
    def forward(
        ctx: Any, mode: str, heads: Heads, objective: Objective, sums: HeadSums, trunk_output: Tensor, *_: Tensor
    ) -> Tensor:
        micro_batch = heads, trunk_output.detach(), objective
        ctx.gradients = ctx.micro_batch = None
        if mode == "eager":
            ctx.gradients, head_sums = _differentiate(*micro_batch)
        else:
            ctx.micro_batch, head_sums = micro_batch, _losses(*micro_batch)
        return sums.record(objective, head_sums)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        gradients: _HeadGradients | None = ctx.gradients
        if gradients is None:
            if ctx.micro_batch is None:
                raise RuntimeError("a second backward pass through the heads' loss: the first has freed its gradients")
            gradients, _ = _differentiate(*ctx.micro_batch)
        ctx.gradients = ctx.micro_batch = None
        return None, None, None, None, *gradients.times(upstream)


def _trained_unembeddings(heads: Heads) -> list[Tensor]:
    distinct = {id(weight): weight for weight in heads.unembeddings}
    return [weight for weight in distinct.values() if weight.requires_grad]


def _losses(heads: Heads, trunk_output: Tensor, objective: Objective) -> list[LossSums]:
    """The heads' forward passes alone."""
    with torch.no_grad():
        return [
            _head_sums(heads, objective, distance, _whole_sequence(heads.hidden(distance, trunk_output), objective))
            for distance in range(1, objective.num_heads + 1)
        ]


def _differentiate(heads: Heads, trunk_output: Tensor, objective: Objective) -> tuple["_HeadGradients", list[LossSums]]:
    """Every head's forward and backward pass."""
    gradients = _HeadGradients(heads, trunk_output, objective)
    sums = [gradients.add_head(distance, trunk_output) for distance in range(1, objective.num_heads + 1)]
    gradients.of_trunk_output = gradients.of_trunk_output.to(trunk_output.dtype)
    return gradients, sums


def _whole_sequence(hidden: Tensor, objective: Objective) -> Tensor:
    """Hidden states `[S, B, D]` of the whole sequence, without a graph."""
    hidden = hidden.detach()
    if not objective.sequence_parallel:
        return hidden
    whole: Tensor = gather_from_sequence_parallel_region(hidden, group=objective.vocabulary.group)
    return whole


def _summed_over_vocabulary(partial: Tensor, objective: Objective) -> Tensor:
    """The gradient of a head's hidden states, shaped as the head gave them, from this rank's part `[S, B, D]`."""
    group = objective.vocabulary.group
    if objective.sequence_parallel:
        gradient: Tensor = reduce_scatter_to_sequence_parallel_region(partial, group=group)
        return gradient
    if group.size() > 1:
        all_reduce(partial, group=group)
    return partial


def _head_sums(
    heads: Heads, objective: Objective, distance: int, hidden: Tensor, request: GradientRequest | None = None
) -> LossSums:
    return linear_cross_entropy(
        hidden.flatten(0, 1),
        heads.unembeddings[distance - 1],
        objective.targets[distance - 1].T.flatten(),
        objective.vocabulary,
        objective.chunk_tokens,
        request,
    )


class _HeadGradients:
    """The gradients of one micro-batch's loss, found head by head; what several heads add to is summed in fp32."""

    def __init__(self, heads: Heads, trunk_output: Tensor, objective: Objective) -> None:
        self.heads = heads
        self.objective = objective
        self.of_trunk_output = _zeros_like(trunk_output)
        self.of_weights: list[Tensor | None] = [None] * len(heads.weights)
        self.of_unembeddings: dict[int, Tensor] = {}

    def add_head(self, distance: int, trunk_output: Tensor) -> LossSums:
        """The forward and backward pass of the head of that prediction distance."""
        trunk_output = trunk_output.detach().requires_grad_()
        with torch.enable_grad():
            hidden = self.heads.hidden(distance, trunk_output)
        sums, of_hidden = self._loss_and_gradient(distance, hidden)
        inputs = [trunk_output, *self.heads.weights]
        of_trunk_output, *of_weights = torch.autograd.grad(hidden, inputs, of_hidden, allow_unused=True)
        self.of_trunk_output += of_trunk_output
        for index, gradient in enumerate(of_weights):
            total = self.of_weights[index]
            if gradient is not None:
                self.of_weights[index] = (
                    gradient if total is None else gradient.to(accumulation_dtype(total.dtype)) + total
                )
        return sums

    def _loss_and_gradient(self, distance: int, hidden: Tensor) -> tuple[LossSums, Tensor]:
        """A head's sums and the gradient of its hidden states; adds that of its unembedding."""
        whole = _whole_sequence(hidden, self.objective)
        partial = torch.empty_like(whole, memory_format=torch.contiguous_format)
        request = GradientRequest(
            scale=self.objective.scales[distance - 1],
            z_loss=self.objective.z_loss,
            hidden=partial.flatten(0, 1),
            weight=self._of_unembedding(distance),
        )
        sums = _head_sums(self.heads, self.objective, distance, whole, request)
        self._finish_unembedding(distance)
        return sums, _summed_over_vocabulary(partial, self.objective)

    def _of_unembedding(self, distance: int) -> Tensor | None:
        """Where the gradient of head `distance`'s unembedding is summed, or None where it is frozen."""
        weight = self.heads.unembeddings[distance - 1]
        if weight.requires_grad and id(weight) not in self.of_unembeddings:
            self.of_unembeddings[id(weight)] = _zeros_like(weight)
        return self.of_unembeddings.get(id(weight))

    def _finish_unembedding(self, distance: int) -> None:
        """After the last head that uses it the sum needs no more than the weight's own precision."""
        weight = self.heads.unembeddings[distance - 1]
        if weight.requires_grad and all(later is not weight for later in self.heads.unembeddings[distance:]):
            self.of_unembeddings[id(weight)] = self.of_unembeddings[id(weight)].to(weight.dtype)

    def times(self, upstream: Tensor) -> list[Tensor | None]:
        """The gradients of z, the weights and the trained unembeddings, one by one let go of."""
        gradients: list[Tensor | None] = [self.of_trunk_output.mul_(upstream)]
        for weight in self.heads.weights:
            gradient = self.of_weights.pop(0)
            # Not in place: autograd may have handed out one tensor for several weights.
            gradients.append(None if gradient is None else (gradient * upstream).to(weight.dtype))
        for weight in _trained_unembeddings(self.heads):
            gradients.append(self.of_unembeddings.pop(id(weight)).mul_(upstream))
        return gradients


def _zeros_like(tensor: Tensor) -> Tensor:
    return torch.zeros_like(tensor, dtype=accumulation_dtype(tensor.dtype))
