"""The loss of n heads one after the other, in the memory of one head (Gloeckle et al. 2024, section 2)."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple, cast

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
from mtp_dist.loss.linear_cross_entropy import GradientBuffers, accumulation_dtype, linear_cross_entropy
from mtp_dist.loss.objective import Heads, HeadSums, Objective


class _MicroBatch(NamedTuple):
    """The heads and what their loss needs of one micro-batch."""

    heads: Heads
    context: Any
    objective: Objective


def sequential_heads_loss(
    mode: Literal["eager", "recompute"],
    heads: Heads,
    trunk_output: Tensor,
    context: Any,
    objective: Objective,
    sums: HeadSums,
) -> Tensor:
    """Return the scalar loss and accumulate its sums into the zero-initialized `sums`.

    Each chain of heads, which is one head if the heads are independent, runs from the trunk's output z to the gradient
    of z before the next chain starts. `eager` does that in the forward pass and keeps the gradients for the backward
    pass. `recompute` computes only the sums in the forward pass, keeps only z, and starts again in the backward pass:
    one more forward pass of the heads. What needs no gradient, such as a frozen head, runs forward only.
    """
    micro_batch = _MicroBatch(heads, context, objective)
    if not torch.is_grad_enabled():
        _forward(micro_batch, trunk_output, sums)
        return objective.loss(sums)
    inputs = (trunk_output, *heads.trained_parameters(context), *_trained_unembeddings(micro_batch))
    loss: Tensor = _SequentialLoss.apply(mode, micro_batch, sums, *inputs)  # type: ignore[no-untyped-call]
    return loss


class _SequentialLoss(torch.autograd.Function):
    """A function whose gradients are precomputed; autograd gets them scaled by the incoming gradient.

    As outputs of one function they go through every hook, loss scale and accumulation like autograd's own.
    """

    @staticmethod
    def forward(
        ctx: Any, mode: str, micro_batch: _MicroBatch, sums: HeadSums, trunk_output: Tensor, *_: Tensor
    ) -> Tensor:
        ctx.gradients = ctx.inputs = None
        leaf = trunk_output.detach().requires_grad_(ctx.needs_input_grad[3])
        if mode == "eager":
            ctx.gradients = _differentiate(micro_batch, leaf, sums)
        else:
            ctx.inputs = micro_batch, leaf
            _forward(micro_batch, leaf, sums)
        return micro_batch.objective.loss(sums)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        gradients: _HeadGradients | None = ctx.gradients
        if gradients is None:
            if ctx.inputs is None:
                raise RuntimeError("a second backward pass through the heads' loss: the first has freed its gradients")
            micro_batch, trunk_output = ctx.inputs
            gradients = _differentiate(micro_batch, trunk_output, micro_batch.objective.zero_sums(trunk_output.dtype))
        ctx.gradients = ctx.inputs = None
        return None, None, None, *gradients.scaled_by(upstream)


def _trained_unembeddings(micro_batch: _MicroBatch) -> list[Tensor]:
    weights = [*micro_batch.heads.unembedding_weights(micro_batch.context).values()]
    if (token_order := micro_batch.heads.token_order_weight) is not None:
        weights.append(token_order)
    distinct = {id(weight): weight for weight in weights}
    return [weight for weight in distinct.values() if weight.requires_grad]


@torch.no_grad()
def _forward(micro_batch: _MicroBatch, trunk_output: Tensor, sums: HeadSums) -> None:
    """Run the heads' forward passes only."""
    heads, context, objective = micro_batch
    losses = _Losses(micro_batch, sums)
    for chain in heads.chains:
        hidden = trunk_output
        for head in objective.active(chain):
            hidden = heads.pre_norm_hidden(head, hidden, context)
            normalized = _gather_sequence(heads.normalize(head, hidden, context), objective)
            losses.add_head(head, normalized)
            if head == 1 and objective.token_order:
                losses.add_token_order(normalized)


def _differentiate(micro_batch: _MicroBatch, trunk_output: Tensor, sums: HeadSums) -> "_HeadGradients":
    """Run every head's forward and backward pass."""
    gradients = _HeadGradients(micro_batch, trunk_output, sums)
    for chain in micro_batch.heads.chains:
        gradients.add_chain(micro_batch.objective.active(chain), trunk_output)
    gradients.finish(trunk_output.dtype)
    return gradients


def _gather_sequence(normalized: Tensor, objective: Objective) -> Tensor:
    """Return the hidden states `[S, B, D]` of the whole sequence, without a graph."""
    normalized = normalized.detach()
    if not objective.sequence_parallel:
        return normalized
    return cast(Tensor, gather_from_sequence_parallel_region(normalized, group=objective.vocabulary.group))


