"""Every kind of heads, way to the loss and mask of documents equals the plain reference, alone and combined."""

import json

import pytest

from mtp_dist.config.heads import KINDS
from tests.parity.comparison import assert_within_bounds, errors_of, parse_case, reference_of, run_sharded
from tests.ranks import Ranks
from tests.tiny import LINEAR_ROPE, LLAMA3_ROPE

APART = "data.loss_across_documents=false data.attention_across_documents=false"
RECOMPUTE, NAIVE = "heads.loss_mode=recompute", "heads.loss_mode=naive"
SEQUENTIAL, TIED, SEPARATE = "heads.kind=sequential", "model.tie_embeddings=true", "heads.unembedding=separate"
FULL, SELECTIVE = "train.activation_checkpointing=full", "train.activation_checkpointing=selective"
DISTILLED = "heads.distillation=0.5 heads.distillation_top=5"
VARIATION = "heads.total_variation=1.5"
ORDERED = "heads.token_order=0.7 heads.token_order_window=8"
ZERO, BF16 = "parallel.zero_stage=1", "train.precision=bf16"
ISOLATED = "heads.detach=full"
CHUNKS = "heads.chunk_tokens=5"
CONDITIONED = "heads.condition=previous_token"
IN_TWO_LAYOUTS = ("parallel", "causal", "sequential")
"""Kinds of heads whose masks of documents are compared in more than one layout."""
WEIGHTED = "heads.weighted_hidden_states=true"
RATES = 'optimizer.multipliers={"trunk":0.1,"heads":5}'
CHANGING_RATES = 'optimizer.multipliers={"trunk":[[1,0],[2,0.1]],"heads":5}'
SPLIT = "heads.stages"
QWEN2, QWEN3, NEOX, MISTRAL = "blocks=qwen2", "blocks=qwen3", "blocks=neox", "blocks=mistral"
FOUR_GROUPS, LEAPS = "model.num_query_groups=4", "heads.prediction_distances=[1,3,5,7]"


def product(layouts: str, *variants: str) -> list[str]:
    return [f"{layout} {variant}" for layout in layouts.split() for variant in variants]


