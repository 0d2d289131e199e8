"""Trunk layers of each pipeline stage."""

import itertools
import random
import time
from functools import partial

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mtp_dist.config import DeviceMemory, with_device_memory
from mtp_dist.config.low_rank import LowRankConfig
from mtp_dist.planner.flops import parameter_counts
from mtp_dist.planner.memory import rank_memory
from mtp_dist.planner.partition import (
    fewest_layers,
    head_numbers,
    pipeline_stages,
    rank_bytes,
    split_dual_pipe_v,
    split_layers,
    trunk_layers_per_stage,
)
from mtp_dist.planner.parts import Parts, Passes, Stage
from mtp_dist.planner.weights import stage_weights
from tests.tiny import tiny_config


def config_of(layers, stages, heads=4, depth=1, partition="balanced", vocab_size=131, schedule="1f1b"):
    model = {"trunk_layers": layers, "vocab_size": vocab_size}
    parallel = {"pipeline": stages, "partition": partition, "schedule": schedule}
    train = {"micro_batch_size": 1}
    return tiny_config(model=model, parallel=parallel, heads={"count": heads, "layers_per_head": depth}, train=train)


def partitions(layers, stages):
    """Yield every partition that gives each stage between the first and the last at least one layer."""
    for cuts in itertools.combinations(range(layers + 1), stages - 1):
        yield tuple(after - before for before, after in itertools.pairwise((0, *cuts, layers)))


def parts(embedding, layer, heads):
    """Return costs, a third of which is in the forward pass, for four equal heads."""
    costs = (embedding, layer, heads / 4, heads / 4)
    return Parts(*(Passes(cost / 3, cost * 2 / 3) for cost in costs), num_heads=4)


def random_case(seed):
    """Return layers, stages, and the costs and the largest number of layers of each stage."""
    rng = random.Random(seed)
    layers, stages = rng.randint(1, 10), rng.randint(1, 5)
    steps = [[rng.choice([0, 1, 1, 2, rng.random()]) for _ in range(layers)] for _ in range(stages)]
    costs = [list(itertools.accumulate(row, initial=rng.choice([0, 3 * rng.random()]))) for row in steps]
    most = [rng.choice([layers, rng.randint(0, layers)]) for _ in range(stages)]
    return layers, stages, costs, most


def cost_of(costs, stage, layers):
    return costs[stage][layers]


def fits(most, stage, layers):
    return layers <= most[stage]


def test_split_is_the_best_of_all():
    infeasible = 0
    for seed in range(1000):
        layers, stages, costs, most = random_case(seed)
        split = split_layers(layers, fewest_layers(stages), partial(cost_of, costs), partial(fits, most))
        allowed = [each for each in partitions(layers, stages) if all(map(int.__le__, each, most))]
        assert (split is None) == (not allowed), seed
        if split is None:
            infeasible += 1
            continue
        assert split in allowed, seed
        slowest = {each: max(row[n] for row, n in zip(costs, each, strict=True)) for each in allowed}
        assert slowest[split] == min(slowest.values()), seed
    assert 100 < infeasible < 500


@given(layers=st.integers(1, 9), stages=st.integers(1, 5), heads=st.floats(0.1, 20), embedding=st.floats(0, 3))
def test_layers_without_a_stage_of_their_own_go_to_later_stages(layers, stages, heads, embedding):
    if layers < stages - 2:
        return
    split = trunk_layers_per_stage(config_of(layers, stages), parts(embedding, 1, heads))
    middle = list(split[1:-1])
    assert middle == sorted(middle) and (not middle or middle[-1] - middle[0] <= 1)

    # Not only the slowest stage: of equal choices the second slowest one is as fast as possible, and so on.
    def times(each):
        costs = [*each]
        costs[0] += embedding
        costs[-1] += heads
        return sorted(costs, reverse=True)

    assert times(split) == pytest.approx(min(map(times, partitions(layers, stages))))


def test_a_thousand_layers_on_64_stages_take_a_moment():
    started = time.process_time()
    split = trunk_layers_per_stage(config_of(1000, 64, vocab_size=300_000))
    assert time.process_time() - started < 0.1
    assert sum(split) == 1000 and max(split[:-1]) - min(split[:-1]) <= 1


