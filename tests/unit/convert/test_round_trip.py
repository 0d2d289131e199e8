"""Head 1 is the Llama of an export and of an import, for every kind of heads, and an import restores an export."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from mtp_dist.checkpoint import writer
from mtp_dist.checkpoint.format import read_metadata
from mtp_dist.checkpoint.reader import load_weights
from mtp_dist.config.heads import KINDS
from mtp_dist.convert.exported import exported_weights
from mtp_dist.convert.to_huggingface import export_checkpoint
from mtp_dist.errors import ConfigError
from mtp_dist.model.parameters import initial_weight
from mtp_dist.model.reference import ReferenceModel, reference_losses
from tests.engines import global_batch
from tests.parity.resuming import BOTH, at
from tests.ranks import Ranks
from tests.tiny import LINEAR_ROPE, LLAMA3_ROPE, tiny_config
from tests.unit.checkpoint.on_ranks import train_part
from tests.unit.convert.folders import check_logits, check_weights, import_from, open_model, write_llama, write_model

CASES: dict[str, tuple[dict[str, dict[str, Any]], int]] = {
    "four heads": ({}, 2),
    "one head": ({"heads": {"count": 1}}, 2),
    "tied": ({"model": {"tie_embeddings": True}}, 2),
    "no grouped queries": ({"model": {"num_query_groups": 4}}, 2),
    "one key for all": ({"model": {"num_query_groups": 1}}, 2),
    "theta and epsilon": ({"model": {"rope_theta": 500.0, "norm_eps": 1e-2}}, 2),
    "linear rope scaling": ({"model": {"rope_scaling": LINEAR_ROPE, "rope_theta": 500.0}}, 2),
    "llama3 rope scaling": ({"model": {"rope_scaling": LLAMA3_ROPE}}, 2),
    "two layers per head": ({"heads": {"layers_per_head": 2}}, 1),
    "no layers": ({"heads": {"layers_per_head": 0, "unembedding": "separate"}}, 3),
    "causal": ({"heads": {"kind": "causal"}}, 2),
    "causal, two layers": ({"heads": {"kind": "causal", "layers_per_head": 2}}, 1),
    "anticausal": ({"heads": {"kind": "anticausal", "count": 2}}, 1),
    "sequential": ({"heads": {"kind": "sequential"}}, 3),
    "repeated": ({"heads": {"kind": "sequential", "repeated": True}}, 3),
    "mlp": ({"heads": {"kind": "mlp"}}, 3),
    "linear": ({"heads": {"kind": "linear"}}, 3),
    "separate unembeddings": ({"heads": {"unembedding": "separate", "token_order": 0.1}}, 2),
    "conditioned": ({"heads": {"condition": "previous_token", "condition_rank": 6}}, 2),
    "weighted hidden states": ({"heads": {"weighted_hidden_states": True}}, 2),
    "separate, mlp": ({"heads": {"kind": "mlp", "unembedding": "separate"}}, 3),
}
"""Sections of the configuration, and the trunk layers that remain of a Llama of three layers."""
assert CASES.keys() >= KINDS.keys() - {"parallel"}, "a case per kind; the first one has parallel heads"


def opened(folder: Path) -> LlamaForCausalLM:
    model, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert isinstance(model, LlamaForCausalLM) and not any(report.values()), report
    return model.eval()


@pytest.mark.parametrize("case", [case for case in CASES if case not in KINDS or KINDS[case].exportable])
def test_export_is_head_1_and_import_restores_it(tmp_path: Path, case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer, "FILE_BYTES", 20_000)
    model = write_model(tmp_path / "before", **CASES[case][0])
    exported = export_checkpoint(tmp_path / "before", tmp_path / "hf", None)
    llama = opened(tmp_path / "hf")
    check_logits(model, llama)
    assert llama.dtype == torch.float32, "the precision of the training"
    assert exported.parameters == sum(weight.numel() for weight in llama.parameters())
    assert exported.layers == len(llama.model.layers)
    weights, heads = model.named_weights(), tmp_path / "hf" / "mtp_heads.safetensors"
    others = load_file(heads) if heads.exists() else {}
    assert bool(others) == heads.exists() and all(torch.equal(w, weights[name]) for name, w in others.items())
    numbers = [sum(weight.numel() for weight in each.values()) for each in (others, weights)]
    assert exported.parameters + numbers[0] == numbers[1], "no weight is lost, and none is exported twice"

    config, exported_tensors = exported_weights(tmp_path / "hf")
    check_weights(model, ReferenceModel(config, dict(exported_tensors)))
    after = open_model(import_from(tmp_path))
    check_weights(model, after)
    config, metadata = after.config, read_metadata(tmp_path / "c")
    assert (config.heads, config.data, config.vocab_size) == (model.config.heads, model.config.data, 257)
    assert config.model.rope_scaling == model.config.model.rope_scaling
    assert (metadata.step, metadata.optimizer_updates, metadata.samples) == (0, 0, None)


@pytest.mark.parametrize("copy", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_import_is_the_llama(tmp_path: Path, case: str, copy: bool) -> None:
    sections, trunk_layers = CASES[case]
    model = sections.get("model", {})
    rope = {"rope_type": "default", "rope_theta": model.get("rope_theta", 10_000.0)} | model.get("rope_scaling", {})
    changes = {"num_key_value_heads": model.get("num_query_groups", 2), "rms_norm_eps": model.get("norm_eps", 1e-6)}
    changes |= {"tie_word_embeddings": model.get("tie_embeddings", False), "rope_parameters": rope}
    llama = write_llama(tmp_path / "hf", **changes)
    heads = sections.get("heads", {})
    overrides = [f"heads.{key}={value}" for key, value in heads.items()]
    kind = KINDS[heads.get("kind", "parallel")]
    # Of anticausal heads, all layers are the Llama's.
    has_no_layers = not kind.has_layers or kind.reads == "next head" or heads.get("count") == 1
    if copy and has_no_layers and "unembedding" not in heads:
        with pytest.raises(ConfigError, match=r"^--copy-heads has nothing to copy: heads.kind = "):
            import_from(tmp_path, *overrides, copy_heads=True)
        return
    imported = open_model(import_from(tmp_path, *overrides, copy_heads=copy))
    check_logits(imported, llama)
    assert imported.config.model.trunk_layers == trunk_layers
    assert imported.config.model.tie_embeddings == (case == "tied")
    assert all(logits.isfinite().all() for logits in imported(torch.arange(24)[None], 16).values())


def test_other_heads_are_new_or_copies(tmp_path: Path) -> None:
    write_llama(tmp_path / "hf")
    config, new = load_weights(import_from(tmp_path))
    name = "heads.3.0.mlp.linear_fc1.weight"
    assert torch.equal(new[name], initial_weight(config, name, new[name].shape))
    logits = open_model(import_from(tmp_path, to="copies", copy_heads=True))(torch.arange(16)[None])
    assert all(torch.equal(logits[k], logits[1]) for k in (2, 3, 4))


def test_more_heads_than_were_exported(tmp_path: Path) -> None:
    before = write_model(tmp_path / "before").named_weights()
    export_checkpoint(tmp_path / "before", tmp_path / "hf", "fp32")
    after = open_model(import_from(tmp_path, heads=6)).named_weights()
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert {name.split(".")[1] for name in after.keys() - before.keys()} == {"5", "6"}
    with pytest.raises(ConfigError, match=r"^heads\.kind is 'causal', the heads in .*mtp_heads.safetensors have 'par"):
        import_from(tmp_path, "heads.kind=causal", to="d")


RANKS_CASES = [(1, False, None), (1, True, LLAMA3_ROPE), (4, False, LINEAR_ROPE), (4, True, None)]
"""Number of heads, tied embeddings, scaling of the rotary embeddings."""


@pytest.mark.parametrize("case", RANKS_CASES)
def test_checkpoint_of_ranks_is_exported_and_trained_again(ranks: Ranks, tmp_path: Path, case: Any) -> None:
    count, tied, scaling = case
    model = {"vocab_size": 257, "tie_embeddings": tied, "init_std": 0.2, "rope_scaling": scaling}
    ranks.run(4, train_part, at(BOTH, tmp_path / "runs", model=model, heads={"count": count}), 0, 1)
    model = open_model(tmp_path / "runs" / "step_00000001")
    export_checkpoint(tmp_path / "runs", tmp_path / "hf", None)
    check_logits(model, opened(tmp_path / "hf"))
    imported = open_model(import_from(tmp_path))
    check_weights(model, imported)

    sections = imported.config.model_dump(include={"model", "heads", "data", "optimizer"})
    other_layout = tiny_config(**sections, parallel={"pipeline": 2})
    samples, targets = global_batch(other_layout, 1)
    expected = reference_losses(model, samples, targets).losses
    for part in ranks.run(2, train_part, other_layout, 0, 1, tmp_path / "c", False):
        torch.testing.assert_close(part.losses[0][0].float(), expected, rtol=1e-5, atol=1e-6)
