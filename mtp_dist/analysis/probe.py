"""Linear probes: how well a linear classifier of hidden states predicts the tokens after them.

There is a probe for each layer and distance, a multinomial logistic regression that is fitted to the first part of the
text and measured on the rest. Two baselines show what the probe of the trunk's output would reach without the states:
the unigram frequencies of the first part, and the same probe on states in a random order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mtp_dist.analysis.information import cross_entropies, mean_and_interval
from mtp_dist.analysis.layer_states import LayeredModel
from mtp_dist.analysis.linear_probes import ROWS_PER_STEP, SEED, LinearProbes, TokenClasses, num_steps
from mtp_dist.errors import DataError
from mtp_dist.model.targets import MicroBatch

HELD_OUT_FRACTION = 0.25


class ProbeScore(NamedTuple):
    """The quality of predictions of held-out tokens."""

    accuracy: float
    accuracy_interval: float | None
    """Half the width of its 95% interval."""
    cross_entropy: float
    """Nats per token."""


class ProbedModel(NamedTuple):
    """The scores of a model's probes, and the losses that they are made of."""

    result: dict[str, Any]
    losses: list[NDArray[np.float64]]
    """Cross-entropy of the probe of the trunk's output on each held-out token, by distance."""
    block: int
    """Tokens per window."""


class TextStates(NamedTuple):
    """The states of a model at T successive positions of a text."""

    layers: list[str]
    states: Tensor
    """`[L, T, D]`, fp32."""
    own_losses: Tensor
    """`[n, T]`: cross-entropies of the model's own heads; NaN if a target is masked."""


def probe_model(
    model: LayeredModel,
    text: NDArray[np.integer],
    limit: int,
    max_distance: int,
    on_read: Callable[[int, int], None],
    on_fit: Callable[[int, int], None],
) -> ProbedModel:
    """Return the scores of probes of each layer at about `limit` positions, for distances 1 .. max_distance.

    Next to them is the loss of the model's own head at that distance. limit: at most the number of tokens that are
    followed by `max_distance` others. on_read follows the batches that the model reads, on_fit the steps of the probes.
    Raise DataError if the text has no held-out window.
    """
    batches, block = model.windows(text, limit), model.sequence_length
    positions = sum(batch.targets[0].numel() for batch in batches)
    if positions < 2 * block:
        raise DataError(
            f"--tokens or --data has fewer than two windows of {block} tokens, one to fit the probe and one to measure "
            "it: give more"
        )
    layers, states, own_losses = read_states(model, batches, on_read)
    boundary = fitted_positions(positions, block)
    standardize(states, boundary)
    heads = dict(zip(model.distances, own_losses[:, boundary:].nanmean(1).tolist(), strict=True))
    tokens = torch.as_tensor(text.astype(np.int64), device=states.device)
    done, total = 0, max_distance * num_steps(boundary)

    def count_step() -> None:
        nonlocal done
        done += 1
        on_fit(done, total)

    rows, losses = [], []
    for distance in range(1, max_distance + 1):
        targets = tokens[distance : distance + positions]
        output = layers.index(model.output_layer)
        probed = probe_states(states, targets, output, model.vocab_size, block, count_step)
        named = [{"layer": name, **score._asdict()} for name, score in zip(layers, probed.layers, strict=True)]
        baselines = {name: score._asdict() for name, score in probed.scores.items()}
        rows.append({"distance": distance, "head": heads.get(distance), **baselines, "layers": named})
        losses.append(probed.losses)
    result = {
        "model": str(model.folder),
        "heads": len(model.distances),
        "trunk_layers": model.num_layers,
        "positions": positions,
        "rows": rows,
    }
    return ProbedModel(result, losses, block)


def read_states(model: LayeredModel, batches: Sequence[MicroBatch], on_read: Callable[[int, int], None]) -> TextStates:
    """Return the states of all layers on the batches, which the model reads once."""
    losses, begin, states = [], 0, torch.empty(0)
    positions = sum(batch.targets[0].numel() for batch in batches)
    for done, batch in enumerate(batches, 1):
        named, logits = model.layer_states(batch)
        end = begin + batch.targets[0].numel()
        for layer, state in enumerate(named.values()):
            if not states.numel():  # allocated once: the states of large models would not fit twice
                states = state.new_empty(len(named), positions, state.shape[-1])
            states[layer, begin:end] = state.flatten(0, 1)
        losses.append(torch.stack([cross_entropies(*own) for own in zip(logits, batch.targets, strict=True)]))
        begin = end
        on_read(done, len(batches))
    return TextStates([*named], states, torch.cat([part.flatten(1) for part in losses], 1).double())


def fitted_positions(positions: int, block: int) -> int:
    """Return the number of positions before the held-out ones, a multiple of `block`."""
    blocks = positions // block
    return (blocks - max(1, round(blocks * HELD_OUT_FRACTION))) * block


def standardize(states: Tensor, count: int) -> None:
    """Shift and scale each value of the states `[L, T, D]` in place to mean 0 and variance 1 at the first `count`."""
    for layer in states:
        std, mean = torch.std_mean(layer[:count], 0)
        layer.sub_(mean).div_(std.clamp(min=1e-6))


class ProbedStates(NamedTuple):
    """Scores of the probes of one distance."""

    layers: list[ProbeScore]
    scores: dict[str, ProbeScore]
    """Scores of the probe of the trunk's output and of its baselines."""
    losses: NDArray[np.float64]
    """Cross-entropy of the probe of the trunk's output on each held-out token."""


def probe_states(
    states: Tensor, targets: Tensor, output: int, vocab_size: int, block: int, on_step: Callable[[], None]
) -> ProbedStates:
    """Return the scores of probes of standardized states `[L, T, D]` for targets `[T]`.

    The states are those of successive tokens. output: index of the trunk's output among the layers, which the baselines
    are of. block: tokens per window. on_step: called after each of `num_steps` for the fitted positions.
    """
    positions = len(targets)
    boundary = fitted_positions(positions, block)
    generator = torch.Generator().manual_seed(SEED)
    orders = [torch.randperm(rows, generator=generator) for rows in (boundary, positions - boundary)]
    shuffled = torch.cat([orders[0], boundary + orders[1]]).to(states.device)

    def read(rows: Tensor) -> Tensor:
        return torch.cat([states[:, rows], states[output, shuffled[rows]][None]])

    classes = TokenClasses(targets[:boundary], vocab_size)
    probes = LinearProbes(read, targets[:boundary], classes, on_step)
    losses, correct = [], []
    for rows in torch.arange(boundary, positions, device=states.device).split(ROWS_PER_STEP):
        log_probs, wanted = probes.log_probs(read(rows)), targets[rows]
        log_probs = torch.cat([log_probs, classes.log_frequencies.expand_as(log_probs[:1])])
        losses.append(classes.token_losses(log_probs, wanted))
        correct.append(classes.best_tokens(log_probs) == wanted)
    found = torch.cat(losses, 1).double().cpu().numpy(), torch.cat(correct, 1).double().cpu().numpy()
    *layers, shuffled_score, unigram = (score(*parts, block) for parts in zip(*found, strict=True))
    scores = {"unigram": unigram, "probe": layers[output], "shuffled": shuffled_score}
    return ProbedStates(layers, scores, found[0][output])


def score(losses: NDArray[np.float64], correct: NDArray[np.float64], block: int) -> ProbeScore:
    """Return the score of predictions with these cross-entropies and right answers. block: tokens per window."""
    accuracy, half_width = mean_and_interval(correct, block)
    return ProbeScore(accuracy, half_width, float(losses.mean()))


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
