"""The plain model that every layout is compared with: is it right itself?"""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from mtp_dist.config import Config
from mtp_dist.model.reference import ReferenceModel, reference_losses
from mtp_dist.model.targets import IGNORE_INDEX
from tests.tiny import LINEAR_ROPE, LLAMA3_ROPE, VOCAB_SIZE, tiny_config


def tokens_of(batch: int, length: int) -> Tensor:
    return torch.randint(0, VOCAB_SIZE, (batch, length), generator=torch.Generator().manual_seed(3))


def lively_model(config: Config) -> ReferenceModel:
    """With weights far from their initial values, norms included, so that no factor hides by being 1 or tiny."""
    model = ReferenceModel(config).double()
    generator = torch.Generator().manual_seed(8)
    with torch.no_grad():
        for weight in model.parameters():
            noise = torch.randn(weight.shape, generator=generator, dtype=torch.float64)
            weight.copy_(noise * 0.2 if weight.ndim > 1 else 1 + 0.3 * noise)
    return model


def llama_of(model: ReferenceModel, distance: int) -> LlamaForCausalLM:
    """Hugging Face's Llama with trunk and that head's layers as one stack."""
    config = model.config
    depth, shape = config.heads.layers_per_head, config.model
    scaling = shape.rope_scaling.model_dump(exclude_none=True) if shape.rope_scaling else {}
    llama = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCAB_SIZE,
            hidden_size=shape.hidden_size,
            intermediate_size=shape.ffn_size,
            num_hidden_layers=shape.trunk_layers + depth,
            num_attention_heads=shape.num_attention_heads,
            num_key_value_heads=shape.query_groups,
            rms_norm_eps=shape.norm_eps,
            rope_parameters={"rope_type": "default", "rope_theta": shape.rope_theta} | scaling,
            tie_word_embeddings=shape.tie_embeddings,
            attn_implementation="eager",
        )
    ).double()
    ours = {name: weight.detach() for name, weight in model.named_weights().items()}
    theirs = {"model.embed_tokens.weight": ours["embedding.weight"], "model.norm.weight": ours["final_norm.weight"]}
    if not shape.tie_embeddings:
        theirs["lm_head.weight"] = ours["unembedding.weight"]
    names = [f"trunk.{index}" for index in range(shape.trunk_layers)]
    names += [f"heads.{distance}.{index}" for index in range(depth)]
    for index, name in enumerate(names):
        theirs |= {
            f"model.layers.{index}.{key}.weight": value for key, value in _llama_layer(shape, ours, name).items()
        }
    missing = llama.load_state_dict(theirs, strict=False)
    assert not missing.unexpected_keys
    assert missing.missing_keys == (["lm_head.weight"] if shape.tie_embeddings else [])
    return llama


