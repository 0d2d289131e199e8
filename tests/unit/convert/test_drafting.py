"""An export for transformers drafts with the heads there: in generate(use_mtp=True), or by its own generate.py.

Verification hides wrong drafts, so draft logits are compared with the training reference, not only texts.
"""

from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.generation.candidate_generator import MTPCandidateGenerator

from mtp_dist.config.heads import KINDS
from mtp_dist.convert.architectures.gpt_neox import GPT_NEOX
from mtp_dist.convert.architectures.registry import ARCHITECTURES
from mtp_dist.convert.head_layout import MTP, transformers_architecture
from mtp_dist.convert.remote import generate as remote
from mtp_dist.convert.to_huggingface import export_checkpoint
from mtp_dist.model.reference import ReferenceModel
from tests.tiny import tiny_config
from tests.unit.convert.exports import CUSTOM, NATIVE, TRUNKS, Heads, export, forward_passes
from tests.unit.convert.folders import VOCAB_SIZE, save_model


def plain(llama: Any, ids: Tensor, **options: Any) -> Any:
    """Generate by transformers alone."""
    return type(llama).generate(llama, ids, **{"do_sample": False, "max_new_tokens": 24} | options)


def check_draft(model: ReferenceModel, text: Tensor, prefix: Tensor, logits: Tensor) -> int:
    """Compare the logits of the token after a prefix, drafted after a text, with those of the nearest head."""
    distances, ahead = model.config.heads.distances, prefix.shape[1] - text.shape[1] + 2
    head = next(k for k, distance in enumerate(distances, 1) if distance >= ahead)
    position = prefix.shape[1] - distances[head - 1]
    samples = F.pad(prefix, (0, model.config.heads.lookahead + 1))
    with torch.no_grad():
        expected = model(samples, text.shape[1] - 1)[head][0, position]
    torch.testing.assert_close(logits[0], expected, rtol=0, atol=1e-4)
    return head


