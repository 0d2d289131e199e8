"""Names, shapes, initial values and cuts of the weights."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from mtp_dist.config import Config
from mtp_dist.config.schema import padded_vocab_size
from mtp_dist.model.parameters import initial_weight, parameter_shapes
from mtp_dist.model.sharding import is_sharded, shard, unshard
from mtp_dist.planner.flops import model_flops_per_token, parameter_counts
from tests.tiny import tiny_config

RANKS = st.sampled_from([1, 2, 4])


def tagged(shape: tuple[int, ...], dim: int, stride: int) -> nn.Parameter:
    """A rank's weight of that shape, tagged as `tag_shards` does it."""
    weight = nn.Parameter(torch.empty(shape))
    weight.tensor_model_parallel = True
    weight.partition_dim = dim
    weight.partition_stride = stride
    return weight


def numbered(*shape: int) -> Tensor:
    """Every entry differs."""
    return torch.arange(1.0, 1 + math.prod(shape)).view(shape)


def cut_all(whole: Tensor, weight: nn.Parameter, ranks: int) -> list[Tensor]:
    parts = [shard(whole, weight, rank, ranks) for rank in range(ranks)]
    assert {part.shape for part in parts} == {weight.shape}
    return parts


@given(ranks=RANKS, rows=st.integers(1, 6), columns=st.integers(1, 6), dim=st.sampled_from([0, 1]))
def test_plain_cut_and_join(ranks: int, rows: int, columns: int, dim: int) -> None:
    shape = (rows * ranks, columns) if dim == 0 else (rows, columns * ranks)
    whole, weight = numbered(*shape), tagged((rows, columns), dim, 1)
    parts = cut_all(whole, weight, ranks)
    assert torch.equal(torch.cat(parts, dim), whole), "neighbouring ranks hold neighbouring parts"
    assert torch.equal(unshard(parts, weight, shape), whole)


@given(ranks=RANKS, half=st.integers(1, 6), columns=st.integers(1, 6))
def test_stride_2_gives_every_rank_a_part_of_both_halves(ranks: int, half: int, columns: int) -> None:
    gate, linear = numbered(half * ranks, columns), -numbered(half * ranks, columns)
    whole, weight = torch.cat([gate, linear]), tagged((2 * half, columns), 0, 2)
    parts = cut_all(whole, weight, ranks)
    for rank, part in enumerate(parts):
        rows = slice(rank * half, (rank + 1) * half)
        assert torch.equal(part, torch.cat([gate[rows], linear[rows]]))
    assert torch.equal(unshard(parts, weight, whole.shape), whole)


