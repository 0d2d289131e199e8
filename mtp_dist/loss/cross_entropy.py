"""Cross-entropy and accuracy over a vocabulary that is cut over the tensor-parallel ranks."""

import torch
from megatron.core.parallel_state import get_tensor_model_parallel_group
from megatron.core.tensor_parallel.cross_entropy import vocab_parallel_cross_entropy
from torch import Tensor


def cross_entropy_sum(logits: Tensor, targets: Tensor, ignore_index: int) -> Tensor:
    """Sum of the cross-entropies of the valid targets, fp32, in nats: the same on every tensor-parallel rank.

    Overwrites fp32 logits (Megatron-core turns them into their softmax): count the correct ones before.

    logits: this rank's `[S, B, V/TP]`, -inf at padded entries. targets: `[S, B]` over the whole vocabulary.
    """
    valid = targets != ignore_index
    losses = vocab_parallel_cross_entropy(logits, targets.where(valid, 0))
    return losses.where(valid, 0.0).sum()


@torch.no_grad()
def count_correct(logits: Tensor, targets: Tensor) -> Tensor:
    """Number of targets `[S, B]` that are the most probable token of logits `[S, B, V/TP]`; masked ones never are."""
    group = get_tensor_model_parallel_group()
    best, entry = logits.float().max(-1)
    if group.size() == 1:
        return (entry == targets).sum()
    entry = entry + group.rank() * logits.shape[-1]
    local = torch.stack([best, entry.to(best.dtype)])
    everywhere = [torch.empty_like(local) for _ in range(group.size())]
    torch.distributed.all_gather(everywhere, local, group=group)
    values, entries = torch.stack(everywhere, 1)
    winner = values.argmax(0, keepdim=True)
    return (entries.gather(0, winner).squeeze(0).long() == targets).sum()
