"""Loss and gradient that n heads assign to choices and to inconsequential tokens.

A choice is a token that cannot be predicted and that determines tokens after it, the position before it is a choice
point; an inconsequential token neither determines others nor is determined. A loss term is a head k at a position s,
with the target x_{s+k}. Gloeckle et al. 2024, appendix L: of the terms whose target is the choice x_p or a token that
it determines, those at positions s < p are wrong together with the choice: k of head k's, n(n+1)/2 in all if the choice
determines n - 1 tokens or more. The n terms of an inconsequential token concern nothing else.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from enum import IntEnum
from typing import Any

import torch
from torch import Tensor

from mtp_dist.analysis.information import cross_entropies
from mtp_dist.analysis.marked_text import IGNORED, Mark, MarkedText, Part, TermLabels, TextTerms
from mtp_dist.analysis.trained_model import TrainedModel
from mtp_dist.model.targets import MicroBatch

NEXT_MARKS = (Mark.INCONSEQUENTIAL, Mark.CHOICE, Mark.DETERMINED)
PROFILE_LENGTH = 32
"""Largest distance from the last choice, exclusive, of the positions whose loss and gradient are reported."""


def measure_choice_points(
    model: TrainedModel, text: MarkedText, limit: int, on_progress: Callable[[int, int], None]
) -> dict[str, Any]:
    """Return loss and gradient of about `limit` positions, divided among choices and other tokens, for heads 1..n.

    Raise DataError if the text is too short to contain a choice.
    """
    batches = model.windows(text.tokens, limit)
    positions = sum(batch.samples.shape[0] for batch in batches) * model.sequence_length
    terms = TextTerms(text.marks, positions, model.heads.distances)
    tally, start = Tally(model.heads.count, model.heads.distances[-1], model.device), 0
    for done, batch in enumerate(batches, 1):
        shape = batch.targets[0].shape
        labels = terms.labels(start, shape, model.device)
        for k, (losses, gradients) in enumerate(head_gradients(model, batch, labels)):
            tally.add(k, losses, gradients, labels)
        start += shape.numel()
        on_progress(done, len(batches))
    return {
        "model": str(model.folder),
        "heads": model.heads.count,
        "positions": positions,
        "choices": terms.choices,
        "inconsequential": terms.inconsequential,
        "rows": tally.rows(terms),
        "nats_by_offset": _means(tally.offset_nats, tally.offset_terms),
        "profile": tally.profile(),
    }


def head_gradients(model: TrainedModel, batch: MicroBatch, labels: TermLabels) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield each head's cross-entropies `[B, S]`, 0 if not counted, and their gradients with respect to the trunk's
    output, `[3, B, S, D]`: that of the sum of the terms of each `Part`."""
    z, mask = model.trunk(batch)
    z.requires_grad_()
    for logits, targets, parts in zip(model.head_logits(z, batch, mask), batch.targets, labels.parts, strict=True):
        losses = cross_entropies(logits, targets)
        losses = losses.masked_fill(parts == IGNORED, 0.0)
        sums = [losses.where(parts == part, 0.0).sum() for part in Part]
        # Heads that `heads.detach` separates from the trunk have no gradient.
        gradients = [
            torch.autograd.grad(part, z, retain_graph=True)[0] if part.requires_grad else torch.zeros_like(z)
            for part in sums
        ]
        yield losses.detach(), torch.stack(gradients)


