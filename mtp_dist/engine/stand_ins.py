"""Parameters that are always 0, which give the optimizers of all ranks the same groups.

DeepSpeed builds no optimizer without parameters, the norm of ZeRO has a collective per group over all stages, and that
of BF16_Optimizer needs a gradient on each rank. On a frozen trunk stages before the heads train nothing, and what heads
without layers train counts on tensor-parallel rank 0 only; with `train.low_rank` or `optimizer.multipliers` stages have
different groups.
"""

import torch
from deepspeed.runtime.pipe import schedule
from deepspeed.runtime.pipe.engine import PipelineEngine
from torch import nn

from mtp_dist.config import Config
from mtp_dist.engine.hooks import RunInstruction, hook_instruction
from mtp_dist.engine.optimizer import GroupKey, group_key
from mtp_dist.model.parameters import is_trained, parameter_shapes


def stand_in_names(config: Config) -> list[str]:
    """Return the global name of a trained weight of each of the optimizer's groups; none if no rank lacks a group."""
    if not (config.train.freezes_weights or config.optimizer.multipliers):
        return []
    names: dict[GroupKey, str] = {}
    for name, shape in parameter_shapes(config).items():
        if is_trained(config, name):
            names.setdefault(group_key(config, name, len(shape)), name)
    return list(names.values())


def new_stand_in(ndim: int) -> nn.Parameter:
    """Return a parameter of one element, which counts in norms on every tensor-parallel rank."""
    stand_in = nn.Parameter(torch.zeros([1] * ndim))
    stand_in.tensor_model_parallel = True  # type: ignore[attr-defined]
    return stand_in


def add_zero_gradients(pipeline: PipelineEngine, stand_ins: list[nn.Parameter]) -> None:
    """Give each stand-in a gradient of 0 in each step."""

    def add(execute: RunInstruction) -> None:
        for stand_in in stand_ins:
            stand_in.grad = torch.zeros_like(stand_in)
        if pipeline.using_bf16_optimizer:
            optimizer = pipeline.optimizer
            for has_gradient, weights in zip(optimizer.fp32_groups_has_gradients, optimizer.bf16_groups, strict=True):
                for index, weight in enumerate(weights):
                    has_gradient[index] |= any(weight is stand_in for stand_in in stand_ins)
        execute()

    hook_instruction(pipeline, schedule.ReduceTiedGrads, add)
