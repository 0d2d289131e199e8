"""Which samples every rank reads."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from mtp_dist.config import Config
from mtp_dist.model.targets import IGNORE_INDEX
from mtp_dist.parallel.topology import Topology
from mtp_dist.training.batches import Batches, micro_batches_of
from tests.parity.runs import tiny_config

HEADS, LENGTH = 2, 5


class NumberedSamples:
    """Sample i is i*100, i*100 + 1, ..."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __len__(self) -> int:
        return self.number

    def __getitem__(self, index: int) -> NDArray[np.int64]:
        if not 0 <= index < self.number:
            raise IndexError(index)
        return index * 100 + np.arange(LENGTH + HEADS)


def config_of(global_batch: int, micro_batch: int, tensor: int = 1, pipeline: int = 1) -> Config:
    return tiny_config(
        train={"global_batch_size": global_batch, "micro_batch_size": micro_batch, "sequence_length": LENGTH},
        heads={"count": HEADS},
        parallel={"tensor": tensor, "pipeline": pipeline},
    )


def topology_of(config: Config, data: int, data_rank: int, pipeline_rank: int = 0, tensor_rank: int = 0) -> Topology:
    tensor, pipeline = config.parallel.tensor, config.parallel.pipeline
    return Topology(tensor, pipeline, data, tensor_rank, pipeline_rank, data_rank, torch.device("cpu"))


def numbers(tokens: torch.Tensor) -> list[int]:
    return (tokens[:, 0] // 100).tolist()


def test_micro_batches_keep_order_and_targets() -> None:
    samples = torch.arange(4 * (LENGTH + HEADS)).view(4, LENGTH + HEADS)
    batches = micro_batches_of(config_of(4, 2), samples)
    assert [part.tolist() for part, _ in batches] == [samples[:2].tolist(), samples[2:].tolist()]
    assert [targets.shape for _, targets in batches] == [(2, 2, LENGTH)] * 2
    for part, targets in batches:
        assert torch.equal(targets[0], part[:, :LENGTH] + 1) and torch.equal(targets[1], part[:, :LENGTH] + 2)


@given(data=st.integers(1, 4), micro_batch=st.integers(1, 4), accumulation=st.integers(1, 4), step=st.integers(1, 5))
def test_training_reads_the_global_batch_in_order(data: int, micro_batch: int, accumulation: int, step: int) -> None:
    size = data * micro_batch * accumulation
    config = config_of(size, micro_batch)
    read: list[int] = []
    for rank in range(data):
        batch = Batches(config, topology_of(config, data, rank)).training(NumberedSamples(5 * size), step)
        assert len(batch) == config.micro_batches(data) == accumulation
        for tokens, targets in batch:
            assert tokens.shape == (micro_batch, LENGTH + HEADS) and targets.shape == (HEADS, micro_batch, LENGTH)
            assert torch.equal(targets[1], tokens[:, :LENGTH] + 2) and not (targets == IGNORE_INDEX).any()
            read += numbers(tokens)
    assert read == list(range((step - 1) * size, step * size)), "whatever the layout"


@given(data=st.integers(1, 5), micro_batch=st.integers(1, 4), samples=st.integers(1, 40))
def test_validation_counts_each_sample_once(data: int, micro_batch: int, samples: int) -> None:
    config = config_of(micro_batch * data, micro_batch)
    counted: list[int] = []
    lengths = set()
    for rank in range(data):
        batch, announced = Batches(config, topology_of(config, data, rank)).validation(NumberedSamples(samples))
        lengths |= {len(batch), announced}
        for tokens, targets in batch:
            assert tokens.shape == (micro_batch, LENGTH + HEADS)
            valid = (targets != IGNORE_INDEX).all(0).all(-1)
            assert torch.equal(valid, (targets != IGNORE_INDEX).any(0).any(-1)), "a sample counts whole or not"
            assert torch.equal(targets[0][valid], tokens[valid, :LENGTH] + 1)
            counted += numbers(tokens[valid])
    assert counted == list(range(samples))
    assert lengths == {-(-samples // (micro_batch * data))}, "every rank runs the same number of micro-batches"


@pytest.mark.parametrize(("pipeline_rank", "reads"), [(0, True), (1, False), (2, False), (3, True)])
def test_only_first_and_last_stage_read(pipeline_rank: int, reads: bool) -> None:
    config = config_of(4, 2, pipeline=4)
    batches = Batches(config, topology_of(config, 1, 0, pipeline_rank))
    training, (validation, announced) = batches.training(NumberedSamples(8), 1), batches.validation(NumberedSamples(7))
    assert announced == 4
    assert (len(training), len(validation)) == ((2, 4) if reads else (0, 0))


def test_tensor_ranks_read_the_same() -> None:
    config = config_of(4, 2, tensor=2)
    first, second = (
        Batches(config, topology_of(config, 1, 0, tensor_rank=rank)).training(NumberedSamples(8), 2) for rank in (0, 1)
    )
    assert all(torch.equal(a, b) for one, two in zip(first, second, strict=True) for a, b in zip(one, two, strict=True))
