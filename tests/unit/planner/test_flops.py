"""Parameters and FLOPs from the shapes of matrices."""

import math

import pytest

from mtp_dist.config.heads import KINDS
from mtp_dist.model.parameters import parameter_shapes
from mtp_dist.planner.flops import ParameterCounts, model_flops_per_token, parameter_counts
from mtp_dist.planner.weights import stage_weights
from tests.tiny import BLOCKS, tiny_config


def small_config(heads=(), **model):
    """D = 32, 4 attention heads of 8 channels in 2 groups, F = 48; 3 trunk layers, 2 heads of 2 layers, S = 10."""
    heads = {"count": 2, "layers_per_head": 2} | dict(heads)
    return tiny_config(model={"trunk_layers": 3, "vocab_size": 101} | model, heads=heads, train={"sequence_length": 10})


# query, key, value, projection, gate, up, down
LAYER_MATRICES = [(32, 32), (32, 16), (32, 16), (32, 32), (32, 48), (32, 48), (48, 32)]


def size(*shapes):
    return sum(math.prod(shape) for shape in shapes)


def test_counts_equal_the_shapes():
    counts, layer = parameter_counts(small_config()), size(*LAYER_MATRICES, (32,), (32,))
    assert counts == ParameterCounts(3 * layer, 2 * 2 * layer + 32, embeddings=size((101, 32), (101, 32)))
    assert counts.total == counts.trunk + counts.heads + counts.embeddings


@pytest.mark.parametrize(
    ("changes", "matrices"), [({"tie_embeddings": True}, 1), ({"heads": {"unembedding": "separate"}}, 3)]
)
def test_other_unembeddings_multiply_like_a_shared_one(changes, matrices):
    config, plain = small_config(**changes), small_config()
    assert parameter_counts(config).embeddings == matrices * 101 * 32
    assert parameter_counts(config).heads == parameter_counts(plain).heads
    assert model_flops_per_token(config, 2) == model_flops_per_token(plain, 2)


@pytest.mark.parametrize("kind", ["parallel", "sequential"])
@pytest.mark.parametrize("blocks", BLOCKS)
def test_counts_are_those_of_the_model(blocks, kind):
    config = tiny_config(model=BLOCKS[blocks], heads={"kind": kind})
    shapes = parameter_shapes(config)
    assert parameter_counts(config).total == size(*shapes.values())
    assert parameter_counts(config).trunk == size(*(shape for name, shape in shapes.items() if "trunk" in name))
    whole = (weight.elements for weight in stage_weights(config, 0, config.model.trunk_layers))
    padding = 2 * (config.padded_vocab_size - config.vocab_size) * config.model.hidden_size
    assert sum(whole) == parameter_counts(config).total + padding


def test_flops_of_windows_and_heads_of_another_width():
    """12 channels per attention head instead of 8, and 4 keys instead of 10."""
    layer = 2 * size((32, 48), (32, 24), (32, 24), (48, 32), *LAYER_MATRICES[4:]) + 4 * 48 * 4
    config = small_config(kv_channels=12, sliding_window=4)
    assert model_flops_per_token(config, 2) == 3 * ((3 + 2 * 2) * layer + 2 * (2 * 32 * 101))


def a_7b_model(trunk_layers, **heads):
    shape = {"vocab_size": 32000, "hidden_size": 4096, "num_attention_heads": 32, "ffn_hidden_size": 11008}
    model = shape | {"trunk_layers": trunk_layers, "num_query_groups": None}
    return tiny_config(model=model, heads=heads, train={"sequence_length": 4096})


def test_a_7b_model():
    layer, square = 202_383_360, 4096**2
    assert layer == 4 * square + 3 * 4096 * 11008 + 2 * 4096
    llama = 6_738_415_616  # Llama 7B, which has 32 layers and one unembedding, too
    assert parameter_counts(a_7b_model(28)).total == parameter_counts(a_7b_model(31, count=1)).total == llama
    sequential = layer + 2 * square + 2 * 4096
    blocks = {"parallel": 4 * layer, "causal": 4 * layer, "anticausal": 4 * layer, "linear": 4 * square}
    for kind, parameters in (blocks | {"mlp": 3 * square, "sequential": 3 * sequential}).items():
        counts = parameter_counts(a_7b_model(28, kind=kind))
        assert counts == ParameterCounts(28 * layer, parameters + 4096, embeddings=2 * 32000 * 4096), kind
    assert parameter_counts(a_7b_model(28, kind="sequential", repeated=True)).heads == sequential + 4096
    separate = parameter_counts(a_7b_model(28, unembedding="separate", token_order=1.0))
    assert separate.embeddings == (1 + 4 + 1) * 32000 * 4096


def test_flops_of_every_matrix_product():
    """A product [1, a] @ [a, b] costs 2ab forward and twice that backward."""
    layers, query_channels, keys = 3 + 2 * 2, 32, 10
    scores, values = 2 * query_channels * keys, 2 * keys * query_channels
    forward = layers * (2 * size(*LAYER_MATRICES) + scores + values) + 2 * (2 * 32 * 101)
    assert model_flops_per_token(small_config(), 2) == 3 * forward


@pytest.mark.parametrize(("unembedding", "products"), [("shared", 2), ("separate", 3)])
def test_flops_on_a_frozen_trunk(unembedding, products):
    """Trunk and head 1 run forward only; a frozen unembedding passes head 2's gradient on, and has none itself."""
    config = small_config(heads={"unembedding": unembedding, "token_order": 1.0})
    frozen = config.model_copy(update={"train": config.train.model_copy(update={"freeze": ("trunk",)})})
    layer, vocabulary = 2 * size(*LAYER_MATRICES) + 4 * 32 * 10, 2 * 32 * 101
    head_2 = 3 * 2 * layer + products * vocabulary
    token_order = 2 * vocabulary  # the gradient of the matrix, not of what it reads
    assert model_flops_per_token(frozen, 2) == (3 + 2) * layer + vocabulary + head_2 + token_order


@pytest.mark.parametrize("freeze", [(), ("trunk",)])
@pytest.mark.parametrize("kind", ["parallel", "linear", "mlp"])
def test_condition_costs_little(kind, freeze):
    """At the shape of Llama 3.2 1B with four heads: a matrix of 2048 x 256 for each head from head 2 on."""
    shape = {"vocab_size": 128_256, "hidden_size": 2048, "num_attention_heads": 32, "ffn_hidden_size": 8192}
    model = shape | {"trunk_layers": 16, "num_query_groups": 8}
    train = {"sequence_length": 4096, "freeze": freeze}
    plain, conditioned = (
        tiny_config(model=model, heads={"kind": kind, "condition": condition}, train=train)
        for condition in ("none", "previous_token")
    )
    for active in (1, 2, 4):
        before, after = model_flops_per_token(plain, active), model_flops_per_token(conditioned, active)
        assert after - before == 6 * (active - 1) * 2048 * 256 and after < 1.02 * before
    before, after = parameter_counts(plain), parameter_counts(conditioned)
    assert after.heads - before.heads == 3 * 2048 * 256 and after.embeddings - before.embeddings == 128_256 * 256


@pytest.mark.parametrize("kind", KINDS)
def test_flops_of_some_heads_are_those_of_a_model_with_so_many(kind):
    for active in (1, 2, 3):
        fewer = model_flops_per_token(a_7b_model(8, count=active, kind=kind), active)
        assert model_flops_per_token(a_7b_model(8, kind=kind), active) == fewer
