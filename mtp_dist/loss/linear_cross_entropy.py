"""The cross-entropy of `hidden @ weight.T` and its gradient, with the logits of only one chunk of tokens alive.

The vocabulary is cut over the tensor-parallel ranks. Each chunk goes from logits to gradient at once, in one buffer:

    l = hidden @ weight.T                   this rank's logits
    m, t = max(l), l[target]                over this rank's entries; t = 0 where the target is elsewhere
    o = max(l but l[target])                likewise; the target is a hit if it is above every rank's o
    p = softmax(l), s = 1 / max(p)          likewise; s = sum(exp(l - m))
    M = max(m), S = sum(s * exp(m - M))     over the ranks, which exchange m, s, t and o in one collective
    loss = (M - sum(t)) + log(S)            in this order: exact however large the logits are
    d loss / d l = p * s * exp(m - M) / S - (1 at the target)
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from mtp_dist.loss.matmul import add_matmul, matmul_into

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


class LossSums(NamedTuple):
    """What one head sums over the valid targets of a micro-batch: scalars, fp32 (fp64 from fp64), nats."""

    cross_entropy: Tensor
    squared_normalizer: Tensor
    """Of the logarithm of the softmax's denominator: what the z-loss weighs (PaLM, section 5)."""
    correct: Tensor
    """Targets that are more probable than every other entry."""


@dataclass(frozen=True)
class GradientRequest:
    """What to differentiate, and where the results go."""

    scale: Tensor
    """Scalar; what is differentiated is scale * (cross-entropy + z_loss * squared normalizer)."""
    z_loss: float
    hidden: Tensor
    """`[T, D]`, contiguous, in hidden's precision: overwritten by this rank's part, to be summed over the vocabulary's
    ranks."""
    weight: Tensor | None
    """`[V/TP, D]`, fp32 (fp64 from fp64): added to; None where the weight is frozen."""


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
    request: GradientRequest | None = None,
) -> LossSums:
    """Sums over the targets `[T]` of hidden `[T, D]` under this rank's rows `[V/TP, D]`, and gradients if asked for.

    All ranks of the vocabulary must call it, with the same hidden and targets; the sums are the same on each. At most
    `chunk_tokens` tokens (by default as many as fit into CHUNK_BYTES) have their logits in memory, in fp32 at least
    whatever the precision of hidden. Autograd sees nothing of it: the gradients go where `request` says.
    """
    tokens, rows = len(hidden), len(weight)
    most = chunk_tokens or default_chunk_tokens(rows, hidden.dtype, hidden.device)
    chunks = -(-tokens // most)
    size = -(-tokens // chunks)
    buffer = hidden.new_empty(size, rows, dtype=accumulation_dtype(hidden.dtype))
    rounded = buffer if buffer.dtype == hidden.dtype or request is None else hidden.new_empty(size, rows)
    sums = buffer.new_zeros(3)
    for start in range(0, tokens, size):
        part = slice(start, start + size)
        logits = buffer[: len(hidden[part])]
        matmul_into(logits, hidden[part], weight.T)
        softmax = _Softmax(logits, targets[part], vocabulary)
        sums += softmax.sums()
        if request is not None:
            gradient = softmax.gradient(request, out=rounded[: len(logits)])
            torch.mm(gradient, weight, out=request.hidden[part])
            if request.weight is not None:
                add_matmul(request.weight, gradient.T, hidden[part])
    return LossSums(*sums)


class _Softmax:
    """The softmax of one chunk, over all ranks of the vocabulary. Works in place on this rank's logits `[C, V/TP]`."""

    def __init__(self, logits: Tensor, targets: Tensor, vocabulary: Vocabulary) -> None:
        rows = logits.shape[1]
        first_entry = vocabulary.group.rank() * rows
        padding = first_entry + rows - vocabulary.size
        if padding > 0:
            # Not -inf: on a rank that has nothing but padding, -inf - -inf would be NaN.
            logits[:, max(0, rows - padding) :] = torch.finfo(logits.dtype).min
        self.valid = targets != vocabulary.ignore_index
        local = targets - first_entry
        self.is_here = self.valid & (local >= 0) & (local < rows)
        self.entry = local.where(self.is_here, 0).unsqueeze(1)

        target_logit = logits.gather(1, self.entry)
        # Hiding the target gives the best of the OTHER entries, which tells a hit from a tie in the same pass.
        logits.scatter_(1, self.entry, target_logit.where(~self.is_here.unsqueeze(1), torch.finfo(logits.dtype).min))
        best_other = logits.amax(1)
        logits.scatter_(1, self.entry, target_logit)
        target_logit = target_logit.squeeze(1).where(self.is_here, 0.0)
        largest = best_other.where(~self.is_here, torch.maximum(best_other, target_logit))
        self.probabilities = torch.softmax(logits, 1, out=logits)
        denominator = self.probabilities.amax(1).reciprocal()
        self._join(largest, denominator, target_logit, best_other, vocabulary.group)

    def _join(
        self, largest: Tensor, denominator: Tensor, target_logit: Tensor, best_other: Tensor, group: dist.ProcessGroup
    ) -> None:
        """From what this rank found in its entries, each `[C]`, to what all entries give: one collective."""
        local = torch.stack([largest, denominator, target_logit, best_other])
        everywhere = local
        if group.size() > 1:
            everywhere = local.new_empty(group.size() * len(local), len(largest))
            dist.all_gather_into_tensor(everywhere, local, group=group)
        maxima, denominators, target_logits, best_others = everywhere.unflatten(0, (group.size(), -1)).unbind(1)
        maximum = maxima.amax(0)
        total = (denominators * (maxima - maximum).exp()).sum(0)
        self.losses = maximum - target_logits.sum(0) + total.log()
        self.normalizer = maximum + total.log()
        self.hits = target_logits.sum(0) > best_others.amax(0)
        self.local_share = denominator * (largest - maximum).exp() / total

    def sums(self) -> Tensor:
        """The chunk's LossSums as one tensor `[3]`."""
        terms = torch.stack([self.losses, self.normalizer.square(), self.hits.to(self.losses)])
        return terms.where(self.valid, 0.0).sum(1)

    def gradient(self, request: GradientRequest, out: Tensor) -> Tensor:
        """The gradient for this rank's logits in `out` `[C, V/TP]`, which may be their own memory.

        The entry of the target is rounded last: near 0 for a target that is all but certain, not near 1 - 1.
        """
        scale = request.scale * self.valid
        factor = (scale * (1 + 2 * request.z_loss * self.normalizer) * self.local_share).unsqueeze(1)
        at_entry = self.probabilities.gather(1, self.entry) * factor - (scale * self.is_here).unsqueeze(1)
        torch.mul(self.probabilities, factor, out=out)
        return out.scatter_(1, self.entry, at_entry.to(out.dtype))
