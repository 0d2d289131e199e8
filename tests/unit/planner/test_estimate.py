"""Time of a training step: sums, bounds, units."""

from dataclasses import replace

import pytest

from mtp_dist.planner.devices import LAYER_FRACTION
from mtp_dist.planner.estimate import estimate, time_by_part, timeline
from mtp_dist.planner.fit import fit
from mtp_dist.planner.flops import model_flops_per_token
from mtp_dist.planner.layouts import SCHEDULES
from mtp_dist.planner.stage_cost import stage_cost
from mtp_dist.planner.stage_times import axis_rates
from tests.unit.planner.models import cluster, on_ranks, unresolved

LAYOUTS = [
    (1, {}),
    (64, {"tensor": 2, "pipeline": 4}),
    (64, {"tensor": 8, "sequence": True, "pipeline": 2}),
    (32, {"pipeline": 8}),
]


def step(config, **rates):
    return estimate(fit(config), cluster(**rates))


def test_one_rank_computes_all_flops():
    """Without a network and a pipeline, and with free memory traffic, only FLOPs take time."""
    config = on_ranks(unresolved(heads={"loss_mode": "naive"}), 1)
    found = step(config, memory=1e30)
    cost = stage_cost(config, 0, 28)
    seconds = 1024 * (cost.forward_flops + cost.backward_flops) / (0.7 * 989e12 * LAYER_FRACTION)
    assert found.pipeline == pytest.approx(seconds) and found.balance == 1
    assert found.mfu == pytest.approx(1024 * 4096 * model_flops_per_token(config, 4) / found.seconds / 989e12)
    assert found.tokens_per_second == pytest.approx(1024 * 4096 / found.seconds)


@pytest.mark.parametrize(("ranks", "layout"), LAYOUTS)
@pytest.mark.parametrize("checkpointing", ["none", "full"])
def test_parts_add_up(ranks, layout, checkpointing):
    found = step(on_ranks(unresolved(activation_checkpointing=checkpointing), ranks, **layout))
    parts = time_by_part(found)
    assert sum(parts.values()) == pytest.approx(found.seconds)
    assert min(parts.values()) > -1e-9 * found.seconds
    assert (parts["recomputation"] > 0) == (checkpointing == "full")
    assert (parts["tensor-parallel communication"] > 0) == (layout.get("tensor", 1) > 1)
    assert (parts["transfers between stages"] > 0) == (parts["pipeline bubble"] > 1e-6) == ("pipeline" in layout)
    assert parts["heads and their loss"] / parts["trunk layers"] == pytest.approx(4 * 1.56 / 28, rel=0.1)
    if checkpointing == "full":
        assert 0.25 < parts["recomputation"] / (parts["trunk layers"] + parts["heads and their loss"]) < 0.4


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_repeated_micro_batches_are_extrapolated(schedule):
    found = step(on_ranks(unresolved(batch=256), 4, pipeline=4, schedule=schedule))
    simulated = timeline(found, 256)
    assert found.pipeline == pytest.approx(simulated.seconds, rel=1e-3)
    bound = estimate(found.fit, found.cluster, simulated=False)
    assert 0.8 * found.pipeline < bound.pipeline < (1 if schedule == "1f1b" else 1.01) * found.pipeline


def test_links_of_the_axes():
    """Eight GPUs share a node: tensor-parallel ranks first, then data-parallel ones, then the stages."""
    nodes = cluster()
    link, network = nodes.rates.link, nodes.rates.network
    for ranks, layout, expected in (
        (8, {"tensor": 2, "pipeline": 2}, (link, link, link)),
        (16, {"tensor": 2, "pipeline": 2}, (link, network, link)),
        (64, {"tensor": 8}, (link, network, network)),
        (64, {"tensor": 4}, (link, network, 2 * network)),
        (64, {}, (link, network, 8 * network)),
        (64, {"tensor": 16}, (network, network, network)),
        (12, {"tensor": 4, "pipeline": 3}, (link, network, link)),
        (24, {"pipeline": 8}, (link, network, min(link, 8 * network))),
    ):
        assert axis_rates(on_ranks(unresolved(batch=1536), ranks, **layout), nodes) == pytest.approx(expected), (
            ranks,
            layout,
        )


def test_faster_hardware_is_faster():
    config = on_ranks(unresolved(), 64, tensor=2, pipeline=4)
    slow = step(config)
    rates = {name: 2 * rate for name, rate in slow.cluster.rates.__dict__.items()}
    assert step(config, **rates).seconds == pytest.approx(slow.seconds / 2)
    for name in rates:
        assert step(config, **{name: rates[name]}).seconds < slow.seconds, name
    assert replace(slow, update=slow.update + 1).seconds == pytest.approx(slow.seconds + 1)
