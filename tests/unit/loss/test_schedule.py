"""How much each head's loss counts, and which heads learn, at each step."""

import itertools
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mtp_dist.config import Config
from mtp_dist.loss.schedule import HeadSchedule, head_schedule
from tests.tiny import tiny_config


def config_of(steps: int = 20, **heads: Any) -> Config:
    return tiny_config(heads=heads, train={"steps": steps})


def weights_of(step: int = 1, **heads: Any) -> tuple[float, ...]:
    return head_schedule(config_of(**heads), step).loss_weights


def test_all_heads_count_alike_unless_weights_are_given() -> None:
    assert head_schedule(config_of(), 7) == HeadSchedule((1.0, 1.0, 1.0, 1.0), 4)
    assert weights_of(loss_weights=[1, 0.5, 0, 2e-1]) == (1.0, 0.5, 0.0, 0.2)


def test_auxiliary_weight_is_shared_by_the_other_heads() -> None:
    assert weights_of(auxiliary_weight=0.3) == pytest.approx((1.0, 0.1, 0.1, 0.1), rel=1e-15)
    assert weights_of(count=2, auxiliary_weight=0.3) == (1.0, 0.3)
    assert weights_of(auxiliary_weight=0) == (1.0, 0.0, 0.0, 0.0)


def test_auxiliary_weight_in_steps() -> None:
    steps = {1: 0.3, 6: 0.3, 7: 0.1, 9: 0.1, 10: 0.0, 20: 0.0}
    for step, value in steps.items():
        found = weights_of(step, count=3, auxiliary_weight=[[1, 0.3], [7, 0.1], [10, 0]])
        assert found == (1.0, value / 2, value / 2), step


def test_decay_by_distance() -> None:
    assert weights_of(count=3, loss_decay=0.5) == pytest.approx((4 / 7, 2 / 7, 1 / 7), rel=1e-15)
    assert weights_of(loss_decay=1.0) == (0.25,) * 4


@given(count=st.integers(1, 12), decay=st.floats(1e-3, 1))
def test_decayed_weights_are_shares(count: int, decay: float) -> None:
    weights = weights_of(count=count, loss_decay=decay)
    assert len(weights) == count and sum(weights) == pytest.approx(1, rel=1e-12)
    for earlier, later in itertools.pairwise(weights):
        assert later == pytest.approx(decay * earlier, rel=1e-12)


@pytest.mark.parametrize("given_weights", [{}, {"loss_decay": 0.6}, {"loss_weights": [1.0]}])
def test_one_head(given_weights: dict[str, Any]) -> None:
    for schedule in ("constant", "forward", "reverse"):
        config = config_of(count=1, schedule=schedule, **given_weights)
        assert {head_schedule(config, step) for step in range(1, 21)} == {HeadSchedule((1.0,), 1)}


def active_heads(schedule: str, count: int, steps: int) -> list[int]:
    config = config_of(steps, count=count, schedule=schedule)
    return [head_schedule(config, step).active_heads for step in range(1, steps + 1)]


def test_stages_by_hand() -> None:
    assert active_heads("forward", 3, 6) == [1, 1, 2, 2, 3, 3]
    assert active_heads("reverse", 3, 6) == [3, 3, 2, 2, 1, 1]
    assert active_heads("constant", 3, 4) == [3, 3, 3, 3]
    assert active_heads("forward", 4, 4) == [1, 2, 3, 4]


@given(count=st.integers(1, 9), further=st.integers(0, 60))
def test_stages(count: int, further: int) -> None:
    steps = count + further
    forward, reverse = (active_heads(schedule, count, steps) for schedule in ("forward", "reverse"))
    assert forward == sorted(forward) and set(forward) == set(range(1, count + 1))
    assert reverse == [count + 1 - active for active in forward]
    lengths = [forward.count(stage) for stage in range(1, count + 1)]
    assert max(lengths) - min(lengths) <= (1 if steps % count else 0)
