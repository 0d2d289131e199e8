"""Measurement of marginalized predictions on the windows of a text, with those of other ways next to them."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mtp_dist.analysis.branches import Prefix, attends_by_mask, read_prefix
from mtp_dist.analysis.causal_model import CausalModel
from mtp_dist.analysis.information import ratio_and_interval
from mtp_dist.analysis.marginalization import Scores, marginals
from mtp_dist.analysis.window_records import WindowRecords
from mtp_dist.errors import CheckpointError
from mtp_dist.model.targets import document_ids

POSITION_STRIDE = 16
"""Every 16th position of a window is measured: neighbours have nearly the same context."""
NEXT_TOKEN, TRUE_PREFIX, HEAD, ROLLOUT, MARGINAL = "next token", "true prefix", "head", "greedy rollout", "marginal"


@dataclass(frozen=True)
class MarginalizationOptions:
    """Distances to predict, and numbers of continuations to sum over."""

    distances: tuple[int, ...]
    """Distances of the predicted tokens, each at least 2, ascending."""
    top_k: tuple[int, ...]
    """Numbers of continuations, ascending. The beam has the largest."""
    stride: int = POSITION_STRIDE
    """Every how many-th position is measured."""


class Window(NamedTuple):
    """A part of the text, and where it is measured."""

    tokens: Tensor
    """`[S + 1]`."""
    documents: Tensor
    """`[S + 1]`: index of each token's document; all 0 if targets in other documents count."""
    positions: Tensor
    """`[P]`: last token of each context."""

    def counts(self, positions: Tensor, distance: int) -> Tensor:
        """Return whether the targets of positions `[G]` count, as bool `[G]`."""
        return self.documents[positions + distance] == self.documents[positions]

    def fingerprint(self) -> str:
        """Return a hash of the tokens."""
        return hashlib.sha256(self.tokens.cpu().numpy().tobytes()).hexdigest()[:16]


