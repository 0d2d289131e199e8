"""The acceptance of drafts in a validation equals a decoder's that follows the text, at every layout."""

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import GenerationConfig

from mtp_dist.config import Config
from mtp_dist.engine.optimizer_state import set_master_weight
from mtp_dist.inference.speculation import Speculation
from mtp_dist.loss.acceptance import draft_acceptance_rates, draft_acceptance_sums
from mtp_dist.loss.schedule import head_schedule
from mtp_dist.metrics import HeadMetrics
from mtp_dist.model.parameters import initial_weight, named_weights, parameter_shapes
from mtp_dist.model.reference import ReferenceModel
from mtp_dist.model.sharding import shard
from mtp_dist.model.targets import IGNORE_INDEX, document_ids
from mtp_dist.verify.reference_training import END_OF_DOCUMENT, local_batch, random_batch
from tests.engines import open_engine
from tests.parity.comparison import parse_case
from tests.parity.test_variants import APART, CHUNKS, FOUR_GROUPS, NAIVE, SEPARATE, SEQUENTIAL
from tests.ranks import Ranks
from tests.tiny import BLOCKS, tiny_config
from tests.unit.inference.models import open_weights

FREQUENT = [2, 130]
"""The only tokens with an unembedding, so that untrained heads often predict the same ones. Two tensor-parallel ranks
have one each, in the same row. If both are improbable, all others tie."""
CASES = [
    "tp1-pp1-dp1",
    f"tp1-pp1-dp1 heads.kind=mlp {NAIVE}",
    "tp1-pp1-dp2 heads.kind=linear micro_batches=2",
    f"tp2-pp1-dp1 heads.count=2 heads.prediction_distances=[1,4] {CHUNKS}",
    f"tp2-pp1-dp1-sp heads.kind=causal {APART}",
    f"tp2-pp2-dp1-sp {SEQUENTIAL} {APART}",
    f"tp1-pp2-dp2 heads.count=3 heads.prediction_distances=[1,2,4] {APART} {SEPARATE}",
    f"tp2-pp1-dp1-sp heads.kind=anticausal {NAIVE}",
    f"tp1-pp2-dp1-v heads.kind=mlp {APART}",
    "tp2-pp2-dp1-sp heads.stages=2 heads.kind=mlp",
    f"tp4-pp1-dp1 {FOUR_GROUPS} heads.distillation=0.5",
    "tp2-pp1-dp1-sp blocks=neox",
]


def weights(config: Config) -> dict[str, Tensor]:
    """Return the initial weights by global name, with unembeddings of few tokens."""
    full = {name: initial_weight(config, name, shape) for name, shape in parameter_shapes(config).items()}
    for name in full:
        if name.startswith("unembedding"):
            full[name] = torch.zeros_like(full[name]).index_copy(0, torch.tensor(FREQUENT), full[name][FREQUENT])
    return full


def evaluation(config: Config) -> HeadMetrics:
    """On each rank: evaluate a random batch."""
    engine, full = open_engine(config), weights(config)
    topology = engine.topology
    for name, weight in named_weights(engine.stage):
        set_master_weight(weight, shard(full[name], weight, topology.tp_rank, topology.tp_size))
    return engine.evaluate(local_batch(config, topology, *random_batch(config)), head_schedule(config, 1))


def decode_along(text: list[list[int]], valid: list[list[bool]], distances: tuple[int, ...]) -> Tensor:
    """Return `[d_n - 1, 2]`: the drafts that a decoder verifies and accepts on one sample, see `draft_acceptance_sums`.

    text: most probable tokens by head and position; valid: likewise, whether the head has a target.
    """
    counts, position, length = torch.zeros(distances[-1] - 1, 2, dtype=torch.float64), 0, len(text[0])
    while position < length:
        tokens = 1
        for distance in range(2, distances[-1] + 1):
            head, reach = next((head, reach) for head, reach in enumerate(distances) if reach >= distance)
            source, verifier = position - (reach - distance), position + distance - 1
            if source < 0 or verifier >= length or not valid[head][source]:
                break
            counts[distance - 2, 0] += 1
            if text[head][source] != text[0][verifier]:
                break
            counts[distance - 2, 1] += 1
            tokens += 1
        position += tokens
    return counts


@torch.no_grad()
def reference_counts(config: Config) -> Tensor:
    samples, targets = random_batch(config)
    documents = None if config.data.attention_across_documents else document_ids(samples, END_OF_DOCUMENT)
    logits = ReferenceModel(config, weights(config)).double()(samples, targets.shape[-1], documents)
    texts = torch.stack([logits[k].argmax(-1) for k in range(1, len(targets) + 1)], 1)
    valid = (targets != IGNORE_INDEX).transpose(0, 1)
    rows = zip(texts.tolist(), valid.tolist(), strict=True)
    return torch.stack([decode_along(*row, config.heads.distances) for row in rows]).sum(0)


@pytest.mark.parametrize("case", CASES)
def test_equals_a_decoder_that_follows_the_text(ranks: Ranks, case: str) -> None:
    layout, config = parse_case(f"{case} train.sequence_length=48 model.init_std=0.1 run.seed=1")
    counts = reference_counts(config)
    assert (counts > 0).all()
    rates = torch.cumprod(counts[:, 1] / counts[:, 0].clamp(min=1), 0).tolist()
    for heads in ranks.run(layout.world_size, evaluation, config):
        assert heads.draft_acceptance_rates == pytest.approx(rates, rel=1e-12)
        assert heads.expected_tokens_per_forward == pytest.approx(1 + sum(rates))


@pytest.mark.parametrize(
    ("heads", "model"),
    [
        ({"kind": "parallel"}, {}),
        ({"kind": "sequential"}, {}),
        ({"prediction_distances": [1, 2, 4]}, {}),
        ({"kind": "causal"}, BLOCKS["qwen3"]),
    ],
    ids=str,
)
@torch.no_grad()
def test_equals_the_decoder_on_the_text_that_it_writes(heads: dict[str, Any], model: dict[str, Any]) -> None:
    config = tiny_config(heads={"count": 3, **heads}, model={"init_std": 0.2, **model})
    reference, prompts, length = ReferenceModel(config, weights(config)), torch.arange(32).unsqueeze(1), 64
    speculation = Speculation(heads=3)
    text = open_weights(config, reference.named_weights()).generate(
        prompts,
        attention_mask=torch.ones_like(prompts),
        generation_config=GenerationConfig(max_new_tokens=length + 3, do_sample=False),
        speculation=speculation,
    )
    best = torch.stack([logits.argmax(-1) for logits in reference(text, length).values()]).transpose(1, 2)
    sums = draft_acceptance_sums(best, torch.ones_like(best, dtype=torch.bool), config.heads.distances)
    estimate = HeadMetrics((), (), None, draft_acceptance_rates=draft_acceptance_rates(sums))
    counted = speculation.statistics
    tokens, passes = counted.tokens - len(prompts), counted.forward_passes - len(prompts)  # without the prompts'
    assert estimate.expected_tokens_per_forward == pytest.approx(tokens / passes, rel=0.02)
