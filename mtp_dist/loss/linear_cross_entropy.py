"""The cross-entropy of `hidden @ weight.T` and its gradients, with the logits of only one chunk of positions alive.

The vocabulary is sharded over the tensor-parallel ranks. Each chunk goes from logits to gradient in one buffer. Capital
letters are values over all ranks; p is normalized over this rank's tokens, s and e turn it back into exponentials:

    l = hidden @ weight.T                   this rank's logits
    m, t = max(l), l[target]                over this rank's tokens; t = 0 if another rank has the target
    o = max(l except l[target])             likewise; a prediction is correct if its target is above every rank's o
    p = softmax(l), s = 1 / max(p)          likewise; s is p's own denominator, about sum(exp(l - m))
    e = s * sum(p)                          sum(exp(l - m)) to the last digits, which s lacks: see _Softmax
    M = max(m), S = sum(s * exp(m - M))     over the ranks, which exchange m, s, e, t and o in one collective
    E = sum(e * exp(m - M))                 likewise: M + log(E) is the log-sum-exp of all logits
    loss = (M - sum(t)) + log(E)            in this order: exact however large the logits are
    d loss / d l = p * s * exp(m - M) / S - (1 at the target)

The total variation distance of the probabilities q = p * s * exp(m - M) / S to a distribution t is sum(max(t - q, 0)):
1 minus the fraction of drafts from q that rejection sampling accepts for t (Leviathan et al. 2023, arXiv:2211.17192).
With A, the tokens whose q < t, it takes a second collective, of sum(min(q, t)) and sum(q over A):

    d distance / d l = q * (sum(q over A) - (1 in A))
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from mtp_dist.config.heads import CHUNK_BYTES
from mtp_dist.loss.objective import SoftTargets, Vocabulary


@dataclass(frozen=True)
class GradientBuffers:
    """The memory of the gradients, and the weights in the loss that is differentiated.

    That loss is scale * (cross_entropy + z_loss * log_z_squared + soft_weight * soft_cross_entropy
    + total_variation_weight * total_variation).
    """

    scale: Tensor
    """Scalar."""
    z_loss: float
    hidden: Tensor | None
    """`[T, D]`, contiguous, in the precision of the hidden states: overwritten with this rank's partial gradient, which
    is to be summed over the ranks of the vocabulary; None if they need none."""
    weight: Tensor | None
    """`[V/TP, D]`, fp32 (fp64 from fp64): the gradient is added; None if the weight is frozen."""
    soft_weight: float = 0.0
    total_variation_weight: float = 0.0


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the precision of logits and of sums over many terms: fp32, or fp64 for fp64 inputs."""
    return torch.promote_types(dtype, torch.float32)


