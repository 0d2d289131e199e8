"""The cross-entropy of `hidden @ weight.T` and its gradient, with the logits of only one chunk of tokens alive.

The vocabulary is cut over the tensor-parallel ranks. Each chunk goes from logits to gradient at once, in one buffer:

    l = hidden @ weight.T                   this rank's logits
    m, t = max(l), l[target]                over this rank's entries; t = 0 where the target is elsewhere
    o = max(l but l[target])                likewise; the target is a hit if it is above every rank's o
    p = softmax(l), s = 1 / max(p)          likewise; s is p's own denominator, about sum(exp(l - m))
    e = s * sum(p)                          sum(exp(l - m)) to the last digits, which s lacks: see _Softmax
    M = max(m), S = sum(s * exp(m - M))     over the ranks, which exchange m, s, e, t and o in one collective
    E = sum(e * exp(m - M))                 likewise: M + log(E) is the log-sum-exp of all logits
    loss = (M - sum(t)) + log(E)            in this order: exact however large the logits are
    d loss / d l = p * s * exp(m - M) / S - (1 at the target)
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

CHUNK_BYTES = {"cpu": 64 * 2**20, "cuda": 2**30}
"""Memory for the logits of one chunk, in bytes, by type of device.

Each chunk reads the weight and its gradient once more. That costs little where it is small beside the chunk's matmuls,
which asks for more tokens the more FLOPs a device does per byte it reads: some hundreds on a CPU, thousands on a GPU.
"""


@dataclass(frozen=True)
class Vocabulary:
    """How logits and targets are to be read."""

    size: int
    """Entries over all ranks; rows of the weights beyond them are padding, which nothing can predict."""
    ignore_index: int
    """Target that does not count."""
    group: dist.ProcessGroup
    """The ranks that share the vocabulary, each with the same number of rows, in rank order."""


class SoftTargets(NamedTuple):
    """For each of T tokens a distribution over N entries, to be predicted beside its one target."""

    entries: Tensor
    """`[T, N]`, int64, over the whole vocabulary."""
    probabilities: Tensor
    """`[T, N]`, fp32; 0 throughout for a token that does not count. An entry that occurs twice counts twice."""

    def part(self, tokens: slice) -> "SoftTargets":
        return SoftTargets(self.entries[tokens], self.probabilities[tokens])


class LossSums(NamedTuple):
    """What one head sums over the valid targets of a micro-batch: scalars, fp32 (fp64 from fp64), nats."""

    cross_entropy: Tensor
    log_z_squared: Tensor
    """Of the logarithm of the softmax's denominator: what the z-loss weighs (PaLM, section 5)."""
    correct: Tensor
    """Targets that are more probable than every other entry."""
    soft_cross_entropy: Tensor
    """Of the soft targets, over the tokens that have any."""


