"""Loss by distance and its difference to head 1's."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from mtp_dist.analysis.information import mean_and_interval, measure_information

LENGTH, HEADS, WINDOWS = 16, 4, 5


def test_differences_are_those_of_the_same_tokens_and_windows(model):
    """Across windows, head 1 would have read less than head k."""
    tokens = np.random.default_rng(6).integers(0, 256, WINDOWS * LENGTH + HEADS)
    batches = model.windows(tokens, WINDOWS * LENGTH)
    rows = measure_information(model, batches, lambda done, total: None)["rows"]
    by_token = {}
    for window in range(WINDOWS):
        first = window * LENGTH
        samples = torch.as_tensor(tokens[None, first : first + LENGTH + HEADS])
        with torch.no_grad():
            logits = model.network(samples, LENGTH)
        for k in range(1, HEADS + 1):
            losses = F.cross_entropy(logits[k][0], samples[0, k : k + LENGTH], reduction="none")
            by_token |= {(window, k, offset + k): float(losses[offset]) for offset in range(LENGTH)}
    for row in rows:
        k = row["head"]
        pairs = [
            (loss, by_token[window, 1, token])
            for (window, head, token), loss in by_token.items()
            if head == k and (window, 1, token) in by_token
        ]
        assert len(pairs) == WINDOWS * (LENGTH - k + 1)
        loss, next_token_loss = np.mean(pairs, 0)
        assert row["information"] == pytest.approx(loss - next_token_loss, abs=1e-5)
        assert row["loss"] == pytest.approx(loss, rel=1e-5)
        assert row["next_token_loss"] == pytest.approx(next_token_loss, rel=1e-5)
    assert rows[0]["information"] == 0
    total = sum(row["loss"] for row in rows)
    assert rows[-1]["information_share"] == pytest.approx(sum(row["information"] for row in rows) / total)


def test_interval_is_that_of_the_blocks_means():
    """Values that agree within blocks are no more evidence than one value per block."""
    blocks = np.random.default_rng(7).normal(size=200)
    mean, half_width = mean_and_interval(np.repeat(blocks, 10), 10)
    assert mean == pytest.approx(blocks.mean())
    assert half_width == pytest.approx(1.96 * blocks.std(ddof=1) / np.sqrt(200), rel=1e-6)
    with_gap = np.append(np.repeat(blocks, 10), [np.nan] * 10)
    assert mean_and_interval(with_gap, 10) == (pytest.approx(mean), pytest.approx(half_width))
    assert mean_and_interval(np.ones(5), 10) == (1, None)
