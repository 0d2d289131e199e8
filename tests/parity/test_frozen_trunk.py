"""Training heads on a frozen trunk equals the plain reference; a learning rate of 0 freezes weights too."""

import pytest
import torch
from torch import Tensor

from mtp_dist.config import Config
from mtp_dist.engine.tensor_shards import full_tensors, master_weight
from mtp_dist.model.parameters import model_part, parameter_shapes
from tests.engines import open_engine, take_step
from tests.parity.comparison import assert_within_bounds, errors_of, parse_case, reference_of, run_sharded
from tests.parity.test_variants import (
    APART,
    BF16,
    CHUNKS,
    CONDITIONED,
    DISTILLED,
    FULL,
    NAIVE,
    NEOX,
    ORDERED,
    QWEN2,
    QWEN3,
    RECOMPUTE,
    SEPARATE,
    SEQUENTIAL,
    TIED,
    WEIGHTED,
    ZERO,
)
from tests.ranks import Ranks

FROZEN = "train.freeze=[trunk]"
CASES = {
    "one process": "tp1-pp1-dp1",
    "tensor": f"tp2-pp1-dp1 {QWEN3}",
    "pipeline": f"tp1-pp2-dp1 {NEOX}",
    "both": f"tp2-pp2-dp1-sp {QWEN2}",
    "causal": f"tp2-pp2-dp1-sp heads.kind=causal {RECOMPUTE} {FULL}",
    "linear": f"tp2-pp2-dp1 heads.kind=linear {ORDERED} {CHUNKS} {RECOMPUTE}",
    "mlp": f"tp2-pp2-dp1 heads.kind=mlp {BF16}",
    "sequential, tied": f"tp1-pp3-dp1 {SEQUENTIAL} {TIED} {APART} parallel.partition=[0,4,0]",
    "repeated": f"tp2-pp2-dp1-sp {SEQUENTIAL} heads.repeated=true {NAIVE} {BF16}",
    "distillation": f"tp1-pp2-dp2 {SEQUENTIAL} {TIED} {BF16} {DISTILLED} heads.loss_weights=[0,1,1,1]",
    "no trunk layer on the last stage": f"tp1-pp2-dp2 {ZERO} parallel.partition=[4,0] {NAIVE}",
    "unembeddings only": f"tp2-pp2-dp1 {SEPARATE} heads.layers_per_head=0 {ZERO}",
    "condition": f"tp1-pp2-dp2 heads.kind=mlp {CONDITIONED} {BF16}",
    "condition without blocks": f"tp2-pp2-dp1-sp {CONDITIONED} {SEPARATE} heads.layers_per_head=0 {RECOMPUTE}",
    "separate": f"tp2-pp1-dp2 {SEPARATE} {ORDERED} {BF16}",
    "weighted hidden states": f"tp2-pp1-dp1-sp {WEIGHTED} {DISTILLED} {BF16}",
}


@pytest.mark.parametrize("name", CASES)
def test_heads_on_a_frozen_trunk_equal_the_reference(ranks: Ranks, name: str) -> None:
    layout, config = parse_case(f"{CASES[name]} {FROZEN}")
    truth = reference_of(config, 2)
    assert_within_bounds(config, errors_of(run_sharded(ranks, config, layout, 2), truth))
    parts = {".".join(gradient.split(".")[:2]) for gradient in truth.gradients}
    assert parts and not parts & {"heads.1", "unembedding.weight", "unembeddings.1", "final_norm.weight"}


def weights_of_steps(config: Config, steps: int) -> list[dict[str, Tensor]]:
    """On each rank: return the stage's fp32 weights before the first step and after each."""
    engine, shapes = open_engine(config), parameter_shapes(config)

    def weights() -> dict[str, Tensor]:
        tensors = full_tensors(engine.stage, shapes, engine.topology, master_weight)
        return {name: weight.clone() for name, weight in tensors}

    return [weights(), *((take_step(engine, step), weights())[1] for step in range(1, steps + 1))]


@pytest.mark.parametrize("case", ["tp2-pp2-dp1", f"tp1-pp2-dp1 {BF16}", f"tp1-pp1-dp2 {ZERO}"])
def test_factor_0_keeps_weights(ranks: Ranks, case: str) -> None:
    layout, config = parse_case(f'{case} optimizer.multipliers={{"trunk":[[1,0],[3,0.1]],"heads":[[1,1],[3,0]]}}')
    assert config.optimizer.weight_decay
    for start, _, second, third in ranks.run(layout.world_size, weights_of_steps, config, 3):
        for name, weight in second.items():
            is_head = model_part(name) == "heads"
            assert torch.equal(weight, start[name]) == (not is_head), name
            assert torch.equal(weight, third[name]) == is_head, name
