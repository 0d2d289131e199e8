"""How tensor parallelism shards the parameters: tag a module's parameters, shard full tensors, unshard them."""

from collections.abc import Iterator, Sequence

import torch
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding
from torch import Tensor, nn


def tag_shards(module: nn.Module) -> None:
    """Mark every weight that tensor parallelism cuts, with Megatron's attributes.

    The engine reads `tensor_model_parallel` to count each weight once in the gradient norm; `partition_dim` and
    `partition_stride` say how the weight is cut (stride 2: SwiGLU's two halves are cut one by one).
    """
    for name, child in module.named_modules():
        if isinstance(child, (ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding)):
            if child.weight is None:  # the tied unembedding holds no weight of its own
                continue
            child.weight.tensor_model_parallel = True
            child.weight.partition_dim = int(isinstance(child, RowParallelLinear))
            child.weight.partition_stride = 2 if name.endswith("linear_fc1") else 1


def is_sharded(weight: nn.Parameter) -> bool:
    """Whether tensor-parallel ranks hold different parts of this weight; they hold the same values where not."""
    return getattr(weight, "tensor_model_parallel", False)


def _partition(weight: nn.Parameter) -> tuple[int, int]:
    """Dimension and stride in which a weight is cut."""
    return weight.partition_dim, weight.partition_stride  # type: ignore[attr-defined]


def shard(whole: Tensor, weight: nn.Parameter, rank: int, ranks: int) -> Tensor:
    """The part of the `whole` tensor that tensor-parallel rank `rank` of `ranks` holds in `weight`.

    Rows of a vocabulary beyond the real one are 0.
    """
    if not is_sharded(weight):
        return whole
    dim, stride = _partition(weight)
    missing = weight.shape[dim] * ranks - whole.shape[dim]
    if missing:
        whole = torch.cat([whole, whole.new_zeros(missing, *whole.shape[1:])])
    blocks = whole.chunk(stride, dim)
    return torch.cat([block.chunk(ranks, dim)[rank] for block in blocks], dim)


def blocks_of_part(
    shape: Sequence[int], weight: nn.Parameter, rank: int, ranks: int, first: int, last: int
) -> Iterator[tuple[slice, ...]]:
    """Yield which blocks of the whole tensor of that shape are rows first to last - 1 of what `cut` gives a rank.

    They are in the order of the rows. Rows beyond the real vocabulary are in none of them.
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
        # Row 0 of this rank's part of the block is at `offset` more in the whole.
        offset = block * rows * ranks + rank * rows - block * rows
        begin, end = max(first, block * rows), min(last, (block + 1) * rows, shape[0] - offset)
        if begin < end:
            yield (slice(begin + offset, end + offset),)


def unshard(parts: Sequence[Tensor], weight: nn.Parameter, shape: Sequence[int]) -> Tensor:
    """The whole tensor of that shape from the parts of all tensor-parallel ranks, in rank order: undoes `cut`."""
    if not is_sharded(weight):
        return parts[0]
    dim, stride = _partition(weight)
    blocks = zip(*(part.chunk(stride, dim) for part in parts), strict=True)
    whole = torch.cat([part for block in blocks for part in block], dim)
    return whole.narrow(dim, 0, shape[dim])