def _sum_over_vocabulary(partial: Tensor, objective: Objective) -> Tensor:
    """Return the gradient of a head's normalized hidden states, in their shape, from this rank's part `[S, B, D]`."""
    group = objective.vocabulary.group
    if objective.sequence_parallel:
        return cast(Tensor, reduce_scatter_to_sequence_parallel_region(partial, group=group))
    if group.size() > 1:
        all_reduce(partial, group=group)
    return partial


class _Losses:
    """Losses of normalized hidden states `[S, B, D]` of whole sequences, head 1 first: it is the teacher."""

    def __init__(self, micro_batch: _MicroBatch, sums: HeadSums) -> None:
        self.objective = micro_batch.objective
        self.rows = sums.tensor
        self.unembeddings = micro_batch.heads.unembedding_weights(micro_batch.context)
        self.token_order_weight = micro_batch.heads.token_order_weight
        self.teacher: Teacher | None = None

    def add_head(self, head: int, normalized: Tensor, grads: GradientBuffers | None = None) -> None:
        objective, soft = self.objective, None
        on_logits: list[Callable[[slice, Tensor], None]] = []
        if objective.on_logits:
            on_logits.append(partial(objective.on_logits, head))
        targets = objective.targets[head - 1].T.flatten()
        if (distillation := objective.distillation) and head == 1:
            length, batch, _ = normalized.shape
            self.teacher = Teacher(length, batch, distillation.top, objective.vocabulary, normalized.device)
            on_logits.append(self.teacher.record)
        elif distillation:
            assert self.teacher, "head 1 runs first"
            valid = targets != objective.vocabulary.ignore_index
            soft = self.teacher.soft_targets(distillation.distances[head - 1], valid)
            soft = soft._replace(total_variation=distillation.total_variation > 0)
        linear_cross_entropy(
            normalized.flatten(0, 1),
            self.unembeddings[head],
            targets,
            objective.vocabulary,
            self.rows[head - 1],
            objective.chunk_tokens,
            grads,
            soft,
            on_logits,
        )

    def add_token_order(self, normalized: Tensor, grads: GradientBuffers | None = None) -> None:
        """Add the token-order loss of head 1's normalized hidden states."""
        objective = self.objective
        assert self.token_order_weight is not None
        no_targets = torch.full_like(objective.targets[0].flatten(), objective.vocabulary.ignore_index)
        linear_cross_entropy(
            normalized.flatten(0, 1),
            self.token_order_weight,
            no_targets,
            objective.vocabulary,
            self.rows[-1],
            objective.chunk_tokens,
            grads,
            objective.token_order,
        )


