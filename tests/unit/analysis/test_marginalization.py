"""Marginalized predictions compared with the sum over all continuations, each read from its beginning."""

import math
from itertools import pairwise, product
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)

from mtp_dist.analysis.branches import attends_by_mask, read_prefix
from mtp_dist.analysis.causal_model import CausalModel
from mtp_dist.analysis.marginal_windows import MarginalizationOptions, WindowMeter, cut_windows
from mtp_dist.analysis.marginalization import Scores, marginals
from mtp_dist.config.schema import DataConfig
from mtp_dist.errors import ConfigError
from mtp_dist.model.targets import attention_bias, document_ids
from tests.tiny import BLOCKS
from tests.unit.convert.folders import write_model
from tests.unit.inference.models import tiny_model

VOCAB, LENGTH = 9, 24
END = VOCAB - 1
SIZES = {"vocab_size": VOCAB, "hidden_size": 16, "num_hidden_layers": 2}
LLAMA = SIZES | {"intermediate_size": 24, "num_attention_heads": 4, "num_key_value_heads": 2}


def llama():
    return LlamaForCausalLM(LlamaConfig(**LLAMA))


def sliding(window):
    return MistralForCausalLM(MistralConfig(**LLAMA, sliding_window=window))


NETWORKS = {
    "llama": (llama, True),
    "gpt2": (lambda: GPT2LMHeadModel(GPT2Config(vocab_size=VOCAB, n_embd=16, n_layer=2, n_head=4)), True),
    "ours": (lambda: tiny_model("linear", vocab_size=VOCAB).model, True),
    "window longer than the text": (lambda: sliding(LENGTH + 1), True),
    "window shorter than the text": (lambda: sliding(15), False),
    "alibi": (lambda: BloomForCausalLM(BloomConfig(vocab_size=VOCAB, hidden_size=16, n_layer=2, n_head=4)), False),
    "recurrent": (lambda: MambaForCausalLM(MambaConfig(**SIZES, state_size=4, conv_kernel=3)), False),
}
"""Models, and whether masks alone decide what they attend to."""