TWO_STEPS = [
    # Every kind of heads.
    *product(
        "tp1-pp2-dp1 tp2-pp2-dp1 tp2-pp1-dp1-sp",
        "heads.layers_per_head=2 heads.count=3",
        *(f"heads.kind={kind}" for kind in KINDS if kind != "parallel"),
        f"{SEQUENTIAL} heads.repeated=true",
    ),
    "tp2-pp2-dp1-sp heads.kind=causal heads.detach=true",
    "tp1-pp2-dp1 heads.detach=true",
    f"tp2-pp2-dp1 heads.kind=mlp heads.detach=true {SEPARATE}",
    f"tp1-pp2-dp1 {SEQUENTIAL} heads.detach=true",
    *product("tp2-pp2-dp1-sp", *(f"heads.kind={kind} {ISOLATED}" for kind in ("parallel", "linear"))),
    f"tp1-pp2-dp1 {SEQUENTIAL} {ISOLATED} heads.z_loss=0.01",
    f"tp2-pp2-dp1-sp {SEQUENTIAL} {ISOLATED} {NAIVE}",
    f"tp1-pp2-dp2 {SEQUENTIAL} {ISOLATED} {ZERO}",
    f"tp1-pp2-dp2 {SEQUENTIAL} {ISOLATED} {TIED} {ZERO} {ORDERED} {DISTILLED}",
    f"tp2-pp1-dp1 heads.kind=mlp {ISOLATED} {SEPARATE} {RECOMPUTE}",
    f"tp2-pp1-dp1-sp heads.kind=causal {ISOLATED} {NAIVE} {TIED}",
    f"tp2-pp2-dp1 {SEQUENTIAL} heads.repeated=true {ISOLATED} {BF16}",
    f"tp2-pp2-dp1 {SEQUENTIAL} {TIED}",
    f"tp2-pp2-dp1-sp {SEQUENTIAL} {SEPARATE} {RECOMPUTE}",
    f"tp2-pp2-dp1-sp {SEQUENTIAL} {NAIVE}",
    f"tp2-pp1-dp1-sp heads.kind=anticausal {RECOMPUTE}",
    f"tp2-pp1-dp1 heads.kind=anticausal {NAIVE}",
    f"tp2-pp2-dp1 {SEQUENTIAL} heads.repeated=true {FULL}",
    f"tp1-pp2-dp2 {SEQUENTIAL} {ZERO}",
    # Heads that read the token before their target.
    *product("tp2-pp1-dp1-sp tp1-pp2-dp1", *(f"heads.kind={kind} {CONDITIONED}" for kind in ("parallel", "mlp"))),
    f"tp1-pp1-dp1 heads.kind=linear {CONDITIONED}",
    f"tp2-pp1-dp1 heads.kind=linear {CONDITIONED} {ISOLATED} {RECOMPUTE}",
    f"tp2-pp2-dp1-sp {CONDITIONED} {NAIVE} {SEPARATE} heads.layers_per_head=0",
    f"tp2-pp2-dp1 heads.kind=mlp {CONDITIONED} {NAIVE} heads.detach=true {TIED}",
    f"tp2-pp2-dp1-sp {CONDITIONED} {RECOMPUTE} {LEAPS} {DISTILLED} {FULL}",
    f"tp4-pp1-dp1 micro_batches=1 {FOUR_GROUPS} {CONDITIONED} {ZERO} {CHUNKS} {APART}",
    f"tp2-pp2-dp1-sp heads.kind=linear {CONDITIONED} {BF16}",
    # Distances and weights.
    f"tp2-pp2-dp1 {LEAPS}",
    "tp1-pp2-dp1 heads.kind=causal heads.count=3 heads.prediction_distances=[1,2,4]",
    "tp1-pp2-dp1 heads.auxiliary_weight=[[1,0.3],[2,0.1]]",
    "tp1-pp1-dp2 heads.loss_decay=0.6",
    # Heads on a weighted sum of all hidden states.
    f"tp2-pp2-dp1-sp {WEIGHTED}",
    f"tp1-pp4-dp1 {WEIGHTED} heads.kind=mlp heads.detach=true",
    f"tp1-pp3-dp1 {WEIGHTED} parallel.partition=[0,4,0]",
    f"tp1-pp2-dp2 {WEIGHTED} heads.kind=linear {NAIVE} {ZERO} {TIED}",
    f"tp2-pp2-dp1 {WEIGHTED} {ISOLATED} {RECOMPUTE} {DISTILLED} parallel.partition=[4,0]",
    # Detached: bf16 drops the gradients of states of little weight, see docs/heads.md.
    f"tp1-pp2-dp2 {WEIGHTED} {BF16} {FULL} heads.detach=true",
    # Learning rates by part of the model.
    f"tp2-pp2-dp1-sp {RATES}",
    f"tp1-pp2-dp2 {RATES} {SEQUENTIAL} {TIED} {ZERO}",
    f"tp1-pp2-dp2 {RATES} heads.kind=mlp {BF16}",
    # Distillation and token order.
    f"tp2-pp1-dp1 {DISTILLED}",
    f"tp2-pp2-dp1-sp {SEQUENTIAL} heads.distillation=0.5 heads.distillation_top=500 {RECOMPUTE} {VARIATION}",
    f"tp2-pp2-dp1 heads.distillation=2.0 heads.distillation_top=3 {LEAPS} {CHUNKS} heads.z_loss=0.01 {SEPARATE}",
    f"tp1-pp2-dp2 {DISTILLED} heads.loss_weights=[1,0.3,0.5,0]",
    f"tp1-pp1-dp2 {SEQUENTIAL} heads.distillation=0.5 {ORDERED}",
    f"tp2-pp2-dp1 {VARIATION} heads.distillation_top=5 {LEAPS} {CHUNKS} heads.z_loss=0.01 {SEPARATE}",
    f"tp1-pp2-dp2 {VARIATION} {ORDERED} heads.loss_weights=[1,0.3,0.5,0] {TIED}",
    f"tp2-pp1-dp1 {VARIATION} heads.distillation_top=5 {BF16}",
    f"tp2-pp2-dp1 {ORDERED}",
    f"tp2-pp1-dp1-sp heads.token_order=1.0 heads.token_order_window=20 {CHUNKS} {RECOMPUTE}",
    # In bf16.
    f"tp2-pp1-dp1 {DISTILLED} {BF16}",
    f"tp2-pp2-dp1 {ORDERED} {BF16}",
    f"tp2-pp2-dp1 {SEQUENTIAL} {TIED} {BF16}",
    f"tp2-pp2-dp1-sp heads.kind=causal heads.detach=true {BF16}",
    # Ways to the loss; most of `eager`, the default, is in test_layouts.py.
    *(
        f"{layout} {mode}"
        for mode in (RECOMPUTE, NAIVE)
        for layout in (
            "tp1-pp1-dp1",
            f"tp2-pp2-dp1-sp {ZERO}",
            "tp1-pp2-dp2 micro_batches=1",
            f"tp4-pp1-dp1 micro_batches=1 {ZERO} {FOUR_GROUPS}",
            f"tp2-pp2-dp1-sp {BF16}",
            f"tp1-pp2-dp2 {BF16}",
        )
    ),
    f"tp2-pp2-dp1-sp {ZERO} {SEPARATE}",
    f"tp2-pp2-dp1-sp {SEPARATE} heads.layers_per_head=0",
    f"tp1-pp2-dp1 {SEPARATE} heads.layers_per_head=0 {RECOMPUTE}",
    f"tp1-pp2-dp2 {SEPARATE} heads.z_loss=0.01 {BF16}",
    f"tp4-pp1-dp1 micro_batches=1 {FOUR_GROUPS} {SEPARATE} heads.z_loss=0.01 {CHUNKS}",
    f"tp2-pp2-dp1-sp micro_batches=1 heads.z_loss=0.01 {CHUNKS} {FULL}",
    f"tp2-pp2-dp1-sp {SEPARATE} heads.z_loss=0.01 {RECOMPUTE} {CHUNKS}",
    f"tp2-pp2-dp1-sp {ZERO} {RECOMPUTE} {TIED} {FULL}",
    f"tp4-pp1-dp1 {FOUR_GROUPS} {RECOMPUTE} heads.z_loss=0.01 {SELECTIVE}",
    f"tp2-pp2-dp1-sp {ZERO} {SEPARATE} heads.z_loss=0.01 {NAIVE}",
    f"tp1-pp2-dp2 {NAIVE} {TIED}",
    # DualPipeV: all kinds of heads, ways to the loss and masks.
    f"tp1-pp2-dp1-v parallel.partition=uniform {RATES}",
    f"tp1-pp2-dp1-v micro_batches=8 heads.kind=causal {APART} {ZERO}",
    f"tp1-pp2-dp1-v heads.kind=anticausal {RECOMPUTE} parallel.partition=[0,1,2,1]",
    f"tp1-pp2-dp1-v heads.kind=linear {CHUNKS} {SEPARATE} {DISTILLED} {LEAPS}",
    f"tp1-pp2-dp2-v heads.kind=mlp {CONDITIONED} {TIED} {ZERO} {ORDERED}",
    f"tp2-pp2-dp1-sp-v {SEQUENTIAL} {APART} {FULL}",
    f"tp2-pp2-dp1-v {SEQUENTIAL} {TIED} {BF16} {VARIATION}",
    f"tp1-pp2-dp1-v {SEQUENTIAL} heads.repeated=true {ISOLATED} {NAIVE}",
    f"tp1-pp3-dp1-v micro_batches=8 {APART} {BF16} {SEPARATE}",
    f"tp1-pp4-dp1-v micro_batches=8 model.trunk_layers=6 {WEIGHTED} {BF16} heads.detach=true {TIED}",
    f"tp1-pp2-dp2-v {WEIGHTED} parallel.partition=[0,1,2,1]",
    # Heads on several stages.
    f"tp1-pp2-dp1 {SPLIT}=2",
    f"tp1-pp2-dp1 {SPLIT}=2 heads.kind=linear {TIED} {RECOMPUTE} {CHUNKS} {APART}",
    f"tp1-pp2-dp1 {SPLIT}=2 heads.kind=mlp {BF16} {RECOMPUTE} heads.detach=true",
    f"tp1-pp2-dp2 {SPLIT}=2 {ZERO} {SEPARATE} heads.layers_per_head=0 parallel.partition=[4,0]",
    f"tp2-pp2-dp1-sp {SPLIT}=2 {BF16} {TIED} {LEAPS} {FULL}",
    f"tp1-pp3-dp1 {SPLIT}=2 {ISOLATED} {ZERO} heads.z_loss=0.01",
    f"tp1-pp4-dp1 {SPLIT}=3 heads.kind=mlp {TIED} {ISOLATED} {BF16} {RATES}",
    f"tp1-pp4-dp1 {SPLIT}=2 model.trunk_layers=6 parallel.partition=uniform heads.loss_weights=[1,0,0.5,0]",
    # Building blocks of other architectures.
    *product("tp2-pp1-dp1 tp1-pp2-dp1 tp2-pp2-dp1-sp", QWEN2, QWEN3, NEOX, MISTRAL),
    *product("tp2-pp2-dp1-sp", *(f"{block} {BF16}" for block in (QWEN2, QWEN3, NEOX, MISTRAL))),
    *(f"tp2-pp2-dp1-sp {NEOX} {SEQUENTIAL} {memory} {TIED}" for memory in (FULL, SELECTIVE)),
    f"tp2-pp1-dp1-sp {QWEN3} heads.kind=causal {SELECTIVE} {SEPARATE} {RECOMPUTE}",
    f"tp2-pp2-dp1-sp {NEOX} {ISOLATED} {WEIGHTED}",
    f"tp1-pp2-dp2-v {MISTRAL} {APART} {ZERO}",
    f"tp4-pp1-dp1 micro_batches=1 {QWEN2} {FOUR_GROUPS} {ZERO}",
    # Documents that stop attention and targets.
    *product("tp2-pp2-dp1-sp tp1-pp3-dp1", *(f"heads.kind={kind} {APART}" for kind in IN_TWO_LAYOUTS)),
    *product("tp2-pp1-dp1 tp1-pp2-dp1 tp1-pp1-dp2", APART),
    f"tp1-pp4-dp1 {APART}",
    "tp1-pp3-dp1 data.loss_across_documents=false",
    "tp1-pp3-dp1 data.attention_across_documents=false",
    f"tp1-pp3-dp1 {APART} {FULL}",
    f"tp2-pp2-dp1-sp {APART} {FULL} heads.kind=causal {RECOMPUTE}",
    f"tp2-pp2-dp1-sp {APART} {SELECTIVE}",
    f"tp1-pp2-dp1 {APART} {SEQUENTIAL} {NAIVE}",
    f"tp2-pp2-dp1-sp {APART} {RECOMPUTE} {TIED}",
    *product("tp1-pp2-dp1", *(f"{APART} heads.kind={kind}" for kind in KINDS if kind not in IN_TWO_LAYOUTS)),
    f"tp1-pp3-dp1 {APART} {SEQUENTIAL} heads.repeated=true heads.layers_per_head=2",
    f"tp2-pp2-dp1-sp {APART} {LEAPS} {DISTILLED}",
    f"tp1-pp3-dp1 {APART} {ORDERED}",
    f"tp2-pp1-dp1-sp {APART} heads.token_order=0.7 heads.token_order_window=20 {RECOMPUTE} {CHUNKS}",
    f"tp1-pp2-dp2 {APART} {ZERO}",
    f"tp2-pp2-dp1-sp {APART} {BF16} {FULL}",
]
"""Cases whose first step compares gradients, and the second one what the update made of them."""

