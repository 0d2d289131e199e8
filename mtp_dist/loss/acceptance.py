"""Acceptance of the heads' drafts in greedy self-speculative decoding (Stern et al. 2018), on a text that is given."""

from collections.abc import Sequence

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from mtp_dist.config.heads import drafting_head
from mtp_dist.loss.objective import Vocabulary


class GreedyTokens:
    """The most probable token of each head at each position of a micro-batch; of several the one with the lowest id."""

    def __init__(self, heads: int, length: int, batch: int, vocabulary: Vocabulary, device: torch.device) -> None:
        self.vocabulary = vocabulary
        self.token_ids = torch.zeros(heads, length, batch, dtype=torch.int64, device=device)
        """`[n, S, B]`; 0 for a head that does not run."""

    def record(self, head: int, positions: slice, logits: Tensor) -> None:
        """Keep the best of a head's logits `[C, V/TP]` at these of the `S * B` positions. A collective."""
        group = self.vocabulary.group
        best, token_ids = logits.max(1)  # the first of equal ones
        token_ids += group.rank() * logits.shape[1]
        if group.size() > 1:
            local = torch.stack([best.double(), token_ids.double()])  # both exactly
            gathered = local.new_empty(group.size() * 2, local.shape[1])
            dist.all_gather_into_tensor(gathered, local, group=group)
            by_rank = gathered.unflatten(0, (group.size(), 2))
            token_ids = by_rank[:, 1].gather(0, by_rank[:, 0].argmax(0, keepdim=True)).squeeze(0).long()
        self.token_ids[head - 1].view(-1)[positions] = token_ids


def draft_acceptance_sums(token_ids: Tensor, valid: Tensor, distances: Sequence[int]) -> Tensor:
    """Return `[d_n - 1, 2]`, fp64: per distance 2, 3, .. d_n the number of drafts that head 1 verifies and accepts.

    token_ids: `[n, S, B]`, the heads' most probable tokens; valid: likewise, True if the head has a target. The drafts
    are those of a decoder that follows the text. A forward pass at position t gives head 1's token t + 1 and a draft of
    token t + m from the nearest head that predicts d >= m ahead, at position t - (d - m). Head 1, which has read the
    text, verifies it at position t + m - 1 if all drafts before it are accepted, both positions are in the sample and
    the head has a target. The next pass is at the last token that this one has given.
    """
    accepted = torch.ones_like(valid[0])
    drafts = []
    for distance in range(2, distances[-1] + 1):
        head = drafting_head(distances, distance) - 1
        earlier = distance - distances[head]
        expected = _values_at(token_ids[0], distance - 1, -1)
        verified = accepted & _values_at(valid[head], earlier, False) & (expected >= 0)
        accepted = verified & (_values_at(token_ids[head], earlier, -1) == expected)
        drafts.append(torch.stack([verified, accepted]))
    if not drafts:
        return torch.zeros(0, 2, dtype=torch.float64, device=valid.device)
    by_distance = torch.stack(drafts)
    starts = _starts_of_passes(1 + by_distance[:, 1].sum(0))
    return (by_distance & starts).sum((2, 3)).double()


def _values_at(values: Tensor, offset: int, outside: int) -> Tensor:
    """Return the values `[S, B]` that lie `offset` positions later, `outside` beyond the sample."""
    positions = torch.arange(len(values), device=values.device).unsqueeze(1) + offset
    inside = (positions >= 0) & (positions < len(values))
    return values.roll(-offset, 0).where(inside, outside)


def _starts_of_passes(tokens: Tensor) -> Tensor:
    """Return `[S, B]`, True at the positions of a decoder's passes, the first at 0.

    tokens: `[S, B]`, number of tokens that a pass at each position gives, within the sample.
    """
    length = len(tokens)
    positions = torch.arange(length + 1, device=tokens.device).unsqueeze(1)
    next_start = (positions + F.pad(tokens, (0, 0, 0, 1))).clamp(max=length)
    starts = (positions == 0).expand_as(next_start).long()
    for _ in range(length.bit_length()):  # doubles the number of passes that are followed
        starts = starts.scatter_add(0, next_start, starts).clamp(max=1)
        next_start = next_start.gather(0, next_start)
    return starts[:-1].bool()


def draft_acceptance_rates(sums: Tensor) -> tuple[float | None, ...]:
    """Return the fraction of passes that accept all drafts up to distance 2, 3, .. from `draft_acceptance_sums`.

    It is the product of the fractions of verified drafts that are accepted, so that drafts beyond a sample's end or
    without a target neither raise nor lower it; 0 if no draft gets that far, None if none is verified at all.
    """
    rates, rate = list[float | None](), 1.0
    for verified, accepted in sums.tolist():
        rate *= accepted / max(verified, 1.0)
        rates.append(rate if sums[0, 0] else None)
    return tuple(rates)
