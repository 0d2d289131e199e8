"""The loss of all heads by autograd and Megatron-core's vocab-parallel cross-entropy, for comparison."""

from typing import Any

import torch
from megatron.core.parallel_state import get_tensor_model_parallel_group
from megatron.core.tensor_parallel.cross_entropy import vocab_parallel_cross_entropy
from megatron.core.tensor_parallel.mappings import reduce_from_tensor_model_parallel_region
from torch import Tensor

from mtp_dist.loss.objective import Heads, HeadSums, Objective


def naive_heads_loss(heads: Heads, trunk_output: Tensor, context: Any, objective: Objective, sums: HeadSums) -> Tensor:
    """Return the loss, a scalar, and add the sums behind it to `sums`, which are 0 before.

    All heads' logits stay alive for the backward pass.
    """
    rows = list(objective.zero_sums(trunk_output.dtype).tensor)
    for chain in heads.chains:
        hidden = trunk_output
        for head in objective.active(chain):
            hidden = heads.pre_norm_hidden(head, hidden.detach() if head in heads.detached else hidden, context)
            logits = heads.logits(head, heads.normalize(head, hidden, context), context)
            if objective.on_logits:
                objective.on_logits(head, slice(None), logits.detach().flatten(0, 1))
            rows[head - 1] = head_sums(logits, objective.targets[head - 1].T.contiguous(), objective)
    differentiable = HeadSums(torch.stack(rows))
    sums.tensor.add_(differentiable.tensor.detach())
    return objective.loss(differentiable)


def head_sums(logits: Tensor, targets: Tensor, objective: Objective) -> Tensor:
    """Return a row of HeadSums from this rank's logits `[S, B, V/TP]`, which it overwrites, and targets `[S, B]`."""
    valid = targets != objective.vocabulary.ignore_index
    # The cross-entropy comes last: Megatron-core turns fp32 logits into their softmax in place.
    correct = count_correct(logits, targets)
    log_z_squared = log_z_squared_sum(logits, valid) if objective.z_loss else logits.new_zeros(())
    losses = vocab_parallel_cross_entropy(logits, targets.where(valid, 0))
    no_soft_targets = losses.new_zeros(())
    columns = losses.where(valid, 0.0).sum(), log_z_squared, correct, *[no_soft_targets] * 2, valid.sum()
    return torch.stack([column.to(losses.dtype) for column in columns])


def log_z_squared_sum(logits: Tensor, valid: Tensor) -> Tensor:
    """Return the sum of log(sum(exp(logits)))^2 over the valid positions, fp32 (PaLM, arXiv:2204.02311, section 5)."""
    logits = logits.float()
    largest = logits.detach().max(-1, keepdim=True).values
    group = get_tensor_model_parallel_group()
    if group.size() > 1:
        torch.distributed.all_reduce(largest, torch.distributed.ReduceOp.MAX, group=group)
    denominator = reduce_from_tensor_model_parallel_region((logits - largest).exp().sum(-1))
    log_z = denominator.log() + largest.squeeze(-1)
    return log_z.square().where(valid, 0.0).sum()


@torch.no_grad()
def count_correct(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the number of targets `[S, B]` whose logit is above every other one of `[S, B, V/TP]`.

    Masked targets never are.
    """
    group = get_tensor_model_parallel_group()
    lowest = torch.finfo(logits.dtype).min
    local = targets - group.rank() * logits.shape[-1]
    is_local = ((local >= 0) & (local < logits.shape[-1])).unsqueeze(-1)
    column = local.unsqueeze(-1).where(is_local, 0)
    target_logit = logits.gather(-1, column)
    logits.detach().scatter_(-1, column, target_logit.where(~is_local, lowest))
    best_other = logits.amax(-1)
    logits.detach().scatter_(-1, column, target_logit)
    best = torch.stack([target_logit.where(is_local, lowest).squeeze(-1), best_other])
    if group.size() > 1:
        torch.distributed.all_reduce(best, torch.distributed.ReduceOp.MAX, group=group)
    return (best[0] > best[1]).sum()
