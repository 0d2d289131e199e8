"""Entropies of a small Markov source, enumerated exactly: where the mutual information in the heads' losses comes from.

Gloeckle et al. 2024, section 5.2: for the next token X and the one after it Y, given the context C,

    H(X|C) + H(Y|C) = H(X|Y,C) + 2 I(X;Y|C) + H(Y|X,C),

the loss of a perfect model with two heads, while next-token prediction of both has the loss

    H(X|C) + H(Y|X,C) = H(X|Y,C) + I(X;Y|C) + H(Y|X,C).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Table = NDArray[np.float64]

LIKELY = 0.6
"""Probability of the more likely one of two tokens."""
MAX_DISTANCE = 8


@dataclass(frozen=True)
class Decomposition:
    """Conditional entropies and mutual information of X and Y given C in nats, each from its own definition."""

    x: float
    """H(X|C)."""
    y: float
    """H(Y|C)."""
    x_given_y: float
    """H(X|Y,C)."""
    y_given_x: float
    """H(Y|X,C)."""
    information: float
    """I(X;Y|C)."""

    @property
    def two_heads(self) -> float:
        """H(X|C) + H(Y|C)."""
        return self.x + self.y

    @property
    def decomposed(self) -> float:
        """H(X|Y,C) + 2 I(X;Y|C) + H(Y|X,C)."""
        return self.x_given_y + 2 * self.information + self.y_given_x


def decompose(joint: Table) -> Decomposition:
    """Return the entropies of a joint distribution `[C, X, Y]`, all of whose probabilities add up to 1."""
    context = joint.sum((1, 2), keepdims=True)
    with_x, with_y = joint.sum(2, keepdims=True), joint.sum(1, keepdims=True)
    return Decomposition(
        x=_expected_log(with_x, context, with_x),
        y=_expected_log(with_y, context, with_y),
        x_given_y=_expected_log(joint, with_y, joint),
        y_given_x=_expected_log(joint, with_x, joint),
        information=_expected_log(joint, joint * context, with_x * with_y),
    )


def _expected_log(probability: Table, numerator: Table, denominator: Table) -> float:
    """Return the expectation of log(numerator / denominator); outcomes of probability 0 do not count."""
    possible = probability > 0
    ratio = np.broadcast_to(numerator, probability.shape)[possible] / denominator[possible]
    return float((probability[possible] * np.log(ratio)).sum())


@dataclass(frozen=True)
class MarkovSource:
    """A stationary Markov chain of tokens."""

    names: Sequence[str]
    transitions: Table
    """`[V, V]`: probability of the next token (column) after each token (row)."""

    @property
    def stationary(self) -> Table:
        """Probability of each token, `[V]`."""
        size = len(self.transitions)
        equations = np.vstack([self.transitions.T - np.eye(size), np.ones(size)])
        return np.linalg.lstsq(equations, np.eye(size + 1)[size], rcond=None)[0]

    def joint(self) -> Table:
        """Return the joint distribution of three successive tokens `[C, X, Y]`."""
        return self.stationary[:, None, None] * self.transitions[:, :, None] * self.transitions[None]

    def distance_information(self, distance: int) -> tuple[float, float]:
        """Return H(x_{t+k} | x_t) and I(x_{t+1..t+k-1}; x_{t+k} | x_t) for the distance k, in nats.

        Given the last of the tokens in between, the others add nothing, so the information is H(x_{t+k} | x_t) minus
        the entropy of the next token.
        """
        entropy = self._entropy(np.linalg.matrix_power(self.transitions, distance))
        return entropy, entropy - self._entropy(self.transitions)

    def _entropy(self, conditional: Table) -> float:
        joint = self.stationary[:, None] * conditional
        return _expected_log(joint, joint.sum(1, keepdims=True), joint)


def choice_source() -> MarkovSource:
    """Return the source of the docs: after S comes A1 or B1, a choice that determines two more tokens, then F or G,
    which is as uncertain and determines nothing, then S again."""
    following = {"A1": "A2", "A2": "A3", "B1": "B2", "B2": "B3", "F": "S", "G": "S"}
    uncertain = {"S": ("A1", "B1"), "A3": ("F", "G"), "B3": ("F", "G")}
    names = ("S", "A1", "A2", "A3", "B1", "B2", "B3", "F", "G")
    transitions = np.zeros((len(names), len(names)))
    for token, successor in following.items():
        transitions[names.index(token), names.index(successor)] = 1
    for token, (likely, unlikely) in uncertain.items():
        transitions[names.index(token), names.index(likely)] = LIKELY
        transitions[names.index(token), names.index(unlikely)] = 1 - LIKELY
    return MarkovSource(names, transitions)


def describe_source(source: MarkovSource) -> dict[str, Any]:
    """Return the decomposition with and without a context, by context token, and the information by distance."""
    joint = source.joint()
    decompositions = {"without context": joint.sum(0, keepdims=True), "given the token before": joint}
    return {
        "tokens": list(source.names),
        "transitions": source.transitions.tolist(),
        "decompositions": {
            name: asdict(result) | {"two_heads": result.two_heads, "decomposed": result.decomposed}
            for name, result in ((name, decompose(table)) for name, table in decompositions.items())
        },
        "information_after": {
            name: decompose(table[None] / table.sum()).information
            for name, table in zip(source.names, joint, strict=True)
        },
        "distances": [
            {"distance": k, "entropy": entropy, "information": information}
            for k, (entropy, information) in ((k, source.distance_information(k)) for k in range(1, MAX_DISTANCE + 1))
        ],
    }
