"""The pieces of the self-check; that its comparison finds differences is seen in the parity tests."""

import math
from typing import Any

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from mtp_dist.config import Config, build_config
from mtp_dist.distributed.topology import Topology
from mtp_dist.errors import ConfigError
from mtp_dist.model.targets import IGNORE_INDEX
from mtp_dist.planner.flops import parameter_counts
from mtp_dist.planner.partition import trunk_layers_per_stage
from mtp_dist.verify.reference_training import local_batch, random_batch
from mtp_dist.verify.selfcheck import (
    PARAMETER_LIMIT,
    reduced,
    relative_error,
    with_small_batch,
)
from tests.ranks import Ranks
from tests.tiny import tiny_config
from tests.unit.verify.selfcheck_on_ranks import selfcheck_of

SEVEN_BILLION: dict[str, dict[str, Any]] = {
    "model": {
        "vocab_size": 128_000,
        "hidden_size": 4096,
        "trunk_layers": 28,
        "num_attention_heads": 32,
        "num_query_groups": 8,
        "ffn_hidden_size": 11008,
    },
    "train": {"global_batch_size": 1024, "micro_batch_size": 4, "sequence_length": 4096, "precision": "bf16"},
}


def big_config(parallel: dict[str, Any], **model: Any) -> Config:
    sections = {name: dict(section) for name, section in SEVEN_BILLION.items()}
    world_size = 2 * parallel.get("tensor", 1) * parallel.get("pipeline", 1)
    return tiny_config(world_size, parallel=parallel, model=sections["model"] | model, train=sections["train"])


BIG: dict[str, Config] = {
    "tensor 8, pipeline 8": big_config({"tensor": 8, "pipeline": 8, "sequence": True}),
    "explicit partition": big_config({"tensor": 8, "pipeline": 8, "partition": [4, 4, 4, 4, 4, 4, 3, 1]}),
    "heads alone on the last stage": big_config({"pipeline": 4, "partition": [10, 9, 9, 0]}),
    "uniform": big_config({"tensor": 2, "pipeline": 7, "partition": "uniform"}),
    "as many stages as layers": big_config({"pipeline": 28}),
    "one process": big_config({}),
    "no grouped queries": big_config({"tensor": 8}, num_query_groups=None, ffn_hidden_size=None),
    "70 billion": big_config(
        {"tensor": 8, "pipeline": 8, "sequence": True},
        hidden_size=8192,
        trunk_layers=80,
        num_attention_heads=64,
        ffn_hidden_size=28672,
    ),
}


def check_reduction(config: Config) -> Config:
    """The reduced configuration, seen to be a valid one of the same layout."""
    small = with_small_batch(reduced(config), config.dp_size)
    values = small.model_dump(mode="json")
    assert build_config(values).model_dump(mode="json") == values, "its settings are compatible"
    assert small.micro_batches == 2 * config.parallel.pipeline
    assert (small.parallel, small.heads, small.train.precision) == (
        config.parallel,
        config.heads,
        config.train.precision,
    )
    grouped = config.model.query_groups < config.model.num_attention_heads
    assert (small.model.query_groups < small.model.num_attention_heads) == grouped
    assert small.model.tie_embeddings == config.model.tie_embeddings
    assert small.vocab_size <= config.vocab_size
    assert small.train.sequence_length <= 2048
    tokens, wanted = (c.train.micro_batch_size * c.train.sequence_length for c in (small, config))
    assert wanted <= tokens < wanted + small.train.sequence_length, "sums over a micro-batch are as long"
    assert parameter_counts(small).total <= parameter_counts(config).total
    assert sum(trunk_layers_per_stage(small)) == small.model.trunk_layers
    return small


@pytest.mark.parametrize("name", BIG)
def test_big_models_are_reduced_and_stay_valid(name: str) -> None:
    config = BIG[name]
    small = check_reduction(config)
    assert parameter_counts(config).total > PARAMETER_LIMIT
    if not isinstance(config.parallel.partition, str):
        assert trunk_layers_per_stage(small) == config.parallel.partition


def test_reduced_models_are_small() -> None:
    sizes = {name: parameter_counts(reduced(config)).total for name, config in BIG.items()}
    assert {name: size for name, size in sizes.items() if size > PARAMETER_LIMIT} == {}


def test_small_models_stay_as_they_are() -> None:
    config = tiny_config(train={"micro_batch_size": 1})
    assert reduced(config) == config


