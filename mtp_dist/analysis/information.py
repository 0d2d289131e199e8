"""Loss by distance, and the part of it that is mutual information with the tokens in between."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from mtp_dist.analysis.trained_model import TrainedModel
from mtp_dist.errors import CheckpointError
from mtp_dist.model.targets import IGNORE_INDEX, MicroBatch

NORMAL_95 = 1.96
"""Half the width of a 95% interval in standard errors."""


def measure_information(
    model: TrainedModel, batches: Sequence[MicroBatch], on_progress: Callable[[int, int], None]
) -> dict[str, Any]:
    """Return each head's loss and how much it exceeds head 1's loss on the same tokens, in nats.

    Head k predicts token x_{t+k} from x_1..x_t, head 1 predicts it from x_1..x_{t+k-1}, with x_1 the first token of
    the window: only pairs within a window have the same context. The difference estimates the mutual information
    I(x_{t+1..t+k-1}; x_{t+k} | x_1..x_t); it exceeds it by what head k has learned less well than head 1. Appendix L of
    Gloeckle et al. 2024 has the same difference with the marginal of head 1's distributions in place of head k. The
    95% interval comes from the windows' means. Raise CheckpointError if a window is shorter than a distance.
    """
    length = model.sequence_length
    if model.heads.distances[-1] > length:
        raise CheckpointError(
            f"--model = '{model.folder}' has train.sequence_length = {length}, too short for its head at distance "
            f"{model.heads.distances[-1]}: give a model that was trained on longer samples"
        )
    losses = token_losses(model, batches, on_progress)
    windows = losses.reshape(len(losses), -1, length)
    rows, total, information = [], 0.0, 0.0
    for k, distance in enumerate(model.heads.distances, 1):
        pairs = length - distance + 1
        # Head 1 has the same target `distance - 1` positions later.
        further, nearer = windows[k - 1][:, :pairs], windows[0][:, distance - 1 :]
        mean, half_width = mean_and_interval((further - nearer).ravel(), pairs)
        loss = float(np.nanmean(further))
        total, information = total + loss, information + mean
        rows.append(
            {
                "head": k,
                "distance": distance,
                "loss": loss,
                "next_token_loss": loss - mean,
                "information": mean,
                "information_interval": half_width,
                "information_share": information / total,
            }
        )
    return {"model": str(model.folder), "heads": model.heads.count, "tokens": losses.shape[1], "rows": rows}


def token_losses(
    model: TrainedModel, batches: Sequence[MicroBatch], on_progress: Callable[[int, int], None]
) -> NDArray[np.float64]:
    """Return the cross-entropy of each head at each position of the text, `[n, T]`; NaN if a target is masked."""
    parts = []
    for done, batch in enumerate(batches, 1):
        z, mask = model.trunk(batch)
        with torch.no_grad():
            losses = [
                cross_entropies(logits, target)
                for logits, target in zip(model.head_logits(z, batch, mask), batch.targets, strict=True)
            ]
        parts.append(torch.stack(losses).flatten(1).double().cpu().numpy())
        on_progress(done, len(batches))
    return np.concatenate(parts, 1)


def cross_entropies(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Return the cross-entropy `[B, S]` of each target; NaN if it is masked."""
    losses = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORE_INDEX, reduction="none")
    return losses.view_as(targets).masked_fill(targets == IGNORE_INDEX, torch.nan)


def mean_and_interval(values: NDArray[np.float64], block: int) -> tuple[float, float | None]:
    """Return the mean and half the width of its 95% interval, from the means of blocks of successive values.

    Neighbouring tokens are not independent samples, blocks nearly are. NaN does not count; the interval is None if
    there is only one block.
    """
    blocks = [part for part in np.split(values, range(block, len(values), block)) if not np.isnan(part).all()]
    sums, counts = (
        np.array([np.nansum(part) for part in blocks]),
        np.array([(~np.isnan(part)).sum() for part in blocks]),
    )
    return ratio_and_interval(sums, counts)


def ratio_and_interval(sums: NDArray[np.float64], counts: NDArray[np.integer]) -> tuple[float, float | None]:
    """Return the mean of values of which each block has a sum and a count, and half the width of its 95% interval."""
    mean, blocks = sums.sum() / counts.sum(), len(sums)
    residuals = sums - mean * counts
    if blocks < 2:
        return float(mean), None
    variance = blocks / (blocks - 1) * (residuals**2).sum() / counts.sum() ** 2
    return float(mean), float(NORMAL_95 * np.sqrt(variance))
