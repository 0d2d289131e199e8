"""Names, shapes, initial values and shards of the parameters."""

import math
from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from mtp_dist.config import Config, LowRankConfig
from mtp_dist.config.heads import KINDS
from mtp_dist.config.schema import padded_vocab_size
from mtp_dist.model.parameters import STATE_WEIGHTS, initial_weight, is_trained, model_part, parameter_shapes
from mtp_dist.model.sharding import is_sharded, shard, unshard
from mtp_dist.planner.flops import model_flops_per_token, parameter_counts, trained_parameters
from mtp_dist.planner.weights import stage_weights
from tests.tiny import tiny_config

RANKS = st.sampled_from([1, 2, 4])
HEADS = ("heads.", "final_norm", "weighted_hidden_states")


def tagged(shape: tuple[int, ...], dim: int, stride: int) -> nn.Parameter:
    """Return a rank's parameter of that shape, tagged like `tag_shards` does it."""
    weight = nn.Parameter(torch.empty(shape))
    weight.tensor_model_parallel, weight.partition_dim, weight.partition_stride = True, dim, stride
    return weight


def numbered(*shape: int) -> Tensor:
    """Return a tensor of different elements."""
    return torch.arange(1.0, 1 + math.prod(shape)).view(shape)


def shards_of_all(full: Tensor, weight: nn.Parameter, ranks: int) -> list[Tensor]:
    """Return all ranks' shards, from which `unshard` must restore the full tensor."""
    shards = [shard(full, weight, rank, ranks) for rank in range(ranks)]
    assert {part.shape for part in shards} == {weight.shape}
    assert torch.equal(unshard(shards, weight, full.shape), full)
    return shards


@given(ranks=RANKS, rows=st.integers(1, 6), columns=st.integers(1, 6), dim=st.sampled_from([0, 1]))
def test_neighbouring_ranks_hold_neighbouring_shards(ranks: int, rows: int, columns: int, dim: int) -> None:
    full = numbered(*((rows * ranks, columns) if dim == 0 else (rows, columns * ranks)))
    assert torch.equal(torch.cat(shards_of_all(full, tagged((rows, columns), dim, 1), ranks), dim), full)


@given(ranks=RANKS, half=st.integers(1, 6), columns=st.integers(1, 6))
def test_stride_2_gives_every_rank_a_shard_of_both_halves(ranks: int, half: int, columns: int) -> None:
    gate, linear = numbered(half * ranks, columns), -numbered(half * ranks, columns)
    shards = shards_of_all(torch.cat([gate, linear]), tagged((2 * half, columns), 0, 2), ranks)
    for rank, part in enumerate(shards):
        rows = slice(rank * half, (rank + 1) * half)
        assert torch.equal(part, torch.cat([gate[rows], linear[rows]]))