class DraftRecorder:
    """Keeps the draft logits of a generate.py, and replaces 0, 1, 2, ... of its first drafts by the true text."""

    def __init__(self, llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        drafter = llama.generate.func.__globals__["Drafter"]
        self.drafts: list[tuple[Tensor, Tensor, Tensor]] = []
        """Texts, prefixes and logits."""
        self.truth, self.accepted, calls = torch.empty(1, 0), set[int](), count()
        original = drafter.draft

        def draft(own: Any, text: Tensor, outputs: Any, probabilities: Callable[..., Tensor]) -> Any:
            def recorded(prefix: Tensor, logits: Tensor) -> Tensor:
                self.drafts.append((text, prefix, logits))
                return probabilities(prefix, logits)

            drafts = original(own, text, outputs, recorded)
            true = next(calls) % (len(drafts) + 1)
            self.accepted.add(true)
            following = self.truth[:, text.shape[1] : text.shape[1] + true]
            own_token = [(token[None], F.one_hot(token[0], VOCAB_SIZE).float()) for token in following.T]
            return own_token + drafts[len(own_token) :]

        monkeypatch.setattr(drafter, "draft", draft)


assert KINDS.keys() == {heads.get("kind", "parallel") for heads in CUSTOM.values()}


@pytest.mark.parametrize("case", [*CUSTOM, *TRUNKS])
def test_own_generate_drafts_with_every_kind(tmp_path: Path, case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # transformers would load the byte tokenizer as Qwen2's, and the export would refuse it.
    monkeypatch.setattr("mtp_dist.convert.to_huggingface.write_tokenizer", lambda *rest: ("<|endoftext|>", 256))
    heads, trunk = TRUNKS.get(case) or (CUSTOM[case], {})
    model, llama = export(tmp_path, heads, trunk)
    recorder = DraftRecorder(llama, monkeypatch)
    for length in (1, 3, 20):
        ids = torch.arange(90, 90 + length)[None]
        recorder.truth = plain(llama, ids, max_new_tokens=40)
        with forward_passes(llama) as passes:
            text = llama.generate(ids, do_sample=False, max_new_tokens=24)
        assert text.tolist() == recorder.truth[:, : length + 24].tolist()
        assert passes[0] < 22, "true drafts are accepted"
    assert recorder.accepted == set(range(model.config.heads.distances[-1])), "every number of accepted drafts"
    heads = {check_draft(model, *draft) for draft in recorder.drafts}
    assert heads == set(range(2, model.config.heads.count + 1))


def test_texts_beyond_the_original_length_of_dynamic_scaling_are_not_drafted(tmp_path: Path) -> None:
    _, llama = export(tmp_path, *TRUNKS["Llama, dynamic"])
    ids, passes_of = torch.arange(90, 110)[None], dict[int, int]()
    for length in (62, 63):
        with forward_passes(llama) as passes:
            text = llama.generate(ids, do_sample=False, max_length=length)
        passes_of[length] = passes[0]
        assert torch.equal(text, plain(llama, ids, max_new_tokens=None, max_length=length))
    assert passes_of[62] < passes_of[63] == 63 - 20, passes_of


def test_own_generate_has_the_names_of_the_conversion() -> None:
    """It runs in an export, without mtp_dist."""
    for architecture in ARCHITECTURES.values():
        assert architecture.layer == (remote.GPT_NEOX_LAYER if architecture is GPT_NEOX else remote.LAYER)


@pytest.mark.parametrize("case", NATIVE)
def test_transformers_drafts_with_mtp_layers(tmp_path: Path, case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, llama = export(tmp_path, *NATIVE[case])
    drafts: list[tuple[Tensor, Tensor, Tensor]] = []
    original = MTPCandidateGenerator.get_candidates

    def get_candidates(own: Any, input_ids: Tensor, *args: Any, **kwargs: Any) -> Any:
        candidates, logits = original(own, input_ids, *args, **kwargs)
        for index in range(0 if logits is None else logits.shape[1]):
            drafts.append((input_ids, candidates[:, : input_ids.shape[1] + index], logits[:, index]))
        return candidates, logits

    monkeypatch.setattr(MTPCandidateGenerator, "get_candidates", get_candidates)
    for length in (4, 20):
        ids = torch.arange(90, 90 + length)[None]
        assert torch.equal(plain(llama, ids, use_mtp=True), plain(llama, ids))
    assert {check_draft(model, *draft) for draft in drafts} == set(range(2, model.config.heads.count + 1))
    assert llama.config.num_nextn_predict_layers == llama.config.num_mtp_layers == model.config.heads.count - 1


@pytest.fixture(scope="module")
def parallel(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return export(tmp_path_factory.mktemp("parallel"), CUSTOM["parallel"])[1]


class Streamed(list[int]):
    def put(self, tokens: Tensor) -> None:
        self.extend(tokens.flatten().tolist())

    def end(self) -> None:
        self.append(-1)


def test_generation_stops_within_a_draft(parallel: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    recorder, ids = DraftRecorder(parallel, monkeypatch), torch.arange(90, 95)[None]
    recorder.truth = text = plain(parallel, ids, max_new_tokens=60)
    tokenizer, lengths = AutoTokenizer.from_pretrained(parallel.config.name_or_path), set[int]()
    for place in range(6, 16):
        end = int(text[0, place])
        stops: dict[str, Any] = {"eos_token_id": end}
        if end < 128:  # a byte that is a character
            stops |= {"stop_strings": [tokenizer.decode([end])], "tokenizer": tokenizer}
            stops.pop("eos_token_id")
        stopped = parallel.generate(ids, do_sample=False, max_new_tokens=40, **stops)
        assert torch.equal(stopped, plain(parallel, ids, max_new_tokens=40, **stops))
        lengths.add(stopped.shape[1])
    assert len(lengths) > 6, "the text ends at many places"
    for tokens in (1, 2, 3, 7):
        streamed, expected = Streamed(), Streamed()
        parallel.generate(ids, do_sample=False, max_new_tokens=tokens, streamer=streamed)
        plain(parallel, ids, max_new_tokens=tokens, streamer=expected)
        assert streamed == expected and len(streamed) == 5 + tokens + 1


def test_other_modes_decode_plainly(parallel: Any) -> None:
    ids = torch.arange(40, 45)[None]
    mask = torch.ones(2, 5, dtype=torch.long)
    mask[1, :2] = 0
    options: list[dict[str, Any]] = [
        {"input_ids": ids.repeat(2, 1), "attention_mask": mask},
        {"input_ids": ids, "attention_mask": mask[1:]},
        {"input_ids": ids, "num_beams": 3},
        {"input_ids": ids, "num_beams": 2, "num_return_sequences": 2},
        {"input_ids": ids, "cache_implementation": "static"},
        {"input_ids": ids, "use_cache": False},
        {"input_ids": ids, "return_dict_in_generate": True, "output_scores": True},
        {"input_ids": ids, "prompt_lookup_num_tokens": 2},
    ]
    for option in options:
        chosen = {"do_sample": False, "max_new_tokens": 9} | option
        own, theirs = parallel.generate(**chosen), type(parallel).generate(parallel, **chosen)
        if "return_dict_in_generate" in option:
            assert len(own.scores) == 9
            own, theirs = own.sequences, theirs.sequences
        assert torch.equal(own, theirs), option
    sampled = parallel.generate(ids, do_sample=True, num_return_sequences=3, max_new_tokens=4)
    assert sampled.shape == (3, 9)


def always(draft: Tensor, proposal: Tensor, target: Tensor) -> tuple[Tensor, bool]:
    return draft, True


def by_target_only(draft: Tensor, proposal: Tensor, target: Tensor) -> tuple[Tensor, bool]:
    if torch.rand(()) < target[int(draft)]:
        return draft, True
    return remote.pick((target - proposal).clamp(min=0)), False


def without_residual(draft: Tensor, proposal: Tensor, target: Tensor) -> tuple[Tensor, bool]:
    token, accepted = remote.verify(draft, proposal, target)
    return (token, True) if accepted else (remote.pick(target), False)


def p_value(counts: Tensor, probabilities: Tensor) -> float:
    """Return the p-value of Pearson's chi-square test."""
    expected = probabilities * counts.sum()
    statistic = ((counts - expected) ** 2 / expected).sum()
    return float(torch.special.gammaincc(torch.tensor((len(counts) - 1) / 2), statistic / 2))


@pytest.mark.parametrize("rule", [remote.verify, always, by_target_only, without_residual])
def test_verified_tokens_have_the_target_distribution(rule: Any) -> None:
    torch.manual_seed(11)
    target, proposal = torch.randn(2, 8).softmax(-1)
    tokens = [int(rule(remote.pick(proposal), proposal, target)[0]) for _ in range(4000)]
    p = p_value(torch.bincount(torch.tensor(tokens), minlength=8), target)
    assert p > 1e-3 if rule is remote.verify else p < 1e-6, p


SAMPLED, TOKENS = 800, 12


@pytest.mark.parametrize("rule", [remote.verify, always])
def test_sampled_text_has_the_distribution_of_head_1(
    tmp_path: Path, rule: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A token's place among all in order of probability, spread evenly over its own probability, is uniform."""
    model, llama = export(tmp_path, {"count": 3}, {"trunk_layers": 1})
    llama.generation_config.eos_token_id = None
    monkeypatch.setitem(llama.generate.func.__globals__, "verify", rule)
    torch.manual_seed(11)
    options = {"do_sample": True, "temperature": 0.7, "top_k": 0, "suppress_tokens": list(range(TOKENS, VOCAB_SIZE))}
    text = llama.generate(torch.tensor([[4]]), max_new_tokens=SAMPLED, **options)
    with torch.no_grad():
        logits = model.next_token_logits(text)[0, :-1, :TOKENS] / 0.7
    values, tokens = logits.sort(descending=True)
    chosen, probabilities = tokens == text[0, 1:, None], values.softmax(-1)
    place = (probabilities.cumsum(-1) - torch.rand(SAMPLED, 1) * probabilities)[chosen]
    p = p_value(torch.histc(place, 10, 0, 1), torch.full((10,), 0.1))
    assert p < 1e-6 if rule is always else p > 1e-3, p


def train_on_cycles(heads: Heads) -> ReferenceModel:
    """Train a tiny model a little on texts in which each token follows from the one before."""
    config = tiny_config(model={"vocab_size": VOCAB_SIZE, "init_std": 0.1}, heads=heads, train={"sequence_length": 64})
    model, order = ReferenceModel(config), torch.randperm(32, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        model.weight("final_norm.weight").uniform_(0.5, 1.5, generator=torch.Generator().manual_seed(3))
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    generator = torch.Generator().manual_seed(4)
    for _ in range(25):
        tokens = [torch.randint(0, 32, (8,), generator=generator)]
        for _ in range(20):
            tokens.append(order[tokens[-1]])
        samples = torch.stack(tokens, 1)
        loss = sum(
            F.cross_entropy(logits.flatten(0, 1), samples[:, head : 16 + head].flatten())
            for head, logits in model(samples, 16).items()
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model


@pytest.mark.parametrize("heads", [{"kind": "sequential"}, {"kind": "parallel"}], ids=lambda heads: heads["kind"])
def test_drafts_of_a_trained_model_are_accepted(tmp_path: Path, heads: Heads) -> None:
    model = save_model(tmp_path / "c", train_on_cycles(heads))
    export_checkpoint(tmp_path / "c", tmp_path / "hf", "fp32", engine="transformers")
    llama = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", trust_remote_code=True)
    is_native = transformers_architecture(model.config) == MTP
    ids = torch.arange(4)[None]
    with forward_passes(llama) as passes:
        text = llama.generate(ids, do_sample=False, max_new_tokens=30, **({"use_mtp": True} if is_native else {}))
    assert torch.equal(text, plain(llama, ids, max_new_tokens=30))
    assert passes[0] <= 15, "more than two tokens per forward pass"
