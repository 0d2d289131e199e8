"""The sharded model starts from the same weights at every layout, and a head without targets does no harm."""

import pytest
import torch

from mtp_dist.model.parameters import initial_weight, parameter_shapes
from tests.ranks import Ranks
from tests.tiny import tiny_config
from tests.unit.engine.on_ranks import SILENT_HEAD, initial_weights, train_with_a_silent_head


@pytest.mark.parametrize(
    ("tensor", "pipeline", "data", "tied", "precision", "zero_stage"),
    [
        *(
            (*layout, tied, "fp32", 0)
            for layout in [(1, 1, 1), (4, 1, 1), (2, 2, 1), (1, 4, 1), (1, 2, 2)]
            for tied in (False, True)
        ),
        (1, 2, 2, True, "fp32", 1),
        *(
            pytest.param(*layout, tied, "bf16", 0)
            for layout, tied in [((1, 1, 1), False), ((2, 2, 1), True), ((1, 1, 4), True), ((1, 2, 2), True)]
        ),
    ],
)
def test_initial_weights(
    ranks: Ranks, tensor: int, pipeline: int, data: int, tied: bool, precision: str, zero_stage: int
) -> None:
    """They are the same fp32 numbers in every precision."""
    config = tiny_config(
        parallel={"tensor": tensor, "pipeline": pipeline, "sequence": tensor > 1, "zero_stage": zero_stage},
        model={"tie_embeddings": tied, "num_query_groups": 4},
        train={"precision": precision},
    )
    by_rank = ranks.run(tensor * pipeline * data, initial_weights, config)
    shapes = parameter_shapes(config)
    expected = {name: initial_weight(config, name, shape) for name, shape in shapes.items()}
    replicas = tensor * data
    stages = [by_rank[first : first + replicas] for first in range(0, len(by_rank), replicas)]
    assert sorted(name for stage in stages for name in stage[0]) == sorted(shapes), "each weight on exactly one stage"
    for stage in stages:
        for rank in stage:
            assert rank.keys() == stage[0].keys()
            for name, weight in rank.items():
                assert torch.equal(weight, expected[name]), name


@pytest.mark.parametrize(
    ("tensor", "pipeline", "data", "precision"), [(1, 1, 1, "fp32"), (2, 2, 1, "fp32"), (1, 2, 2, "bf16")]
)
def test_head_without_a_valid_target(ranks: Ranks, tensor: int, pipeline: int, data: int, precision: str) -> None:
    config = tiny_config(
        parallel={"tensor": tensor, "pipeline": pipeline},
        train={"precision": precision, "micro_batch_size": 2},
        heads={"count": 3},
    )
    by_rank = ranks.run(tensor * pipeline * data, train_with_a_silent_head, config)
    for metrics, norms, weights in by_rank:
        for heads in metrics:
            assert heads.losses[SILENT_HEAD - 1] is heads.accuracies[SILENT_HEAD - 1] is None
            assert heads.distillation == () and heads.token_order is None, "not configured"
            assert all(0 < heads.losses[head] < 10 for head in (0, 2))
        assert all(0 < norm < float("inf") for norm in norms)
        totals = [heads.total for heads in metrics]
        assert totals == sorted(totals, reverse=True), "the others learn"
        assert all(weight.isfinite().all() for weight in weights.values())
        for name, weight in weights.items():
            if name.startswith(f"heads.{SILENT_HEAD}."):
                start = initial_weight(config, name, weight.shape)
                # Without a gradient AdamW only decays.
                decay = 1.0 if weight.ndim == 1 else (1 - 1e-3 * config.optimizer.weight_decay) ** 3
                torch.testing.assert_close(weight, start * decay, rtol=1e-5 if precision == "fp32" else 1e-2, atol=1e-7)
