"""The teacher's soft targets are the same at every tensor-parallel degree and belong to the right token."""

from dataclasses import dataclass

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from mtp_dist.config.schema import padded_vocab_size
from mtp_dist.loss.distillation import Teacher
from mtp_dist.loss.objective import Vocabulary
from mtp_dist.model.targets import IGNORE_INDEX
from tests.ranks import Ranks
from tests.unit.loss.harness import ALONE, SIZES, VOCAB_SIZE, run_cases

TOKENS = 10


@dataclass
class TeacherCase:
    logits: Tensor
    """`[T, V]` over the real vocabulary."""
    top: int
    chunk_tokens: int


def teach(case: TeacherCase, group: dist.ProcessGroup) -> tuple[Tensor, Tensor]:
    """On each rank: return the token ids and probabilities that the teacher keeps."""
    missing = padded_vocab_size(VOCAB_SIZE, group.size()) - VOCAB_SIZE
    padded = F.pad(case.logits, (0, missing), value=torch.finfo(case.logits.dtype).min)  # as the kernel masks it
    local = padded.chunk(group.size(), 1)[group.rank()]
    teacher = Teacher(TOKENS, 1, case.top, Vocabulary(VOCAB_SIZE, IGNORE_INDEX, group), local.device)
    for start in range(0, TOKENS, case.chunk_tokens):
        positions = slice(start, start + case.chunk_tokens)
        teacher.record(positions, local[positions])
    return teacher.token_ids, teacher.probabilities


def random_logits(scale: float = 3.0, last_rank: float = 0.0) -> Tensor:
    """last_rank is added to the logits of the last 3 tokens, which the third of 4 ranks has."""
    logits = scale * torch.randn(TOKENS, VOCAB_SIZE, generator=torch.Generator().manual_seed(5))
    logits[:, 128:] += last_rank
    return logits


CASES = {
    "top 5": TeacherCase(random_logits(), 5, 3),
    "top 1": TeacherCase(random_logits(), 1, TOKENS),
    "the best on one rank": TeacherCase(random_logits(last_rank=100), 2, 1),
    "more than that rank has": TeacherCase(random_logits(last_rank=100), 7, 4),
    "more than a rank of 4 has": TeacherCase(random_logits(), 100, 4),
    "more than a rank of 2 has": TeacherCase(random_logits(), 130, 4),
    "the whole vocabulary": TeacherCase(random_logits(), VOCAB_SIZE, 4),
    "more than the vocabulary": TeacherCase(random_logits(), 500, 4),
    "large logits": TeacherCase(random_logits(3000.0), 5, 4),
    "fp64": TeacherCase(random_logits().double(), 5, 4),
}


@pytest.mark.parametrize("size", SIZES)
def test_teacher_covers_the_whole_vocabulary(ranks: Ranks, size: int) -> None:
    for name, by_rank in run_cases(ranks, size, teach, CASES).items():
        best, expected = CASES[name].logits.topk(min(CASES[name].top, VOCAB_SIZE), 1)
        for token_ids, probabilities in by_rank:
            assert torch.equal(token_ids, expected), name
            assert probabilities.dtype == torch.float32
            torch.testing.assert_close(probabilities, best.softmax(1).float(), rtol=1e-6, atol=1e-7)


def numbered_teacher(length: int, batch: int) -> Teacher:
    """Return a teacher whose best token at position s of sample b is number s * batch + b, the second best 0 or 1."""
    tokens = length * batch
    logits, numbers = torch.zeros(tokens, tokens + 2), torch.arange(tokens)
    logits[numbers, numbers] = 2.0
    logits[numbers, (numbers == 0).long()] = 1.0
    teacher = Teacher(length, batch, 2, Vocabulary(tokens + 2, IGNORE_INDEX, ALONE), logits.device)
    teacher.record(slice(0, tokens), logits)
    return teacher


@given(length=st.integers(1, 6), batch=st.integers(1, 4), distance=st.integers(1, 9), seed=st.integers(0, 99))
def test_soft_targets_are_those_of_the_same_token(length: int, batch: int, distance: int, seed: int) -> None:
    teacher = numbered_teacher(length, batch)
    valid = torch.rand(length * batch, generator=torch.Generator().manual_seed(seed)) < 0.7
    soft = teacher.soft_targets(distance, valid)
    assert soft.token_ids.shape == soft.probabilities.shape == (length * batch, 2)
    for row in range(length * batch):
        later = row + (distance - 1) * batch
        if later >= length * batch or not valid[row]:
            assert not soft.probabilities[row].any(), "no later position, or no target"
            continue
        assert soft.token_ids[row, 0] == later, "head 1 predicts the same token there"
        torch.testing.assert_close(soft.probabilities[row], torch.tensor([2.0, 1.0]).softmax(0))


def test_soft_targets_do_not_change_the_teacher() -> None:
    teacher, valid = numbered_teacher(4, 2), torch.ones(8, dtype=torch.bool)
    first = [tensor.clone() for tensor in teacher.soft_targets(2, valid)[:2]]
    teacher.soft_targets(3, ~valid)
    assert all(torch.equal(*pair) for pair in zip(first, teacher.soft_targets(2, valid)[:2], strict=True))