@pytest.mark.parametrize("heads_cost", [0.4, 2.96, 30])
def test_ranks_of_dualpipev_are_as_fast_as_any(heads_cost):
    for ranks, layers in itertools.product((2, 3, 4), range(6, 12)):
        config = config_of(layers, ranks, schedule="dualpipev")
        stages = trunk_layers_per_stage(config, parts(0, 1, heads_cost))
        assert len(stages) == 2 * ranks and sum(stages) == layers and 0 not in stages[1:-1]
        chosen = [sum(stages[stage] for stage in config.parallel.rank_stages(rank)) for rank in range(ranks)]
        every = (each for each in itertools.product(range(layers + 1), repeat=ranks) if sum(each) == layers)
        allowed = [each for each in every if min(each[1:]) >= 2]
        assert max(chosen[0] + heads_cost, *chosen[1:]) == min(max(n + heads_cost, *rest) for n, *rest in allowed)


def test_rank_with_the_first_and_the_last_stage_has_one_embedding():
    for tied in (True, False):
        heads, parallel = {"kind": "sequential"}, {"pipeline": 2, "schedule": "dualpipev"}
        config = tiny_config(model={"tie_embeddings": tied, "vocab_size": 128}, heads=heads, parallel=parallel)
        stages = enumerate(trunk_layers_per_stage(config))
        elements = sum(weight.elements for stage in stages for weight in stage_weights(config, *stage))
        assert elements == parameter_counts(config).total


def test_by_hand():
    for layers, stages, partition, expected in (
        (12, 4, "uniform", (3, 3, 3, 3)),
        (5, 1, "uniform", (5,)),
        (12, 4, [6, 1, 5, 0], (6, 1, 5, 0)),
        (5, 1, [5], (5,)),
        (5, 1, "balanced", (5,)),
        (4, 4, "balanced", (1, 1, 2, 0)),
        (4, 6, "balanced", (0, 1, 1, 1, 1, 0)),
        # 192 padded rows of 32 numbers are 6144 products, a layer's matrices 7680. Forward and backward they count six
        # times, the attention's 512 of 16 positions and the causal half seven times: two heads cost 3.48 layers.
        (12, 2, "balanced", (8, 4)),
        (12, 2, "measured", (8, 4)),
    ):
        assert trunk_layers_per_stage(config_of(layers, stages, 2, 1, partition)) == expected, (layers, partition)
    for layers, ranks, partition, expected in (
        (12, 3, "uniform", (2, 2, 2, 2, 2, 2)),
        (4, 2, [0, 1, 3, 0], (0, 1, 3, 0)),
        (12, 2, "balanced", (4, 4, 4, 0)),
        (12, 2, "measured", (4, 4, 4, 0)),
    ):
        config = config_of(layers, ranks, 2, 1, partition, schedule="dualpipev")
        assert trunk_layers_per_stage(config) == expected, (layers, partition)
    config = config_of(12, 2, 2)
    for key, value, expected in (
        # The trunk's layers run forward only: the heads cost 6.28 of them.
        ("freeze", ("trunk",), (9, 3)),
        ("activation_checkpointing", "full", (8, 4)),
        ("low_rank", LowRankConfig(rank=1), (8, 4)),
    ):
        train = config.train.model_copy(update={key: value})
        assert trunk_layers_per_stage(config.model_copy(update={"train": train})) == expected, value
    # Adapters have a frozen embedding before them: on a stage of its own nothing would be trained.
    adapted = config_of(3, 4, 2).model_copy(update={"train": train})
    assert trunk_layers_per_stage(adapted) == (1, 1, 1, 0)


def heads_and_layers(layers, stages, holders, heads):
    """Yield the parts of the stages in every way with heads on so many last stages, of which the first has any number
    and the others equal ones."""
    for first in range(1, heads + 1 - (holders - 1)) if holders > 1 else [heads]:
        share, odd = divmod(heads - first, max(1, holders - 1))
        behind = [(0, share + (index < odd)) for index in range(holders - 1)]
        for split in partitions(layers, stages - holders + 1):
            yield [*((n, 0) for n in split[:-1]), (split[-1], first), *behind]


