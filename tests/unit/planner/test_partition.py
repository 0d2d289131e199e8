"""Trunk layers of each pipeline stage."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mtp_dist.planner.partition import trunk_layers_per_stage
from tests.tiny import tiny_config


def config_of(layers, stages, heads=4, depth=1, partition="balanced", vocab_size=131):
    model, parallel = {"trunk_layers": layers, "vocab_size": vocab_size}, {"pipeline": stages, "partition": partition}
    return tiny_config(model=model, parallel=parallel, heads={"count": heads, "layers_per_head": depth})


def compositions(layers, stages):
    """Yield every partition that gives each stage except the last at least one layer."""
    for others in itertools.product(range(1, layers + 1), repeat=stages - 1):
        if sum(others) <= layers:
            yield (*others, layers - sum(others))


def heads_cost(config):
    """Return the cost in trunk layers, from the matrices: D = 32, 4 attention heads in 2 groups, F = 48."""
    layer = 32 * 32 + 2 * 32 * 16 + 32 * 32 + 3 * 32 * 48
    return config.heads.count * (config.heads.layers_per_head * layer + config.vocab_size * 32) / layer


def slowest(layers, last_cost):
    return max(*layers[:-1], layers[-1] + last_cost)


@given(st.integers(2, 9), st.integers(2, 4), st.integers(1, 3), st.integers(1, 2), st.sampled_from([1, 131, 600, 5000]))
def test_balanced_is_as_fast_as_any(layers, stages, heads, depth, vocab_size):
    stages = min(stages, layers)
    config = config_of(layers, stages, heads, depth, vocab_size=vocab_size)
    chosen, cost = trunk_layers_per_stage(config), heads_cost(config)
    times = {partition: slowest(partition, cost) for partition in compositions(layers, stages)}
    best = min(times.values())
    assert times[chosen] == pytest.approx(best, rel=1e-12)
    fullest = max(partition[-1] for partition, time in times.items() if time <= best + 1e-9)
    assert chosen[-1] == fullest, "of equal choices the fullest last stage"
    assert max(chosen[:-1]) - min(chosen[:-1]) <= 1 and list(chosen[:-1]) == sorted(chosen[:-1])


@given(layers=st.integers(1, 120), stages=st.integers(1, 32), vocab_size=st.integers(1, 300_000))
def test_sum_length_and_minimum(layers, stages, vocab_size):
    stages = min(stages, layers)
    chosen = trunk_layers_per_stage(config_of(layers, stages, vocab_size=vocab_size))
    assert len(chosen) == stages and sum(chosen) == layers
    assert all(layers >= 1 for layers in chosen[:-1]) and chosen[-1] >= 0


def test_by_hand():
    for layers, stages, partition, expected in (
        (12, 4, "uniform", (3, 3, 3, 3)),
        (5, 1, "uniform", (5,)),
        (12, 4, [6, 1, 5, 0], (6, 1, 5, 0)),
        (5, 1, [5], (5,)),
        (5, 1, "balanced", (5,)),
        (4, 4, "balanced", (1, 1, 2, 0)),
        # 131 tokens of 32 numbers are 0.545 of a layer's 7680: two heads cost 3.09 layers.
        (12, 2, "balanced", (8, 4)),
    ):
        assert trunk_layers_per_stage(config_of(layers, stages, 2, 1, partition)) == expected, (layers, partition)
    config = config_of(12, 2, 2)
    train = config.train.model_copy(update={"freeze": ("trunk",)})
    # Forward passes of a layer and two unembeddings, then twice a layer and one unembedding: 5.63 forward passes.
    assert trunk_layers_per_stage(config.model_copy(update={"train": train})) == (9, 3)
