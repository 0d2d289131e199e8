"""The linear cross-entropy on some ranks beside fp64: what the tests of its targets and of its soft targets share."""

from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor

from tests.errors import norm_error
from tests.ranks import Ranks
from tests.tiny import tiny_config
from tests.unit.loss.linear_on_ranks import LinearAnswer, LinearCase, linear_answers, truth_of

VOCAB_SIZE = 131
"""With 4 ranks of 64 rows the third has 3 real entries and the fourth none."""
TOKENS, WIDTH = 26, 16
SIZES = [1, 2, 4]
ALONE = dist.ProcessGroup(0, 1)
"""A group of one rank, of which nobody asks more than its rank and size."""
BOUNDS = {torch.float64: (1e-12, 1e-12), torch.float32: (1e-6, 1e-6), torch.bfloat16: (1e-6, 5e-3)}
"""Relative errors of the 2-norm that the sums and the gradients may have."""


def in_dtype(case: LinearCase, dtype: torch.dtype) -> LinearCase:
    return replace(case, hidden=case.hidden.to(dtype), weight=case.weight.to(dtype))


def steep_logits() -> tuple[Tensor, Tensor]:
    """Hidden and weight whose logits are 10^4, -10^4 and 0, exact in fp32."""
    hidden, weight = torch.zeros(6, WIDTH), torch.zeros(VOCAB_SIZE, WIDTH)
    hidden[0, 0], hidden[1, 0], hidden[2, 1], hidden[3, 2], hidden[4, 3] = 100, -100, 100, 100, 1
    weight[7, 0], weight[70, 0], weight[:, 1] = 100, -100, 100
    weight[:, 2], weight[130, 2], weight[7, 3], weight[70, 3] = -100, 100, 10000, 9999
    return hidden, weight


def answers_of(ranks: Ranks, size: int, cases: dict[str, LinearCase]) -> dict[str, list[LinearAnswer]]:
    """The answers of all ranks to each case."""
    config = tiny_config(parallel={"tensor": size}, model={"num_query_groups": 4})
    by_rank = ranks.run(size, linear_answers, config, list(cases.values()))
    return dict(zip(cases, (list(answers) for answers in zip(*by_rank, strict=True)), strict=True))


def assert_equals_fp64(
    case: LinearCase, found: list[LinearAnswer], bounds: tuple[float, float], hidden_bound: float | None = None
) -> None:
    """bounds are those of the sums and of the gradients; hidden_bound, if given, that of the gradient of hidden."""
    sums, grad_hidden, of_weight = truth_of(case)
    sum_bound, gradient_bound = bounds
    for answer in found:
        assert torch.equal(answer.sums, found[0].sums), "every rank has the same bits"
        assert torch.equal(answer.sums, answer.forward_sums), "with gradients or without"
    for index in (0, 1, 3):
        assert norm_error(found[0].sums[index], sums[index]) <= sum_bound
    assert found[0].sums[2] == sums[2], "hits"
    hidden = torch.stack([answer.hidden.double() for answer in found]).sum(0)
    assert norm_error(hidden, grad_hidden) <= (hidden_bound or gradient_bound)
    assert not hidden[~grad_hidden.any(1)].any(), "rows without any target"
    if case.frozen:
        assert all(answer.weight is None for answer in found)
        return
    weight = torch.cat([answer.weight for answer in found if answer.weight is not None]) - case.start
    assert weight.dtype == torch.promote_types(case.weight.dtype, torch.float32)
    assert norm_error(weight[:VOCAB_SIZE], of_weight) <= gradient_bound
    assert not weight[VOCAB_SIZE:].any(), "padding"


def assert_one_collective_a_chunk(answers: dict[str, list[LinearAnswer]], chunks: dict[str, int], size: int) -> None:
    """chunks gives the number of chunks of some cases."""
    for name, number in chunks.items():
        expected = {"allgather_base": number} if size > 1 else {}
        for answer in answers[name]:
            assert answer.collectives == [expected, expected]
