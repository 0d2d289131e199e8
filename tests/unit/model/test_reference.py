"""The plain model that every layout is compared with equals Hugging Face's Llama and its own definition."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from mtp_dist.config import Config
from mtp_dist.convert.llama import llama_weights, split
from mtp_dist.model.reference import ReferenceModel, reference_losses
from mtp_dist.model.targets import IGNORE_INDEX
from tests.tiny import LINEAR_ROPE, LLAMA3_ROPE, VOCAB_SIZE, tiny_config


def random_tokens(batch: int, length: int) -> Tensor:
    return torch.randint(0, VOCAB_SIZE, (batch, length), generator=torch.Generator().manual_seed(3))


def shifted_targets(tokens: Tensor, heads: int) -> Tensor:
    """Return targets of `heads` heads; from head 2 on the first sample has two valid ones."""
    targets = torch.stack([tokens.roll(-k, 1) for k in range(1, heads + 1)])
    targets[1:, 0, 2:] = IGNORE_INDEX
    return targets


def lively_model(config: Config) -> ReferenceModel:
    """Return a model with weights far from their initial values, so that no factor hides by being 1 or tiny."""
    model = ReferenceModel(config).double()
    generator = torch.Generator().manual_seed(8)
    with torch.no_grad():
        for weight in model.parameters():
            noise = torch.randn(weight.shape, generator=generator, dtype=torch.float64)
            weight.copy_(noise * 0.2 if weight.ndim > 1 else 1 + 0.3 * noise)
    return model


def llama_names(model: ReferenceModel, distance: int) -> dict[str, tuple[str, ...]]:
    """Return the Llama's names of the weights of the trunk and one head."""
    names = llama_weights(model.config)
    return {name.replace("heads.1.", f"heads.{distance}."): parts for name, parts in names.items()}


def as_llama(model: ReferenceModel, distance: int) -> LlamaForCausalLM:
    """Return Hugging Face's Llama with the layers of trunk and one head as one stack."""
    config, shape = model.config, model.config.model
    scaling = shape.rope_scaling.model_dump(exclude_none=True) if shape.rope_scaling else {}
    llama = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCAB_SIZE,
            hidden_size=shape.hidden_size,
            intermediate_size=shape.ffn_size,
            num_hidden_layers=shape.trunk_layers + config.heads.layers_per_head,
            num_attention_heads=shape.num_attention_heads,
            num_key_value_heads=shape.query_groups,
            rms_norm_eps=shape.norm_eps,
            rope_parameters={"rope_type": "default", "rope_theta": shape.rope_theta} | scaling,
            tie_word_embeddings=shape.tie_embeddings,
            attn_implementation="eager",
        )
    ).double()
    ours, theirs = model.named_weights(), dict[str, Tensor]()
    for name, parts in llama_names(model, distance).items():
        theirs |= dict(zip(parts, split(name, ours[name].detach(), shape), strict=True))
    missing = llama.load_state_dict(theirs, strict=False)
    assert not missing.unexpected_keys
    assert missing.missing_keys == (["lm_head.weight"] if shape.tie_embeddings else [])
    return llama


VARIANTS: dict[str, dict[str, dict[str, Any]]] = {
    "grouped queries": {"model": {"num_query_groups": 2}},
    "one key for all": {"model": {"num_query_groups": 1}},
    "no grouped queries": {"model": {"num_query_groups": 4}},
    "tied": {"model": {"tie_embeddings": True}},
    "two layers per head": {"heads": {"layers_per_head": 2}},
    "other theta and epsilon": {"model": {"rope_theta": 500.0, "norm_eps": 1e-2}},
    "linear rope scaling": {"model": {"rope_scaling": LINEAR_ROPE}},
    "llama3 rope scaling": {"model": {"rope_scaling": LLAMA3_ROPE}},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_equals_llama_of_hugging_face(variant: str) -> None:
    config = tiny_config(**{name: dict(section) for name, section in VARIANTS[variant].items()})
    model, tokens = lively_model(config), random_tokens(2, 40)
    for distance, logits in model(tokens).items():
        expected = as_llama(model, distance)(tokens).logits
        assert float(expected.detach().std()) > 0.5, "the logits are not trivial"
        torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)


