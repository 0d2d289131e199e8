"""Costs of the parts of a model, and their arrangements over ranks."""

import itertools
import time

import pytest

from mtp_dist.planner.balance import arrangements, optimum
from mtp_dist.planner.flops import model_flops_per_token
from mtp_dist.planner.parts import Parts, Passes, Stage, part_flops
from tests.tiny import tiny_config


def parts(head, num_heads=4, embedding=0.0):
    return Parts(Passes(embedding, 0), Passes(1 / 3, 2 / 3), Passes(head * num_heads, 0), num_heads)


@pytest.mark.parametrize("kind", ["parallel", "linear", "sequential"])
@pytest.mark.parametrize("train", [{}, {"freeze": ("trunk",)}, {"low_rank": {"rank": 3}}])
def test_parts_add_up_to_the_models_flops(kind, train):
    config = tiny_config(heads={"kind": kind}, train=train)
    costs = part_flops(config)
    whole = 4 * costs.layer.total + costs.heads.total
    assert whole == model_flops_per_token(config, 4)
    assert costs.stage(Stage(4, 2), is_first=True).total == whole - costs.heads.total / 2
    if "low_rank" not in train:
        assert costs.layer.backward == (0 if train else 2 * costs.layer.forward)


def test_recomputation_costs_a_forward_pass():
    def costs(loss_mode="eager", **train):
        return part_flops(tiny_config(heads={"loss_mode": loss_mode}, train=train))

    plain, layer = costs(), costs().layer.forward
    heads = plain.heads.forward / 3
    assert plain.heads == (3 * heads, 0), "eager runs backward in the forward pass"
    assert costs("recompute").heads == pytest.approx((heads, 3 * heads))
    assert costs("naive").heads == pytest.approx((heads, 2 * heads))
    full, mlp = costs(activation_checkpointing="full"), 2 * 3 * 32 * 48
    assert full.layer == (layer, 3 * layer) and full.heads.forward == 3 * heads + 4 * layer
    assert costs(activation_checkpointing="selective").layer == (layer, 2 * layer + mlp)
    frozen = costs(activation_checkpointing="full", freeze=("trunk",))
    assert frozen.layer == (layer, 0)
    assert frozen.heads.forward == costs(freeze=("trunk",)).heads.forward + 3 * layer, "head 1 runs forward only"


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
