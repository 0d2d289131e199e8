"""Learning rate, parameter groups and the optimizer."""

import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from mtp_dist.engine.optimizer import build_optimizer, learning_rate, parameter_groups, set_learning_rate
from mtp_dist.model.reference import ReferenceModel
from tests.tiny import tiny_config

PEAK, CPU = 2e-3, torch.device("cpu")


def learning_rates(steps: int, warmup: int, **optimizer: Any) -> list[float]:
    config = tiny_config(train={"steps": steps}, optimizer={"lr": PEAK, "warmup_steps": warmup, **optimizer})
    return [learning_rate(config, step) for step in range(1, steps + 1)]


def test_by_hand() -> None:
    half = (1 + math.cos(math.pi / 4)) / 2
    factors = [0.25, 0.5, 0.75, 1.0, 0.1 + 0.9 * half, 0.55, 0.1 + 0.9 * (1 - half), 0.1]
    assert learning_rates(8, 4, min_lr_ratio=0.1) == pytest.approx([PEAK * factor for factor in factors], rel=1e-12)


@given(
    steps=st.integers(1, 60),
    warmup=st.integers(0, 80),
    floor=st.floats(0, 1),
    schedule=st.sampled_from(["cosine", "constant"]),
)
def test_shape(steps: int, warmup: int, floor: float, schedule: str) -> None:
    rates = learning_rates(steps, warmup, min_lr_ratio=floor, schedule=schedule)
    rise, rest = rates[:warmup], rates[warmup:]
    assert rise == pytest.approx([PEAK * step / warmup for step in range(1, len(rise) + 1)], rel=1e-12)
    assert not warmup or len(rise) < warmup or rise[-1] == PEAK, "exactly"
    if schedule == "constant":
        assert rest == [PEAK] * len(rest)
    elif rest:
        assert rest[-1] == pytest.approx(floor * PEAK, abs=1e-15)
        assert all(later <= earlier * (1 + 1e-12) for earlier, later in itertools.pairwise(rest))
        assert all(floor * PEAK * (1 - 1e-12) - 1e-15 <= rate <= PEAK for rate in rest)


@pytest.mark.parametrize("tied", [False, True])
def test_norms_are_not_decayed(tied: bool) -> None:
    config = tiny_config(model={"tie_embeddings": tied}, optimizer={"weight_decay": 0.3})
    model = ReferenceModel(config)
    names = {id(weight): name for name, weight in model.named_weights().items()}
    groups = parameter_groups(config, model.named_weights().items())
    assert [group["weight_decay"] for group in groups] == [0.3, 0.0]
    decayed, plain = ({names[id(weight)] for weight in group["params"]} for group in groups)
    assert plain == {name for name in names.values() if "norm" in name} and len(plain) == 17
    assert decayed == set(names.values()) - plain


def test_optimizer() -> None:
    config = tiny_config(optimizer={"lr": 0.5, "betas": [0.8, 0.7], "eps": 1e-6, "weight_decay": 0.1})
    matrix, vector = nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(2))
    optimizer = build_optimizer(config, [("trunk.0.a", matrix), ("trunk.0.b", vector)], CPU)
    for group in optimizer.param_groups:
        assert (group["lr"], tuple(group["betas"]), group["eps"]) == (0.5, (0.8, 0.7), 1e-6)
    matrix.grad, vector.grad = torch.zeros(2, 2), torch.zeros(2)
    optimizer.step()
    assert torch.allclose(matrix, torch.tensor(0.95)) and torch.equal(vector, torch.ones(2)), "decoupled decay"
    [group] = build_optimizer(config, [("trunk.0.b", vector)], CPU).param_groups
    assert len(group["params"]) == 1, "no empty group, at which some optimizers fail"


NEXT_TOKEN = {"trunk": 0.1, "embedding": 0.1, "final_norm": 0.1, "unembedding": 0.1, "heads.1": 0.1, "heads.2": 1}
SPECIFIC = {"embedding": 0.2, "head_1": 0.3, "unembedding": 0.4, "heads": 3}
REPEATED = {"kind": "sequential", "repeated": True, "token_order": 0.5}


@pytest.mark.parametrize(
    ("multipliers", "sections", "expected"),
    [
        ({}, {}, dict.fromkeys(NEXT_TOKEN, 1)),
        ({"trunk": 0.1}, {}, NEXT_TOKEN),
        ({"trunk": [[1, 0], [9, 0.1], [10, 1]], "heads": [[1, 1], [10, 0]]}, {}, NEXT_TOKEN),
        ({"heads": 3}, {}, {"trunk": 1, "heads.1": 1, "heads.2": 3, "heads.4": 3, "unembedding": 1}),
        (
            {"trunk": 0.1, **SPECIFIC},
            {},
            NEXT_TOKEN | {"embedding": 0.2, "heads.1": 0.3, "unembedding": 0.4, "heads.2": 3},
        ),
        (
            {"head_1": 0.3, "heads": 3},
            {"heads": {"unembedding": "separate"}},
            {"heads.1": 0.3, "unembeddings.1": 0.3, "unembeddings.2": 3, "final_norm": 1},
        ),
        ({"heads": 3}, {"heads": REPEATED}, {"heads.repeated": 3, "token_order": 3, "trunk": 1, "unembedding": 1}),
        ({"trunk": 0.1}, {"heads": {"condition": "previous_token"}}, {"heads.1": 0.1, "heads.2": 1, "condition": 1}),
        ({"heads": 3}, {"heads": {"count": 12}}, {"heads.1": 1, "heads.10": 3, "heads.11": 3, "heads.12": 3}),
    ],
)
def test_learning_rates_by_part(multipliers: Any, sections: Any, expected: dict[str, float]) -> None:
    config = tiny_config(optimizer={"lr": 0.5, "multipliers": multipliers}, **sections)
    model = ReferenceModel(config)
    optimizer = build_optimizer(config, model.named_weights().items(), CPU)
    set_learning_rate(optimizer, 0.25, 9)
    rates = {id(weight): group["lr"] for group in optimizer.param_groups for weight in group["params"]}
    for prefix, multiplier in expected.items():
        found = {rates[id(weight)] for name, weight in model.named_weights().items() if name.startswith(f"{prefix}.")}
        assert found == {0.25 * multiplier}, prefix
