"""Memory and FLOPs of a stage, compared with what real engines allocate and compute."""

import pytest

from mtp_dist.bench.plan import case_config, measure_case
from mtp_dist.bench.plan_cases import CASES
from mtp_dist.distributed.device import select_device
from mtp_dist.planner.stage_cost import stage_cost
from tests.tiny import tiny_config

MEASURED = {
    1: ["parallel", "sequential", "selective checkpointing", "naive, fp32", "low-rank adapters", "frozen trunk"],
    2: ["tensor 2, sequence", "data 2, ZeRO 1, fp32", "pipeline 2, tied, fp32", "pipeline 2, full checkpointing"],
}


def measure(names):
    """Return the rows of some cases, on a rank."""
    from mtp_dist.distributed.topology import close_axes, initialize_topology

    rows = []
    for name in names:
        config = case_config(name)
        rows += measure_case(name, config, initialize_topology(config, select_device(config)))
        close_axes()
    return rows


@pytest.mark.parametrize("world_size", MEASURED)
def test_predictions_equal_measurements(ranks, world_size):
    assert all(CASES[name][0] == world_size for name in MEASURED[world_size])
    rows = ranks.run(world_size, measure, MEASURED[world_size])[0]
    for row in rows:
        where = row["case"], row["stage"], row["predicted"], row["measured"]
        assert row["error"] < 0.1, where
        for exact in ("parameters", "gradients", "accumulators", "optimizer"):
            assert row["predicted"][exact] == pytest.approx(row["measured"][exact], rel=0.005), (exact, where)
        assert row["predicted_flops"] == pytest.approx(row["measured_flops"], rel=0.02), where


def test_stages_and_ranks_share_the_work():
    """The heads' loss and the layers are divided over the tensor-parallel ranks, and the layers over the stages."""

    def flops(tensor, stages, layers):
        config = tiny_config(parallel={"tensor": tensor, "pipeline": len(layers)}, model={"vocab_size": 128})
        costs = [stage_cost(config, stage, layers[stage]) for stage in range(stages)]
        return sum(cost.forward_flops + cost.backward_flops for cost in costs)

    assert flops(2, 1, [4]) == flops(1, 1, [4]) / 2
    assert flops(1, 2, [3, 1]) == flops(1, 1, [4])