class _HeadGradients:
    """Gradients of one micro-batch's loss, computed head by head; what several heads add to is summed in fp32."""

    def __init__(self, micro_batch: _MicroBatch, trunk_output: Tensor, sums: HeadSums) -> None:
        self.heads, self.context, self.objective = micro_batch
        self.params = self.heads.trained_parameters(self.context)
        self.trained_unembeddings = _trained_unembeddings(micro_batch)
        self.grad_trunk_output = _zeros_like(trunk_output) if trunk_output.requires_grad else None
        self.grad_params: list[Tensor | None] = [None] * len(self.params)
        self.grad_unembeddings: dict[int, Tensor] = {}
        self.losses = _Losses(micro_batch, sums)

    def add_chain(self, chain: Sequence[int], trunk_output: Tensor) -> None:
        """Run the forward and backward passes of heads of which each reads the one before it.

        Each head's logits are freed before the next head runs. What autograd saves of the chain's blocks stays until
        the last one has run forward.
        """
        steps = []
        inputs = trunk_output
        for head in chain:
            leaf = inputs.detach().requires_grad_(inputs.requires_grad)
            with record_function(f"head {head}: forward, loss"):
                with torch.enable_grad():
                    hidden = self.heads.pre_norm_hidden(head, leaf, self.context)
                steps.append((head, leaf, hidden, self._grad_pre_norm_hidden(head, hidden)))
            inputs = hidden
        grad_next: Tensor | None = None
        while steps:
            head, leaf, hidden, grad_hidden = steps.pop()
            with record_function(f"head {head}: backward"):
                if grad_hidden is not None and grad_next is not None:
                    grad_hidden = grad_hidden + grad_next
                grad_next = self._backward(hidden, leaf, grad_hidden)
            if head in self.heads.detached:
                grad_next = None
        if grad_next is not None:
            assert self.grad_trunk_output is not None
            self.grad_trunk_output += grad_next

    def _grad_pre_norm_hidden(self, head: int, hidden: Tensor) -> Tensor | None:
        """Compute a head's loss and return the gradient of its hidden states from that loss alone, if they need one."""
        leaf = hidden.detach().requires_grad_(hidden.requires_grad)
        with torch.enable_grad():
            normalized = self.heads.normalize(head, leaf, self.context)
        return self._backward(normalized, leaf, self._grad_normalized(head, normalized))

    def _backward(self, output: Tensor, leaf: Tensor, grad_output: Tensor | None) -> Tensor | None:
        """Return the gradient of `leaf` from that of `output`, None if it needs none; add those of the parameters in
        between."""
        if grad_output is None:
            return None
        needed = [*self.params, leaf] if leaf.requires_grad else self.params
        gradients = torch.autograd.grad(output, needed, grad_output, allow_unused=True)
        for index, gradient in enumerate(gradients[: len(self.params)]):
            total = self.grad_params[index]
            if gradient is not None:
                self.grad_params[index] = (
                    gradient if total is None else gradient.to(accumulation_dtype(total.dtype)) + total
                )
        return gradients[-1] if leaf.requires_grad else None

    def _grad_normalized(self, head: int, normalized: Tensor) -> Tensor | None:
        """Compute a head's loss. Return the gradient of its normalized hidden states, None if they need none; add its
        unembedding's."""
        objective, losses = self.objective, self.losses
        gathered = _gather_sequence(normalized, objective)
        partial = _empty_like(gathered) if normalized.requires_grad else None
        unembedding = losses.unembeddings[head]
        scale, soft_weights = objective.scales[head - 1], objective.soft_weights(head)
        losses.add_head(head, gathered, self._buffers(scale, soft_weights, partial, unembedding))
        if sum(other is unembedding for other in losses.unembeddings.values()) == 1:
            self._finish_unembedding(unembedding)
        if head == 1 and objective.token_order:
            assert losses.token_order_weight is not None
            grad_token_order = None if partial is None else _empty_like(partial)
            grads = self._buffers(objective.scales[-1], (1.0, 0.0), grad_token_order, losses.token_order_weight)
            losses.add_token_order(gathered, grads)
            if partial is not None and grad_token_order is not None:
                partial += grad_token_order
        return None if partial is None else _sum_over_vocabulary(partial, objective)

    def _buffers(
        self, scale: Tensor, soft_weights: tuple[float, float], grad_hidden: Tensor | None, unembedding: Tensor
    ) -> GradientBuffers | None:
        """Return where a head's loss adds its gradients; None if nothing needs one."""
        if grad_hidden is None and not unembedding.requires_grad:
            return None
        if unembedding.requires_grad and id(unembedding) not in self.grad_unembeddings:
            self.grad_unembeddings[id(unembedding)] = _zeros_like(unembedding)
        return GradientBuffers(
            scale=scale,
            z_loss=self.objective.z_loss,
            hidden=None if grad_hidden is None else grad_hidden.flatten(0, 1),
            weight=self.grad_unembeddings.get(id(unembedding)),
            soft_weight=soft_weights[0],
            total_variation_weight=soft_weights[1],
        )

    def finish(self, dtype: torch.dtype) -> None:
        """Round the sums to their own precision after the last head; that of z is `dtype`."""
        if self.grad_trunk_output is not None:
            self.grad_trunk_output = self.grad_trunk_output.to(dtype)
        for weight in self.trained_unembeddings:
            self._finish_unembedding(weight)

    def _finish_unembedding(self, weight: Tensor) -> None:
        if id(weight) in self.grad_unembeddings:
            self.grad_unembeddings[id(weight)] = self.grad_unembeddings[id(weight)].to(weight.dtype)

    def scaled_by(self, upstream: Tensor) -> list[Tensor | None]:
        """Return the gradients of z, the parameters and the trained unembeddings, each of which is released here.

        Parameters that no active head uses get 0: engines reduce the gradients of all.
        """
        gradients = [None if self.grad_trunk_output is None else self.grad_trunk_output.mul_(upstream)]
        for param in self.params:
            gradient = self.grad_params.pop(0)
            # Not in place: autograd may have returned one tensor for several parameters.
            gradients.append(torch.zeros_like(param) if gradient is None else (gradient * upstream).to(param.dtype))
        for weight in self.trained_unembeddings:
            total = self.grad_unembeddings.pop(id(weight), None)
            gradients.append(torch.zeros_like(weight) if total is None else total.mul_(upstream))
        return gradients


def _empty_like(tensor: Tensor) -> Tensor:
    return torch.empty_like(tensor, memory_format=torch.contiguous_format)


def _zeros_like(tensor: Tensor) -> Tensor:
    return torch.zeros_like(tensor, dtype=accumulation_dtype(tensor.dtype))