def default_chunk_tokens(local_vocab_size: int, dtype: torch.dtype, device: torch.device) -> int:
    """Return the number of positions whose logits fit into the device's CHUNK_BYTES."""
    return max(1, CHUNK_BYTES[device.type] // (local_vocab_size * accumulation_dtype(dtype).itemsize))


@torch.no_grad()
def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    vocabulary: Vocabulary,
    sums: Tensor,
    chunk_tokens: int | None = None,
    grads: GradientBuffers | None = None,
    soft: SoftTargets | None = None,
    on_logits: Sequence[Callable[[slice, Tensor], None]] = (),
) -> None:
    """Add the sums over the targets `[T]` to `sums`, a row of HeadSums, and compute gradients if `grads` is given.

    hidden: `[T, D]`, weight: this rank's rows `[V/TP, D]`. All ranks of the vocabulary must call it, with the same
    hidden states and targets; the sums are the same on each. At most `chunk_tokens` positions (by default as many as
    fit into CHUNK_BYTES) have their logits in memory, in fp32 at least. Autograd records nothing. Each function of
    `on_logits` gets the positions of each chunk and this rank's logits, which it must not change.
    """
    tokens, local_vocab_size = len(hidden), len(weight)
    most = chunk_tokens or default_chunk_tokens(local_vocab_size, hidden.dtype, hidden.device)
    chunks = -(-tokens // most)
    size = -(-tokens // chunks)
    buffer = hidden.new_empty(size, local_vocab_size, dtype=accumulation_dtype(hidden.dtype))
    rounded = buffer if buffer.dtype == hidden.dtype or grads is None else hidden.new_empty(size, local_vocab_size)
    for start in range(0, tokens, size):
        positions = slice(start, start + size)
        logits = buffer[: len(hidden[positions])]
        _matmul_into(logits, hidden[positions], weight.T)
        _mask_padding(logits, vocabulary)
        for function in on_logits:
            function(positions, logits)
        softmax = _Softmax(logits, targets[positions], vocabulary, soft and soft.at(positions))
        softmax.add_sums(sums)
        if grads is not None:
            grad_logits = softmax.grad_logits(grads, out=rounded[: len(logits)])
            if grads.hidden is not None:
                torch.mm(grad_logits, weight, out=grads.hidden[positions])
            if grads.weight is not None:
                _add_matmul(grads.weight, grad_logits.T, hidden[positions])


def _mask_padding(logits: Tensor, vocabulary: Vocabulary) -> None:
    local_vocab_size = logits.shape[1]
    padding = (vocabulary.group.rank() + 1) * local_vocab_size - vocabulary.size
    if padding > 0:
        # Not -inf: on a rank that has nothing but padding, -inf - -inf would be NaN.
        logits[:, max(0, local_vocab_size - padding) :] = torch.finfo(logits.dtype).min


class _Softmax:
    """The softmax of one chunk over all ranks of the vocabulary, in the memory of this rank's logits `[C, V/TP]`."""

    def __init__(self, logits: Tensor, targets: Tensor, vocabulary: Vocabulary, soft: SoftTargets | None) -> None:
        local_vocab_size = logits.shape[1]
        first_token = vocabulary.group.rank() * local_vocab_size
        self.valid = targets != vocabulary.ignore_index
        local_targets = targets - first_token
        self.is_local = self.valid & (local_targets >= 0) & (local_targets < local_vocab_size)
        self.column = local_targets.where(self.is_local, 0).unsqueeze(1)
        self.soft = soft and _localized(soft, first_token, local_vocab_size, logits.dtype)
        soft_terms = self._soft_terms(logits) if self.soft else []

        target_logit = logits.gather(1, self.column)
        # Hiding the target gives the best of the OTHER tokens: one pass distinguishes a correct prediction from a tie.
        lowest = torch.finfo(logits.dtype).min
        logits.scatter_(1, self.column, target_logit.where(~self.is_local.unsqueeze(1), lowest))
        best_other = logits.amax(1)
        logits.scatter_(1, self.column, target_logit)
        target_logit = target_logit.squeeze(1).where(self.is_local, 0.0)
        largest = best_other.where(~self.is_local, torch.maximum(best_other, target_logit))
        self.probabilities = torch.softmax(logits, 1, out=logits)
        denominator = self.probabilities.amax(1).reciprocal()
        # On a CPU PyTorch's softmax adds up its denominator term by term: over 50,000 tokens it is 2e-6 too small.
        # The probabilities' sum, which torch.sum adds pairwise, is above 1 by as much.
        exponentials = denominator * self.probabilities.sum(1)
        self._reduce([largest, denominator, exponentials, target_logit, best_other, *soft_terms], vocabulary.group)
        self.total_variation = torch.zeros_like(self.losses)
        if self.soft and self.soft.total_variation:
            self._measure_total_variation(self.soft, vocabulary.group)

    def _soft_terms(self, logits: Tensor) -> list[Tensor]:
        """Return the largest local logit of the soft targets, their mean distance below it and their mass, `[C]` each.

        The mean is weighted by the probabilities.
        """
        assert self.soft is not None
        chosen = logits.gather(1, self.soft.token_ids)
        best = chosen.amax(1)
        below = ((chosen - best.unsqueeze(1)) * self.soft.probabilities).sum(1)
        return [best, below, self.soft.probabilities.sum(1)]

    def _reduce(self, local: list[Tensor], group: dist.ProcessGroup) -> None:
        """Compute losses and shares over the whole vocabulary from local values, each `[C]`: one collective."""
        largest, denominator = local[:2]
        stacked = torch.stack(local)
        gathered = stacked
        if group.size() > 1:
            gathered = stacked.new_empty(group.size() * len(stacked), len(largest))
            dist.all_gather_into_tensor(gathered, stacked, group=group)
        by_rank = gathered.unflatten(0, (group.size(), -1))
        maxima, denominators, exponentials, target_logits, best_others, *soft_terms = by_rank.unbind(1)
        maximum = maxima.amax(0)
        factors = (maxima - maximum).exp()
        log_total = (exponentials * factors).sum(0).log()
        self.losses = maximum - target_logits.sum(0) + log_total
        self.log_z = maximum + log_total
        self.correct = target_logits.sum(0) > best_others.amax(0)
        # Of the denominators, not the exact sums: it undoes the division that gave the probabilities.
        self.local_share = denominator * (largest - maximum).exp() / (denominators * factors).sum(0)
        self.soft_losses, self.soft_mass = torch.zeros_like(maximum), torch.zeros_like(maximum)
        if soft_terms:
            best, below, mass = soft_terms
            self.soft_mass = mass.sum(0)
            above_best = mass * (maximum - best).where(mass > 0, 0.0)
            self.soft_losses = (above_best - below).sum(0) + self.soft_mass * log_total

    def _measure_total_variation(self, soft: SoftTargets, group: dist.ProcessGroup) -> None:
        """Compute the distance to the soft targets and what its gradient needs: one collective."""
        chosen = self.probabilities.gather(1, soft.token_ids) * self.local_share.unsqueeze(1)
        self.below_target = chosen.where(chosen < soft.probabilities, 0.0)
        """`[C, N]`: probabilities of the soft targets that are too improbable, 0 for the others."""
        sums = torch.stack([chosen.minimum(soft.probabilities).sum(1), self.below_target.sum(1)])
        if group.size() > 1:
            dist.all_reduce(sums, group=group)
        self.total_variation, self.mass_below_target = self.soft_mass - sums[0], sums[1]

    def add_sums(self, row: Tensor) -> None:
        """Add the chunk's sums to a row of HeadSums."""
        terms = torch.stack([self.losses, self.log_z.square(), self.correct.to(self.losses)]).where(self.valid, 0.0)
        sums = torch.cat([terms, torch.stack([self.soft_losses, self.total_variation])]).sum(1)
        row += torch.cat([sums, self.valid.sum(0, keepdim=True)])

    def grad_logits(self, grads: GradientBuffers, out: Tensor) -> Tensor:
        """Return the gradient of this rank's logits in `out` `[C, V/TP]`, which may be their own memory.

        The target's element is rounded last: near 0 for a target that is all but certain, not near 1 - 1.
        """
        upstream = grads.scale.to(self.losses.dtype)
        scale, soft_scale = upstream * self.valid, upstream * grads.soft_weight
        factor = scale * (1 + 2 * grads.z_loss * self.log_z) + soft_scale * self.soft_mass
        if self.soft:
            at_soft_targets = -soft_scale * self.soft.probabilities
            if self.soft.total_variation:
                total_variation_scale = upstream * grads.total_variation_weight
                factor = factor + total_variation_scale * self.mass_below_target
                at_soft_targets -= total_variation_scale * self.below_target
        factor = (factor * self.local_share).unsqueeze(1)
        if self.soft:
            self.probabilities.mul_(factor).scatter_add_(1, self.soft.token_ids, at_soft_targets)
            self.probabilities.scatter_add_(1, self.column, -(scale * self.is_local).unsqueeze(1))
            return out.copy_(self.probabilities)
        at_target = self.probabilities.gather(1, self.column) * factor - (scale * self.is_local).unsqueeze(1)
        torch.mul(self.probabilities, factor, out=out)
        return out.scatter_(1, self.column, at_target.to(out.dtype))


def _localized(soft: SoftTargets, first_token: int, local_vocab_size: int, dtype: torch.dtype) -> SoftTargets:
    """Return the soft targets by this rank's rows, in a precision; tokens of other ranks get the probability 0."""
    local = soft.token_ids - first_token
    is_local = (local >= 0) & (local < local_vocab_size)
    probabilities = soft.probabilities.where(is_local, 0.0).to(dtype)
    return soft._replace(token_ids=local.where(is_local, 0), probabilities=probabilities)


def _matmul_into(result: Tensor, left: Tensor, right: Tensor) -> None:
    """Compute result = left @ right in the result's precision."""
    if left.dtype == result.dtype:
        torch.mm(left, right, out=result)
    elif result.is_cuda:
        torch.mm(left, right, out_dtype=result.dtype, out=result)
    else:  # PyTorch has no such product on the CPU
        torch.mm(left.to(result.dtype), right.to(result.dtype), out=result)


def _add_matmul(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Compute total += left @ right in the total's precision."""
    if left.dtype == total.dtype:
        total.addmm_(left, right)
    elif total.is_cuda:
        torch.addmm(total, left, right, out_dtype=total.dtype, out=total)
    else:
        total.addmm_(left.to(total.dtype), right.to(total.dtype))