def _llama_layer(shape: Any, ours: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    """Rows of the fused projection: for each query group its queries, its key, its value."""
    queries = shape.num_attention_heads // shape.query_groups
    query, key, value = [], [], []
    for group in ours[f"{name}.self_attention.linear_qkv.weight"].chunk(shape.query_groups):
        heads = list(group.split(shape.head_dim))
        query += heads[:queries]
        key.append(heads[queries])
        value.append(heads[queries + 1])
    fused = ours[f"{name}.mlp.linear_fc1.weight"]
    return {
        "input_layernorm": ours[f"{name}.input_layernorm.weight"],
        "self_attn.q_proj": torch.cat(query),
        "self_attn.k_proj": torch.cat(key),
        "self_attn.v_proj": torch.cat(value),
        "self_attn.o_proj": ours[f"{name}.self_attention.linear_proj.weight"],
        "post_attention_layernorm": ours[f"{name}.pre_mlp_layernorm.weight"],
        "mlp.gate_proj": fused[: shape.ffn_size],
        "mlp.up_proj": fused[shape.ffn_size :],
        "mlp.down_proj": ours[f"{name}.mlp.linear_fc2.weight"],
    }


VARIANTS: dict[str, dict[str, dict[str, Any]]] = {
    "grouped queries": {"model": {"num_query_groups": 2}},
    "one key for all": {"model": {"num_query_groups": 1}},
    "no grouped queries": {"model": {"num_query_groups": 4}},
    "tied": {"model": {"tie_embeddings": True}},
    "two layers a head": {"heads": {"layers_per_head": 2}},
    "other theta and epsilon": {"model": {"rope_theta": 500.0, "norm_eps": 1e-2}},
    "linear rope scaling": {"model": {"rope_scaling": LINEAR_ROPE}},
    "llama3 rope scaling": {"model": {"rope_scaling": LLAMA3_ROPE}},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_equals_llama_of_hugging_face(variant: str) -> None:
    config = tiny_config(**{name: dict(section) for name, section in VARIANTS[variant].items()})
    model, tokens = lively_model(config), tokens_of(2, 40)
    for distance, logits in model(tokens).items():
        expected = llama_of(model, distance)(tokens).logits
        assert float(expected.std()) > 0.5, "logits that say something"
        torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)


def test_gradient_equals_llamas() -> None:
    model, tokens = lively_model(tiny_config(heads={"count": 1})), tokens_of(2, 16)
    llama = llama_of(model, 1)
    targets = tokens.roll(-1, 1)
    reference_losses(model, tokens, targets[None]).objectives.sum().backward()
    F.cross_entropy(llama(tokens).logits.flatten(0, 1), targets.flatten()).backward()
    ours = model.named_weights()
    theirs = dict(llama.named_parameters())
    for name, other in {
        "embedding.weight": "model.embed_tokens.weight",
        "unembedding.weight": "lm_head.weight",
        "final_norm.weight": "model.norm.weight",
        "trunk.0.self_attention.linear_proj.weight": "model.layers.0.self_attn.o_proj.weight",
        "trunk.3.mlp.linear_fc2.weight": "model.layers.3.mlp.down_proj.weight",
        "heads.1.0.input_layernorm.weight": "model.layers.4.input_layernorm.weight",
    }.items():
        gradient, expected = ours[name].grad, theirs[other].grad
        assert gradient is not None and expected is not None
        assert float((gradient - expected).norm() / expected.norm()) < 1e-5, name


def test_a_later_token_changes_no_earlier_logits() -> None:
    model, tokens = lively_model(tiny_config()), tokens_of(2, 12)
    changed = tokens.clone()
    changed[:, 7] = (changed[:, 7] + 1) % VOCAB_SIZE
    for before, after in zip(model(tokens).values(), model(changed).values(), strict=True):
        assert torch.equal(before[:, :7], after[:, :7])
        assert (before[:, 7:] != after[:, 7:]).any(-1).all(), "and it does change all that follow"


def test_each_head_trains_its_own_layers_and_what_is_shared() -> None:
    model, tokens = lively_model(tiny_config(heads={"count": 3, "layers_per_head": 2})), tokens_of(1, 8)
    for distance, logits in model(tokens).items():
        gradients = torch.autograd.grad(
            logits.pow(2).sum(), list(model.parameters()), retain_graph=True, allow_unused=True
        )
        trained = {
            name
            for name, gradient in zip(model.named_weights(), gradients, strict=True)
            if gradient is not None and gradient.any()
        }
        assert trained == {
            name for name in model.named_weights() if not name.startswith("heads.") or f"heads.{distance}." in name
        }


@pytest.mark.parametrize("kind", ["parallel", "causal", "anticausal", "linear", "mlp", "sequential"])
def test_next_token_logits_are_those_of_head_1(kind: str) -> None:
    model, samples = lively_model(tiny_config(heads={"kind": kind})), tokens_of(1, 12)
    every = model(samples, 8)
    assert sorted(every) == [1, 2, 3, 4]
    torch.testing.assert_close(model.next_token_logits(samples[:, :8]), every[1])


def test_losses_are_means_over_the_valid_targets() -> None:
    model, tokens = lively_model(tiny_config(heads={"count": 3})), tokens_of(2, 6)
    targets = torch.stack([tokens.roll(-k, 1) for k in range(1, 4)])
    targets[1, 0, 2:] = IGNORE_INDEX
    targets[2] = IGNORE_INDEX
    losses, _, objectives, _ = reference_losses(model, tokens, targets)
    logits = model(tokens)
    expected = [F.cross_entropy(logits[k + 1].flatten(0, 1), targets[k].flatten()) for k in range(2)]
    torch.testing.assert_close(losses[:2], torch.stack(expected))
    assert losses[2] == 0 and torch.equal(losses, objectives), "no z-loss asked for"
    losses.sum().backward()
    assert all(weight.grad is None or weight.grad.isfinite().all() for weight in model.parameters())


def test_the_z_loss_is_minimized_but_not_reported() -> None:
    model, tokens = lively_model(tiny_config(heads={"count": 2, "z_loss": 0.01})), tokens_of(2, 6)
    targets = torch.stack([tokens.roll(-k, 1) for k in (1, 2)])
    targets[1, 0, 2:] = IGNORE_INDEX
    losses, _, objectives, _ = reference_losses(model, tokens, targets)
    for logits, target, loss, objective in zip(model(tokens).values(), targets, losses, objectives, strict=True):
        normalizers = logits.logsumexp(-1)[target != IGNORE_INDEX]
        torch.testing.assert_close(objective, loss + 0.01 * normalizers.square().mean())


def test_given_weights_replace_the_initial_ones() -> None:
    config = tiny_config()
    weights = {name: weight.detach() for name, weight in lively_model(config).named_weights().items()}
    again = ReferenceModel(config, weights).named_weights()
    assert again.keys() == weights.keys()
    assert all(torch.equal(again[name], weights[name]) for name in weights)
