"""From the engine's sums to the metrics of a step, and from these to the scalars of the logs."""

from typing import Any

import pytest
import torch
from torch import Tensor

from mtp_dist.loss.weights import HeadWeights
from mtp_dist.training.callbacks import validation_scalars
from mtp_dist.training.loop import head_metrics
from mtp_dist.training.metrics import HeadMetrics
from tests.parity.runs import tiny_config

WEIGHTS = (1.0, 0.5, 0.25)


def sums_of(**rows: list[float]) -> Tensor:
    """Of 3 heads with 8, 4 and no valid targets; the last one has not learnt."""
    sums = {"losses": [16.0, 12.0, 0.0], "correct": [2.0, 3.0, 0.0], "targets": [8.0, 4.0, 0.0]}
    sums |= {"distillation": [0.0, 0.0, 0.0], "token_order": [0.0, 0.0, 0.0]} | rows
    return torch.tensor(list(sums.values()), dtype=torch.float64)


def metrics_of(sums: Tensor, active: int = 3, **heads: Any) -> HeadMetrics:
    return head_metrics(tiny_config(heads={"count": 3, **heads}), sums, HeadWeights(WEIGHTS, active))


def test_means_over_the_valid_targets() -> None:
    assert metrics_of(sums_of()) == HeadMetrics((2.0, 3.0, 0.0), (0.25, 0.75, 0.0), 2 + 0.5 * 3)


def test_only_active_heads() -> None:
    assert metrics_of(sums_of(), active=2) == HeadMetrics((2.0, 3.0), (0.25, 0.75), 2 + 0.5 * 3)
    assert metrics_of(sums_of(), active=1) == HeadMetrics((2.0,), (0.25,), 2.0)


def test_distillation() -> None:
    sums = sums_of(targets=[8.0, 4.0, 2.0], losses=[16.0, 12.0, 10.0], distillation=[0.0, 20.0, 14.0])
    found = metrics_of(sums, distillation=0.1)
    assert found.losses == (2.0, 3.0, 5.0) and found.distillation == (5.0, 7.0) and found.token_order is None
    assert found.total == pytest.approx(2 + 0.5 * (3 + 0.1 * 5) + 0.25 * (5 + 0.1 * 7), rel=1e-15)
    two = metrics_of(sums, active=2, distillation=0.1)
    assert two.distillation == (5.0,) and two.total == pytest.approx(2 + 0.5 * (3 + 0.1 * 5), rel=1e-15)
    assert metrics_of(sums, active=1, distillation=0.1) == HeadMetrics((2.0,), (0.25,), 2.0)


def test_token_order() -> None:
    found = metrics_of(sums_of(token_order=[24.0, 0.0, 0.0]), active=1, token_order=0.1)
    assert found.token_order == 3.0, "over the valid targets of head 1"
    assert found.losses == (2.0,) and found.distillation == ()
    assert found.total == pytest.approx(2 + 0.1 * 3, rel=1e-15)


def test_scalars_leave_out_what_there_is_not() -> None:
    few = validation_scalars(HeadMetrics((2.0,), (0.25,), 2.0), None, 2.0)
    assert {name.removeprefix("validation/") for name in few} == {
        "loss/head_1",
        "loss/total",
        "accuracy/head_1",
        "bits_per_byte/head_1",
    }
    many = validation_scalars(HeadMetrics((2.0, 3.0, 5.0), (0.1, 0.2, 0.3), 9.0, (5.0, 7.0), 4.0), None, 2.0)
    assert {name: many[f"validation/loss/{name}"] for name in ("head_3", "total", "token_order")} == {
        "head_3": 5.0,
        "total": 9.0,
        "token_order": 4.0,
    }
    assert many["validation/loss/distillation/head_2"] == 5.0 and many["validation/loss/distillation/head_3"] == 7.0
    assert "validation/loss/distillation/head_1" not in many and len(many) == 3 + 1 + 2 + 1 + 3 + 3
