"""Costs of the parts of a model, and their arrangements over ranks."""

import itertools
import time

import pytest

from mtp_dist.config.heads import KINDS
from mtp_dist.planner.balance import arrangements, optimum
from mtp_dist.planner.fit import fit
from mtp_dist.planner.flops import model_flops_per_token
from mtp_dist.planner.layouts import SCHEDULES
from mtp_dist.planner.partition import pipeline_stages
from mtp_dist.planner.parts import Parts, Passes, Stage
from mtp_dist.planner.stage_cost import part_flops
from tests.tiny import tiny_config


def parts(head, num_heads=4, embedding=0.0):
    return Parts(Passes(embedding, 0), Passes(1 / 3, 2 / 3), Passes(head, 0), Passes(head, 0), num_heads)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("train", [{}, {"freeze": ("trunk",)}, {"low_rank": {"rank": 3}}])
def test_parts_add_up_to_the_models_flops(kind, train):
    """The convention of the MFU counts the attention over all keys: 4 * D * S forward and 8 backward, not 2 and 5."""
    if train and kind == "anticausal":
        return  # whose head 1, which would be frozen, reads the trunk through the other heads
    config = tiny_config(model={"vocab_size": 128}, heads={"kind": kind}, train=train)
    costs, tokens, width = part_flops(config), 32, 32 * 16
    head_1_layers = config.heads.block_layers * config.heads.traits.first_head_has_block
    forward_only = 4 + head_1_layers if "freeze" in train else 0
    trained = 4 + head_1_layers + 3 * config.heads.block_layers - forward_only
    whole = tokens * (model_flops_per_token(config, 4) - width * (5 * trained + 2 * forward_only))
    assert 4 * costs.layer.total + costs.heads.total == whole
    assert (costs.input_grad > 0) == ("low_rank" in train), "nothing before the first layer is trained"
    alone = costs.stage(Stage(4, 4), is_first=True).total
    assert alone == whole - costs.input_grad
    assert costs.stage(Stage(4, 2), is_first=True).total == alone - 2 * costs.later_head.total
    assert costs.stage(Stage(4, 3), is_first=True, has_head_1=False).total == alone - costs.head_1.total


SPLIT_HEADS = [
    {"kind": "parallel", "stages": 3},
    {"kind": "mlp", "unembedding": "separate", "stages": 3},
    {"kind": "linear", "detach": "full", "stages": 3},
]
"""Heads whose first one costs more or less than the others."""


@pytest.mark.parametrize("train", [{}, {"low_rank": {"rank": 3}}, {"activation_checkpointing": "full"}])
@pytest.mark.parametrize("heads", [*({"kind": kind} for kind in KINDS), *SPLIT_HEADS], ids=str)
def test_split_and_estimate_cost_stages_alike(heads, train):
    if "low_rank" in train and (heads["kind"] == "anticausal" or "stages" in heads):
        return  # incompatible
    for tensor, schedule in itertools.product((1, 2), ["1f1b"] if "stages" in heads else SCHEDULES):
        parallel = {"pipeline": 4, "schedule": schedule, "tensor": tensor}
        train = train | {"global_batch_size": 16}
        config = tiny_config(model={"trunk_layers": 12}, heads=heads, train=train, parallel=parallel)
        split = pipeline_stages(config)
        costs = [(cost.forward_flops, cost.backward_flops) for cost in fit(config).costs]
        assert costs == part_flops(config).stages(split) and len(costs) == config.parallel.stages


def test_recomputation_costs_a_forward_pass():
    def costs(loss_mode="eager", **train):
        return part_flops(tiny_config(heads={"loss_mode": loss_mode}, train=train))

    plain, layer = costs(), costs().layer.forward
    forward, backward = costs("naive").heads
    assert 2 * forward < backward < 2.1 * forward, "five products of the attention for two"
    assert plain.heads == (forward + backward, 0), "eager runs backward in the forward pass"
    assert costs("recompute").heads == (forward, forward + backward)
    full, mlp = costs(activation_checkpointing="full"), 2 * 32 * 3 * 32 * 48
    assert full.layer == (layer, plain.layer.backward + layer) and full.heads.forward == plain.heads.forward + 4 * layer
    assert costs(activation_checkpointing="selective").layer == (layer, plain.layer.backward + mlp)
    frozen = costs(activation_checkpointing="full", freeze=("trunk",))
    assert frozen.layer == (layer, 0)
    assert frozen.heads.forward == costs(freeze=("trunk",)).heads.forward + 3 * layer, "head 1 runs forward only"


