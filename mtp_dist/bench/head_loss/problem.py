"""Inputs of the head-loss benchmark, the modes of mtp-dist on them, and their gradients in fp64."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from mtp_dist.bench.head_loss.baselines import BASELINES, Inputs, Loss, gradient
from mtp_dist.config import Config
from mtp_dist.loss.naive import naive_heads_loss
from mtp_dist.loss.objective import Objective, Vocabulary
from mtp_dist.loss.sequential import sequential_heads_loss
from mtp_dist.model.heads import Unembedding
from mtp_dist.model.layers import transformer_config
from mtp_dist.model.targets import IGNORE_INDEX

REFERENCE_BYTES = 2**28
"""Memory for the fp64 logits of one slice of the reference."""


class Problem:
    """Random inputs and targets, equal on all ranks except for the rank's rows of the unembedding."""

    def __init__(
        self,
        config: Config,
        tokens: int,
        dtype: torch.dtype,
        device: torch.device,
        group: torch.distributed.ProcessGroup,
    ) -> None:
        self.vocab_size, self.dtype, self.device, self.group = config.vocab_size, dtype, device, group
        self.hidden_size = config.model.hidden_size
        heads = config.heads.count
        generator = torch.Generator(device).manual_seed(0)
        self.trunk_output = torch.randn(tokens, 1, self.hidden_size, generator=generator, device=device).to(dtype)
        spread = 0.1 * torch.randn(heads, self.hidden_size, generator=generator, device=device)
        self.norms = (1 + spread).to(dtype)
        self.targets = torch.randint(self.vocab_size, (heads, 1, tokens), generator=generator, device=device)
        self.unembedding = Unembedding(config, transformer_config(config)).to(device, dtype)
        rows = self.unembedding.weight.shape[0]
        whole = F.pad(self.full_unembedding(), (0, 0, 0, config.padded_vocab_size - self.vocab_size))
        with torch.no_grad():
            self.unembedding.weight.copy_(whole[group.rank() * rows :][:rows])

    def full_unembedding(self) -> Tensor:
        """Return the weight `[V, D]`, for logits with a standard deviation near 1."""
        generator = torch.Generator(self.device).manual_seed(1)
        whole = torch.randn(self.vocab_size, self.hidden_size, generator=generator, device=self.device)
        return (whole / math.sqrt(self.hidden_size)).to(self.dtype)

    def inputs(self, mode: str, heads: int) -> Inputs:
        """Return the leaves of one mode, which share the memory of this problem."""
        weight = self.unembedding.weight
        rows = weight if mode not in BASELINES else weight.detach()[: self.vocab_size].requires_grad_()
        norms = [norm.detach().requires_grad_() for norm in self.norms[:heads]]
        return Inputs(self.trunk_output.detach().requires_grad_(), norms, rows)

    def loss(self, mode: str) -> Loss:
        return BASELINES[mode].loss if mode in BASELINES else partial(self._own_loss, mode)

    def matmuls(self) -> Callable[[], None]:
        """Return a step with the three matmuls of one head, all tokens at once, into preallocated memory."""
        hidden = self.trunk_output.flatten(0, 1)
        weight = self.unembedding.weight.detach()
        logits = torch.mm(hidden, weight.T)
        grad_hidden, grad_weight = torch.empty_like(hidden), torch.empty_like(weight)

        def step() -> None:
            torch.mm(hidden, weight.T, out=logits)
            torch.mm(logits, weight, out=grad_hidden)
            torch.mm(logits.T, hidden, out=grad_weight)

        return step

    def _own_loss(self, mode: str, inputs: Inputs, targets: Tensor) -> Tensor:
        count, _, tokens = targets.shape
        heads = _NormHeads(inputs, self.unembedding, count)
        objective = Objective(
            targets=targets,
            active_heads=count,
            scales=torch.full((count + 1,), 1 / tokens, device=targets.device),
            vocabulary=Vocabulary(self.vocab_size, IGNORE_INDEX, self.group),
        )
        sums = objective.zero_sums(inputs.trunk_output.dtype)
        if mode == "naive":
            return naive_heads_loss(heads, inputs.trunk_output, None, objective, sums)
        return sequential_heads_loss(
            "eager" if mode == "eager" else "recompute", heads, inputs.trunk_output, None, objective, sums
        )


class _NormHeads:
    """Heads that are a norm each, on one unembedding."""

    detached = ()
    token_order_weight = None

    def __init__(self, inputs: Inputs, unembedding: Unembedding, count: int) -> None:
        self.inputs, self.unembedding = inputs, unembedding
        self.chains = [[head] for head in range(1, count + 1)]

    def pre_norm_hidden(self, head: int, inputs: Tensor, context: None) -> Tensor:
        return inputs

    def normalize(self, head: int, hidden: Tensor, context: None) -> Tensor:
        return self.inputs.hidden(head, hidden)

    def logits(self, head: int, normalized: Tensor, context: None) -> Tensor:
        return cast(Tensor, self.unembedding(normalized, None))

    def trained_parameters(self, context: None) -> list[Tensor]:
        return self.inputs.norms

    def unembedding_weights(self, context: None) -> dict[int, Tensor]:
        return {head: self.inputs.unembedding for [head] in self.chains}


@dataclass(frozen=True)
class ReferenceGradients:
    """Gradients of the loss of the first heads, in fp64."""

    trunk_output: Tensor
    norms: list[Tensor]
    unembedding: Tensor
    """`[V, D]`."""

    def copy(self) -> "ReferenceGradients":
        """Return a copy in the CPU's memory."""
        leaves = (self.trunk_output, *self.norms, self.unembedding)
        trunk_output, *norms, unembedding = (leaf.to("cpu", copy=True) for leaf in leaves)
        return ReferenceGradients(trunk_output, norms, unembedding)

    def error(self, inputs: Inputs, grad_unembedding: Tensor) -> float:
        """Return the largest relative error, in the 2-norm, of a mode's gradients.

        grad_unembedding: all rows, those of the other ranks included.
        """
        pairs = [(gradient(inputs.trunk_output), self.trunk_output), (grad_unembedding, self.unembedding)]
        pairs += zip((gradient(norm) for norm in inputs.norms), self.norms, strict=True)
        return max(_relative_error(actual, expected) for actual, expected in pairs)


def _relative_error(actual: Tensor, expected: Tensor) -> float:
    expected = expected.to(actual.device)
    return ((actual - expected).norm() / expected.norm()).item()


def reference_gradients(problem: Problem, heads: int) -> Iterator[ReferenceGradients]:
    """Yield the gradients with one head, with two, and so on, by plain PyTorch on a few tokens at a time.

    The next ones are added in place: copy those to keep.
    """
    weight = problem.full_unembedding().double().requires_grad_()
    trunk_output = problem.trunk_output.double().requires_grad_()
    norms = [norm.double().requires_grad_() for norm in problem.norms]
    inputs = Inputs(trunk_output, norms, weight)
    tokens = len(trunk_output)
    size = max(1, REFERENCE_BYTES // (len(weight) * weight.itemsize))
    for distance in range(1, heads + 1):
        for start in range(0, tokens, size):
            part = slice(start, start + size)
            hidden = inputs.hidden(distance, trunk_output[part]).flatten(0, 1)
            targets = problem.targets[distance - 1, 0, part]
            (F.cross_entropy(hidden @ weight.T, targets, reduction="sum") / tokens).backward()
        grad_trunk_output, grad_weight, *grad_norms = (
            gradient(leaf) for leaf in (trunk_output, weight, *norms[:distance])
        )
        yield ReferenceGradients(grad_trunk_output, grad_norms, grad_weight)
