"""Parts of the self-check; the parity tests show that its comparison finds differences."""

import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given
from hypothesis import strategies as st

from mtp_dist.config import build_config
from mtp_dist.distributed.device import select_device
from mtp_dist.distributed.topology import Topology, initialize_topology
from mtp_dist.errors import ConfigError
from mtp_dist.model import trunk
from mtp_dist.model.targets import IGNORE_INDEX
from mtp_dist.planner.flops import parameter_counts
from mtp_dist.planner.partition import trunk_layers_per_stage
from mtp_dist.verify.reference_training import local_batch, random_batch
from mtp_dist.verify.selfcheck import PARAMETER_LIMIT, reduced, relative_error, selfcheck, with_small_batch
from tests.tiny import BLOCKS, tiny_config

SEVEN_BILLION = {"vocab_size": 128_000, "hidden_size": 4096, "trunk_layers": 28, "num_attention_heads": 32}
SEVEN_BILLION |= {"num_query_groups": 8, "ffn_hidden_size": 11008}
SEVENTY_BILLION = {"hidden_size": 8192, "trunk_layers": 80, "num_attention_heads": 64, "ffn_hidden_size": 28672}
TRAIN = {"global_batch_size": 1024, "micro_batch_size": 4, "sequence_length": 4096, "precision": "bf16"}


def check_reduction(config):
    """Return the reduced configuration after checking that it is valid and has the same layout."""
    small = with_small_batch(reduced(config), config.dp_size)
    values = small.model_dump(mode="json")
    assert build_config(values).model_dump(mode="json") == values, "its settings are compatible"
    assert small.micro_batches == 2 * config.parallel.pipeline
    assert (small.parallel, small.heads) == (config.parallel, config.heads)
    assert small.train.precision == config.train.precision
    attention, other = ((m.query_groups < m.num_attention_heads, m.tie_embeddings) for m in (small.model, config.model))
    assert attention == other, "grouped queries and tied embeddings stay"
    blocks = [
        (m.qk_norm, m.normalization, m.parallel_residual, m.kv_channels is None, m.rotary_percent < 1, m.linear_bias)
        for m in (small.model, config.model)
    ]
    assert blocks[0] == blocks[1], "the building blocks stay"
    assert not config.model.sliding_window or small.model.sliding_window < small.train.sequence_length
    assert small.vocab_size <= config.vocab_size and small.train.sequence_length <= 2048
    tokens, expected = (c.train.micro_batch_size * c.train.sequence_length for c in (small, config))
    assert expected <= tokens < expected + small.train.sequence_length, "sums over a micro-batch are as long"
    assert parameter_counts(small).total <= parameter_counts(config).total
    assert sum(trunk_layers_per_stage(small)) == small.model.trunk_layers
    return small


@pytest.mark.parametrize(
    ("parallel", "model"),
    [
        *(({"tensor": 8, "pipeline": 8, "sequence": True}, model) for model in ({}, SEVENTY_BILLION)),
        ({"tensor": 8, "pipeline": 8, "partition": [4, 4, 4, 4, 4, 4, 3, 1]}, {}),
        *((parallel, {}) for parallel in ({}, {"pipeline": 28}, {"pipeline": 4, "partition": [10, 9, 9, 0]})),
        ({"tensor": 2, "pipeline": 7, "partition": "uniform"}, {}),
        ({"tensor": 2, "pipeline": 7, "schedule": "dualpipev", "partition": "uniform"}, {}),
        ({"pipeline": 8, "schedule": "dualpipev"}, {}),
        ({"tensor": 8}, {"num_query_groups": None, "ffn_hidden_size": None}),
        ({"tensor": 8}, {**BLOCKS["qwen3"], "kv_channels": 128, "sliding_window": 4095}),
        ({"tensor": 8}, {**BLOCKS["neox"], "num_query_groups": 8, "rotary_percent": 0.28125}),
    ],
)
def test_big_models_are_reduced_and_stay_valid(parallel, model):
    world_size = 2 * parallel.get("tensor", 1) * parallel.get("pipeline", 1)
    config = tiny_config(world_size, parallel=parallel, model=SEVEN_BILLION | model, train=TRAIN)
    small = check_reduction(config)
    assert parameter_counts(small).total <= PARAMETER_LIMIT < parameter_counts(config).total
    partition = config.parallel.partition
    assert isinstance(partition, str) or trunk_layers_per_stage(small) == partition