@given(ranks=RANKS, vocab_size=st.integers(1, 600))
def test_vocabulary_is_padded_with_zeros_that_join_drops(ranks: int, vocab_size: int) -> None:
    padded = padded_vocab_size(vocab_size, ranks)
    whole, weight = numbered(vocab_size, 3), tagged((padded // ranks, 3), 0, 1)
    parts = cut_all(whole, weight, ranks)
    together = torch.cat(parts)
    assert torch.equal(together[:vocab_size], whole) and not together[vocab_size:].any()
    assert torch.equal(unshard(parts, weight, whole.shape), whole)


def test_replicated_weights_are_whole_everywhere() -> None:
    weight, whole = nn.Parameter(torch.empty(5)), numbered(5)
    assert not is_sharded(weight)
    assert torch.equal(shard(whole, weight, 1, 2), whole) and torch.equal(unshard([whole, whole], weight, (5,)), whole)


@given(vocab_size=st.integers(1, 300_000), ranks=st.sampled_from([1, 2, 4, 8]))
def test_padded_vocab_size(vocab_size: int, ranks: int) -> None:
    padded = padded_vocab_size(vocab_size, ranks)
    assert vocab_size <= padded < vocab_size + 64 * ranks
    assert padded % (64 * ranks) == 0
    assert padded_vocab_size(padded, ranks) == padded


KINDS = ["parallel", "causal", "anticausal", "linear", "mlp", "sequential", "repeated"]
SHAPES = {
    "heads": st.integers(1, 4),
    "depth": st.integers(1, 3),
    "trunk_layers": st.integers(1, 5),
    "head_dim": st.sampled_from([2, 4]),
    "groups": st.sampled_from([1, 2, None]),
    "ffn": st.sampled_from([None, 7, 64]),
    "kind": st.sampled_from(KINDS),
    "unembedding": st.sampled_from(["shared", "tied", "separate"]),
    "token_order": st.booleans(),
}


def drawn_config(drawn: dict[str, Any], vocab_size: int) -> Config:
    model = {
        "vocab_size": vocab_size,
        "hidden_size": 4 * drawn["head_dim"],
        "trunk_layers": drawn["trunk_layers"],
        "num_query_groups": drawn["groups"],
        "ffn_hidden_size": drawn["ffn"],
        "tie_embeddings": drawn["unembedding"] == "tied",
    }
    is_repeated = drawn["kind"] == "repeated"
    heads = {
        "count": drawn["heads"],
        "kind": "sequential" if is_repeated else drawn["kind"],
        "repeated": is_repeated,
        "layers_per_head": 1 if drawn["kind"] in ("linear", "mlp") else drawn["depth"],
        "unembedding": "separate" if drawn["unembedding"] == "separate" else "shared",
        "token_order": 0.5 if drawn["token_order"] else 0.0,
    }
    return tiny_config(model=model, heads=heads)


@given(drawn=st.fixed_dictionaries(SHAPES), vocab_size=st.integers(1, 999))
def test_as_many_parameters_as_the_planner_counts(drawn: dict[str, Any], vocab_size: int) -> None:
    config = drawn_config(drawn, vocab_size)
    shapes = parameter_shapes(config)
    sizes = {name: math.prod(shape) for name, shape in shapes.items()}
    counts = parameter_counts(config)
    assert sum(sizes.values()) == counts.total
    assert sum(size for name, size in sizes.items() if name.startswith("trunk.")) == counts.trunk
    assert sum(size for name, size in sizes.items() if name.startswith(("heads.", "final_norm"))) == counts.heads
    embeddings = [size for name, size in sizes.items() if "embedding" in name or name.startswith("token_order")]
    assert sum(embeddings) == counts.embeddings
    assert set(embeddings) == {vocab_size * config.model.hidden_size}


@given(drawn=st.fixed_dictionaries(SHAPES), vocab_size=st.integers(1, 999))
def test_as_many_products_as_the_planner_counts(drawn: dict[str, Any], vocab_size: int) -> None:
    """Every position multiplies each layer's matrices once, those of a repeated block once a head, and, whether they
    are one matrix or n, n unembeddings."""
    config = drawn_config(drawn, vocab_size)
    shapes, width = parameter_shapes(config), config.model.hidden_size
    own = {
        head: f"heads.{'repeated' if drawn['kind'] == 'repeated' else head}." for head in range(1, drawn["heads"] + 1)
    }
    if drawn["kind"] in ("mlp", "sequential", "repeated"):
        del own[1]
    used = [name for name in shapes if name.startswith("trunk.")]
    used += [name for prefix in own.values() for name in shapes if name.startswith(prefix)]
    assert len(set(used)) == len([name for name in shapes if name.startswith(("trunk.", "heads."))])
    matrices = sum(math.prod(shapes[name]) for name in used if len(shapes[name]) == 2)
    matrices += (drawn["heads"] + drawn["token_order"]) * vocab_size * width
    layers = sum(name.endswith("linear_qkv.weight") for name in used)
    attention = 12 * layers * width * config.train.sequence_length
    assert model_flops_per_token(config, config.heads.count) == 6 * matrices + attention


def seeded(seed: int, **sections: Any) -> Config:
    return tiny_config(run={"seed": seed}, **sections)


NAME = "trunk.1.mlp.linear_fc1.weight"


def test_initial_weights_depend_on_seed_and_name_only() -> None:
    weight = initial_weight(seeded(1), NAME, (40, 30))
    torch.manual_seed(99)
    assert torch.equal(initial_weight(seeded(1), NAME, (40, 30)), weight)
    other_layout = seeded(1, parallel={"tensor": 2, "pipeline": 4}, heads={"count": 2}, model={"trunk_layers": 9})
    assert torch.equal(initial_weight(other_layout, NAME, (40, 30)), weight)
    for other in (
        initial_weight(seeded(2), NAME, (40, 30)),
        initial_weight(seeded(1), "trunk.2.mlp.linear_fc1.weight", (40, 30)),
        initial_weight(seeded(1), "heads.1.0.mlp.linear_fc1.weight", (40, 30)),
    ):
        assert abs(torch.corrcoef(torch.stack([weight.flatten(), other.flatten()]))[0, 1]) < 0.1


def test_initial_weights_leave_the_global_generator_alone() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    initial_weight(seeded(1), NAME, (40, 30))
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize(
    ("name", "std"),
    [
        ("embedding.weight", 0.05),
        ("unembedding.weight", 0.05),
        ("trunk.0.self_attention.linear_qkv.weight", 0.05),
        ("heads.2.1.mlp.linear_fc1.weight", 0.05),
        # 6 trunk layers and 2 of a head lie between a token and its logits.
        ("trunk.0.self_attention.linear_proj.weight", 0.05 / 4),
        ("heads.2.1.mlp.linear_fc2.weight", 0.05 / 4),
    ],
)
def test_spread_of_the_initial_weights(name: str, std: float) -> None:
    config = seeded(1, model={"trunk_layers": 6, "init_std": 0.05}, heads={"layers_per_head": 2})
    weight = initial_weight(config, name, (400, 400))
    assert weight.dtype == torch.float32
    assert float(weight.std()) == pytest.approx(std, rel=0.01)
    assert abs(float(weight.mean())) < 0.01 * std


@pytest.mark.parametrize("name", ["final_norm.weight", "trunk.0.input_layernorm.weight"])
def test_norms_start_at_1(name: str) -> None:
    assert torch.equal(initial_weight(seeded(1), name, (7,)), torch.ones(7))
