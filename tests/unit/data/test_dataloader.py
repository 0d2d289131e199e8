"""The samples that every rank reads, and their targets."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mtp_dist.data.dataloader import Batches
from mtp_dist.data.datasets import Datasets
from mtp_dist.distributed.topology import Topology
from mtp_dist.model.targets import IGNORE_INDEX
from tests.tiny import tiny_config

HEADS, LENGTH = 2, 5
CPU = torch.device("cpu")


class NumberedSamples:
    """Sample i is i*100, i*100 + 1, ..."""

    def __init__(self, number):
        self.number = number

    def __len__(self):
        return self.number

    def __getitem__(self, index):
        if not 0 <= index < self.number:
            raise IndexError(index)
        return index * 100 + np.arange(LENGTH + HEADS)

    def read(self, first, count, rank=0, ranks=1):
        share = count // ranks
        self.last = first + (rank + 1) * share
        return np.stack([self[index] for index in range(first + rank * share, self.last)])

    def state(self):
        return {"read": self.last}


SCHEDULES = {1: "1f1b", 3: "dualpipev"}
"""Schedules by pipeline-parallel degree."""


def config_of(global_batch, micro_batch, tensor=1, pipeline=1, schedule="1f1b", **data):
    return tiny_config(
        train={"global_batch_size": global_batch, "micro_batch_size": micro_batch, "sequence_length": LENGTH},
        model={"trunk_layers": 6},
        heads={"count": HEADS},
        parallel={"tensor": tensor, "pipeline": pipeline, "schedule": schedule},
        data=data,
    )


def batches_of(config, data=1, dp_rank=0, completed_steps=0, samples=10**6, device=CPU, tp_rank=0, pp_rank=0):
    degrees = config.parallel.tensor, config.parallel.pipeline, data
    topology = Topology(*degrees, tp_rank, pp_rank, dp_rank, device, config.parallel.schedule, config.heads.stages)
    tokenizer = SimpleNamespace(end_of_document=103)
    datasets = Datasets(tokenizer, NumberedSamples(samples), ("a",), ("f",), (), ())
    return Batches(config, topology, datasets, completed_steps, completed_steps * config.train.global_batch_size)


def numbers(tokens):
    return (tokens[:, 0] // 100).tolist()


small = st.integers(1, 4)


@given(data=small, micro_batch=small, accumulation=small, step=small, tp_rank=st.integers(0, 1))
def test_train_batches_read_the_global_batch_in_order(data, micro_batch, accumulation, step, tp_rank):
    size = data * micro_batch * accumulation
    config = config_of(size, micro_batch, tensor=2)
    read = []
    for rank in range(data):
        batches = batches_of(config, data, rank, completed_steps=step - 1, tp_rank=tp_rank)
        batch = batches.next_train_batch()
        batches.close()
        assert len(batch.micro_batches) == batch.num_micro_batches == accumulation
        assert batch.valid_targets.tolist() == [micro_batch * accumulation * LENGTH] * HEADS
        for tokens, targets, documents in batch.micro_batches:
            assert tokens.shape == (micro_batch, LENGTH + HEADS) and targets.shape == (HEADS, micro_batch, LENGTH)
            assert torch.equal(targets[0], tokens[:, :LENGTH] + 1) and torch.equal(targets[1], tokens[:, :LENGTH] + 2)
            assert documents is None, "documents do not matter"
            read += numbers(tokens)
    assert read == list(range((step - 1) * size, step * size)), "at every layout"


@given(st.integers(1, 5), st.integers(1, 4), st.integers(1, 40), st.sampled_from([1, 3]))
def test_validation_counts_each_sample_once(data, micro_batch, samples, pipeline):
    config = config_of(micro_batch * data * 2 * pipeline, micro_batch, pipeline=pipeline, schedule=SCHEDULES[pipeline])
    counted = []
    valid_targets = 0.0
    for rank in range(data):
        batch = batches_of(config, data, rank).validation_batch(NumberedSamples(samples))
        least = 1 if pipeline == 1 else 2 * pipeline
        assert len(batch.micro_batches) == batch.num_micro_batches == max(-(-samples // (micro_batch * data)), least)
        valid_targets += float(batch.valid_targets[-1])
        for tokens, targets, _ in batch.micro_batches:
            assert tokens.shape == (micro_batch, LENGTH + HEADS)
            valid = (targets != IGNORE_INDEX).all(0).all(-1)
            assert torch.equal(valid, (targets != IGNORE_INDEX).any(0).any(-1)), "all of a sample counts or nothing"
            assert torch.equal(targets[0][valid], tokens[valid, :LENGTH] + 1)
            counted += numbers(tokens[valid])
    assert counted == list(range(samples)) and valid_targets == samples * LENGTH


@pytest.mark.parametrize("data", [{}, {"loss_across_documents": False}, {"attention_across_documents": False}])
@pytest.mark.parametrize("pp_rank", range(4))
@pytest.mark.parametrize(("schedule", "readers", "counts"), [("1f1b", (0, 3), (8, 4)), ("dualpipev", (0,), (8, 8))])
def test_middle_stages_read_for_their_attention_only(schedule, readers, counts, pp_rank, data):
    config = config_of(16, 2, pipeline=4, schedule=schedule, **data)
    needs_data = pp_rank in readers or "attention_across_documents" in data
    batches = batches_of(config, pp_rank=pp_rank)
    read = batches.next_train_batch(), batches.validation_batch(NumberedSamples(7))
    for batch, count in zip(read, counts, strict=True):
        assert batch.num_micro_batches == count
        assert len(batch.micro_batches) == (count if needs_data else 0)
        assert batch.valid_targets.shape == (HEADS,) and bool(batch.valid_targets.all()) == needs_data


def test_every_stage_with_heads_reads():
    config = config_of(16, 2, pipeline=4)
    config = config.model_copy(update={"heads": config.heads.model_copy(update={"stages": 2})})
    assert [batches_of(config, pp_rank=rank).needs_data for rank in range(4)] == [True, False, True, True]


def test_state_is_that_after_the_step_however_far_ahead_is_read():
    batches = batches_of(config_of(4, 2), 2, 0)
    for step in range(1, 6):
        assert numbers(batches.next_train_batch().micro_batches[0].samples)[0] == (step - 1) * 4
        assert batches.state() == {"read": step * 4, "fingerprints": ["f"], "train": {"read": (step - 1) * 4 + 2}}
    batches.close()


@pytest.mark.parametrize(("completed_steps", "samples"), [(tiny_config().train.steps - 2, 10**6), (0, 9)])
def test_reading_ends_at_the_last_step_and_errors_come_with_their_step(completed_steps, samples):
    batches = batches_of(config_of(4, 2), completed_steps=completed_steps, samples=samples)
    for _ in range(2):
        assert batches.next_train_batch().num_micro_batches == 2
    with pytest.raises(IndexError):
        batches.next_train_batch()
    batches.close()


@pytest.mark.parametrize("across", [True, False])
def test_documents_and_valid_targets(across):
    batches = batches_of(config_of(4, 2, loss_across_documents=across, attention_across_documents=False))
    batch = batches.next_train_batch()
    micro_batch, *others = batch.micro_batches
    assert micro_batch.documents.tolist() == [[0] * 7, [0, 0, 0, 0, 1, 1, 1]], "sample 1 is 100, 101, ..., 106"
    everywhere = [[101, 102, 103, 104, 105], [102, 103, 104, 105, 106]]
    within = [[101, 102, 103, IGNORE_INDEX, 105], [102, 103, IGNORE_INDEX, IGNORE_INDEX, 106]]
    assert micro_batch.targets[:, 1].tolist() == (everywhere if across else within)
    assert batch.valid_targets.tolist() == ([20, 20] if across else [19, 18])
    for part in others:
        assert part.documents is not None and not part.documents.any() and not (part.targets == IGNORE_INDEX).any()
    validation = batches.validation_batch(NumberedSamples(3)).micro_batches
    counts = [(part.targets != IGNORE_INDEX).sum((0, 2)).tolist() for part in validation]
    assert counts == [[10, 10 if across else 7], [10, 0]], "masked are both documents and repeated samples"
