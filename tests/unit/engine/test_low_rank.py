"""With low-rank adapters only these and later heads are trained: frozen weights have no gradient or optimizer state."""

from typing import Any, cast

import pytest

from mtp_dist.errors import ConfigError
from mtp_dist.model.parameters import is_trained, parameter_shapes
from mtp_dist.run import _build_engine
from tests.parity.comparison import parse_case
from tests.ranks import Ranks
from tests.tiny import tiny_config
from tests.unit.engine.test_frozen_trunk import observe


def test_only_adapters_and_later_heads_are_trained(ranks: Ranks) -> None:
    layout, config = parse_case("tp2-pp2-dp1-sp train.precision=bf16 train.low_rank={}")
    by_rank = ranks.run(layout.world_size, observe, config)
    changed = {name: was for seen in by_rank for name, was in seen.changed.items()}
    assert changed == {name: is_trained(config, name) for name in parameter_shapes(config)}
    trained = {name for name, was in changed.items() if was}
    assert {name.rsplit(".", 2)[1] for name in trained if name.startswith(("trunk.", "heads.1."))} == {
        "lora_A",
        "lora_B",
    }
    assert sum(name.startswith("heads.1.") for name in trained) == 2 * 4, "head 1 is adapted like the trunk"
    for seen in by_rank:
        assert seen.gradients <= trained and seen.backward_passes == 3 * config.micro_batches
        # Master weight, gradient and two moments, with some elements of padding.
        assert 0 <= seen.state_bytes - 16 * seen.trained <= 16 * 8


def test_random_weights_are_not_adapted() -> None:
    with pytest.raises(ConfigError, match=r"^train\.low_rank would freeze random weights: name a trained model"):
        _build_engine(tiny_config(train={"low_rank": {}}), cast(Any, None), None, None)
