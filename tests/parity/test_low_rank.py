"""Training low-rank adapters and further heads equals the plain reference, from adapters that are not 0."""

import json
from pathlib import Path

import pytest
import torch

from mtp_dist.model.parameters import is_trained, parameter_shapes
from tests.errors import largest_error, norm_error
from tests.parity.comparison import assert_within_bounds, errors_of, parse_case, reference_of, run_sharded
from tests.parity.resuming import ALL, BOTH, END, MIDDLE, at, run
from tests.parity.runs import losses_of_evaluations
from tests.parity.test_variants import (
    BF16,
    DISTILLED,
    FULL,
    NEOX,
    QWEN2,
    QWEN3,
    RECOMPUTE,
    SEPARATE,
    SEQUENTIAL,
    TIED,
    ZERO,
)
from tests.ranks import Ranks

ADAPTED = 'train.low_rank={"rank":3,"alpha":5}'
CASES = {
    "tensor": f"tp2-pp1-dp1 {QWEN2} heads.condition=previous_token {ADAPTED}",
    "pipeline": f"tp1-pp2-dp1 {QWEN3} {SEQUENTIAL} {TIED} {DISTILLED} {ADAPTED}",
    "both": f"tp2-pp2-dp1-sp heads.weighted_hidden_states=true {ADAPTED}",
    "ZeRO": f"tp1-pp2-dp2 heads.kind=mlp {ZERO} {RECOMPUTE} {ADAPTED} parallel.partition=[4,0]",
    "bf16": f"tp2-pp2-dp1-sp heads.kind=causal {BF16} {FULL} {ADAPTED}",
    "no layer behind the embedding": f"tp1-pp2-dp1-v {BF16} {ADAPTED} parallel.partition=[0,1,3,0]",
    "biases": f"tp2-pp2-dp1-sp {NEOX} {ADAPTED}",
    "some matrices": "tp2-pp1-dp2 " + SEPARATE + ' train.low_rank={"rank":3,"targets":[linear_fc1,linear_proj]}',
}


@pytest.mark.parametrize("name", CASES)
def test_low_rank_training_equals_the_reference(ranks: Ranks, name: str) -> None:
    layout, config = parse_case(CASES[name])
    truth = reference_of(config, 2)
    assert truth.gradients.keys() == {name for name in parameter_shapes(config) if is_trained(config, name)}
    assert all(gradient.any() for gradient in truth.gradients.values()), "A has a gradient as well as B"
    assert_within_bounds(config, errors_of(run_sharded(ranks, config, layout, 2), truth))


def test_adapters_start_as_the_base_and_resume_at_another_layout(ranks: Ranks, tmp_path: Path) -> None:
    low_rank = {"train": {"low_rank": {"rank": 3}}}
    adapted, plain = (
        ranks.run(BOTH.world_size, losses_of_evaluations, at(BOTH, tmp_path, **sections))[-1]
        for sections in (low_rank, {})
    )
    assert torch.equal(adapted[0], plain[0]) and not torch.equal(adapted[2], plain[2])

    run(ranks, at(BOTH, tmp_path, **low_rank), BOTH, 0, MIDDLE)
    whole = run(ranks, at(BOTH, tmp_path, **low_rank), BOTH, 0, END, None, False)
    folder = tmp_path / f"step_{MIDDLE:08d}"
    saved = json.loads((folder / "optimizer.safetensors.index.json").read_text())["weight_map"]
    assert saved.keys() == whole.moments.keys()
    rest = run(ranks, at(ALL, tmp_path, 1, **low_rank), ALL, MIDDLE, END, folder, False)
    assert rest.moments.keys() == whole.moments.keys()
    assert max(norm_error(weight, whole.weights[name]) for name, weight in rest.weights.items()) <= 1e-4
    assert largest_error(torch.stack(rest.losses), torch.stack(whole.losses[MIDDLE:])) <= 1e-5
