"""Which samples every rank reads."""

from types import SimpleNamespace
from typing import cast

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from mtp_dist.config import Config
from mtp_dist.data.dataloader import Batches, micro_batches_of
from mtp_dist.data.datasets import Datasets, TrainingSamples
from mtp_dist.data.tokenizer import Tokenizer
from mtp_dist.distributed.topology import Topology
from mtp_dist.model.targets import IGNORE_INDEX
from tests.tiny import tiny_config

HEADS, LENGTH = 2, 5
END_OF_DOCUMENT = 103


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

    def read(self, first: int, count: int, rank: int = 0, ranks: int = 1) -> NDArray[np.int64]:
        share = count // ranks
        self.last = first + (rank + 1) * share
        return np.stack([self[index] for index in range(first + rank * share, self.last)])

    def state(self) -> dict[str, int]:
        return {"read": self.last}


def config_of(global_batch: int, micro_batch: int, tensor: int = 1, pipeline: int = 1, **data: bool) -> Config:
    return tiny_config(
        train={"global_batch_size": global_batch, "micro_batch_size": micro_batch, "sequence_length": LENGTH},
        heads={"count": HEADS},
        parallel={"tensor": tensor, "pipeline": pipeline},
        data=data,
    )


def topology_of(config: Config, data: int, dp_rank: int, pp_rank: int = 0, tp_rank: int = 0) -> Topology:
    tensor, pipeline = config.parallel.tensor, config.parallel.pipeline
    return Topology(tensor, pipeline, data, tp_rank, pp_rank, dp_rank, torch.device("cpu"))


def batches_of(
    config: Config,
    data: int,
    dp_rank: int,
    pp_rank: int = 0,
    tp_rank: int = 0,
    completed_steps: int = 0,
    samples: int = 10**6,
) -> Batches:
    tokenizer = SimpleNamespace(end_of_document=END_OF_DOCUMENT)
    datasets = Datasets(cast(Tokenizer, tokenizer), cast(TrainingSamples, NumberedSamples(samples)), ("a",), ("f",), ())
    topology = topology_of(config, data, dp_rank, pp_rank, tp_rank)
    return Batches(config, topology, datasets, completed_steps, completed_steps * config.train.global_batch_size)


