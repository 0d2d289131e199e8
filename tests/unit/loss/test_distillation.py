"""What head 1 teaches: the same at every tensor-parallel degree, and about the right token."""

import functools

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from mtp_dist.loss.distillation import Teacher
from mtp_dist.loss.linear_cross_entropy import Vocabulary
from mtp_dist.model.targets import IGNORE_INDEX
from tests.ranks import Ranks
from tests.tiny import tiny_config
from tests.unit.loss.distillation_on_ranks import TeacherCase, teachings

VOCAB_SIZE, TOKENS = 131, 10
"""With 4 ranks of 64 rows the third has 3 real entries and the fourth none."""
SIZES = [1, 2, 4]
ALONE = dist.ProcessGroup(0, 1)
"""A group of one rank, of which nobody asks more than its rank and size."""


def logits_of(scale: float = 3.0) -> Tensor:
    return scale * torch.randn(TOKENS, VOCAB_SIZE, generator=torch.Generator().manual_seed(5))


def best_last() -> Tensor:
    """The best tokens are the last 3, which the third of 4 ranks has."""
    logits = logits_of()
    logits[:, 128:] += 100
    return logits


CASES = {
    "top 5": TeacherCase(logits_of(), 5, 3),
    "top 1": TeacherCase(logits_of(), 1, TOKENS),
    "the best on one rank": TeacherCase(best_last(), 2, 1),
    "more than that rank has": TeacherCase(best_last(), 7, 4),
    "more than a rank of 4 has": TeacherCase(logits_of(), 100, 4),
    "more than a rank of 2 has": TeacherCase(logits_of(), 130, 4),
    "the whole vocabulary": TeacherCase(logits_of(), VOCAB_SIZE, 4),
    "more than the vocabulary": TeacherCase(logits_of(), 500, 4),
    "large logits": TeacherCase(logits_of(3000.0), 5, 4),
    "fp64": TeacherCase(logits_of().double(), 5, 4),
}


@functools.cache
def _answers(ranks: Ranks, size: int) -> dict[str, list[tuple[Tensor, Tensor]]]:
    config = tiny_config(parallel={"tensor": size}, model={"num_query_groups": 4})
    by_rank = ranks.run(size, teachings, config, list(CASES.values()))
    return dict(zip(CASES, (list(answers) for answers in zip(*by_rank, strict=True)), strict=True))


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("size", SIZES)
def test_teacher_sees_the_whole_vocabulary(ranks: Ranks, size: int, name: str) -> None:
    case = CASES[name]
    best, expected = case.logits.topk(min(case.top, VOCAB_SIZE), 1)
    for entries, probabilities in _answers(ranks, size)[name]:
        assert torch.equal(entries, expected)
        assert probabilities.dtype == torch.float32
        torch.testing.assert_close(probabilities, best.softmax(1).float(), rtol=1e-6, atol=1e-7)


def numbered_teacher(length: int, batch: int) -> Teacher:
    """Its best token at position s of sample b is number s * batch + b, the second best 0 or 1."""
    tokens = length * batch
    logits = torch.zeros(tokens, tokens + 2)
    places = torch.arange(tokens)
    logits[places, places] = 2.0
    logits[places, (places == 0).long()] = 1.0
    teacher = Teacher(length, batch, 2, Vocabulary(tokens + 2, IGNORE_INDEX, ALONE), logits.device)
    teacher.look(slice(0, tokens), logits)
    return teacher


@given(length=st.integers(1, 6), batch=st.integers(1, 4), distance=st.integers(1, 9), seed=st.integers(0, 99))
def test_soft_targets_are_about_the_same_token(length: int, batch: int, distance: int, seed: int) -> None:
    teacher = numbered_teacher(length, batch)
    valid = torch.rand(length * batch, generator=torch.Generator().manual_seed(seed)) < 0.7
    soft = teacher.soft_targets(distance, valid)
    assert soft.entries.shape == soft.probabilities.shape == (length * batch, 2)
    for position in range(length):
        for sample in range(batch):
            row, later = position * batch + sample, position + distance - 1
            if later >= length or not valid[row]:
                assert not soft.probabilities[row].any(), "no teacher, or no target"
                continue
            assert soft.entries[row, 0] == later * batch + sample, "head 1 there speaks of the same token"
            expected = torch.tensor([2.0, 1.0]).softmax(0)
            torch.testing.assert_close(soft.probabilities[row], expected)


def test_soft_targets_leave_the_teacher_as_it_is() -> None:
    teacher, valid = numbered_teacher(4, 2), torch.ones(8, dtype=torch.bool)
    first = [tensor.clone() for tensor in teacher.soft_targets(2, valid)]
    teacher.soft_targets(3, ~valid)
    for one, other in zip(first, teacher.soft_targets(2, valid), strict=True):
        assert torch.equal(one, other)