def test_gradient_equals_llamas() -> None:
    model, tokens = lively_model(tiny_config(heads={"count": 1})), random_tokens(2, 16)
    llama, targets = as_llama(model, 1), tokens.roll(-1, 1)
    reference_losses(model, tokens, targets[None]).objectives.sum().backward()
    F.cross_entropy(llama(tokens).logits.flatten(0, 1), targets.flatten()).backward()
    theirs = dict(llama.named_parameters())
    for name, parts in llama_names(model, 1).items():
        gradient = model.weight(name).grad
        assert gradient is not None
        for part, value in zip(parts, split(name, gradient, model.config.model), strict=True):
            expected = theirs[part].grad
            assert expected is not None and float((value - expected).norm() / expected.norm()) < 1e-5, part


def test_a_later_token_changes_no_earlier_logits() -> None:
    model, tokens = lively_model(tiny_config()), random_tokens(2, 12)
    changed = tokens.clone()
    changed[:, 7] = (changed[:, 7] + 1) % VOCAB_SIZE
    for before, after in zip(model(tokens).values(), model(changed).values(), strict=True):
        assert torch.equal(before[:, :7], after[:, :7])
        assert (before[:, 7:] != after[:, 7:]).any(-1).all(), "all that follow change"


def test_each_head_trains_its_own_layers_and_what_is_shared() -> None:
    model, tokens = lively_model(tiny_config(heads={"count": 3, "layers_per_head": 2})), random_tokens(1, 8)
    names = list(model.named_weights())
    for distance, logits in model(tokens).items():
        gradients = torch.autograd.grad(
            logits.square().sum(), list(model.parameters()), retain_graph=True, allow_unused=True
        )
        trained = [n for n, gradient in zip(names, gradients, strict=True) if gradient is not None and gradient.any()]
        assert trained == [n for n in names if not n.startswith("heads.") or f"heads.{distance}." in n]


@pytest.mark.parametrize("kind", ["parallel", "causal", "anticausal", "linear", "mlp", "sequential"])
def test_next_token_logits_are_those_of_head_1(kind: str) -> None:
    model, samples = lively_model(tiny_config(heads={"kind": kind})), random_tokens(1, 12)
    every = model(samples, 8)
    assert sorted(every) == [1, 2, 3, 4]
    torch.testing.assert_close(model.next_token_logits(samples[:, :8]), every[1])


def test_losses_are_means_over_the_valid_targets() -> None:
    model, tokens = lively_model(tiny_config(heads={"count": 3})), random_tokens(2, 6)
    targets = shifted_targets(tokens, 3)
    targets[2] = IGNORE_INDEX
    losses, _, objectives, _ = reference_losses(model, tokens, targets)
    logits = model(tokens)
    expected = [F.cross_entropy(logits[k + 1].flatten(0, 1), targets[k].flatten()) for k in range(2)]
    torch.testing.assert_close(losses[:2], torch.stack(expected))
    assert losses[2] == 0 and torch.equal(losses, objectives), "without z-loss"
    losses.sum().backward()
    assert all(weight.grad is None or weight.grad.isfinite().all() for weight in model.parameters())


def test_the_z_loss_is_minimized_but_not_reported() -> None:
    model, tokens = lively_model(tiny_config(heads={"count": 2, "z_loss": 0.01})), random_tokens(2, 6)
    targets = shifted_targets(tokens, 2)
    losses, _, objectives, _ = reference_losses(model, tokens, targets)
    for logits, target, loss, objective in zip(model(tokens).values(), targets, losses, objectives, strict=True):
        log_z = logits.logsumexp(-1)[target != IGNORE_INDEX]
        torch.testing.assert_close(objective, loss + 0.01 * log_z.square().mean())


def test_given_weights_replace_the_initial_ones() -> None:
    weights = {name: weight.detach() for name, weight in lively_model(tiny_config()).named_weights().items()}
    again = ReferenceModel(tiny_config(), weights).named_weights()
    assert again.keys() == weights.keys() and all(torch.equal(again[name], weights[name]) for name in weights)
