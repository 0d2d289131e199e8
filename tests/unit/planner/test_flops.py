"""Parameters and FLOPs from the shapes of matrices, and peaks by the names that drivers report."""

import math

import pytest

from mtp_dist.config import build_config, resolve
from mtp_dist.planner.flops import model_flops_per_token, parameter_counts, peak_flops


def make_config(heads, sequence_length, **model):
    train = {"steps": 1, "global_batch_size": 1, "micro_batch_size": 1, "sequence_length": sequence_length}
    config = build_config({"model": model, "heads": heads, "data": {"train": [{"path": "x"}]}, "train": train})
    return resolve(config, model.get("vocab_size", 101), 1)


def small_config(heads=None, **model):
    """D = 48, 6 attention heads of 8 channels in 2 groups, F = 80; 3 trunk layers, 2 heads of 2 layers, S = 10."""
    shape = {
        "hidden_size": 48,
        "trunk_layers": 3,
        "num_attention_heads": 6,
        "num_query_groups": 2,
        "ffn_hidden_size": 80,
    }
    return make_config({"count": 2, "layers_per_head": 2} | (heads or {}), 10, **(shape | model))


# query, key, value, projection, gate, up, down
LAYER_MATRICES = [(48, 48), (48, 16), (48, 16), (48, 48), (48, 80), (48, 80), (80, 48)]
LAYER_NORMS = [(48,), (48,)]


def size(*shapes):
    return sum(math.prod(shape) for shape in shapes)


def test_counts_equal_the_shapes():
    counts = parameter_counts(small_config())
    assert counts.trunk == 3 * size(*LAYER_MATRICES, *LAYER_NORMS)
    assert counts.heads == 2 * 2 * size(*LAYER_MATRICES, *LAYER_NORMS) + 48
    assert counts.embeddings == size((101, 48), (101, 48))
    assert counts.total == counts.trunk + counts.heads + counts.embeddings


@pytest.mark.parametrize(
    ("changes", "matrices"), [({"tie_embeddings": True}, 1), ({"heads": {"unembedding": "separate"}}, 3)]
)
def test_other_unembeddings_multiply_like_a_shared_one(changes, matrices):
    config, plain = small_config(**changes), small_config()
    assert parameter_counts(config).embeddings == matrices * 101 * 48
    assert parameter_counts(config).heads == parameter_counts(plain).heads
    assert model_flops_per_token(config, 2) == model_flops_per_token(plain, 2)


def a_7b_model(trunk_layers, **heads):
    shape = {"vocab_size": 32000, "hidden_size": 4096, "num_attention_heads": 32, "ffn_hidden_size": 11008}
    return make_config(heads, 4096, trunk_layers=trunk_layers, **shape)


def test_a_7b_model():
    config = a_7b_model(28, count=4)
    counts = parameter_counts(config)
    layer = 4 * 4096**2 + 3 * 4096 * 11008 + 2 * 4096
    assert layer == 202_383_360
    assert counts.trunk == 28 * layer == 5_666_734_080
    assert counts.heads == 4 * layer + 4096 == 809_537_536, "and the final norm"
    assert counts.embeddings == 2 * 32000 * 4096 == 262_144_000
    assert counts.total == 6_738_415_616  # Llama 7B, which has the same 32 layers
    assert counts.total == parameter_counts(a_7b_model(31, count=1)).total, "31 layers and that of one head"


def test_other_kinds_of_heads_on_a_7b_model():
    layer, square = 202_383_360, 4096**2
    expected = {
        "causal": 4 * layer,
        "anticausal": 4 * layer,
        "linear": 4 * square,
        "mlp": 3 * square,
        "sequential": 3 * (layer + 2 * square + 2 * 4096),
    }
    for kind, parameters in expected.items():
        counts = parameter_counts(a_7b_model(28, count=4, kind=kind))
        assert counts.heads == parameters + 4096, kind
        assert (counts.trunk, counts.embeddings) == (28 * layer, 262_144_000)
    repeated = parameter_counts(a_7b_model(28, count=4, kind="sequential", repeated=True))
    assert repeated.heads == layer + 2 * square + 2 * 4096 + 4096
    separate = parameter_counts(a_7b_model(28, count=4, unembedding="separate", token_order=1.0))
    assert separate.embeddings == (1 + 4 + 1) * 32000 * 4096


def test_flops_of_every_matrix_product():
    """A product [1, a] @ [a, b] costs 2ab forward and twice that backward."""
    layers, query_channels, keys = 3 + 2 * 2, 48, 10
    scores, values = 2 * query_channels * keys, 2 * keys * query_channels
    forward = layers * (2 * size(*LAYER_MATRICES) + scores + values) + 2 * (2 * 48 * 101)
    assert model_flops_per_token(small_config(), 2) == 3 * forward


@pytest.mark.parametrize("kind", ["parallel", "linear", "mlp", "sequential"])
def test_flops_of_some_heads_are_those_of_a_model_with_so_many(kind):
    for active in (1, 2, 3):
        fewer = model_flops_per_token(a_7b_model(8, count=active, kind=kind), active)
        assert model_flops_per_token(a_7b_model(8, count=4, kind=kind), active) == fewer


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA A100 80GB PCIe", 312e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA B200", 2250e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA GeForce RTX 4090", 165e12),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", None),
        ("NVIDIA H100 NVL", None),
        ("NVIDIA GH200 480GB", None),
        ("cpu", None),
    ],
)
def test_peaks(name, peak):
    assert peak_flops(name, "bf16") == peak
    assert peak_flops(name, "fp32") is None
