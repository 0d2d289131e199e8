"""The plain model that every layout is compared with equals Hugging Face's Llama and its own definition."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from mtp_dist.config import Config
from mtp_dist.config.heads import KINDS
from mtp_dist.convert.plain_weights import plain_weights, split
from mtp_dist.convert.to_huggingface import plain_config
from mtp_dist.model.parameters import STATE_WEIGHTS
from mtp_dist.model.reference import ReferenceModel, reference_losses
from mtp_dist.model.targets import IGNORE_INDEX
from tests.tiny import LINEAR_ROPE, LLAMA3_ROPE, VOCAB_SIZE, tiny_config


def random_tokens(batch: int, length: int) -> Tensor:
    return torch.randint(0, VOCAB_SIZE, (batch, length), generator=torch.Generator().manual_seed(3))


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
    names = plain_weights(model.config)
    return {name.replace("heads.1.", f"heads.{distance}."): parts for name, parts in names.items()}


def as_llama(model: ReferenceModel, distance: int) -> LlamaForCausalLM:
    """Return Hugging Face's Llama with the layers of trunk and one head as one stack."""
    shape = model.config.model
    config = LlamaConfig(**plain_config(model.config, 0, "fp32"), attn_implementation="eager")
    llama = LlamaForCausalLM(config).double()
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
    model, tokens = lively_model(tiny_config(**VARIANTS[variant])), random_tokens(2, 40)
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
        loss, weights = logits.square().sum(), list(model.parameters())
        gradients = torch.autograd.grad(loss, weights, retain_graph=True, allow_unused=True)
        trained = [n for n, gradient in zip(names, gradients, strict=True) if gradient is not None and gradient.any()]
        assert trained == [n for n in names if not n.startswith("heads.") or f"heads.{distance}." in n]


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "anticausal"])
@pytest.mark.parametrize("unembedding", ["shared", "separate"])
def test_fully_detached_heads_train_only_their_own_weights(kind: str, unembedding: str) -> None:
    heads = {"kind": kind, "count": 3, "detach": "full", "unembedding": unembedding}
    model, tokens = lively_model(tiny_config(heads=heads)), random_tokens(1, 11)
    weights = model.named_weights()
    for head, logits in list(model(tokens, 8).items())[1:]:
        model.zero_grad()
        logits.square().sum().backward(retain_graph=True)
        trained = {name for name, weight in weights.items() if weight.grad is not None and weight.grad.any()}
        own = tuple(f"heads.{k}." for k in range(2, head + 1))
        assert any(name.startswith(own[-1]) for name in trained)
        others = {name for name in trained if not name.startswith(own)}
        assert others == {f"unembeddings.{head}.weight"} & weights.keys()


@pytest.mark.parametrize("kind", ["parallel", "linear", "mlp"])
def test_condition_adds_a_function_of_the_token_before_the_target(kind: str) -> None:
    heads = {"kind": kind, "count": 3, "prediction_distances": [1, 2, 4]}
    conditioned = lively_model(tiny_config(heads={**heads, "condition": "previous_token", "condition_rank": 5}))
    weights, samples = conditioned.named_weights(), random_tokens(2, 16)
    plain = ReferenceModel(tiny_config(heads=heads), {n: w for n, w in weights.items() if "condition" not in n})
    with torch.no_grad():
        expected, found = plain(samples, 12), conditioned(samples, 12)
    assert torch.equal(found[1], expected[1])
    for k, distance in ((2, 2), (3, 4)):
        for position in range(12):
            embedded = weights["condition.embedding.weight"][samples[:, position + distance - 1]]
            added = embedded @ weights[f"condition.{k}.weight"].T @ weights["unembedding.weight"].T
            torch.testing.assert_close(found[k][:, position], expected[k][:, position] + added.detach())


def test_later_heads_read_the_weighted_hidden_states() -> None:
    """With all weight on one layer they read its output, with all on the last one z."""
    model, tokens = lively_model(tiny_config(heads={"weighted_hidden_states": True})), random_tokens(2, 8)
    without = ReferenceModel(tiny_config(), model.named_weights()).double()
    shallow = model.config.model.model_copy(update={"trunk_layers": 2})
    cut = ReferenceModel(model.config.model_copy(update={"model": shallow, "heads": without.config.heads}))
    cut.weights.update({name: weight for name, weight in model.weights.items() if name in cut.weights})
    for layer, other in ((4, without), (2, cut)):
        with torch.no_grad():
            model.weight(STATE_WEIGHTS).copy_(torch.eye(5)[layer] * 200)
        logits, expected = model(tokens), other(tokens)
        torch.testing.assert_close(logits[1], without(tokens)[1])
        for head in (2, 3, 4):
            torch.testing.assert_close(logits[head], expected[head])


@pytest.mark.parametrize("kind", KINDS)
def test_next_token_logits_are_those_of_head_1(kind: str) -> None:
    model, samples = lively_model(tiny_config(heads={"kind": kind})), random_tokens(1, 12)
    every = model(samples, 8)
    assert sorted(every) == [1, 2, 3, 4]
    torch.testing.assert_close(model.next_token_logits(samples[:, :8]), every[1])


def test_losses_are_means_over_the_valid_targets_and_the_z_loss_is_not_reported() -> None:
    model, tokens = lively_model(tiny_config(heads={"count": 3, "z_loss": 0.01})), random_tokens(2, 6)
    targets = torch.stack([tokens.roll(-k, 1) for k in (1, 2, 3)])
    targets[1, 0, 2:] = targets[2] = IGNORE_INDEX
    losses, _, _, objectives, _ = reference_losses(model, tokens, targets)
    for index, logits in enumerate(list(model(tokens).values())[:2]):
        torch.testing.assert_close(losses[index], F.cross_entropy(logits.flatten(0, 1), targets[index].flatten()))
        log_z = logits.logsumexp(-1)[targets[index] != IGNORE_INDEX]
        torch.testing.assert_close(objectives[index], losses[index] + 0.01 * log_z.square().mean())
    assert losses[2] == objectives[2] == 0, "no valid target"
    objectives.sum().backward()
    assert all(weight.grad is None or weight.grad.isfinite().all() for weight in model.parameters())


def test_given_weights_replace_the_initial_ones() -> None:
    weights = {name: weight.detach() for name, weight in lively_model(tiny_config()).named_weights().items()}
    again = ReferenceModel(tiny_config(), weights).named_weights()
    assert again.keys() == weights.keys() and all(torch.equal(again[name], weights[name]) for name in weights)
