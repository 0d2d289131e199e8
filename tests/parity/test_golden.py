"""Short trainings learn what they learned when `golden.json` was written."""

import json
import math
from collections.abc import Iterator
from typing import Any

import pytest

from tests.parity.golden import BOUNDS, CONFIGS, FILE, golden_run
from tests.ranks import Ranks


def numbers(values: Any) -> Iterator[float]:
    if isinstance(values, float):
        yield values
    for value in values if isinstance(values, list) else ():
        yield from numbers(value)


@pytest.mark.parametrize("name", CONFIGS)
def test_losses_are_those_that_are_written_down(ranks: Ranks, name: str) -> None:
    golden, [found] = json.loads(FILE.read_text())[name], ranks.run(1, golden_run, CONFIGS[name])
    bound = BOUNDS[CONFIGS[name].train.precision]
    for quantity in ("losses", "grad_norms"):
        pairs = list(zip(numbers(found[quantity]), numbers(golden[quantity]), strict=True))
        assert len(pairs) >= 4
        differing = [pair for pair in pairs if not math.isclose(*pair, rel_tol=bound)]
        assert not differing, quantity