@given(ranks=RANKS, vocab_size=st.integers(1, 600))
def test_vocabulary_is_padded_with_zeros_that_unshard_drops(ranks: int, vocab_size: int) -> None:
    padded, full = padded_vocab_size(vocab_size, ranks), numbered(vocab_size, 3)
    together = torch.cat(shards_of_all(full, tagged((padded // ranks, 3), 0, 1), ranks))
    assert torch.equal(together[:vocab_size], full) and not together[vocab_size:].any()


def test_replicated_parameters_are_full_everywhere() -> None:
    weight = nn.Parameter(torch.empty(5))
    assert not is_sharded(weight)
    assert all(torch.equal(part, numbered(5)) for part in shards_of_all(numbered(5), weight, 2))


@given(vocab_size=st.integers(1, 300_000), ranks=st.sampled_from([1, 2, 4, 8]))
def test_padded_vocab_size(vocab_size: int, ranks: int) -> None:
    padded = padded_vocab_size(vocab_size, ranks)
    assert vocab_size <= padded < vocab_size + 64 * ranks and padded % (64 * ranks) == 0


@st.composite
def configs(draw: st.DrawFn) -> Config:
    kind = draw(st.sampled_from([*KINDS, "repeated"]))
    unembedding = draw(st.sampled_from(["shared", "tied", "separate"]))
    model = {
        "vocab_size": draw(st.integers(1, 999)),
        "hidden_size": draw(st.sampled_from([8, 16])),
        "trunk_layers": draw(st.integers(1, 5)),
        "num_query_groups": draw(st.sampled_from([1, 2, None])),
        "ffn_hidden_size": draw(st.sampled_from([None, 7, 64])),
        "tie_embeddings": unembedding == "tied",
    }
    heads = {
        "count": draw(st.integers(1, 4)),
        "kind": "sequential" if kind == "repeated" else kind,
        "repeated": kind == "repeated",
        "layers_per_head": draw(st.integers(1, 3)) if kind == "repeated" or KINDS[kind].has_layers else 1,
        "unembedding": "separate" if unembedding == "separate" else "shared",
        "token_order": draw(st.sampled_from([0.0, 0.5])),
    }
    if heads["count"] > 1 and KINDS[heads["kind"]].reads == "trunk":
        if draw(st.booleans()):
            heads |= {"condition": "previous_token", "condition_rank": draw(st.sampled_from([None, 3]))}
        heads["weighted_hidden_states"] = draw(st.booleans())
    return tiny_config(model=model, heads=heads)


@st.composite
def low_ranks(draw: st.DrawFn) -> LowRankConfig:
    targets = draw(st.lists(st.sampled_from(LowRankConfig().targets), min_size=1))
    return LowRankConfig(rank=draw(st.integers(1, 8)), targets=tuple(targets))


@given(config=configs().filter(lambda config: config.heads.kind != "anticausal"), low_rank=low_ranks())
def test_planner_counts_adapters(config: Config, low_rank: LowRankConfig) -> None:
    """Each product with a frozen matrix lacks the gradient of that matrix, which is a third of its FLOPs."""
    adapted = config.model_copy(update={"train": config.train.model_copy(update={"low_rank": low_rank})})
    sizes = {name: math.prod(shape) for name, shape in parameter_shapes(adapted).items()}
    assert sum(sizes.values()) == parameter_counts(adapted).total
    trained = {name: size for name, size in sizes.items() if is_trained(adapted, name)}
    assert trained_parameters(adapted) == sum(trained.values())
    heads, vocabulary = config.heads, config.vocab_size * config.model.hidden_size
    adapters = sum(size for name, size in trained.items() if ".lora_" in name)
    products = [name for name, shape in parameter_shapes(config).items() if len(shape) == 2]
    frozen = sum(sizes[name] for name in products if name not in trained and name.startswith(("trunk.", "heads.")))
    frozen += (1 if heads.unembedding == "separate" else heads.count) * vocabulary
    change = 6 * adapters - 2 * frozen
    assert model_flops_per_token(adapted, heads.count) == model_flops_per_token(config, heads.count) + change


@given(config=configs())
def test_planner_counts_the_parameters_and_products(config: Config) -> None:
    """A position multiplies each layer's matrices once, those of a repeated block once per head, and n unembeddings."""
    heads, vocab_size = config.heads, config.vocab_size
    shapes, counts, width = parameter_shapes(config), parameter_counts(config), config.model.hidden_size
    sizes = {name: math.prod(shape) for name, shape in shapes.items()}
    assert sum(sizes.values()) == counts.total
    assert sum(size for name, size in sizes.items() if name.startswith("trunk.")) == counts.trunk
    embeddings = [name for name in sizes if "embedding" in name or name.startswith("token_order")]
    assert sum(sizes[name] for name in embeddings) == counts.embeddings
    assert {shapes[name] for name in embeddings if name != "condition.embedding.weight"} == {(vocab_size, width)}
    conditions = [name for name in sizes.keys() - embeddings if name.startswith("condition.")]
    blocks = [*conditions, *(name for name in sizes if name.startswith(HEADS))]
    assert sum(sizes[name] for name in blocks) == counts.heads

    first = 1 if heads.traits.first_head_has_block else 2
    keys = ["repeated" if heads.repeated else k for k in range(first, heads.count + 1)]
    used = [name for name in shapes if name.startswith("trunk.")]
    used += [name for key in keys for name in shapes if name.startswith(f"heads.{key}.")]
    assert set(used) == {name for name in shapes if name.startswith(("trunk.", "heads."))}
    matrices = sum(sizes[name] for name in [*used, *conditions] if len(shapes[name]) == 2)
    matrices += (heads.count + bool(heads.token_order)) * vocab_size * width
    matrices += width * sizes.get(STATE_WEIGHTS, 0)
    attention = 12 * sum(n.endswith("linear_qkv.weight") for n in used) * width * config.train.sequence_length
    assert model_flops_per_token(config, heads.count) == 6 * matrices + attention
    if heads.traits.reads != "next head" and (heads.count > 1 or heads.token_order):
        frozen = config.model_copy(update={"train": config.train.model_copy(update={"freeze": ("trunk",)})})
        assert trained_parameters(config) == counts.total
        assert trained_parameters(frozen) == sum(size for name, size in sizes.items() if is_trained(frozen, name))


@given(config=configs(), low_rank=st.none() | low_ranks(), freeze=st.sampled_from([(), ("trunk",)]))
def test_planner_lists_the_weights_of_one_stage(
    config: Config, low_rank: LowRankConfig | None, freeze: tuple[str, ...]
) -> None:
    """The planner cannot import PyTorch, and so has a list of its own, of sharded weights."""
    padded = config.model.model_copy(update={"vocab_size": 64 * config.vocab_size})
    train = config.train.model_copy(update={"low_rank": low_rank, "freeze": freeze})
    config = config.model_copy(update={"model": padded, "train": train})
    expected = Counter(
        (shape, model_part(name), is_trained(config, name)) for name, shape in parameter_shapes(config).items()
    )
    assert Counter(weight[:3] for weight in stage_weights(config, 0, config.model.trunk_layers)) == expected


def test_weights_of_hidden_states_start_at_the_last() -> None:
    weights = initial_weight(tiny_config(), STATE_WEIGHTS, (5,)).softmax(0)
    torch.testing.assert_close(weights, torch.tensor([0.0025] * 4 + [0.99]))


NAME = "trunk.1.mlp.linear_fc1.weight"


def initial(seed: int = 1, name: str = NAME, size: int = 40, **sections: Any) -> Tensor:
    return initial_weight(tiny_config(run={"seed": seed}, **sections), name, (size, size))


def test_initial_weights_depend_on_seed_and_name_only() -> None:
    weight = initial()
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    assert torch.equal(initial(), weight)
    assert torch.equal(torch.rand(3), expected), "the global generator is left alone"
    layout = {"parallel": {"tensor": 2, "pipeline": 4}, "heads": {"count": 2}, "model": {"trunk_layers": 9}}
    assert torch.equal(initial(**layout), weight)
    for other in (initial(2), initial(1, NAME.replace("1", "2", 1)), initial(1, "heads.1.0.mlp.linear_fc1.weight")):
        assert abs(torch.corrcoef(torch.stack([weight.flatten(), other.flatten()]))[0, 1]) < 0.1


@pytest.mark.parametrize(
    ("name", "std"),
    [
        ("embedding.weight", 0.05),
        ("unembedding.weight", 0.05),
        ("trunk.0.self_attention.linear_qkv.weight", 0.05),
        ("heads.2.1.mlp.linear_fc1.weight", 0.05),
        # 6 trunk layers and 2 of a head are between a token and its logits.
        ("trunk.0.self_attention.linear_proj.weight", 0.05 / 4),
        ("heads.2.1.mlp.linear_fc2.weight", 0.05 / 4),
    ],
)
def test_spread_of_the_initial_weights(name: str, std: float) -> None:
    weight = initial(1, name, 400, model={"trunk_layers": 6, "init_std": 0.05}, heads={"layers_per_head": 2})
    assert weight.dtype == torch.float32
    assert float(weight.std()) == pytest.approx(std, rel=0.01)
    assert abs(float(weight.mean())) < 0.01 * std


def test_condition_starts_at_0() -> None:
    heads = {"condition": "previous_token"}
    shapes = parameter_shapes(tiny_config(heads=heads))
    assert shapes["condition.embedding.weight"] == (131, 4) and "condition.1.weight" not in shapes
    for k in (2, 3, 4):
        assert shapes[f"condition.{k}.weight"] == (32, 4)
        assert not initial(1, f"condition.{k}.weight", heads=heads).any()
    assert initial(1, "condition.embedding.weight", heads=heads).all()


@pytest.mark.parametrize("name", ["final_norm.weight", "trunk.0.input_layernorm.weight"])
def test_norms_start_at_1(name: str) -> None:
    assert torch.equal(initial(1, name), torch.ones(40, 40))


def test_adapters_start_as_those_of_peft() -> None:
    """A as by kaiming_uniform_(a=sqrt(5)), which is uniform up to 1 / sqrt(columns), and B 0."""
    a = initial(1, "trunk.0.mlp.linear_fc2.lora_A.weight", 100)
    assert float(a.abs().max()) == pytest.approx(0.1, rel=1e-3) and float(a.std()) == pytest.approx(
        0.1 / 3**0.5, rel=0.02
    )
    assert not initial(1, "trunk.0.mlp.linear_fc2.lora_B.weight").any()