@given(
    tensor=st.sampled_from([1, 2, 4, 8]),
    pipeline=st.integers(1, 8),
    extra_layers=st.integers(0, 12),
    head_dim=st.sampled_from([2, 6, 64, 130]),
    groups=st.sampled_from([1, 2, 8, 16, None]),
    ffn=st.sampled_from([None, 8, 1000, 16384]),
    length=st.sampled_from([1, 60, 64, 100, 8192]),
    micro_batch=st.integers(1, 5),
    data=st.integers(1, 3),
    sequence=st.booleans(),
    partition=st.sampled_from(["balanced", "uniform"]),
)
def test_every_valid_configuration_stays_valid(
    tensor: int,
    pipeline: int,
    extra_layers: int,
    head_dim: int,
    groups: int | None,
    ffn: int | None,
    length: int,
    micro_batch: int,
    data: int,
    sequence: bool,
    partition: str,
) -> None:
    try:
        config = tiny_config(
            tensor * pipeline * data,
            model={
                "vocab_size": 50_000,
                "hidden_size": 16 * head_dim,
                "num_attention_heads": 16,
                "num_query_groups": groups,
                "ffn_hidden_size": ffn,
                "trunk_layers": pipeline + extra_layers,
            },
            parallel={"tensor": tensor, "pipeline": pipeline, "sequence": sequence, "partition": partition},
            train={
                "sequence_length": length,
                "micro_batch_size": micro_batch,
                "global_batch_size": micro_batch * data * 3,
            },
        )
    except ConfigError:
        assume(False)
    check_reduction(config)


def test_the_micro_batch_has_as_many_tokens_and_a_few_of_them_are_frequent() -> None:
    train = {"micro_batch_size": 4, "global_batch_size": 8, "sequence_length": 1024}
    small = reduced(tiny_config(train=train, model={"vocab_size": 50_000}))
    assert (small.train.micro_batch_size, small.train.sequence_length) == (4, 1024)
    counts = random_batch(small)[0].flatten().bincount(minlength=small.vocab_size)
    assert counts.max() > 0.1 * counts.sum() and counts[0] < 0.001 * counts.sum(), "documents are long"


@pytest.mark.parametrize("kind", ["parallel", "sequential"])
def test_a_sum_over_tokens_in_bf16_is_found(ranks: Ranks, kind: str) -> None:
    """The embedding's gradient as PyTorch computes it on a CPU."""
    config = tiny_config(
        model={"trunk_layers": 2, "vocab_size": 257},
        heads={"kind": kind, "count": 2},
        parallel={"tensor": 2},
        train={"micro_batch_size": 16, "global_batch_size": 32, "sequence_length": 256, "precision": "bf16"},
    )
    right, wrong = (ranks.run(2, selfcheck_of, config, fault)[0] for fault in (False, True))
    assert all(comparison.passed for comparison in right), right
    [failed] = [comparison for comparison in wrong if not comparison.passed]
    assert (failed.quantity, failed.precision) == ("gradients", "bf16") and "embedding.weight" in failed.where


def test_random_batch_is_masked_unevenly_and_shifted() -> None:
    config = tiny_config(train={"sequence_length": 64})
    tokens, targets = random_batch(config)
    assert tokens.shape == (8, 64 + 4) and targets.shape == (4, 8, 64)
    shares = (targets == IGNORE_INDEX).float().mean((0, 2))
    assert shares[0] == 0 and shares[-1] == pytest.approx(0.9, abs=0.07)
    for k in range(1, 5):
        valid = targets[k - 1] != IGNORE_INDEX
        assert torch.equal(targets[k - 1][valid], tokens[:, k : k + 64][valid])
    again = random_batch(config)
    assert torch.equal(again[0], tokens) and torch.equal(again[1], targets)


def test_ranks_share_the_batch_in_order() -> None:
    config = tiny_config()
    tokens, targets = random_batch(config)
    shares = [
        local_batch(config, Topology(1, 1, 2, 0, 0, rank, torch.device("cpu")), tokens, targets).micro_batches
        for rank in (0, 1)
    ]
    assert [len(share) for share in shares] == [2, 2]
    assert torch.equal(torch.cat([part[0] for share in shares for part in share]), tokens)
    assert torch.equal(torch.cat([part[1] for share in shares for part in share], 1), targets)


def test_relative_error() -> None:
    truth = torch.tensor([3.0, 4.0])
    assert relative_error(truth, truth) == 0
    assert relative_error(torch.tensor([3.0, 4.5]), truth) == pytest.approx(0.1)
    assert relative_error(torch.tensor([0.0, 0.25]), torch.zeros(2)) == 0.25, "absolute where the truth is 0"


@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("truth", [0.0, 2.0])
def test_what_is_not_finite_is_infinitely_wrong(wrong: float, truth: float) -> None:
    assert relative_error(torch.tensor([1.0, wrong]), torch.full((2,), truth)) == math.inf