def numbers(tokens: torch.Tensor) -> list[int]:
    return (tokens[:, 0] // 100).tolist()


def test_micro_batches_keep_order_and_targets() -> None:
    samples = torch.arange(4 * (LENGTH + HEADS)).view(4, LENGTH + HEADS)
    batches = micro_batches_of(config_of(4, 2), samples, END_OF_DOCUMENT)
    assert [part.tolist() for part, _, _ in batches] == [samples[:2].tolist(), samples[2:].tolist()]
    assert [targets.shape for _, targets, _ in batches] == [(2, 2, LENGTH)] * 2
    for part, targets, _ in batches:
        assert torch.equal(targets[0], part[:, :LENGTH] + 1) and torch.equal(targets[1], part[:, :LENGTH] + 2)


@given(data=st.integers(1, 4), micro_batch=st.integers(1, 4), accumulation=st.integers(1, 4), step=st.integers(1, 5))
def test_training_reads_the_global_batch_in_order(data: int, micro_batch: int, accumulation: int, step: int) -> None:
    size = data * micro_batch * accumulation
    config = config_of(size, micro_batch)
    read: list[int] = []
    for rank in range(data):
        batches = batches_of(config, data, rank, completed_steps=step - 1)
        batch = batches.training()
        batches.close()
        assert len(batch) == config.micro_batches(data) == accumulation
        for tokens, targets, _ in batch:
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
        batch, announced = batches_of(config, data, rank).validation(NumberedSamples(samples))
        lengths |= {len(batch), announced}
        for tokens, targets, _ in batch:
            assert tokens.shape == (micro_batch, LENGTH + HEADS)
            valid = (targets != IGNORE_INDEX).all(0).all(-1)
            assert torch.equal(valid, (targets != IGNORE_INDEX).any(0).any(-1)), "a sample counts whole or not"
            assert torch.equal(targets[0][valid], tokens[valid, :LENGTH] + 1)
            counted += numbers(tokens[valid])
    assert counted == list(range(samples))
    assert lengths == {-(-samples // (micro_batch * data))}, "every rank runs the same number of micro-batches"


@pytest.mark.parametrize("data", [{}, {"loss_across_documents": False}, {"attention_across_documents": False}])
@pytest.mark.parametrize("pp_rank", range(4))
def test_middle_stages_read_for_their_attention_only(pp_rank: int, data: dict[str, bool]) -> None:
    config = config_of(4, 2, pipeline=4, **data)
    reads = pp_rank in (0, 3) or "attention_across_documents" in data
    batches = batches_of(config, 1, 0, pp_rank)
    training, (validation, announced) = batches.training(), batches.validation(NumberedSamples(7))
    assert announced == 4
    assert (len(training), len(validation)) == ((2, 4) if reads else (0, 0))


def test_tensor_ranks_read_the_same() -> None:
    config = config_of(4, 2, tensor=2, attention_across_documents=False)
    first, second = (batches_of(config, 1, 0, tp_rank=rank, completed_steps=1).training() for rank in (0, 1))
    assert all(torch.equal(a, b) for one, two in zip(first, second, strict=True) for a, b in zip(one, two, strict=True))


def test_a_step_has_the_state_after_it_however_far_ahead_is_read() -> None:
    batches = batches_of(config_of(4, 2), 2, 0)
    for step in range(1, 6):
        first = numbers(batches.training()[0].samples)[0]
        assert first == (step - 1) * 4
        assert batches.state() == {"read": step * 4, "fingerprints": ["f"], "train": {"read": (step - 1) * 4 + 2}}
    batches.close()


def test_nothing_is_read_beyond_the_last_step_and_errors_come_with_their_step() -> None:
    batches = batches_of(config_of(4, 2), 1, 0, completed_steps=tiny_config().train.steps - 2)
    assert len(batches.training()) == len(batches.training()) == 2
    with pytest.raises(IndexError):
        batches.training()
    short = batches_of(config_of(4, 2), 1, 0, samples=9)
    assert len(short.training()) == len(short.training()) == 2
    with pytest.raises(IndexError, match="9"):
        short.training()
    for of_run in (batches, short):
        of_run.close()


@pytest.mark.parametrize("across", [True, False])
def test_documents_and_the_targets_that_they_leave(across: bool) -> None:
    keys = {"loss_across_documents": across, "attention_across_documents": False}
    micro_batch, *others = batches_of(config_of(4, 2, **keys), 1, 0).training()
    assert micro_batch.documents.tolist() == [[0] * 7, [0, 0, 0, 0, 1, 1, 1]], "sample 1 is 100, 101, ..., 106"
    next_tokens, second_next = micro_batch.targets[:, 1]
    if across:
        assert next_tokens.tolist() == [101, 102, 103, 104, 105] and second_next.tolist() == [102, 103, 104, 105, 106]
    else:
        assert next_tokens.tolist() == [101, 102, 103, IGNORE_INDEX, 105]
        assert second_next.tolist() == [102, 103, IGNORE_INDEX, IGNORE_INDEX, 106]
    assert not any(part.documents.any() or (part.targets == IGNORE_INDEX).any() for part in others)


def test_documents_that_nobody_asks_for_are_not_counted() -> None:
    assert [part.documents for part in batches_of(config_of(4, 2), 1, 0).training()] == [None, None]


def test_a_validation_masks_for_both_reasons() -> None:
    batches = batches_of(config_of(4, 4, loss_across_documents=False), 1, 0)
    (micro_batch,), _ = batches.validation(NumberedSamples(2))
    assert (micro_batch.targets != IGNORE_INDEX).sum((0, 2)).tolist() == [10, 7, 0, 0]
