"""The embedding's gradient is a sum over all tokens of a micro-batch, most of which are a few frequent ones."""

import pytest
import torch
import torch.nn.functional as F

from mtp_dist.config import Config
from tests.errors import norm_error
from tests.ranks import Ranks
from tests.tiny import tiny_config
from tests.unit.model.embedding_on_ranks import VOCAB_SIZE, WIDTH, embedding_gradients, token_ids, upstream_gradient


def config_of(tensor: int, sequence: bool, length: int = 1024) -> Config:
    return tiny_config(
        model={"vocab_size": VOCAB_SIZE},
        parallel={"tensor": tensor, "sequence": sequence},
        train={"micro_batch_size": 4, "sequence_length": length},
    )


@pytest.mark.parametrize(("tensor", "sequence"), [(1, False), (2, False), (2, True)])
def test_bf16_gradients_are_rounded_once(ranks: Ranks, tensor: int, sequence: bool) -> None:
    config = config_of(tensor, sequence)
    grad = upstream_gradient(config, torch.bfloat16).transpose(0, 1).flatten(0, 1).double()
    truth = torch.zeros(VOCAB_SIZE, grad.shape[1], dtype=torch.float64).index_add_(0, token_ids(config).flatten(), grad)
    for answer in ranks.run(tensor, embedding_gradients, config, torch.bfloat16):
        for gradient in answer:
            assert gradient.dtype == torch.bfloat16
            assert norm_error(gradient, truth) <= torch.finfo(torch.bfloat16).eps / 2


def test_fp32_gradients_are_bitwise_those_of_pytorch(ranks: Ranks) -> None:
    config = config_of(2, False, 128)
    weight = torch.zeros(VOCAB_SIZE, WIDTH, requires_grad=True)
    F.embedding(token_ids(config), weight).backward(upstream_gradient(config, torch.float32).transpose(0, 1))
    for tensor in (1, 2):
        for answer in ranks.run(tensor, embedding_gradients, config_of(tensor, False, 128), torch.float32):
            assert all(torch.equal(gradient, weight.grad) for gradient in answer)