def test_stages_with_weighted_hidden_states_run_backward_twice():
    costs = part_flops(tiny_config(heads={"weighted_hidden_states": True}))
    once, layer = part_flops(tiny_config()), Stage(3)
    assert costs.stage(layer) == (once.stage(layer).forward, 2 * once.stage(layer).backward)
    assert costs.stage(Stage(3, 4)) == once.stage(Stage(3, 4)), "the last stage has one loss"
    assert part_flops(tiny_config(heads={"weighted_hidden_states": True, "detach": True})).backward_passes == 1


def every_distribution(layers, heads, ranks):
    """Yield the layers and heads of each rank in every way and any order."""
    for cuts in itertools.combinations_with_replacement(range(layers + 1), ranks - 1):
        for head_cuts in itertools.combinations_with_replacement(range(heads + 1), ranks - 1):
            yield [
                (after - before, k_after - k_before)
                for (before, after), (k_before, k_after) in zip(
                    itertools.pairwise((0, *cuts, layers)), itertools.pairwise((0, *head_cuts, heads)), strict=True
                )
            ]


def trunk_ends_at_the_heads(stages):
    first = next(index for index, (_, heads) in enumerate(stages) if heads)
    contiguous = all(heads for _, heads in stages[first:])
    return (
        contiguous
        and not any(layers for layers, _ in stages[first + 1 :])
        and all(layers or heads or index == 0 for index, (layers, heads) in enumerate(stages))
    )


@pytest.mark.parametrize(("head", "embedding"), [(0.4, 0.0), (1.6, 0.0), (3.3, 0.7), (7.0, 0.0)])
@pytest.mark.parametrize(("layers", "heads", "ranks"), [(7, 3, 3), (9, 2, 4), (3, 4, 2), (5, 3, 1)])
def test_arrangements_are_the_best_of_all(head, embedding, layers, heads, ranks):
    costs = parts(head, heads, embedding)

    def slowest(stages):
        return max(n + head * k + embedding * (rank == 0) for rank, (n, k) in enumerate(stages))

    mean = (layers + head * heads + embedding) / ranks
    everything = [*every_distribution(layers, heads, ranks)]
    found = {name: each.balance(costs) for name, each in arrangements(costs, layers, ranks).items()}
    in_order = [each for each in everything if trunk_ends_at_the_heads(each)]
    assert found["balanced, split heads"] == pytest.approx(mean / min(map(slowest, in_order)))
    at_the_end = [each for each in in_order if each[-1][1] == heads]
    assert found["balanced"] == pytest.approx(mean / min(map(slowest, at_the_end)))
    assert optimum(costs, layers, ranks) >= max(found.values()) - 1e-9
    if not embedding:  # else the rank with the embedding should not always have the most heads
        assert optimum(costs, layers, ranks) == pytest.approx(mean / min(map(slowest, everything)))


def test_many_heads_are_shared_in_seconds():
    started = time.process_time()
    assert optimum(parts(1.0, 64), 64, 16) == pytest.approx(1), "eight layers or heads on each rank"
    assert len(arrangements(parts(1.0, 64), 64, 16)) == 5
    assert time.process_time() - started < 5


def test_arrangements_hold_the_whole_model():
    for ranks, names in ((4, 5), (16, 4), (30, 2), (40, 0)):
        found = arrangements(parts(3.28), 28, ranks)
        assert len(found) == names, "empty stages are left out"
        for each in found.values():
            assert each.ranks == ranks and sum(stage.layers for stage in each.stages) == 28
            assert sum(stage.heads for stage in each.stages) == 4
            first = next(index for index, stage in enumerate(each.stages) if stage.heads)
            assert not any(stage.layers for stage in each.stages[first + 1 :]), "all heads read the trunk's output"
            assert all(sum(stage) for stage in each.stages[1:])
    by_rank = arrangements(parts(3.28), 28, 4)["dualpipev, split heads"].rank_costs(parts(3.28))
    assert by_rank == pytest.approx([10.28] * 4), "7 layers and one head each"