class Tally:
    """Sums over the loss terms and positions of a text, by head."""

    def __init__(self, heads: int, reach: int, device: torch.device) -> None:
        def zeros(*shape: int) -> Tensor:
            return torch.zeros(heads, *shape, dtype=torch.float64, device=device)

        self.terms, self.nats = zeros(len(Part)), zeros(len(Part))
        """Number and cross-entropies of head k's terms by `Part`."""
        self.offset_terms, self.offset_nats = zeros(reach), zeros(reach)
        """Number and cross-entropies of head k's terms by the offset of their target from the last choice."""
        self.part_norms = zeros(len(Part))
        """Norms of the gradient of each part of the loss of heads 1..k, summed over the positions."""
        self.mark_norms, self.separate_norms = zeros(len(NEXT_MARKS)), zeros(len(NEXT_MARKS))
        """Norms of the gradient of the loss of heads 1..k, and of the gradients of each head's loss, summed over the
        positions, by the `Mark` of the next token."""
        self.profile_positions = zeros(PROFILE_LENGTH)
        self.profile_nats, self.profile_norms = zeros(PROFILE_LENGTH), zeros(PROFILE_LENGTH)
        """Number of positions, and loss and gradient norm of heads 1..k, by the distance from the last choice."""
        self._nats: Tensor
        self._gradients: Tensor
        self._separate_norms: Tensor

    def add(self, k: int, losses: Tensor, gradients: Tensor, labels: TermLabels) -> None:
        """Add one head's cross-entropies and gradients in one batch; heads are added from head 1 (k = 0) on."""
        parts, offsets = labels.parts[k], labels.offsets[k]
        for part in Part:
            self.terms[k, part] += (parts == part).sum()
            self.nats[k, part] += losses[parts == part].sum()
        from_choice = (parts == Part.CHOICE) | (parts == Part.KNOWN)
        _add_by(offsets, from_choice, self.offset_terms[k], torch.ones_like(losses))
        _add_by(offsets, from_choice, self.offset_nats[k], losses)
        self._nats = losses + (self._nats if k else 0)
        self._gradients = gradients + (self._gradients if k else 0)
        self._separate_norms = gradients.sum(0).norm(dim=-1) + (self._separate_norms if k else 0)
        self.part_norms[k] += self._gradients.norm(dim=-1).sum((1, 2))
        norms = self._gradients.sum(0).norm(dim=-1)
        _add_by(labels.next_marks, labels.counted, self.mark_norms[k], norms)
        _add_by(labels.next_marks, labels.counted, self.separate_norms[k], self._separate_norms)
        for sums, values in (
            (self.profile_positions, torch.ones_like(losses)),
            (self.profile_nats, self._nats),
            (self.profile_norms, norms),
        ):
            _add_by(labels.since_choice, labels.counted, sums[k], values)

    def rows(self, text: TextTerms) -> list[dict[str, Any]]:
        """Return one row per number of heads n: the terms, nats and gradient of heads 1..n."""
        terms, nats = self.terms.cumsum(0), self.nats.cumsum(0)
        rows = []
        for k in range(len(terms)):
            row: dict[str, Any] = {
                "heads": k + 1,
                "loss_share": _named(nats[k] / nats[k].sum(), Part),
                "gradient_share": _named(self.mark_norms[k] / self.mark_norms[k].sum(), NEXT_MARKS),
                "alignment": _named(self.mark_norms[k] / self.separate_norms[k], NEXT_MARKS),
            }
            for part, number in ((Part.CHOICE, text.choices), (Part.INCONSEQUENTIAL, text.inconsequential)):
                row[part.name.lower()] = {
                    name: float(sums[k, part]) / max(1, number)
                    for name, sums in (("terms", terms), ("nats", nats), ("gradient", self.part_norms))
                }
            rows.append(row)
        return rows

    def profile(self) -> dict[str, list[list[float | None]]]:
        """Return mean loss and gradient norm of heads 1..n, by n and the position's distance from the last choice."""
        last = int(self.profile_positions[0].nonzero().max()) + 1
        return {
            name: _means(sums[:, :last], self.profile_positions[:, :last])
            for name, sums in (("nats", self.profile_nats), ("gradient", self.profile_norms))
        }


def _add_by(groups: Tensor, counted: Tensor, sums: Tensor, values: Tensor) -> None:
    """Add each counted value to the sum of its group; groups without a sum are left out."""
    counted = counted & (groups >= 0) & (groups < len(sums))
    sums.index_add_(0, groups[counted], values[counted].double())


def _means(sums: Tensor, numbers: Tensor) -> list[list[float | None]]:
    return [[_number(mean) for mean in row] for row in (sums / numbers).tolist()]


def _named(values: Tensor, names: Iterable[IntEnum]) -> dict[str, float | None]:
    return {name.name.lower(): _number(float(values[name])) for name in names}


def _number(value: float) -> float | None:
    """Return the value, None for NaN, which JSON does not have."""
    return None if math.isnan(value) else value
