"""The loss of all heads by autograd and Megatron-core's vocab-parallel cross-entropy."""

import torch
from megatron.core.parallel_state import get_tensor_model_parallel_group
from megatron.core.tensor_parallel.cross_entropy import vocab_parallel_cross_entropy
from megatron.core.tensor_parallel.mappings import reduce_from_tensor_model_parallel_region
from torch import Tensor

from mtp_dist.loss.linear_cross_entropy import LossSums
from mtp_dist.loss.objective import Heads, HeadSums, Objective


def naive_heads_loss(heads: Heads, trunk_output: Tensor, objective: Objective, sums: HeadSums) -> Tensor:
    """The loss, a scalar, by Megatron-core's cross-entropy; all heads' logits stay alive for the backward pass.

    Adds the micro-batch's losses, hits and valid targets to `sums`.
    """
    head_sums = {}
    for chain in heads.chains:
        state = trunk_output
        for head in objective.running(chain):
            state = heads.state(head, state.detach() if head in heads.detached else state)
            logits = heads.logits(head, heads.hidden(head, state))
            head_sums[head] = _naive_sums(logits, objective.targets[head - 1].T.contiguous(), objective)
    return sums.record(objective, head_sums)


def _naive_sums(logits: Tensor, targets: Tensor, objective: Objective) -> LossSums:
    ignore_index = objective.vocabulary.ignore_index
    # The cross-entropy comes last: it overwrites the logits.
    correct = count_correct(logits, targets)
    normalizer = log_z_squared_sum(logits, targets, ignore_index) if objective.z_loss else logits.new_zeros(())
    return LossSums(cross_entropy_sum(logits, targets, ignore_index), normalizer, correct, logits.new_zeros(()))


def cross_entropy_sum(logits: Tensor, targets: Tensor, ignore_index: int) -> Tensor:
    """Sum of the cross-entropies of the valid targets, fp32, in nats: the same on every tensor-parallel rank.

    Overwrites fp32 logits (Megatron-core turns them into their softmax): count the correct ones before.

    logits: this rank's `[S, B, V/TP]`, -inf at padded entries. targets: `[S, B]` over the whole vocabulary.
    """
    valid = targets != ignore_index
    losses = vocab_parallel_cross_entropy(logits, targets.where(valid, 0))
    return losses.where(valid, 0.0).sum()


def log_z_squared_sum(logits: Tensor, targets: Tensor, ignore_index: int) -> Tensor:
    """Sum over the valid targets of log(sum(exp(logits)))^2, fp32: what the z-loss weighs (PaLM, section 5).

    logits and targets as in `cross_entropy_sum`.
    """
    logits = logits.float()
    largest = logits.detach().max(-1, keepdim=True).values
    group = get_tensor_model_parallel_group()
    if group.size() > 1:
        torch.distributed.all_reduce(largest, torch.distributed.ReduceOp.MAX, group=group)
    denominator = reduce_from_tensor_model_parallel_region((logits - largest).exp().sum(-1))
    normalizer = denominator.log() + largest.squeeze(-1)
    return normalizer.square().where(targets != ignore_index, 0.0).sum()


@torch.no_grad()
def count_correct(logits: Tensor, targets: Tensor) -> Tensor:
    """Number of targets `[S, B]` whose logit is above every other one of `[S, B, V/TP]`; masked ones never are."""
    group = get_tensor_model_parallel_group()
    lowest = torch.finfo(logits.dtype).min
    local = targets - group.rank() * logits.shape[-1]
    is_here = ((local >= 0) & (local < logits.shape[-1])).unsqueeze(-1)
    entry = local.unsqueeze(-1).where(is_here, 0)
    target_logit = logits.gather(-1, entry)
    logits.detach().scatter_(-1, entry, target_logit.where(~is_here, lowest))
    best_other = logits.amax(-1)
    logits.detach().scatter_(-1, entry, target_logit)
    best = torch.stack([target_logit.where(is_here, lowest).squeeze(-1), best_other])
    if group.size() > 1:
        torch.distributed.all_reduce(best, torch.distributed.ReduceOp.MAX, group=group)
    return (best[0] > best[1]).sum()
