"""Loss weights and active heads of each step."""

import itertools
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mtp_dist.loss.schedule import HeadSchedule, head_schedule
from tests.tiny import tiny_config


def at_step(step: int, steps: int = 20, **heads: Any) -> HeadSchedule:
    return head_schedule(tiny_config(heads=heads, train={"steps": steps}), step)


STEPPED = [[1, 0.3], [7, 0.1], [10, 0]]


@pytest.mark.parametrize(
    ("step", "heads", "weights"),
    [
        (7, {}, (1.0,) * 4),
        (1, {"loss_weights": [1, 0.5, 0, 2e-1]}, (1.0, 0.5, 0.0, 0.2)),
        (1, {"auxiliary_weight": 0.3}, (1.0, 0.1, 0.1, 0.1)),
        (1, {"auxiliary_weight": 0.3, "count": 2}, (1.0, 0.3)),
        (1, {"auxiliary_weight": 0}, (1.0, 0.0, 0.0, 0.0)),
        *(
            (step, {"auxiliary_weight": STEPPED, "count": 3}, (1.0, value / 2, value / 2))
            for step, value in {1: 0.3, 6: 0.3, 7: 0.1, 9: 0.1, 10: 0.0, 20: 0.0}.items()
        ),
        (1, {"loss_decay": 0.5, "count": 3}, (4 / 7, 2 / 7, 1 / 7)),
        (1, {"loss_decay": 1.0}, (0.25,) * 4),
    ],
)
def test_loss_weights(step: int, heads: dict[str, Any], weights: tuple[float, ...]) -> None:
    found = at_step(step, **heads)
    assert found.loss_weights == pytest.approx(weights, rel=1e-15) and found.active_heads == len(weights)


@given(count=st.integers(1, 12), decay=st.floats(1e-3, 1))
def test_decayed_weights_add_up_to_1(count: int, decay: float) -> None:
    weights = at_step(1, count=count, loss_decay=decay).loss_weights
    assert len(weights) == count and sum(weights) == pytest.approx(1, rel=1e-12)
    for earlier, later in itertools.pairwise(weights):
        assert later == pytest.approx(decay * earlier, rel=1e-12)


@pytest.mark.parametrize("heads", [{}, {"loss_decay": 0.6}, {"loss_weights": [1.0]}])
@pytest.mark.parametrize("schedule", ["constant", "forward", "reverse"])
def test_one_head(schedule: str, heads: dict[str, Any]) -> None:
    steps = {at_step(step, count=1, schedule=schedule, **heads) for step in range(1, 21)}
    assert steps == {HeadSchedule((1.0,), 1)}


def active_heads(schedule: str, count: int, steps: int) -> list[int]:
    return [at_step(step, steps, count=count, schedule=schedule).active_heads for step in range(1, steps + 1)]


def test_stages_by_hand() -> None:
    assert active_heads("forward", 3, 6) == [1, 1, 2, 2, 3, 3]
    assert active_heads("reverse", 3, 6) == [3, 3, 2, 2, 1, 1]
    assert active_heads("constant", 3, 4) == [3, 3, 3, 3]
    assert active_heads("forward", 4, 4) == [1, 2, 3, 4]


@given(count=st.integers(1, 9), more_steps=st.integers(0, 60))
def test_stages(count: int, more_steps: int) -> None:
    steps = count + more_steps
    forward, reverse = (active_heads(schedule, count, steps) for schedule in ("forward", "reverse"))
    assert forward == sorted(forward) and set(forward) == set(range(1, count + 1))
    assert reverse == [count + 1 - active for active in forward]
    lengths = [forward.count(stage) for stage in range(1, count + 1)]
    assert max(lengths) - min(lengths) <= (1 if steps % count else 0)
