"""Tensor-parallel sharding of the parameters: tag a module's parameters, shard full tensors, unshard them."""

from collections.abc import Iterator, Sequence

import torch
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding
from torch import Tensor, nn


def tag_shards(module: nn.Module) -> None:
    """Tag every parameter that tensor parallelism shards, with Megatron's attributes.

    The engine reads `tensor_model_parallel` to count each parameter once in the gradient norm; `partition_dim` and
    `partition_stride` describe the shards (stride 2: SwiGLU's two halves are sharded one by one, also
    those of an adapter's B). The bias of a matrix whose columns are sharded is replicated.
    """
    for name, child in module.named_modules():
        if isinstance(child, (ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding)):
            is_row = isinstance(child, RowParallelLinear)
            is_fc1 = name.removesuffix(".lora_B").endswith("linear_fc1")
            stride = 2 if is_fc1 and child.config.gated_linear_unit else 1
            for param in (child.weight, None if is_row else getattr(child, "bias", None)):
                if param is not None:  # the tied unembedding has no weight of its own
                    param.tensor_model_parallel = True
                    param.partition_dim = int(is_row)
                    param.partition_stride = stride


def is_sharded(weight: nn.Parameter) -> bool:
    """Return whether tensor-parallel ranks hold different shards of this parameter, not all the same values."""
    return getattr(weight, "tensor_model_parallel", False)


def _partition(weight: nn.Parameter) -> tuple[int, int]:
    """Return the dimension and the stride of a parameter's shards."""
    return weight.partition_dim, weight.partition_stride  # type: ignore[attr-defined]


def shard(full: Tensor, weight: nn.Parameter, rank: int, ranks: int) -> Tensor:
    """Return the shard of the full tensor that tensor-parallel rank `rank` of `ranks` holds in `weight`.

    Rows beyond the real vocabulary are 0.
    """
    if not is_sharded(weight):
        return full
    dim, stride = _partition(weight)
    missing = weight.shape[dim] * ranks - full.shape[dim]
    if missing:
        full = torch.cat([full, full.new_zeros(missing, *full.shape[1:])])
    blocks = full.chunk(stride, dim)
    return torch.cat([block.chunk(ranks, dim)[rank] for block in blocks], dim)


def shard_blocks(
    shape: Sequence[int], weight: nn.Parameter, rank: int, ranks: int, first: int, last: int
) -> Iterator[tuple[slice, ...]]:
    """Yield the blocks of the full tensor of that shape that are rows first to last - 1 of a rank's shard, in order.

    Rows beyond the real vocabulary are in none of them.
    """
    if first == last:
        return
    if not is_sharded(weight):
        yield (slice(first, last),)
        return
    dim, stride = _partition(weight)
    if dim == 1:
        yield slice(first, last), slice(rank * weight.shape[1], (rank + 1) * weight.shape[1])
        return
    rows = weight.shape[0] // stride
    for block in range(stride):
        # Row i of the shard is row i + offset of the full tensor, for the rows of this block.
        offset = block * rows * ranks + rank * rows - block * rows
        begin, end = max(first, block * rows), min(last, (block + 1) * rows, shape[0] - offset)
        if begin < end:
            yield (slice(begin + offset, end + offset),)


def unshard(shards: Sequence[Tensor], weight: nn.Parameter, shape: Sequence[int]) -> Tensor:
    """Return the full tensor of that shape from the shards of all tensor-parallel ranks, in rank order."""
    if not is_sharded(weight):
        return shards[0]
    dim, stride = _partition(weight)
    blocks = zip(*(piece.chunk(stride, dim) for piece in shards), strict=True)
    full = torch.cat([piece for block in blocks for piece in block], dim)
    return full.narrow(dim, 0, shape[dim])
