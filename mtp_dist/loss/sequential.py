"""The loss of n heads one after the other, for the memory of one (Gloeckle et al. 2024, section 2)."""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from megatron.core.tensor_parallel.mappings import (
    gather_from_sequence_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed import all_reduce
from torch.profiler import record_function

from mtp_dist.loss.distillation import Teacher
from mtp_dist.loss.linear_cross_entropy import GradientBuffers, LossSums, accumulation_dtype, linear_cross_entropy
from mtp_dist.loss.objective import TOKEN_ORDER, Heads, HeadSums, Objective


def sequential_heads_loss(
    mode: Literal["eager", "recompute"], heads: Heads, trunk_output: Tensor, objective: Objective, sums: HeadSums
) -> Tensor:
    """The loss, a scalar. Adds the micro-batch's losses, hits and valid targets to `sums`.

    Each chain of heads, one head where they are independent, runs from the trunk's output z to the gradient of z before
    the next one starts. `eager` does that in the forward pass and keeps the gradients for the backward pass.
    `recompute` adds up the losses in the forward pass, keeps nothing but z, and starts anew in the backward pass: one
    more forward pass of the heads.
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
    unembeddings = [*heads.unembeddings, *([] if heads.token_order is None else [heads.token_order])]
    distinct = {id(weight): weight for weight in unembeddings}
    return [weight for weight in distinct.values() if weight.requires_grad]


def _losses(heads: Heads, trunk_output: Tensor, objective: Objective) -> dict[int, LossSums]:
    """The heads' forward passes alone."""
    losses, sums = _Losses(heads, objective), dict[int, LossSums]()
    with torch.no_grad():
        for chain in heads.chains:
            state = trunk_output
            for head in objective.running(chain):
                state = heads.state(head, state)
                hidden = _whole_sequence(heads.hidden(head, state), objective)
                sums[head] = losses.of_head(head, hidden)
                if head == 1 and objective.token_order:
                    sums[TOKEN_ORDER] = losses.of_token_order(hidden)
    return sums


def _differentiate(
    heads: Heads, trunk_output: Tensor, objective: Objective
) -> tuple["_HeadGradients", dict[int, LossSums]]:
    """Every head's forward and backward pass."""
    gradients = _HeadGradients(heads, trunk_output, objective)
    for chain in heads.chains:
        gradients.add_chain(objective.running(chain), trunk_output)
    gradients.finish(trunk_output.dtype)
    return gradients, gradients.sums


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


class _Losses:
    """The losses of one micro-batch from hidden states `[S, B, D]` of the whole sequence, head 1 before the others."""

    def __init__(self, heads: Heads, objective: Objective) -> None:
        self.heads = heads
        self.objective = objective
        self.teacher: Teacher | None = None

    def of_head(self, head: int, hidden: Tensor, request: GradientBuffers | None = None) -> LossSums:
        objective, soft, look = self.objective, None, None
        targets = objective.targets[head - 1].T.flatten()
        if (distillation := objective.distillation) and head == 1:
            length, batch, _ = hidden.shape
            self.teacher = Teacher(length, batch, distillation.top, objective.vocabulary, hidden.device)
            look = self.teacher.look
        elif distillation:
            assert self.teacher, "head 1 runs first"
            valid = targets != objective.vocabulary.ignore_index
            soft = self.teacher.soft_targets(distillation.distances[head - 1], valid)
        return linear_cross_entropy(
            hidden.flatten(0, 1),
            self.heads.unembeddings[head - 1],
            targets,
            objective.vocabulary,
            objective.chunk_tokens,
            request,
            soft,
            look,
        )

    def of_token_order(self, hidden: Tensor, request: GradientBuffers | None = None) -> LossSums:
        """From head 1's hidden states."""
        objective = self.objective
        assert objective.token_order and self.heads.token_order is not None
        no_targets = torch.full_like(objective.targets[0].flatten(), objective.vocabulary.ignore_index)
        return linear_cross_entropy(
            hidden.flatten(0, 1),
            self.heads.token_order,
            no_targets,
            objective.vocabulary,
            objective.chunk_tokens,
            request,
            objective.token_order.targets,
        )


class _HeadGradients:
    """The gradients of one micro-batch's loss, found head by head; what several heads add to is summed in fp32."""

    def __init__(self, heads: Heads, trunk_output: Tensor, objective: Objective) -> None:
        self.heads = heads
        self.objective = objective
        self.grad_trunk_output = _zeros_like(trunk_output)
        self.grad_params: list[Tensor | None] = [None] * len(heads.weights)
        self.grad_unembeddings: dict[int, Tensor] = {}
        self.losses = _Losses(heads, objective)
        self.sums: dict[int, LossSums] = {}

    def add_chain(self, chain: Sequence[int], trunk_output: Tensor) -> None:
        """The forward and backward passes of heads of which each reads the one before it.

        Each head's logits are gone before the next head runs. What the blocks of the chain keep for their backward
        passes stays until the last one has run forward.
        """
        steps = []
        before = trunk_output
        for head in chain:
            leaf = before.detach().requires_grad_()
            with record_function(f"head {head}: forward, loss"):
                with torch.enable_grad():
                    state = self.heads.state(head, leaf)
                steps.append((head, leaf, state, self._of_state(head, state)))
            before = state
        grad_next: Tensor | None = None
        while steps:
            head, leaf, state, grad_state = steps.pop()
            with record_function(f"head {head}: backward"):
                grad_next = self._backward(state, leaf, grad_state if grad_next is None else grad_state + grad_next)
            if head in self.heads.detached:
                grad_next = None
        if grad_next is not None:
            self.grad_trunk_output += grad_next

    def _of_state(self, head: int, state: Tensor) -> Tensor:
        """The gradient of a head's state by its own loss."""
        leaf = state.detach().requires_grad_()
        with torch.enable_grad():
            hidden = self.heads.hidden(head, leaf)
        return self._backward(hidden, leaf, self._of_hidden(head, hidden))

    def _backward(self, output: Tensor, leaf: Tensor, grad_output: Tensor) -> Tensor:
        """The gradient of `leaf` from that of `output`; adds those of the weights in between."""
        grad_leaf, *grad_params = torch.autograd.grad(
            output, [leaf, *self.heads.weights], grad_output, allow_unused=True
        )
        for index, gradient in enumerate(grad_params):
            total = self.grad_params[index]
            if gradient is not None:
                self.grad_params[index] = (
                    gradient if total is None else gradient.to(accumulation_dtype(total.dtype)) + total
                )
        return grad_leaf

    def _of_hidden(self, head: int, hidden: Tensor) -> Tensor:
        """The gradient of a head's hidden states; adds that of its unembedding."""
        objective, unembedding = self.objective, self.heads.unembeddings[head - 1]
        whole = _whole_sequence(hidden, objective)
        partial = torch.empty_like(whole, memory_format=torch.contiguous_format)
        soft_weight = objective.distillation.weight if objective.distillation and head > 1 else 0.0
        request = self._request(objective.scales[head - 1], soft_weight, partial, unembedding)
        self.sums[head] = self.losses.of_head(head, whole, request)
        if sum(other is unembedding for other in self.heads.unembeddings) == 1:
            self._finish_unembedding(unembedding)
        if head == 1 and objective.token_order:
            assert self.heads.token_order is not None
            further = torch.empty_like(partial)
            request = self._request(objective.token_order.scale, 1.0, further, self.heads.token_order)
            self.sums[TOKEN_ORDER] = self.losses.of_token_order(whole, request)
            partial += further
        return _summed_over_vocabulary(partial, objective)

    def _request(self, scale: Tensor, soft_weight: float, grad_hidden: Tensor, unembedding: Tensor) -> GradientBuffers:
        if unembedding.requires_grad and id(unembedding) not in self.grad_unembeddings:
            self.grad_unembeddings[id(unembedding)] = _zeros_like(unembedding)
        return GradientBuffers(
            scale=scale,
            z_loss=self.objective.z_loss,
            soft_weight=soft_weight,
            hidden=grad_hidden.flatten(0, 1),
            weight=self.grad_unembeddings.get(id(unembedding)),
        )

    def finish(self, dtype: torch.dtype) -> None:
        """After the last head: the sums need no more than their own precision, that of z being `dtype`."""
        self.grad_trunk_output = self.grad_trunk_output.to(dtype)
        for weight in _trained_unembeddings(self.heads):
            self._finish_unembedding(weight)

    def _finish_unembedding(self, weight: Tensor) -> None:
        if id(weight) in self.grad_unembeddings:
            self.grad_unembeddings[id(weight)] = self.grad_unembeddings[id(weight)].to(weight.dtype)

    def times(self, upstream: Tensor) -> list[Tensor]:
        """The gradients of z, the weights and the trained unembeddings, one by one let go of.

        0 where no active head uses a weight: engines reduce the gradients of all.
        """
        gradients = [self.grad_trunk_output.mul_(upstream)]
        for weight in self.heads.weights:
            gradient = self.grad_params.pop(0)
            # Not in place: autograd may have handed out one tensor for several weights.
            gradients.append(torch.zeros_like(weight) if gradient is None else (gradient * upstream).to(weight.dtype))
        for weight in _trained_unembeddings(self.heads):
            total = self.grad_unembeddings.pop(id(weight), None)
            gradients.append(torch.zeros_like(weight) if total is None else total.mul_(upstream))
        return gradients


def _zeros_like(tensor: Tensor) -> Tensor:
    return torch.zeros_like(tensor, dtype=accumulation_dtype(tensor.dtype))
