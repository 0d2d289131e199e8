"""The loss over a cut vocabulary equals PyTorch's over the whole one."""

import functools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mtp_dist.config.schema import padded_vocab_size
from mtp_dist.model.targets import IGNORE_INDEX
from tests.ranks import Ranks
from tests.tiny import tiny_config
from tests.unit.loss.on_ranks import UPSTREAM, Answer, Case, hits_of_almost_ties, losses_of

VOCAB_SIZE = 131
"""With 4 ranks the third has 3 real entries and the fourth none."""
LENGTH, BATCH = 7, 3


def padded(logits: Tensor, ranks: int) -> Tensor:
    missing = padded_vocab_size(VOCAB_SIZE, ranks) - VOCAB_SIZE
    return F.pad(logits, (0, missing), value=float("-inf"))


def real_cases() -> dict[str, Case]:
    """Over the real vocabulary; padding depends on the number of ranks."""
    generator = torch.Generator().manual_seed(1)
    shape = (LENGTH, BATCH, VOCAB_SIZE)
    normal = torch.randn(shape, generator=generator) * 3
    targets = torch.randint(0, VOCAB_SIZE, shape[:2], generator=generator)
    best = normal.argmax(-1)
    masked = targets.masked_fill(torch.rand(shape[:2], generator=generator) < 0.5, IGNORE_INDEX)
    steps = torch.randint(0, 3, shape, generator=generator).float()
    near = torch.zeros(shape)
    near[..., 70], near[..., 3] = 1e-9, 5e-10  # different numbers whose exponentials are both 1
    return {
        "random": Case(normal, targets),
        "half of them right": Case(
            normal, torch.where(torch.rand(shape[:2], generator=generator) < 0.5, best, targets)
        ),
        "masked": Case(normal, masked),
        "masked and right": Case(normal, best.masked_fill(masked == IGNORE_INDEX, IGNORE_INDEX)),
        "no valid target": Case(normal, torch.full(shape[:2], IGNORE_INDEX)),
        "the last real entry": Case(normal, torch.full(shape[:2], VOCAB_SIZE - 1)),
        "large": Case(normal * 1000, targets),
        "ties": Case(steps, steps.argmax(-1)),
        "ties, the second best entry": Case(steps, steps.flip(-1).argmax(-1)),
        "all equal": Case(torch.zeros(shape), torch.arange(LENGTH * BATCH).view(LENGTH, BATCH) % 2),
        "bf16": Case(normal.bfloat16(), masked),
        "bf16, right": Case(normal.bfloat16(), normal.bfloat16().argmax(-1)),
        "almost ties": Case(near, torch.full(shape[:2], 70)),
    }


def hits_of(logits: Tensor, targets: Tensor) -> int:
    """Targets whose logit is above every other one."""
    best = logits.topk(2, -1)
    return int(((best.indices[..., 0] == targets) & (best.values[..., 0] > best.values[..., 1])).sum())


@functools.cache
def _answers(ranks: Ranks, size: int) -> tuple[dict[str, list[Answer]], dict[str, Case]]:
    cases = real_cases()
    config = tiny_config(parallel={"tensor": size}, model={"num_query_groups": 4})
    given = [Case(padded(case.logits, size), case.targets) for case in cases.values()]
    by_rank = ranks.run(size, losses_of, config, given)
    return dict(zip(cases, (list(answers) for answers in zip(*by_rank, strict=True)), strict=True)), cases


@pytest.mark.parametrize("case", real_cases())
@pytest.mark.parametrize("size", [1, 2, 4])
def test_equals_pytorch(ranks: Ranks, size: int, case: str) -> None:
    answers, cases = _answers(ranks, size)
    found, logits, targets = answers[case], cases[case].logits.clone().requires_grad_(), cases[case].targets
    loss = F.cross_entropy(logits.double().flatten(0, 1), targets.flatten(), ignore_index=IGNORE_INDEX, reduction="sum")
    (UPSTREAM * loss).backward()
    for answer in found:
        assert answer.loss.dtype == torch.float32
        torch.testing.assert_close(answer.loss.double(), loss.detach(), rtol=1e-6, atol=1e-6)
        assert torch.equal(answer.loss, found[0].loss), "every rank has the same bits"
    gradient = torch.cat([answer.gradient for answer in found], -1)
    tolerance = 1e-2 if logits.dtype == torch.bfloat16 else 1e-6
    torch.testing.assert_close(gradient[..., :VOCAB_SIZE], logits.grad, rtol=tolerance, atol=tolerance * 1e-1)
    assert torch.equal(gradient[..., VOCAB_SIZE:], torch.zeros_like(gradient[..., VOCAB_SIZE:])), "padding"
    assert not gradient[targets == IGNORE_INDEX].any(), "masked"
    correct = hits_of(cases[case].logits, targets)
    assert [answer.correct for answer in found] == [correct] * size


def test_cases_say_something() -> None:
    correct = {name: hits_of(case.logits, case.targets) for name, case in real_cases().items()}
    assert correct["no valid target"] == correct["ties"] == correct["all equal"] == 0
    assert 0 < correct["masked and right"] < correct["almost ties"] == LENGTH * BATCH
    assert 5 < correct["half of them right"] < 16


@pytest.mark.parametrize("size", [1, 2, 4])
def test_no_valid_target_gives_exactly_0(ranks: Ranks, size: int) -> None:
    answers, _ = _answers(ranks, size)
    for answer in answers["no valid target"]:
        assert answer.loss == 0 and answer.correct == 0
        assert torch.equal(answer.gradient, torch.zeros_like(answer.gradient))


def test_hits_are_counted_before_the_loss_overwrites_the_logits(ranks: Ranks) -> None:
    assert ranks.run(1, hits_of_almost_ties, tiny_config()) == [4.0]
