"""The embedding's gradient is a sum over all tokens of a micro-batch, most of which are a few frequent ones."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mtp_dist.config import Config
from mtp_dist.distributed.device import select_device
from mtp_dist.distributed.topology import initialize_topology, tp_group
from mtp_dist.model.layers import transformer_config
from mtp_dist.model.trunk import TokenEmbedding, embed_tokens
from tests.errors import norm_error
from tests.ranks import Ranks
from tests.tiny import tiny_config

VOCAB_SIZE, WIDTH = 128, 32


def tiny_embedding(tensor: int, sequence: bool) -> Config:
    parallel, train = {"tensor": tensor, "sequence": sequence}, {"micro_batch_size": 4, "sequence_length": 1024}
    return tiny_config(model={"vocab_size": VOCAB_SIZE}, parallel=parallel, train=train)


def token_ids(config: Config) -> Tensor:
    """Return ids `[B, S]`: the k-th most frequent token occurs 1/k as often as the first."""
    generator = torch.Generator().manual_seed(3)
    frequencies = 1 / torch.arange(1.0, VOCAB_SIZE + 1)
    shape = config.train.micro_batch_size, config.train.sequence_length
    return torch.multinomial(frequencies, shape[0] * shape[1], True, generator=generator).view(shape)


def upstream_gradient(config: Config, dtype: torch.dtype) -> Tensor:
    """Return `[S, B, D]` with a mean other than 0: contexts of one token agree in part."""
    shape = config.train.sequence_length, config.train.micro_batch_size, WIDTH
    return (torch.randn(shape, generator=torch.Generator().manual_seed(4)) + 0.3).to(dtype)


def embedding_gradients(config: Config, dtype: torch.dtype) -> list[Tensor]:
    """Return the full gradient `[V, D]` by TokenEmbedding and by `embed_tokens`, which sequential heads call."""
    topology = initialize_topology(config, select_device(config))
    tokens, grad = token_ids(config), upstream_gradient(config, dtype)
    if config.parallel.sequence:
        grad = grad.chunk(topology.tp_size)[topology.tp_rank]
    embedding = TokenEmbedding(config, transformer_config(config)).to(dtype)
    embedding(tokens).backward(grad)
    weight = embedding.weight.detach().clone().requires_grad_()
    embed_tokens(weight, tokens, config.parallel.sequence).backward(grad)
    answers = []
    for local in (embedding.weight.grad, weight.grad):
        assert local is not None
        answers.append(local.new_empty(topology.tp_size * len(local), WIDTH))
        torch.distributed.all_gather_into_tensor(answers[-1], local, group=tp_group())
    return answers


@pytest.mark.parametrize(("tensor", "sequence"), [(1, False), (2, False), (2, True)])
def test_bf16_gradients_are_rounded_once(ranks: Ranks, tensor: int, sequence: bool) -> None:
    config = tiny_embedding(tensor, sequence)
    grad = upstream_gradient(config, torch.bfloat16).transpose(0, 1).flatten(0, 1).double()
    truth = torch.zeros(VOCAB_SIZE, WIDTH, dtype=torch.float64).index_add_(0, token_ids(config).flatten(), grad)
    for answer in ranks.run(tensor, embedding_gradients, config, torch.bfloat16):
        for gradient in answer:
            assert gradient.dtype == torch.bfloat16
            assert norm_error(gradient, truth) <= torch.finfo(torch.bfloat16).eps / 2


def test_fp32_gradients_are_bitwise_those_of_pytorch(ranks: Ranks) -> None:
    for tensor in (1, 2):
        config = tiny_embedding(tensor, False)
        weight = torch.zeros(VOCAB_SIZE, WIDTH, requires_grad=True)
        F.embedding(token_ids(config), weight).backward(upstream_gradient(config, torch.float32).transpose(0, 1))
        for answer in ranks.run(tensor, embedding_gradients, config, torch.float32):
            assert all(torch.equal(gradient, weight.grad) for gradient in answer)
