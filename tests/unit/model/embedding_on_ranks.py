"""Gradients of the embedding for token ids whose frequencies are those of a language, on every rank of a test."""

from typing import NamedTuple

import torch
from torch import Tensor

from mtp_dist.config import Config

VOCAB_SIZE = 128
WIDTH = 32


class EmbeddingGradients(NamedTuple):
    first_stage: Tensor
    """Gradient `[V, D]` of the weight by TokenEmbedding."""
    heads: Tensor
    """The same by `embed_tokens`, which sequential heads call."""


def token_ids(config: Config) -> Tensor:
    """`[B, S]`: the second most frequent token occurs half as often as the first, the third a third as often."""
    generator = torch.Generator().manual_seed(3)
    frequencies = 1 / torch.arange(1.0, VOCAB_SIZE + 1)
    shape = config.train.micro_batch_size, config.train.sequence_length
    return torch.multinomial(frequencies, shape[0] * shape[1], True, generator=generator).view(shape)


def upstream_gradient(config: Config, dtype: torch.dtype) -> Tensor:
    """`[S, B, D]`, with a mean: contexts of one token agree in part."""
    shape = config.train.sequence_length, config.train.micro_batch_size, WIDTH
    return (torch.randn(shape, generator=torch.Generator().manual_seed(4)) + 0.3).to(dtype)


def embedding_gradients(config: Config, dtype: torch.dtype) -> EmbeddingGradients:
    from mtp_dist.distributed.device import select_device
    from mtp_dist.distributed.topology import initialize_topology, tp_group
    from mtp_dist.model.layers import transformer_config
    from mtp_dist.model.trunk import TokenEmbedding, embed_tokens

    topology = initialize_topology(config, select_device(config))
    tokens, grad = token_ids(config), upstream_gradient(config, dtype)
    if config.parallel.sequence:
        grad = grad.chunk(topology.tp_size)[topology.tp_rank]
    embedding = TokenEmbedding(config, transformer_config(config)).to(dtype)
    embedding(tokens).backward(grad)
    weight = embedding.weight.detach().clone().requires_grad_()
    embed_tokens(weight, tokens, config.parallel.sequence).backward(grad)
    return EmbeddingGradients(*(_gathered(local, tp_group()) for local in (embedding.weight.grad, weight.grad)))


def _gathered(local: Tensor | None, group: torch.distributed.ProcessGroup) -> Tensor:
    assert local is not None
    full = local.new_empty(group.size() * len(local), WIDTH)
    torch.distributed.all_gather_into_tensor(full, local, group=group)
    return full
