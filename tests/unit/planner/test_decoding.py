"""Bytes and FLOPs of forward passes from the shapes of matrices."""

import math

import pytest

from mtp_dist.planner.decoding import DecodingCosts, Device, PassCost
from tests.tiny import tiny_config

BATCH, CONTEXT, GAINED = 5, 10, 1.5
WIDTH, VOCAB = 32, 101
# query, key, value, projection, gate, up, down: 4 attention heads of 8 channels in 2 groups
LAYER = 32 * 32 + 2 * 32 * 16 + 32 * 32 + 3 * 32 * 48
SQUARE, UNEMBEDDING, CACHE = WIDTH**2, WIDTH * VOCAB, 2 * 16 * CONTEXT
"""Parameters of a head's own matrix and of an unembedding; keys and values of a text in one layer."""


def costs_of(**heads):
    config = tiny_config(model={"trunk_layers": 3, "vocab_size": VOCAB}, heads={"count": 4} | heads)
    return DecodingCosts(config, BATCH, 4)


def attention(positions, layers):
    """Return the multiplications of the scores and of the values."""
    return positions * layers * 2 * WIDTH * CONTEXT


def test_plain_pass():
    """One token runs through the trunk, head 1 and the unembedding."""
    cost = costs_of().step(1, CONTEXT, gained=0.0)
    assert cost.bytes == 4 * (4 * LAYER + UNEMBEDDING + BATCH * 4 * CACHE)
    assert cost.flops == 2 * BATCH * (4 * LAYER + UNEMBEDDING + attention(1, 4))


def test_prompt():
    cost = costs_of().prompt(CONTEXT)
    assert cost.bytes == costs_of().step(1, CONTEXT, gained=0.0).bytes
    assert cost.flops == 2 * BATCH * (CONTEXT * 4 * LAYER + UNEMBEDDING + attention(CONTEXT, 4))


@pytest.mark.parametrize(
    ("heads", "blocks", "first_block", "layers", "reads"),
    [
        ({}, LAYER, LAYER, 1, 1),
        ({"kind": "causal", "layers_per_head": 2}, 2 * LAYER, 2 * LAYER, 2, 1),
        ({"unembedding": "separate"}, LAYER, LAYER, 1, 2),
        ({"kind": "linear"}, SQUARE, SQUARE, 0, 1),
        ({"kind": "mlp"}, SQUARE, 0, 0, 1),
        ({"kind": "sequential"}, LAYER + 2 * SQUARE, 0, 1, 2),
    ],
)
def test_drafting_pass(heads, blocks, first_block, layers, reads):
    """Heads 2 and 3 process the positions gained; three tokens are verified. reads: of the unembedding, by drafts."""
    first_layers = layers if first_block else 0
    cost = costs_of(**heads).step(3, CONTEXT, GAINED)
    verifying = 3 * LAYER + first_block
    cached = BATCH * (3 + first_layers + 2 * layers) * CACHE
    assert cost.bytes == 4 * (verifying + 2 * blocks + (1 + reads) * UNEMBEDDING + cached)
    products = 3 * verifying + GAINED * 2 * blocks + (3 + 2) * UNEMBEDDING
    attended = attention(3, 3 + first_layers) + attention(GAINED, 2 * layers)
    assert math.isclose(cost.flops, 2 * BATCH * (products + attended))


def test_conditioned_drafts_read_a_table_each():
    plain, conditioned = costs_of(), costs_of(condition="previous_token", condition_rank=3)
    assert conditioned.step(1, CONTEXT, 0.0) == plain.step(1, CONTEXT, 0.0)
    before, after = plain.step(4, CONTEXT, GAINED), conditioned.step(4, CONTEXT, GAINED)
    assert after.bytes - before.bytes == 4 * 3 * 3 * VOCAB
    assert math.isclose(after.flops - before.flops, 2 * BATCH * 3 * 3 * VOCAB)


def test_anticausal_drafts_are_states_of_head_1():
    """Only their unembedding is read in addition."""
    costs = costs_of(kind="anticausal")
    plain, drafting = costs.step(1, CONTEXT, 0.0), costs.step(4, CONTEXT, GAINED)
    assert plain.bytes == 4 * (7 * LAYER + UNEMBEDDING + BATCH * 7 * CACHE)
    assert drafting.bytes - plain.bytes == 4 * UNEMBEDDING


def test_leap_and_tree():
    """With distances 1, 3, 5 two heads draft 2 tokens, and all nodes of a tree are verified."""
    leap = costs_of(count=3, prediction_distances=[1, 3, 5])
    assert leap.step(3, CONTEXT, 0.0).bytes == costs_of().step(2, CONTEXT, 0.0).bytes
    tree = costs_of().step(3, CONTEXT, GAINED, nodes=9)
    more = 2 * BATCH * 6 * (4 * LAYER + UNEMBEDDING + 4 * 2 * WIDTH * CONTEXT)
    assert math.isclose(tree.flops - costs_of().step(3, CONTEXT, GAINED).flops, more)


def test_seconds_are_those_of_the_scarce_resource():
    device = Device(bytes_per_second=10.0, flops_per_second=100.0)
    assert PassCost(bytes=50.0, flops=10.0).seconds(device) == 5.0
    assert PassCost(bytes=50.0, flops=900.0).seconds(device) == 9.0
