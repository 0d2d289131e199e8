"""Memory of the ranks of a pipeline, and what makes a run fit."""

import pytest

from mtp_dist.config import DeviceMemory, with_device_memory
from mtp_dist.planner.fit import fit, longest_sequence, pipeline_rank, remedies
from mtp_dist.planner.head_memory import head_loss_memory
from mtp_dist.planner.layouts import with_layout
from mtp_dist.planner.memory import rank_memory
from mtp_dist.planner.parts import Stage
from mtp_dist.planner.schedule import in_flight_peaks
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
def test_dualpipev_keeps_one_micro_batch_more_than_it_has_stages(ranks):
    for rank in range(ranks):
        peaks = in_flight_peaks("dualpipev", rank, ranks, 3 * ranks)
        assert max(map(sum, peaks)) == 2 * ranks + 1
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
    same = [found.rank_with_weights_of(rank) for rank in range(4)]
    weights = [(rank.memory.parameters, rank.trunk_layers) for rank in found.ranks]
    assert [(rank.memory.parameters, rank.trunk_layers) for rank in same] == weights


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
    # Rank 0 of two keeps up to four micro-batches of its first stage and one of the second.
    assert first.memory.activations == 4 * one.activations + other.activations


def test_dualpipev_rank_has_one_optimizer():
    """DeepSpeed reduces and updates the weights of both of its stages together."""
    fp32 = on_ranks(unresolved(precision="fp32"), 4, pipeline=2, schedule="dualpipev", zero_stage=1)
    split = (Stage(12), Stage(2), Stage(2), Stage(12, fp32.heads.count))
    hidden = 4 * 4096 * 4096
    received, bucket = 3 * hidden, 4 * 50_000_000
    assert pipeline_rank(fp32, split, 0, "cuda").memory.communication == received + bucket
    bf16 = on_ranks(unresolved(), 4, pipeline=2, schedule="dualpipev")
    one, other = (rank_memory(bf16, stage, 2, 1) for stage in (1, 2))
    both = pipeline_rank(bf16, split, 1, "cuda").memory
    assert both.total == one.state + other.state + both.communication + both.activations + both.workspace
    copied = one.update
    assert copied > 0 == pipeline_rank(bf16, split, 1, "cuda").memory.update, "above 500 million elements in parts"


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


@pytest.mark.parametrize("schedule", ["1f1b", "dualpipev"])
def test_split_that_is_fastest_and_fits_is_used(schedule):
    """The first stages keep the activations of more micro-batches than the last ones."""
    config = on_ranks(unresolved(micro_batch_size=2), 16, pipeline=4, schedule=schedule)
    free = fit(config)
    limit = free.binding.memory.total

    def bounded(gigabytes):
        return fit(with_device_memory(config, DeviceMemory("cuda", gigabytes)))

    assert bounded(limit / 0.9).split == free.split, "what fits stays as it is"
    found = bounded((limit - 1) / 0.9)
    assert found.binding.memory.total < limit and found.split != free.split and sum(found.split) == 28
    assert bounded(found.binding.memory.total).binding.memory.total < limit, "fits, if not 90 %"
    assert bounded(limit / 5).split == free.split, "nothing fits"
    given = on_ranks(config, 16, partition=list(free.split))
    assert fit(with_device_memory(given, DeviceMemory("cuda", limit / 2))).split == free.split


def test_uniform_partition_is_replaced_if_another_fits():
    config = on_ranks(unresolved(micro_batch_size=2), 16, pipeline=4, partition="uniform")
    memory = DeviceMemory("cuda", needed(config) - 1)
    found = remedies(with_device_memory(config, memory), memory.bytes)
    assert {"parallel.partition": "balanced"} in [changes for changes, _ in found]