def windows_needed(model: CausalModel, options: MarginalizationOptions, limit: int) -> int:
    """Return the number of windows with `limit` positions. Raise CheckpointError if a window is too short for one."""
    positions = len(_positions(model, options))
    if not positions:
        raise CheckpointError(
            f"--model = '{model.folder}' reads windows of {model.sequence_length} tokens, too short for --distance = "
            f"{options.distances[-1]}: give a smaller distance, or a model of longer texts"
        )
    return -(-limit // positions)


def cut_windows(
    model: CausalModel, tokens: NDArray[np.integer], options: MarginalizationOptions, count: int
) -> list[Window]:
    """Return consecutive windows of the text, `count` or as many as there are. Raise DataError if there is none.

    All targets of a position are in its window, so that every prediction of a token has a part of the same context.
    """
    windows = model.cut(tokens, count)
    documents = torch.zeros_like(windows)
    if model.data and not model.data.loss_across_documents:
        documents = document_ids(windows, model.tokenizer.end_of_document)
    positions = _positions(model, options).to(model.device)
    return [Window(*parts, positions) for parts in zip(windows, documents, strict=True)]


def _positions(model: CausalModel, options: MarginalizationOptions) -> Tensor:
    return torch.tensor(
        [*range(options.stride // 2, model.sequence_length - options.distances[-1] + 1, options.stride)]
    )


class Sums:
    """Sums of scores by distance and prediction."""

    def __init__(self) -> None:
        self._rows: dict[tuple[int, str, int | None], dict[str, float]] = {}

    def add(self, distance: int, prediction: str, k: int | None, scores: Scores, counts: Tensor) -> None:
        """Add the scores of the positions whose targets count."""
        row = self._rows.setdefault((distance, prediction, k), {})
        found = {"positions": counts, "top1": scores.ranks < 1, "top5": scores.ranks < 5}
        found |= {name: getattr(scores, name) for name in ("nats", "lower", "upper", "kept_mass")}
        for name, values in found.items():
            row[name] = row.get(name, 0.0) + float(values.double()[counts].sum())

    def rows(self) -> list[dict[str, Any]]:
        """Return the sums as JSON."""
        names = ("distance", "prediction", "k")
        return [dict(zip(names, key, strict=True)) | sums for key, sums in sorted(self._rows.items(), key=_order)]


def _order(row: tuple[tuple[int, str, int | None], Any]) -> tuple[int, int, int]:
    (distance, prediction, k), _ = row
    return distance, (NEXT_TOKEN, TRUE_PREFIX, HEAD, ROLLOUT, MARGINAL).index(prediction), k or 0


class WindowMeter:
    """Measures windows with one model."""

    def __init__(self, model: CausalModel, options: MarginalizationOptions) -> None:
        self.model, self.options = model, options
        with torch.inference_mode():
            self.by_mask = attends_by_mask(model)

    @torch.inference_mode()
    def measure(self, window: Window, on_positions: Callable[[int], None]) -> list[dict[str, Any]]:
        """Return the sums of the scores over the window's positions, by distance and prediction.

        on_positions: called with a number of positions when that many more are done.
        """
        text = torch.cat([window.tokens.new_tensor(self.model.start), window.tokens])
        prefix, sums = read_prefix(self.model, text[:-1], self.by_mask), Sums()
        self._add_heads(sums, window)
        for positions in window.positions.split(prefix.group_size(1)):
            self._add_references(sums, prefix, window, positions)
        beam = min(self.options.top_k[-1], prefix.log_probs.shape[1])
        for positions in window.positions.split(prefix.group_size(beam)):
            self._add_marginals(sums, prefix, window, positions, MARGINAL, self.options.top_k)
            on_positions(len(positions))
        return sums.rows()

    def _add_heads(self, sums: Sums, window: Window) -> None:
        """Add the predictions of the model's further heads."""
        model, positions = self.model.with_heads, window.positions
        if model is None:
            return
        tokens = window.tokens[None, :-1]
        end = self.model.end_of_attention
        logits = model.logits(tokens, documents=None if end is None else document_ids(tokens, end)).heads
        for head, distance in enumerate(model.config.heads.distances, 1):
            if distance in self.options.distances:
                log_probs = logits[head][0, positions].log_softmax(-1)
                scores = Scores.exact(log_probs, window.tokens[positions + distance])
                sums.add(distance, HEAD, None, scores, window.counts(positions, distance))

    def _add_references(self, sums: Sums, prefix: Prefix, window: Window, positions: Tensor) -> None:
        """Add the model's prediction of the next token, and those from the true and from the most probable tokens."""
        for distance in (1, *self.options.distances):
            log_probs = prefix.log_probs[positions + len(self.model.start) + distance - 1]
            scores = Scores.exact(log_probs, window.tokens[positions + distance])
            name = NEXT_TOKEN if distance == 1 else TRUE_PREFIX
            sums.add(distance, name, None, scores, window.counts(positions, distance))
        self._add_marginals(sums, prefix, window, positions, ROLLOUT, (1,))  # a beam of one is greedy

    def _add_marginals(
        self, sums: Sums, prefix: Prefix, window: Window, positions: Tensor, name: str, top_k: Sequence[int]
    ) -> None:
        last = self.options.distances[-1]
        targets = torch.stack([window.tokens[positions + distance] for distance in range(2, last + 1)], 1)
        found = marginals(prefix, positions + len(self.model.start), targets, last, top_k)
        for distance, marginal in enumerate(found, 2):
            if distance in self.options.distances:
                for index, k in enumerate(top_k):
                    scores = Scores.truncated(marginal, index, k, targets[:, distance - 2])
                    sums.add(distance, name, k, scores, window.counts(positions, distance))


def measure_marginals(
    model: CausalModel,
    windows: Sequence[Window],
    options: MarginalizationOptions,
    records: WindowRecords,
    on_progress: Callable[[int, int], None],
) -> dict[str, Any]:
    """Return the scores of the model's predictions by distance. The records get each window when it is done.

    Windows that the records have already are not measured again.
    """
    meter, done = WindowMeter(model, options), 0
    total = sum(len(window.positions) for window in windows)

    def count(positions: int) -> None:
        nonlocal done
        done += positions
        on_progress(done, total)

    found = []
    for number, window in enumerate(windows):
        record = records.find(number, window.fingerprint())
        if record is None:
            started = time.monotonic()
            rows = meter.measure(window, count)
            record = {"rows": rows, "seconds": time.monotonic() - started}
            records.append(number, window.fingerprint(), record)
        else:
            count(len(window.positions))
        found.append(record)
    return {
        "model": str(model.folder),
        "windows": len(windows),
        "window_length": model.sequence_length,
        "positions": total,
        "beam": options.top_k[-1],
        "prefix": "shared by a mask" if meter.by_mask else "copied for each branch",
        "seconds": sum(record["seconds"] for record in found),
        "rows": summarize([record["rows"] for record in found]),
    }


def summarize(windows: Sequence[Sequence[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Return means over all windows, with half the widths of their 95% intervals, from the windows' sums."""
    rows = []
    for group in zip(*windows, strict=True):
        counts = np.array([row["positions"] for row in group])
        row = {name: group[0][name] for name in ("distance", "prediction", "k")} | {"positions": int(counts.sum())}
        if counts.any():
            for name, sums in (("top1", "top1"), ("top5", "top5"), ("cross_entropy", "nats")):
                values = np.array([found[sums] for found in group])
                row[name], row[f"{name}_interval"] = ratio_and_interval(values, counts)
            for name in ("kept_mass", "lower", "upper"):
                row[name] = float(sum(found[name] for found in group) / counts.sum())
        rows.append(row)
    return rows