VARIANTS = [
    "heads.count=2 heads.layers_per_head=2",
    "heads.count=3 heads.loss_weights=[1.0,0.3,0.0]",
    FOUR_GROUPS,
    *(
        f"model.rope_scaling={json.dumps(scaling, separators=(',', ':'))} model.init_std=0.2"
        for scaling in (LINEAR_ROPE, LLAMA3_ROPE)
    ),
    *(f"blocks={scaling} model.init_std=0.2" for scaling in ("yarn", "dynamic")),
    *(f"parallel.partition={partition}" for partition in ("[3,1]", "uniform", "[4,0]", "[0,4]")),
    "train.grad_clip=0.0",
    "train.grad_clip=0.05",
]
THREE_STEPS = [
    *(f"tp2-pp2-dp1-sp micro_batches=2 {variant}" for variant in VARIANTS),
    f"tp4-pp1-dp1-sp micro_batches=2 {FOUR_GROUPS}",  # a rank whose vocabulary is all padding
    f"tp2-pp2-dp1-sp {CHANGING_RATES}",
    f"tp1-pp2-dp2 {CHANGING_RATES} {BF16} {ZERO}",
    *product("tp2-pp2-dp1 tp2-pp2-dp1-sp", SELECTIVE, FULL),
    *product("tp1-pp1-dp1 tp2-pp2-dp1-sp tp1-pp2-dp2 tp1-pp4-dp1", TIED, f"{TIED} {ZERO}"),
    *product("tp1-pp2-dp1 tp2-pp2-dp1-sp tp1-pp2-dp2", f"{TIED} {BF16}"),
]
SIX_STEPS = [
    f"tp1-pp2-dp1 {SPLIT}=2 heads.schedule=forward heads.count=3 train.steps=6",
    f"tp1-pp2-dp1 {WEIGHTED} heads.schedule=forward heads.count=2 train.steps=6",
    *(
        f"{layout} heads.kind={kind} heads.schedule={schedule} heads.count=3 train.steps=6"
        for layout in ("tp2-pp1-dp1-sp", f"tp1-pp2-dp1 {ZERO}")
        for kind in ("parallel", "sequential")
        for schedule in ("forward", "reverse")
    ),
]
STEPS = {2: TWO_STEPS, 3: THREE_STEPS, 6: SIX_STEPS}


@pytest.mark.parametrize(("steps", "case"), [(steps, case) for steps, cases in STEPS.items() for case in cases])
def test_variant_equals_reference(ranks: Ranks, case: str, steps: int) -> None:
    # More micro-batches take longer, and test_layouts.py has them. DualPipeV needs two per stage.
    layout, config = parse_case(case, 4 if "-v" in case.split()[0] else 2)
    truth = reference_of(config, steps)
    assert_within_bounds(config, errors_of(run_sharded(ranks, config, layout, steps), truth))
    assert ("unembedding.weight" in truth.gradients) == (not config.model.tie_embeddings) or SEPARATE in case