@pytest.mark.parametrize("heads_cost", [1.5, 6, 30])
@pytest.mark.parametrize("holders", [2, 3])
def test_heads_of_several_stages_are_split_as_well_as_possible(heads_cost, holders):
    for stages, layers in itertools.product((3, 4, 5), (3, 4, 9)):
        config = config_of(layers, stages)
        config = config.model_copy(update={"heads": config.heads.model_copy(update={"stages": holders})})

        def slowest(split):
            return max(n + heads_cost * k / 4 + 0.5 * (index == 0) for index, (n, k) in enumerate(split))

        found = pipeline_stages(config, parts(0.5, 1, heads_cost))
        every = [*heads_and_layers(layers, stages, holders, 4)]
        assert [*map(tuple, found)] in every
        assert slowest(found) == min(map(slowest, every)), (stages, layers)
        numbers = head_numbers(found)
        assert [head for each in numbers for head in each] == [1, 2, 3, 4]
        assert [index for index, each in enumerate(numbers) if each] == [*range(stages - holders, stages)]


def test_heads_of_several_stages_with_given_layers_and_memory():
    model = {"trunk_layers": 6, "vocab_size": 128}
    config = tiny_config(model=model, parallel={"pipeline": 4, "partition": "uniform"}, heads={"stages": 3})
    assert [*map(tuple, pipeline_stages(config, parts(0, 1, 4)))] == [(3, 0), (3, 1), (0, 2), (0, 1)]
    given = config.model_copy(update={"parallel": config.parallel.model_copy(update={"partition": (6, 0, 0, 0)})})
    assert [*map(tuple, pipeline_stages(given, parts(0, 1, 4)))] == [(6, 0), (0, 1), (0, 2), (0, 1)]
    free = config.model_copy(update={"parallel": config.parallel.model_copy(update={"partition": "balanced"})})
    assert [*map(tuple, pipeline_stages(free, parts(0, 1, 40)))] == [(6, 0), (0, 1), (0, 2), (0, 1)]
    for kind, unembedding in (("mlp", "separate"), ("parallel", "shared"), ("linear", "shared")):
        heads = free.heads.model_copy(update={"kind": kind, "unembedding": unembedding})
        config = free.model_copy(update={"heads": heads})
        stages = enumerate(pipeline_stages(config))
        weights = [weight for stage, parts in stages for weight in stage_weights(config, stage, *parts)]
        norm, shared = config.model.hidden_size, config.padded_vocab_size * config.model.hidden_size
        copies = 2 * (norm + (unembedding == "shared") * shared)
        assert sum(weight.elements for weight in weights) == parameter_counts(config).total + copies
        assert len([w for w in weights if w.part == "head_1"]) == {"mlp": 1, "parallel": 6, "linear": 1}[kind]


def test_two_stages_per_rank_by_hand():
    def split(layers, heads, heads_cost=2.96):
        return split_dual_pipe_v(parts(0, 1, heads_cost), layers, heads, lambda rank, stages: True)

    assert split(2, [4, 0]) == (0, 1, 1, 0) and split(1, [4, 0]) is None
    assert split(12, [4, 0]) == (4, 3, 4, 1), "ranks 7.96 and 7, stages 4 and 3.96"
    assert split(19, [4, 0, 0], 3.09) == (4, 3, 4, 4, 4, 0), "ranks 7.09, 7 and 8"
    # Heads of 1 on three ranks: no layer is behind the heads of stage 4.
    assert split(12, [2, 1, 1, 0], 4) == (2, 3, 2, 2, 2, 1, 0, 0)


def test_memory_bounds_the_split():
    config = config_of(12, 3, 2)
    free = trunk_layers_per_stage(config)
    needed = [rank_memory(config, stage, layers, 3 - stage).total for stage, layers in enumerate(free)]
    assert needed[0] == max(needed), "the first stage has the most micro-batches in flight"
    total = rank_bytes(config, "cuda")
    assert [total(stage, [Stage(layers, 2 * (stage == 2))]) for stage, layers in enumerate(free)] == needed
    for memory, expected in ((needed[0] / 0.9, free), (needed[0] / 0.9 - 1, (free[0] - 1, 6, 2)), (1000, free)):
        assert trunk_layers_per_stage(with_device_memory(config, DeviceMemory("cuda", memory))) == expected, memory


def test_measured_times_decide():
    config = config_of(12, 3, 2, partition="measured")
    assert trunk_layers_per_stage(config, parts(0, 1, 3)) == (5, 5, 2)
    assert trunk_layers_per_stage(config, parts(2, 1, 3)) == (3, 6, 3)
    assert trunk_layers_per_stage(config, parts(20, 1, 3)) == (0, 7, 5)