def open_network(network, **options):
    """Return a model with weights that leave no factor hidden."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for weight in network.parameters():
            if weight.dim() > 1:
                weight.copy_(torch.randn(weight.shape, generator=generator) * 0.4)
    tokenizer = SimpleNamespace(vocab_size=VOCAB, end_of_document=END)
    return CausalModel(Path("model"), network.eval().requires_grad_(False), tokenizer, LENGTH, **options)


def random_text(length, seed=0):
    return torch.randint(VOCAB, (length,), generator=torch.Generator().manual_seed(seed))


def plain_log_probs(model, sequences):
    """Return the log-probabilities `[B, S, V]` without a cache."""
    mask = None
    if model.end_of_attention is not None:
        mask = attention_bias(document_ids(sequences, model.end_of_attention), torch.float32)
    return model.network(input_ids=sequences, attention_mask=mask, use_cache=False).logits.log_softmax(-1)


def brute_force(model, context, distance):
    """Return the sum over all continuations `[V]`, fp64."""
    between = torch.tensor([*product(range(VOCAB), repeat=distance - 1)])
    sequences = torch.cat([context.expand(len(between), -1), between], 1)
    log_probs = plain_log_probs(model, sequences).double()
    of_tokens = log_probs[:, len(context) - 1 : -1].gather(2, between[:, :, None])
    return of_tokens.sum((1, 2)).exp() @ log_probs[:, -1].exp()


def check_exact(model, text, positions):
    prefix = read_prefix(model, text[:-4], attends_by_mask(model))
    for chosen in positions.split(prefix.group_size(VOCAB)):
        targets = torch.stack([text[chosen + 2], text[chosen + 3]], 1)
        found = [*marginals(prefix, chosen, targets, 3, (2, VOCAB**2))]
        for distance, marginal in enumerate(found, 2):
            for row, position in enumerate(chosen.tolist()):
                expected = brute_force(model, text[: position + 1], distance)
                torch.testing.assert_close(marginal.probs[row, -1].double(), expected, rtol=0, atol=1e-6)
                target = targets[row, distance - 2]
                scores = Scores.truncated(marginal, 1, VOCAB**2, targets[:, distance - 2])
                assert float(scores.nats[row]) == pytest.approx(-math.log(expected[target]), abs=1e-5)
                assert int(scores.ranks[row]) == int((expected > expected[target]).sum())
                assert float(scores.kept_mass[row]) == pytest.approx(1, abs=1e-6)
                assert float(marginal.probs[row, 0].sum()) == pytest.approx(
                    float(marginal.log_weights[row, :2].exp().sum()), abs=1e-6
                )


@pytest.mark.parametrize("name", NETWORKS)
def test_all_continuations_equal_brute_force(name):
    build, by_mask = NETWORKS[name]
    torch.manual_seed(0)
    model = open_network(build())
    assert attends_by_mask(model) == by_mask
    check_exact(model, random_text(LENGTH), torch.tensor([0, 4, 11, 19]))


def test_branches_may_take_several_forward_passes(monkeypatch):
    monkeypatch.setattr("mtp_dist.analysis.branches.TOKENS_PER_FORWARD", 5)
    check_exact(open_network(llama()), random_text(LENGTH), torch.tensor([0, 4, 11]))


def test_branches_attend_within_their_document():
    data = DataConfig(train=({"path": "x"},), attention_across_documents=False)
    model = open_network(llama(), data=data)
    text = random_text(LENGTH)
    text[[3, 10]] = END  # positions 3 and 10 end a document, 4 begins one
    check_exact(model, text, torch.tensor([3, 4, 9, 10, 15]))


def test_truncated_sums_converge_with_their_kept_mass():
    model = open_network(llama())
    text, positions = random_text(LENGTH), torch.tensor([5, 9, 14])
    prefix, top_k = read_prefix(model, text[:-1], True), tuple(range(1, VOCAB**2 + 1))
    targets = torch.stack([text[positions + 2], text[positions + 3]], 1)
    for column, marginal in enumerate(marginals(prefix, positions, targets, 3, top_k)):
        limit = VOCAB ** (column + 1)
        scores = [Scores.truncated(marginal, k - 1, k, targets[:, column]) for k in range(1, limit + 1)]
        exact = scores[-1].nats
        assert scores[0].kept_mass.min() < 0.5 and (scores[-1].kept_mass > 1 - 1e-6).all()
        for few, more in pairwise(scores):
            assert (more.kept_mass >= few.kept_mass).all()
            assert (more.upper <= few.upper + 1e-6).all() and (more.lower >= few.lower - 1e-6).all()
        for k, found in enumerate(scores, 1):
            assert (found.lower <= exact + 1e-6).all() and (found.upper >= exact - 1e-6).all()
            missing = marginal.probs[:, limit - 1] - marginal.probs[:, k - 1]
            assert (missing.amax(1) <= 1 - found.kept_mass + 1e-6).all() and (missing > -1e-6).all()
            torch.testing.assert_close(found.nats, found.upper + found.kept_mass.log())


@pytest.mark.parametrize("width", [3, 1000])
def test_work_grows_with_branches_and_not_with_the_text(width):
    vocab = 300
    network = LlamaForCausalLM(LlamaConfig(**LLAMA | {"vocab_size": vocab})).eval().requires_grad_(False)
    counted, k = [], min(width, vocab)
    network.register_forward_pre_hook(
        lambda _, args, kwargs: counted.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    model = CausalModel(Path("model"), network, SimpleNamespace(vocab_size=vocab, end_of_document=0), LENGTH)
    branched = []
    for length in (LENGTH, 2 * LENGTH):
        counted.clear()
        prefix = read_prefix(model, torch.arange(length), True)
        positions = torch.tensor([length - 3, length - 2])
        for chosen in positions.split(prefix.group_size(k)):
            assert all(
                math.isfinite(found.target_log_probs.sum())
                for found in marginals(prefix, chosen, torch.zeros(len(chosen), 2, dtype=torch.long), 3, (width,))
            )
        branched.append(sum(counted) - length)
        assert max(counted[1:]) <= 256
    assert branched == [2 * (k + width)] * 2


def test_other_predictions_are_those_of_the_model():
    """From the true tokens and from its own most probable ones, after the token in front of the window."""
    model = open_network(llama(), start=(3,))
    options = MarginalizationOptions((3,), (1, 4), stride=5)
    [window, _] = cut_windows(model, random_text(2 * LENGTH + 1).numpy(), options, 2)
    rows = WindowMeter(model, options).measure(window, lambda positions: None)
    assert [(row["distance"], row["prediction"], row["k"]) for row in rows] == [
        (1, "next token", None),
        (3, "true prefix", None),
        (3, "greedy rollout", 1),
        (3, "marginal", 1),
        (3, "marginal", 4),
    ]
    text = torch.cat([torch.tensor([3]), window.tokens])
    log_probs = plain_log_probs(model, text[None])[0]
    places = torch.tensor([3, 8, 13, 18])  # of the last token of each context, after the one in front
    targets = text[places + 3]
    expected = {"next token": (log_probs[places], text[places + 1]), "true prefix": (log_probs[places + 2], targets)}
    rollouts = []
    for place in places:
        sequence = text[: place + 1]
        for _ in range(2):
            sequence = torch.cat([sequence, plain_log_probs(model, sequence[None])[0, -1].argmax()[None]])
        rollouts.append(plain_log_probs(model, sequence[None])[0, -1])
    expected["greedy rollout"] = torch.stack(rollouts), targets
    for row in rows[:3]:
        found, wanted = expected[row["prediction"]]
        assert row["positions"] == 4
        assert row["nats"] == pytest.approx(float(-found.gather(1, wanted[:, None]).sum()), abs=1e-4)
        for top in (1, 5):
            hits = (found.topk(top).indices == wanted[:, None]).any(1).sum()
            assert row[f"top{top}"] == int(hits)
    assert 0 < rows[3]["kept_mass"] < rows[4]["kept_mass"] < 4


def test_further_heads_predict_from_the_same_contexts(checkpoint, model):
    opened = CausalModel.open(checkpoint)
    options = MarginalizationOptions((2, 3), (2,), stride=4)
    text = torch.randint(256, (opened.sequence_length + 1,), generator=torch.Generator().manual_seed(1))
    [window] = cut_windows(opened, text.numpy(), options, 1)
    rows = WindowMeter(opened, options).measure(window, lambda positions: None)
    rows = {row["distance"]: row for row in rows if row["prediction"] == "head"}
    assert list(rows) == [2, 3] and window.positions.tolist() == [2, 6, 10]
    for distance, row in rows.items():
        logits = []
        for place in window.positions.tolist():
            context = text[None, : place + 1]
            mask = model.network.attention_mask(context)
            hidden = model.network.pre_norm_hidden(model.network.trunk(context, mask), context, mask)
            logits.append(model.network.head_logits(distance, hidden[distance], context)[0, -1])
        targets = text[window.positions + distance]
        nats = torch.nn.functional.cross_entropy(torch.stack(logits), targets, reduction="sum")
        assert row["nats"] == pytest.approx(float(nats), rel=1e-5) and row["positions"] == row["kept_mass"] == 3
    assert CausalModel.open(checkpoint).with_heads and not open_network(llama()).with_heads


def test_windows_end_where_dynamic_scaling_starts(tmp_path):
    """Beyond, the cached keys that branches share would keep the rotary embedding of an earlier length."""
    folder = tmp_path / "c"
    write_model(folder, model=BLOCKS["dynamic"])
    assert CausalModel.open(folder).sequence_length == 8
    with pytest.raises(ConfigError, match=r"^--sequence-length = 9 exceeds the 8 tokens that "):
        CausalModel.open(folder, 9)


def test_targets_in_other_documents_do_not_count():
    data = DataConfig(train=({"path": "x"},), loss_across_documents=False)
    text = torch.zeros(LENGTH + 1, dtype=torch.long)
    text[4] = END
    options = MarginalizationOptions((2, 3), (2,), stride=3)
    for changes, counted in (({"data": data}, 6), ({}, 7)):
        model = open_network(llama(), **changes)
        [window] = cut_windows(model, text.numpy(), options, 1)
        assert window.positions.tolist() == [1, 4, 7, 10, 13, 16, 19]
        rows = WindowMeter(model, options).measure(window, lambda positions: None)
        assert {row["positions"] for row in rows if row["distance"] == 2} == {counted}
