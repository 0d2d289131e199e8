"""The shared trunk: token embedding and `trunk_layers` transformer layers, and the weighted sum of their outputs."""

from typing import Any, cast

import torch
import torch.nn.functional as F
from megatron.core.parallel_state import get_tensor_model_parallel_group
from megatron.core.tensor_parallel.layers import VocabParallelEmbedding
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from mtp_dist.config import Config
from mtp_dist.model.layers import DecoderLayer


class TokenEmbedding(nn.Module):
    """Tokens `[B, S]` -> hidden `[S, B, D]` (`[S/TP, B, D]` under sequence parallelism)."""

    global_prefix = "embedding"

    def __init__(self, config: Config, megatron: TransformerConfig) -> None:
        super().__init__()
        self.sequence_parallel = config.parallel.sequence
        self.lookup = VocabParallelEmbedding(
            config.padded_vocab_size,
            config.model.hidden_size,
            init_method=nn.init.zeros_,
            reduce_scatter_embeddings=self.sequence_parallel,
            config=megatron,
        )

    @property
    def weight(self) -> nn.Parameter:
        """This rank's rows `[V/TP, D]`."""
        return self.lookup.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return embed_tokens(self.weight, tokens, self.sequence_parallel)


class _Lookup(torch.autograd.Function):
    """Rows `[..., D]` of a weight, whose gradient is accumulated in fp32 and rounded once.

    PyTorch accumulates in the weight's precision on a CPU, and between blocks of tokens on a GPU: in bf16 the sum of a
    frequent token soon stops growing.
    """

    @staticmethod
    def forward(ctx: Any, weight: Tensor, rows: Tensor) -> Tensor:
        ctx.save_for_backward(rows)
        ctx.num_rows, ctx.dtype = len(weight), weight.dtype
        return F.embedding(rows, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None]:
        (rows,) = ctx.saved_tensors
        grad_output = grad_output.to(torch.promote_types(ctx.dtype, torch.float32))
        grad_weight = torch.ops.aten.embedding_dense_backward(grad_output, rows, ctx.num_rows, -1, False)
        return grad_weight.to(ctx.dtype), None


def embed_tokens(weight: Tensor, tokens: Tensor, sequence_parallel: bool) -> Tensor:
    """Return the output of a TokenEmbedding with that weight `[V/TP, D]` for tokens `[B, S]`."""
    rows = tokens - get_tensor_model_parallel_group().rank() * len(weight)
    remote = (rows < 0) | (rows >= len(weight))
    looked_up: Tensor = _Lookup.apply(weight, rows.masked_fill(remote, 0))  # type: ignore[no-untyped-call]
    partial = looked_up.masked_fill(remote.unsqueeze(-1), 0.0).transpose(0, 1).contiguous()
    to_all = (
        reduce_scatter_to_sequence_parallel_region if sequence_parallel else reduce_from_tensor_model_parallel_region
    )
    return cast(Tensor, to_all(partial))


class TrunkLayer(DecoderLayer):
    """Layer `index` of the trunk, counted from 0."""

    def __init__(self, config: Config, megatron: TransformerConfig, index: int) -> None:
        super().__init__(config, megatron, layer_number=index + 1)
        self.index = index
        self.global_prefix = f"trunk.{index}"


class HiddenStateWeights(nn.Module):
    """Softmax weights of the hidden states in the sum that heads 2..n read (ELMo, arXiv:1802.05365, equation 1).

    Every pipeline stage with the embedding or trunk layers has a replica.
    """

    global_prefix = "weighted_hidden_states"

    def __init__(self, config: Config, megatron: TransformerConfig) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.empty(config.model.trunk_layers + 1))
        self.sequence_parallel = megatron.sequence_parallel

    def forward(self) -> Tensor:
        """Return the weights `[trunk_layers + 1]`, fp64, that of the embedding's output first.

        fp64 because the gradient of a logit is the small difference between a gradient and the weighted mean of all.
        """
        logits = self.logits.double()
        return (copy_to_tensor_model_parallel_region(logits) if self.sequence_parallel else logits).softmax(0)


class _AddWeighted(torch.autograd.Function):
    """total + weight * hidden in fp32, for which only `hidden` is kept, in its own precision."""

    @staticmethod
    def forward(ctx: Any, total: Tensor | None, hidden: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(hidden, weight)
        term = weight * hidden.float()
        return (term if total is None else term + total).to(hidden.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor]:
        hidden, weight = ctx.saved_tensors
        has_total, needs_hidden, _ = ctx.needs_input_grad
        grad_hidden = (weight * grad.float()).to(hidden.dtype) if needs_hidden else None
        grad_weight = (grad.float() * hidden).sum(-1).double().sum()
        return grad if has_total else None, grad_hidden, grad_weight


def add_weighted(total: Tensor | None, hidden: Tensor, weight: Tensor) -> Tensor:
    """Return total, None if it is 0, plus the product of the hidden states and their weight, a scalar in fp64."""
    result: Tensor = _AddWeighted.apply(total, hidden, weight)  # type: ignore[no-untyped-call]
    return result