@dataclass(frozen=True)
class GradientBuffers:
    """What to differentiate, and where the results go."""

    scale: Tensor
    """Scalar; what is differentiated is scale * (cross-entropy + z_loss * squared normalizer + soft_weight * soft
    cross-entropy)."""
    z_loss: float
    hidden: Tensor
    """`[T, D]`, contiguous, in hidden's precision: overwritten by this rank's part, to be summed over the vocabulary's
    ranks."""
    weight: Tensor | None
    """`[V/TP, D]`, fp32 (fp64 from fp64): added to; None where the weight is frozen."""
    soft_weight: float = 0.0


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The precision of logits and of sums over many terms: fp32, or fp64 where the inputs are."""
    return torch.promote_types(dtype, torch.float32)


def default_chunk_tokens(rows: int, dtype: torch.dtype, device: torch.device) -> int:
    """Tokens whose logits over `rows` entries fit into the device's CHUNK_BYTES."""
    return max(1, CHUNK_BYTES[device.type] // (rows * accumulation_dtype(dtype).itemsize))


@torch.no_grad()
def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    vocabulary: Vocabulary,
    chunk_tokens: int | None = None,
    request: GradientBuffers | None = None,
    soft: SoftTargets | None = None,
    look: Callable[[slice, Tensor], None] | None = None,
) -> LossSums:
    """Sums over the targets `[T]` of hidden `[T, D]` under this rank's rows `[V/TP, D]`, and gradients if asked for.

    All ranks of the vocabulary must call it, with the same hidden and targets; the sums are the same on each. At most
    `chunk_tokens` tokens (by default as many as fit into CHUNK_BYTES) have their logits in memory, in fp32 at least
    whatever the precision of hidden. Autograd sees nothing of it: the gradients go where `request` says. `look`
    gets each chunk's place and this rank's logits, to read only.
    """
    tokens, rows = len(hidden), len(weight)
    most = chunk_tokens or default_chunk_tokens(rows, hidden.dtype, hidden.device)
    chunks = -(-tokens // most)
    size = -(-tokens // chunks)
    buffer = hidden.new_empty(size, rows, dtype=accumulation_dtype(hidden.dtype))
    rounded = buffer if buffer.dtype == hidden.dtype or request is None else hidden.new_empty(size, rows)
    sums = buffer.new_zeros(len(LossSums._fields))
    for start in range(0, tokens, size):
        part = slice(start, start + size)
        logits = buffer[: len(hidden[part])]
        _matmul_into(logits, hidden[part], weight.T)
        _hide_padding(logits, vocabulary)
        if look is not None:
            look(part, logits)
        softmax = _Softmax(logits, targets[part], vocabulary, soft and soft.part(part))
        sums += softmax.sums()
        if request is not None:
            gradient = softmax.gradient(request, out=rounded[: len(logits)])
            torch.mm(gradient, weight, out=request.hidden[part])
            if request.weight is not None:
                _add_matmul(request.weight, gradient.T, hidden[part])
    return LossSums(*sums)


def _hide_padding(logits: Tensor, vocabulary: Vocabulary) -> None:
    rows = logits.shape[1]
    padding = (vocabulary.group.rank() + 1) * rows - vocabulary.size
    if padding > 0:
        # Not -inf: on a rank that has nothing but padding, -inf - -inf would be NaN.
        logits[:, max(0, rows - padding) :] = torch.finfo(logits.dtype).min


class _Softmax:
    """The softmax of one chunk, over all ranks of the vocabulary. Works in place on this rank's logits `[C, V/TP]`."""

    def __init__(self, logits: Tensor, targets: Tensor, vocabulary: Vocabulary, soft: SoftTargets | None) -> None:
        rows = logits.shape[1]
        first_entry = vocabulary.group.rank() * rows
        self.valid = targets != vocabulary.ignore_index
        local = targets - first_entry
        self.is_here = self.valid & (local >= 0) & (local < rows)
        self.entry = local.where(self.is_here, 0).unsqueeze(1)
        self.soft = soft and _localized(soft, first_entry, rows, logits.dtype)
        of_soft = self._soft_logits(logits) if self.soft else []

        target_logit = logits.gather(1, self.entry)
        # Hiding the target gives the best of the OTHER entries, which tells a hit from a tie in the same pass.
        logits.scatter_(1, self.entry, target_logit.where(~self.is_here.unsqueeze(1), torch.finfo(logits.dtype).min))
        best_other = logits.amax(1)
        logits.scatter_(1, self.entry, target_logit)
        target_logit = target_logit.squeeze(1).where(self.is_here, 0.0)
        largest = best_other.where(~self.is_here, torch.maximum(best_other, target_logit))
        self.probabilities = torch.softmax(logits, 1, out=logits)
        denominator = self.probabilities.amax(1).reciprocal()
        # On a CPU PyTorch's softmax adds up its denominator term by term: over 50,000 entries it is 2e-6 too small.
        # The probabilities' sum, which torch.sum adds pairwise, is above 1 by as much.
        exponentials = denominator * self.probabilities.sum(1)
        self._join([largest, denominator, exponentials, target_logit, best_other, *of_soft], vocabulary.group)

    def _soft_logits(self, logits: Tensor) -> list[Tensor]:
        """The best of the soft targets' logits here, their sum below it by probability, and their mass: `[C]` each."""
        assert self.soft is not None
        chosen = logits.gather(1, self.soft.entries)
        best = chosen.amax(1)
        below = ((chosen - best.unsqueeze(1)) * self.soft.probabilities).sum(1)
        return [best, below, self.soft.probabilities.sum(1)]

    def _join(self, local: list[Tensor], group: dist.ProcessGroup) -> None:
        """From what this rank found in its entries, each `[C]`, to what all entries give: one collective."""
        largest, denominator = local[:2]
        mine = torch.stack(local)
        everywhere = mine
        if group.size() > 1:
            everywhere = mine.new_empty(group.size() * len(mine), len(largest))
            dist.all_gather_into_tensor(everywhere, mine, group=group)
        by_rank = everywhere.unflatten(0, (group.size(), -1))
        maxima, denominators, exponentials, target_logits, best_others, *of_soft = by_rank.unbind(1)
        maximum = maxima.amax(0)
        scales = (maxima - maximum).exp()
        log_total = (exponentials * scales).sum(0).log()
        self.losses = maximum - target_logits.sum(0) + log_total
        self.normalizer = maximum + log_total
        self.correct = target_logits.sum(0) > best_others.amax(0)
        # Of the denominators, not the exact sums: it undoes what the probabilities were divided by.
        self.local_share = denominator * (largest - maximum).exp() / (denominators * scales).sum(0)
        self.soft_losses, self.soft_mass = torch.zeros_like(maximum), torch.zeros_like(maximum)
        if of_soft:
            best, below, mass = of_soft
            self.soft_mass = mass.sum(0)
            above_best = mass * (maximum - best).where(mass > 0, 0.0)
            self.soft_losses = (above_best - below).sum(0) + self.soft_mass * log_total

    def sums(self) -> Tensor:
        """The chunk's LossSums as one tensor `[4]`."""
        terms = torch.stack([self.losses, self.normalizer.square(), self.correct.to(self.losses)]).where(
            self.valid, 0.0
        )
        return torch.cat([terms, self.soft_losses.unsqueeze(0)]).sum(1)

    def gradient(self, request: GradientBuffers, out: Tensor) -> Tensor:
        """The gradient for this rank's logits in `out` `[C, V/TP]`, which may be their own memory.

        The entry of the target is rounded last: near 0 for a target that is all but certain, not near 1 - 1.
        """
        upstream = request.scale.to(self.losses.dtype)
        scale, soft_scale = upstream * self.valid, upstream * request.soft_weight
        factor = scale * (1 + 2 * request.z_loss * self.normalizer) + soft_scale * self.soft_mass
        factor = (factor * self.local_share).unsqueeze(1)
        if self.soft:
            self.probabilities.mul_(factor).scatter_add_(1, self.soft.entries, -soft_scale * self.soft.probabilities)
            self.probabilities.scatter_add_(1, self.entry, -(scale * self.is_here).unsqueeze(1))
            return out.copy_(self.probabilities)
        at_entry = self.probabilities.gather(1, self.entry) * factor - (scale * self.is_here).unsqueeze(1)
        torch.mul(self.probabilities, factor, out=out)
        return out.scatter_(1, self.entry, at_entry.to(out.dtype))


def _localized(soft: SoftTargets, first_entry: int, rows: int, dtype: torch.dtype) -> SoftTargets:
    """Those of this rank's rows, by row, with probabilities of that precision; the others with probability 0."""
    local = soft.entries - first_entry
    is_here = (local >= 0) & (local < rows)
    return SoftTargets(local.where(is_here, 0), soft.probabilities.where(is_here, 0.0).to(dtype))


def _matmul_into(result: Tensor, left: Tensor, right: Tensor) -> None:
    """result = left @ right, in the result's precision."""
    if left.dtype == result.dtype:
        torch.mm(left, right, out=result)
    elif result.is_cuda:
        torch.mm(left, right, out_dtype=result.dtype, out=result)
    else:  # PyTorch has no such product on the CPU
        torch.mm(left.to(result.dtype), right.to(result.dtype), out=result)


def _add_matmul(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total += left @ right, in the total's precision."""
    if left.dtype == total.dtype:
        total.addmm_(left, right)
    elif total.is_cuda:
        torch.addmm(total, left, right, out_dtype=total.dtype, out=total)
    else:
        total.addmm_(left.to(total.dtype), right.to(total.dtype))
