"""Memory of the ranks of a pipeline, and what makes a run fit."""

import pytest

from mtp_dist.planner.fit import fit, in_flight_peaks, longest_sequence, pipeline_rank, remedies
from mtp_dist.planner.head_memory import head_loss_memory
from mtp_dist.planner.layouts import with_layout
from mtp_dist.planner.memory import rank_memory
from mtp_dist.planner.parts import Passes, Stage
from mtp_dist.planner.schedule import simulate
from tests.unit.planner.models import SHAPE_70B, on_ranks, unresolved

GB = 1e9


def needed(config):
    return fit(config).binding.memory.total


@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
@pytest.mark.parametrize("micro_batches", [1, 2, 5, 16, 40])
def test_1f1b_keeps_fewer_micro_batches_on_later_stages(ranks, micro_batches):
    for rank in range(ranks):
        assert in_flight_peaks("1f1b", rank, ranks, micro_batches) == [(min(ranks - rank, micro_batches), 0)]


@pytest.mark.parametrize("ranks", [2, 3, 5])
def test_dualpipev_keeps_as_many_as_its_timeline(ranks):
    timeline = simulate("dualpipev", [Passes(1, 2)] * (2 * ranks), 6 * ranks)
    for rank in range(ranks):
        peaks = in_flight_peaks("dualpipev", rank, ranks, 3 * ranks)
        assert max(map(sum, peaks)) == timeline.in_flight[rank] == 2 * ranks + 1
        assert sorted(peaks) == sorted(in_flight_peaks("dualpipev", rank, ranks, 6 * ranks))


def test_rank_has_the_memory_of_its_stage():
    config = on_ranks(unresolved(), 16, tensor=2, pipeline=4)
    split = (Stage(8), Stage(9), Stage(9), Stage(2, config.heads.count))
    ranks = [pipeline_rank(config, split, rank, "cuda") for rank in range(4)]
    assert [rank.in_flight for rank in ranks] == [4, 3, 2, 1]
    for stage, (layers, rank) in enumerate(zip((8, 9, 9, 2), ranks, strict=True)):
        assert rank.memory == rank_memory(config, stage, layers, 4 - stage) and rank.trunk_layers == (layers,)
    found = fit(config)
    assert found.binding.memory.total == max(rank.memory.total for rank in found.ranks)
    weights = [(rank.memory.parameters, rank.trunk_layers) for rank in found.ranks]
    assert [(found.alike(rank).memory.parameters, found.alike(rank).trunk_layers) for rank in range(4)] == weights


def test_ranks_with_heads_of_several_stages():
    """The middle one of three has two micro-batches in flight: `eager` keeps the gradients of both from forward to
    backward."""
    for mode, waiting in (("eager", 1), ("recompute", 0)):
        config = on_ranks(unresolved(heads={"loss_mode": mode}), 3, pipeline=3)
        config = config.model_copy(update={"heads": config.heads.model_copy(update={"stages": 2})})
        one_head = config.model_copy(update={"heads": config.heads.model_copy(update={"count": 1})})
        found = fit(config)
        assert [stage.heads for stage in found.stages] == [0, 1, 3]
        inner, alone = (
            rank_memory(config, 1, found.split[1], in_flight, heads=found.stages[1].heads) for in_flight in (2, 1)
        )
        assert found.ranks[1].memory == inner and inner.head_loss > 0 == found.ranks[0].memory.head_loss
        added = inner.total - alone.total - (inner.activations - alone.activations)
        assert added == waiting * head_loss_memory(one_head, "cuda").waiting


def test_dualpipev_rank_has_both_of_its_stages():
    config = on_ranks(unresolved(), 4, pipeline=2, schedule="dualpipev", partition=[9, 8, 8, 3])
    split = (Stage(9), Stage(8), Stage(8), Stage(3, config.heads.count))
    first, second = (pipeline_rank(config, split, rank, "cuda") for rank in range(2))
    assert first.trunk_layers == (9, 3) and second.trunk_layers == (8, 8)
    one, other = rank_memory(config, 0, 9, 1), rank_memory(config, 3, 3, 1)
    assert first.memory.optimizer == one.optimizer + other.optimizer
    assert first.memory.head_loss == other.head_loss > 0 == second.memory.head_loss
    # Rank 0 of two keeps up to five half stages, of which at most two are of the second phase.
    kept = [count * one.activations + more * other.activations for count, more in in_flight_peaks("dualpipev", 0, 2, 6)]
    assert first.memory.activations == max(kept)


@pytest.mark.parametrize("layout", [{"tensor": 8, "sequence": True}, {"pipeline": 4}])
def test_longest_sequence_fits_and_no_longer_one_does(layout):
    config = on_ranks(unresolved(activation_checkpointing="full"), 64, **layout)
    longest = longest_sequence(config, 80 * GB)
    assert longest % 128 == 0 and longest > 4096

    def at(tokens):
        return needed(with_layout(config, {"train.sequence_length": tokens}))

    assert at(longest) <= 80 * GB < at(longest + 128)
    assert longest_sequence(config, 1 * GB) == 0


def test_remedies_fit_and_milder_ones_do_not():
    config = on_ranks(unresolved(micro_batch_size=8), 16, pipeline=2)
    assert needed(config) > 80 * GB
    found = {next(iter(changes)): (changes, total) for changes, total in remedies(config, 80 * GB)}
    assert {"train.micro_batch_size", "train.activation_checkpointing", "parallel.tensor"} <= found.keys()
    for changes, total in found.values():
        assert needed(with_layout(config, changes)) == total <= 80 * GB
    tensor = [changes for changes, _ in remedies(config, 80 * GB, per_node=3) if "parallel.tensor" in changes]
    assert tensor == [], "no degree above 1 divides a node of three ranks"
    size = found["train.micro_batch_size"][0]["train.micro_batch_size"]
    assert 1 <= size < 8 and needed(with_layout(config, {"train.micro_batch_size": 2 * size})) > 80 * GB


def test_remedies_are_combined_if_none_suffices_alone():
    config = on_ranks(unresolved(model=SHAPE_70B, micro_batch_size=8), 32, tensor=2)
    found = remedies(config, 80 * GB)
    assert found
    for changes, total in found:
        assert changes["train.activation_checkpointing"] == "full" and changes["train.micro_batch_size"] == 1
        assert {"parallel.tensor", "parallel.pipeline"} & changes.keys()
        assert needed(with_layout(config, changes)) == total <= 80 * GB
    assert remedies(on_ranks(unresolved(model=SHAPE_70B), 1), 80 * GB) == [], "one rank cannot hold it"


def test_another_split_can_fit():
    """The first stages keep the activations of more micro-batches than the last ones."""
    config = on_ranks(unresolved(micro_batch_size=2), 16, pipeline=4, tensor=1)
    limit = needed(config) - 1
    [split] = [
        changes["parallel.partition"] for changes, _ in remedies(config, limit) if "parallel.partition" in changes
    ]
    assert sum(split) == 28 and split != fit(config).split
    assert needed(on_ranks(config, 16, partition=list(split))) <= limit
