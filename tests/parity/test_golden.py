"""Short trainings have the losses of `golden.json`."""

import json

import pytest
import torch

from tests.parity.golden import BOUNDS, CONFIGS, FILE, golden_run
from tests.ranks import Ranks


@pytest.mark.parametrize("name", CONFIGS)
def test_losses_equal_golden_losses(ranks: Ranks, name: str) -> None:
    golden, [found] = json.loads(FILE.read_text())[name], ranks.run(1, golden_run, CONFIGS[name])
    assert found.keys() == golden.keys() == {"losses", "grad_norms"}
    for quantity, values in golden.items():
        expected = torch.tensor(values, dtype=torch.float64)
        assert len(expected) >= 4
        computed = torch.tensor(found[quantity], dtype=torch.float64)
        torch.testing.assert_close(computed, expected, rtol=BOUNDS[CONFIGS[name].train.precision], atol=0)
