"""On a frozen trunk only later heads are trained: the rest stays bitwise the same, without gradient and moments."""

from typing import Any, NamedTuple

import pytest
import torch
from deepspeed.runtime.pipe.schedule import BackwardPass
from torch import Tensor

from mtp_dist.config import Config
from mtp_dist.engine.gradients import before_update
from mtp_dist.engine.hooks import RunInstruction, hook_instruction
from mtp_dist.engine.optimizer_state import ensure_state
from mtp_dist.engine.tensor_shards import full_tensors, master_weight
from mtp_dist.loss.schedule import head_schedule
from mtp_dist.model.parameters import named_weights, parameter_shapes
from mtp_dist.model.trunk import TrunkLayer
from tests.engines import open_engine, step_batch, take_step
from tests.parity.comparison import parse_case
from tests.ranks import Ranks

FROZEN = "train.freeze=[trunk]"


class Observed(NamedTuple):
    """What one rank sees of a training."""

    changed: dict[str, bool]
    """Whether each full weight of the stage has changed, by global name."""
    next_token: list[tuple[float | None, float | None]]
    """Loss and accuracy of head 1 on the same batch, before and after."""
    norms: list[dict[str, float]]
    graphs: set[bool]
    """Whether outputs of trunk layers and of head 1 in training require a gradient."""
    backward_passes: int
    gradients: set[str]
    """Weights with a gradient before the update."""
    state_bytes: int
    """Bytes of gradients, moments and master weights, without those of the stand-in."""
    trained: int
    """Trained parameters of this rank's shards."""


def observe(config: Config) -> Observed:
    """On each rank: train three steps."""
    engine, schedule, shapes = open_engine(config), head_schedule(config, 1), parameter_shapes(config)
    graphs: set[bool] = set()
    for name, module in engine.stage.named_modules():
        if isinstance(module, TrunkLayer) or name.endswith(".heads.1"):
            module.register_forward_hook(lambda layer, _, output: graphs.add(layer.training and output.requires_grad))

    def weights() -> dict[str, Tensor]:
        tensors = full_tensors(engine.stage, shapes, engine.topology, master_weight)
        return {name: weight.clone() for name, weight in tensors}

    passes = []

    def count(execute: RunInstruction) -> None:
        passes.append(1)
        execute()

    gradients: dict[str, int] = {}

    def inspect() -> None:
        for name, weight in named_weights(engine.stage):
            if weight.grad is not None:
                gradients[name] = weight.grad.nbytes

    batch = step_batch(engine)
    before, evaluation = weights(), engine.evaluate(batch, schedule)
    hook_instruction(engine.pipeline, BackwardPass, count)
    with before_update(engine.pipeline, inspect):
        results = [take_step(engine, step, rate=1e-2) for step in (1, 2, 3)]
    after, evaluation_after = weights(), engine.evaluate(batch, schedule)
    ensure_state(engine.pipeline)
    bf16 = config.train.precision == "bf16"
    return Observed(
        changed={name: not torch.equal(weight, after[name]) for name, weight in before.items()},
        next_token=[(heads.losses[0], heads.accuracies[0]) for heads in (evaluation, evaluation_after)],
        norms=[result.grad_norms_by_module for result in results],
        graphs=graphs,
        backward_passes=len(passes),
        gradients=set(gradients),
        state_bytes=_optimizer_bytes(engine.pipeline) + (0 if bf16 else sum(gradients.values())),
        trained=sum(weight.numel() for _, weight in named_weights(engine.stage) if weight.requires_grad),
    )


def _optimizer_bytes(pipeline: Any) -> int:
    """Return the bytes of moments and, in bf16, of master weights and fp32 gradients."""
    optimizer = pipeline.basic_optimizer
    state = [value for values in optimizer.state.values() for value in values.values() if value.numel() > 1]
    if pipeline.using_bf16_optimizer:
        state += [*pipeline.optimizer.fp32_groups_flat_partition, *pipeline.optimizer.fp32_groups_gradients_flat]
    return sum(tensor.nbytes for tensor in state)


CASES: dict[str, tuple[str, tuple[str, ...]]] = {
    "one process": ("tp1-pp1-dp1", ("heads.2.", "heads.3.", "heads.4.")),
    "all axes, bf16": (
        "tp2-pp2-dp1-sp train.precision=bf16 heads.kind=mlp model.tie_embeddings=true",
        ("heads.",),
    ),
    "weighted hidden states": (
        "tp2-pp1-dp1-sp heads.weighted_hidden_states=true",
        ("heads.2.", "heads.3.", "heads.4.", "weighted_hidden_states."),
    ),
    "pipeline": (
        "tp1-pp3-dp1 heads.kind=linear heads.unembedding=separate heads.token_order=1.0 parallel.partition=[2,1,1]",
        (*(f"{part}.{head}." for part in ("heads", "unembeddings") for head in (2, 3, 4)), "token_order."),
    ),
}
"""The case, and beginnings of the names of the weights that are trained."""


@pytest.mark.parametrize("name", CASES)
def test_only_later_heads_are_trained(ranks: Ranks, name: str) -> None:
    case, trained = CASES[name]
    layout, config = parse_case(f"{case} {FROZEN}")
    by_rank = ranks.run(layout.world_size, observe, config)
    changed = {name: was for seen in by_rank for name, was in seen.changed.items()}
    assert changed == {name: name.startswith(trained) for name in parameter_shapes(config)}
    bf16, replicas = config.train.precision == "bf16", layout.tensor * layout.data
    for rank, seen in enumerate(by_rank):
        is_last = rank // replicas == layout.pipeline - 1
        before, after = seen.next_token
        assert before == after and before[0] is not None
        assert all(norms.keys() <= {"head_2", "head_3", "head_4", "shared"} for norms in seen.norms)
        assert seen.graphs <= {False}
        assert seen.backward_passes == (3 * config.micro_batches if is_last else 0)
        assert all(name.startswith(trained) for name in seen.gradients)
        assert (seen.trained > 0) == is_last
        # In bf16 master weight, gradient and two moments, with some elements of padding; in fp32 without the master.
        assert 0 <= seen.state_bytes - seen.trained * (16 if bf16 else 12) <= 16 * 8