@given(
    st.sampled_from([1, 2, 4, 8]),
    st.integers(1, 8),
    st.integers(1, 3),
    st.tuples(st.sampled_from([2, 6, 64, 130]), st.sampled_from([1, 2, 8, 16, None]), st.integers(0, 12)),
    st.fixed_dictionaries({"sequence": st.booleans(), "partition": st.sampled_from(["balanced", "uniform"])}),
    st.sampled_from([None, 8, 1000, 16384]),
    st.tuples(st.sampled_from([1, 60, 64, 100, 8192]), st.integers(1, 5)),
)
def test_every_valid_configuration_stays_valid(tensor, pipeline, data, sizes, parallel, ffn, batch):
    (head_dim, groups, extra_layers), (length, micro_batch) = sizes, batch
    model = {"vocab_size": 50_000, "hidden_size": 16 * head_dim, "num_attention_heads": 16, "num_query_groups": groups}
    model |= {"ffn_hidden_size": ffn, "trunk_layers": pipeline + extra_layers}
    parallel = parallel | {"tensor": tensor, "pipeline": pipeline}
    train = {"sequence_length": length, "micro_batch_size": micro_batch, "global_batch_size": micro_batch * data * 3}
    try:
        config = tiny_config(tensor * pipeline * data, model=model, parallel=parallel, train=train)
    except ConfigError:
        assume(False)
    check_reduction(config)


def test_small_models_keep_their_size_and_few_tokens_are_frequent():
    config = tiny_config(train={"micro_batch_size": 1})
    assert reduced(config) == config
    train = {"micro_batch_size": 4, "global_batch_size": 8, "sequence_length": 1024}
    small = reduced(tiny_config(train=train, model={"vocab_size": 50_000}))
    assert (small.train.micro_batch_size, small.train.sequence_length) == (4, 1024)
    counts = random_batch(small)[0].flatten().bincount(minlength=small.vocab_size)
    assert counts.max() > 0.1 * counts.sum() and counts[0] < 0.001 * counts.sum(), "documents are long"


def selfcheck_of(config, fault):
    """On each rank: check; fault: the embedding's gradient is accumulated in the precision of the weight."""
    with pytest.MonkeyPatch.context() as patch:
        if fault:
            patch.setattr(trunk, "_Lookup", SimpleNamespace(apply=lambda weight, rows: F.embedding(rows, weight)))
        return selfcheck(config, initialize_topology(config, select_device(config)))


@pytest.mark.parametrize(("kind", "blocks"), [("parallel", "qwen2"), ("sequential", "qwen3")])
def test_sum_over_tokens_in_bf16_is_found(ranks, kind, blocks):
    """PyTorch computes the embedding's gradient like that on a CPU."""
    model, heads = {"trunk_layers": 2, "vocab_size": 257} | BLOCKS[blocks], {"kind": kind, "count": 2}
    train = {"micro_batch_size": 16, "global_batch_size": 32, "sequence_length": 256, "precision": "bf16"}
    config = tiny_config(model=model, heads=heads, parallel={"tensor": 2}, train=train)
    right, wrong = (ranks.run(2, selfcheck_of, config, fault)[0] for fault in (False, True))
    assert all(comparison.passed for comparison in right), right
    [failed] = [comparison for comparison in wrong if not comparison.passed]
    assert (failed.quantity, failed.precision) == ("gradients", "bf16") and "embedding.weight" in failed.where


def test_random_batch_is_masked_unevenly_shifted_and_shared_in_order():
    config = tiny_config(train={"sequence_length": 64})
    tokens, targets = random_batch(config)
    assert tokens.shape == (8, 64 + 4) and targets.shape == (4, 8, 64)
    masked = (targets == IGNORE_INDEX).float().mean((0, 2))
    assert masked[0] == 0 and masked[-1] == pytest.approx(0.9, abs=0.07)
    for k in range(1, 5):
        valid = targets[k - 1] != IGNORE_INDEX
        assert torch.equal(targets[k - 1][valid], tokens[:, k : k + 64][valid])
    assert all(map(torch.equal, random_batch(config), (tokens, targets)))

    topologies = [Topology(1, 1, 2, 0, 0, rank, torch.device("cpu")) for rank in (0, 1)]
    parts = [local_batch(config, topology, tokens, targets).micro_batches for topology in topologies]
    assert [len(part) for part in parts] == [2, 2]
    assert torch.equal(torch.cat([micro_batch[0] for part in parts for micro_batch in part]), tokens)
    assert torch.equal(torch.cat([micro_batch[1] for part in parts for micro_batch in part], 1), targets)


@pytest.mark.parametrize(
    ("value", "truth", "error"),
    [
        ([3.0, 4.0], [3.0, 4.0], 0.0),
        ([3.0, 4.5], [3.0, 4.0], 0.1),
        ([0.0, 0.25], [0.0, 0.0], 0.25),  # absolute if the truth is 0
        *(([1.0, wrong], [truth] * 2, math.inf) for wrong in (math.nan, math.inf, -math.inf) for truth in (0.0, 2.0)),
    ],
)
def test_relative_error(value, truth, error):
    assert relative_error(torch.tensor(value), torch.tensor(truth)) == pytest.approx(error)
