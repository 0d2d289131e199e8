"""Predictions of further tokens by a model of the next token, which sums over the tokens in between.

    P(x_{t+d} | x_1..x_t) = sum over v_1..v_{d-1} of P(v_1..v_{d-1} | x_1..x_t) P(x_{t+d} | x_1..x_t, v_1..v_{d-1})

The sum has the k most probable continuations v that a beam finds. The probability of all of them is the kept mass m.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mtp_dist.analysis.branches import Prefix


class Marginal(NamedTuple):
    """Predictions of one distance after G positions, from K continuations sorted by probability."""

    log_weights: Tensor
    """`[G, K]`: log-probability of each continuation."""
    target_log_probs: Tensor
    """`[G, K]`: log-probability of the target after each continuation."""
    probs: Tensor
    """`[G, len(top_k), V]`: the sum over the k most probable continuations, which adds up to the kept mass."""


class Scores(NamedTuple):
    """Quality of predictions, by position `[G]`."""

    ranks: Tensor
    """Number of other tokens that are predicted at least as strongly as the target."""
    nats: Tensor
    """Cross-entropy of the prediction."""
    upper: Tensor
    """Cross-entropy with nothing in place of the continuations left out; never below that of the full sum."""
    lower: Tensor
    """Cross-entropy if all of them predicted the target; never above that of the full sum."""
    kept_mass: Tensor

    @classmethod
    def exact(cls, log_probs: Tensor, targets: Tensor) -> Scores:
        """Return the scores of a model's own distributions `[G, V]`."""
        wanted = log_probs.gather(1, targets[:, None])
        nats = -wanted[:, 0].double()
        return cls((log_probs >= wanted).sum(1) - 1, nats, nats, nats, torch.ones_like(nats))

    @classmethod
    def truncated(cls, marginal: Marginal, index: int, k: int, targets: Tensor) -> Scores:
        """Return the scores of the sum over k continuations, divided by its kept mass. index: that of k in top_k."""
        weights = marginal.log_weights[:, :k].double()
        mass = weights.logsumexp(1).clamp(max=0)
        log_sum = (weights + marginal.target_log_probs[:, :k].double()).logsumexp(1).clamp(max=0)
        probs = marginal.probs[:, index]
        ranks = (probs >= probs.gather(1, targets[:, None])).sum(1) - 1
        missing = -torch.expm1(mass)
        lower = -(log_sum.exp() + missing).clamp(max=1).log()
        return cls(ranks, mass - log_sum, -log_sum, lower, mass.exp())


def marginals(
    prefix: Prefix, positions: Tensor, targets: Tensor, max_distance: int, top_k: Sequence[int]
) -> Iterator[Marginal]:
    """Yield the predictions of distances 2, 3, ... after positions `[G]`.

    targets: `[G, max_distance - 1]`, token ids at these distances.
    """
    branches, beam = prefix.branch(positions), max(top_k)
    first = prefix.log_probs[positions]
    log_weights, tokens = first.topk(min(beam, first.shape[1]))
    parents = torch.zeros_like(tokens)
    for distance in range(2, max_distance + 1):
        is_last, wanted = distance == max_distance, targets[:, distance - 2]
        best: tuple[Tensor, Tensor] | None = None
        found: list[Tensor] = []
        ranks = torch.arange(log_weights.shape[1], device=log_weights.device)
        weights = torch.stack([log_weights.exp() * (ranks < k) for k in top_k], 1)
        probs = weights.new_zeros(len(positions), len(top_k), first.shape[1])
        for part, log_probs in branches.extend(parents, tokens, is_last=is_last):
            found.append(log_probs.gather(2, wanted[:, None, None].expand(-1, log_probs.shape[1], 1))[:, :, 0])
            if not is_last:
                best = _best(best, log_weights[:, part, None] + log_probs, part.start, beam)
            probs += weights[:, :, part] @ log_probs.exp_()
        yield Marginal(log_weights, torch.cat(found, 1), probs)
        if best is not None:
            log_weights, chosen = best
            parents, tokens = chosen // first.shape[1], chosen % first.shape[1]


def _best(best: tuple[Tensor, Tensor] | None, scores: Tensor, start: int, beam: int) -> tuple[Tensor, Tensor]:
    """Return the largest scores `[G, beam]`, sorted, and their places: branch times V, plus the next token.

    best: those of earlier branches. scores: `[G, m, V]`, of the branches from `start` on.
    """
    flat = scores.flatten(1)
    values, places = flat.topk(min(beam, flat.shape[1]))
    places = places + start * scores.shape[2]
    if best is not None:
        values, order = torch.cat([best[0], values], 1).sort(1, descending=True)
        values, order = values[:, :beam], order[:, :beam]
        places = torch.cat([best[1], places], 1).gather(1, order)
    return values, places
