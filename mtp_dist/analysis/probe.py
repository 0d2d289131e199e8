"""Linear probes: how well a linear classifier of hidden states predicts the tokens after them.

A probe is a multinomial logistic regression on standardized states, fitted by L-BFGS to the first part of the text and
measured on the rest. Two baselines show what it would reach without the states: the unigram frequencies of the first
part, and the same probe on states in a random order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from mtp_dist.analysis.information import mean_and_interval, token_losses
from mtp_dist.analysis.trained_model import TrainedModel
from mtp_dist.errors import DataError

HELD_OUT_FRACTION = 0.25
L2_PENALTY = 1e-4
"""Weight of the sum of squares of the classifier's matrix, next to the mean cross-entropy in nats."""
MAX_ITERATIONS = 80
ROWS_PER_CHUNK = 8192
SEED = 0


class ProbeScore(NamedTuple):
    """The quality of predictions of held-out tokens."""

    accuracy: float
    accuracy_interval: float | None
    """Half the width of its 95% interval."""
    cross_entropy: float
    """Nats per token."""


class HeldOut(NamedTuple):
    """Values of successive tokens, the last part of which is held out."""

    train: Tensor
    held_out: Tensor

    @classmethod
    def split(cls, values: Tensor, block: int) -> HeldOut:
        """Split values along their first dimension after a multiple of `block`."""
        blocks = len(values) // block
        boundary = (blocks - max(1, round(blocks * HELD_OUT_FRACTION))) * block
        return cls(values[:boundary], values[boundary:])


class LinearProbe:
    """A linear classifier of hidden states."""

    def __init__(self, states: Tensor, targets: Tensor, num_classes: int) -> None:
        """Fit states `[N, D]` to targets `[N]`, both of any origin: a trunk's output or that of one of its layers."""
        self.mean, self.std = states.mean(0), states.std(0).clamp(min=1e-6)
        inputs = self._inputs(states)
        # The start is the unigram distribution, so that states without information are no worse.
        frequencies = unigram(targets, num_classes)
        self.weight = torch.zeros(inputs.shape[1], num_classes, device=states.device)
        self.weight[-1] = frequencies.log()
        self.weight.requires_grad_()
        optimizer = torch.optim.LBFGS([self.weight], max_iter=MAX_ITERATIONS, line_search_fn="strong_wolfe")

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = L2_PENALTY * self.weight[:-1].square().sum()
            loss.backward()
            for rows, wanted in zip(inputs.split(ROWS_PER_CHUNK), targets.split(ROWS_PER_CHUNK), strict=True):
                part = F.cross_entropy(rows @ self.weight, wanted, reduction="sum") / len(targets)
                part.backward()
                loss = loss + part.detach()
            return loss.detach()

        optimizer.step(closure)
        self.weight.requires_grad_(False)

    def _inputs(self, states: Tensor) -> Tensor:
        standardized = (states - self.mean) / self.std
        return torch.cat([standardized, torch.ones_like(standardized[:, :1])], 1)

    def log_probabilities(self, states: Tensor) -> Tensor:
        """Return the logarithms of the classes' probabilities, `[M, classes]`."""
        return (self._inputs(states) @ self.weight).log_softmax(-1)


def unigram(targets: Tensor, num_classes: int) -> Tensor:
    """Return the frequencies `[classes]` of the targets; each class counts one more time than it occurs."""
    counts = torch.bincount(targets, minlength=num_classes) + 1
    return counts / counts.sum()


def score(log_probabilities: Tensor, targets: Tensor, block: int) -> tuple[ProbeScore, NDArray[np.float64]]:
    """Return how well `[M, classes]` predict `[M]`, and the cross-entropy of each token. block: tokens per window."""
    correct = (log_probabilities.argmax(-1) == targets).double()
    accuracy, half_width = mean_and_interval(correct.cpu().numpy(), block)
    losses = F.nll_loss(log_probabilities, targets, reduction="none").double().cpu().numpy()
    return ProbeScore(accuracy, half_width, float(losses.mean())), losses


class ProbedModel(NamedTuple):
    """The scores of a model's probes, and the losses that they are made of."""

    result: dict[str, Any]
    losses: list[NDArray[np.float64]]
    """Cross-entropy of the probe on each held-out token, by distance."""
    block: int
    """Tokens per window."""


def probe_model(
    model: TrainedModel,
    text: NDArray[np.integer],
    limit: int,
    max_distance: int,
    on_progress: Callable[[int, int], None],
) -> ProbedModel:
    """Return the scores of probes of the trunk's output at about `limit` positions, for distances 1 .. max_distance,
    next to the loss of the model's own head at that distance.

    limit: at most the number of tokens that are followed by `max_distance` others. Raise DataError if the text has no
    held-out window.
    """
    batches = model.windows(text, limit)
    states = torch.cat([model.trunk(batch)[0].flatten(0, 1) for batch in batches])
    block = model.sequence_length
    if len(states) < 2 * block:
        raise DataError(
            f"--tokens or --data has fewer than two windows of {block} tokens, one to fit the probe and one to measure "
            "it: give more"
        )
    tokens = torch.as_tensor(text.astype(np.int64), device=model.device)
    own_losses = torch.as_tensor(token_losses(model, batches, lambda done, total: None)).T
    heads = dict(zip(model.heads.distances, HeldOut.split(own_losses, block).held_out.nanmean(0).tolist(), strict=True))
    rows, losses = [], []
    for distance in range(1, max_distance + 1):
        targets = tokens[distance : distance + len(states)]
        scores, probe_losses = probe_states(states, targets, model.config.vocab_size, block)
        rows.append({"distance": distance, "head": heads.get(distance), **scores})
        losses.append(probe_losses)
        on_progress(distance, max_distance)
    result = {
        "model": str(model.folder),
        "heads": model.heads.count,
        "trunk_layers": model.config.model.trunk_layers,
        "positions": len(states),
        "rows": rows,
    }
    return ProbedModel(result, losses, block)


def probe_states(
    states: Tensor, targets: Tensor, num_classes: int, block: int
) -> tuple[dict[str, Any], NDArray[np.float64]]:
    """Return the scores of a probe of states `[T, D]` for targets `[T]` and of its baselines, and the probe's losses.

    The states are those of successive tokens, at any depth of a model. block: tokens per window.
    """
    generator = torch.Generator().manual_seed(SEED)
    split, wanted = HeldOut.split(states, block), HeldOut.split(targets, block)
    shuffled = HeldOut(*(part[torch.randperm(len(part), generator=generator).to(part.device)] for part in split))
    frequencies = unigram(wanted.train, num_classes).log().expand(len(wanted.held_out), -1)
    predictions = {"unigram": frequencies}
    for name, inputs in (("probe", split), ("shuffled", shuffled)):
        probe = LinearProbe(inputs.train, wanted.train, num_classes)
        predictions[name] = probe.log_probabilities(inputs.held_out)
    scores = {name: score(predicted, wanted.held_out, block) for name, predicted in predictions.items()}
    return {name: found._asdict() for name, (found, _) in scores.items()}, scores["probe"][1]


def compare_probes(models: Sequence[ProbedModel]) -> list[dict[str, Any]]:
    """Return the models' results with the difference of each cross-entropy to that of the first model, token by token.

    The models have read the same tokens.
    """
    first = models[0]
    for model in models[1:]:
        for row, losses, others in zip(model.result["rows"], model.losses, first.losses, strict=True):
            mean, half_width = mean_and_interval(losses - others, model.block)
            row["difference"] = {"cross_entropy": mean, "interval": half_width}
    return [model.result for model in models]
