"""The weights that a new run starts from: which it takes, which are named, and what does not fit."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mtp_dist.config import build_config
from mtp_dist.convert.exported import ExportedWeights
from mtp_dist.convert.initial_weights import InitialWeights, find_initial_weights
from mtp_dist.convert.plain_weights import QKV, fuse, fused_rows, split
from mtp_dist.convert.to_huggingface import export_checkpoint
from mtp_dist.data.build_tokenizer import build_tokenizer
from mtp_dist.errors import CheckpointError, ConfigError
from tests.tiny import TINY, tiny_config
from tests.unit.checkpoint.folders import edit_json, flip
from tests.unit.convert.folders import (
    VOCAB_SIZE,
    byte_pairs,
    import_from,
    train_sentencepiece,
    write_llama,
    write_model,
)
from tests.unit.data.preparing import error_of


def find(
    path: Path, tokenizer: str = "bytes", vocab_size: int = VOCAB_SIZE, **sections: dict[str, Any]
) -> InitialWeights:
    sections["model"] = {"vocab_size": vocab_size} | sections.get("model", {})
    config = tiny_config(checkpoint={"initial_weights": str(path)}, **sections)
    return find_initial_weights(config, build_tokenizer(tokenizer))


def test_every_weight_is_loaded_or_named(tmp_path: Path) -> None:
    write_model(tmp_path / "checkpoints" / "step_00000007", heads={"count": 3, "token_order": 0.1})
    export_checkpoint(tmp_path / "checkpoints", tmp_path / "hf", "fp32")
    for path in (tmp_path, tmp_path / "checkpoints" / "step_00000007", tmp_path / "hf"):
        found = find(path, heads={"count": 1})
        assert found.folder == (path if path.name == "hf" else tmp_path / "checkpoints" / "step_00000007")
        assert found.describe() == (
            f"33 weights loaded from {found.folder}\n"
            "Not used: heads.2 (6 weights), heads.3 (6 weights), token_order.weight"
        )
        shapes, used = found.open().shapes(), find(path, heads={"count": 3, "token_order": 1.0})
        assert used.loaded == len(shapes) and not used.unused and not used.new
        more = find(path, heads={"count": 5, "token_order": 1.0})
        assert more.describe().endswith("\nInitialized: heads.4 (6 weights), heads.5 (6 weights)") and not more.unused
    write_llama(tmp_path / "llama" / "hf")
    folder = import_from(tmp_path / "llama")
    imported = find(folder, str(folder), model={"trunk_layers": 2, "norm_eps": 1e-6}, heads={"count": 4})
    assert not imported.is_export and not imported.unused and not imported.new


EXPORTS: dict[str, dict[str, Any]] = {
    "llama": {},
    "one key": {"model": {"num_query_groups": 1, "tie_embeddings": True}},
    "sequential": {"heads": {"kind": "sequential", "token_order": 0.5}},
    "linear": {"heads": {"kind": "linear", "unembedding": "separate"}},
    "Qwen3": {"model": {"qk_norm": True, "kv_channels": 12}},
    "GPT-NeoX": {"model": {"normalization": "layernorm", "mlp": "gelu", "linear_bias": True, "num_query_groups": 4}},
    "Llama, biases": {"model": {"linear_bias": True}},
}


@pytest.mark.parametrize("name", EXPORTS)
def test_blocks_of_an_export_are_those_of_its_full_weights(tmp_path: Path, name: str) -> None:
    write_model(tmp_path / "step_00000007", **EXPORTS[name])
    engine = "transformers" if name in ("sequential", "linear") else "plain"
    export_checkpoint(tmp_path, tmp_path / "hf", None, engine=engine)
    export = ExportedWeights(tmp_path / "hf")
    assert export.unknown == []
    for weight, shape in export.shapes().items():
        full, rows = export.read(weight).float(), shape[0]
        assert full.shape == shape
        for first, last in ((0, rows), (0, rows // 2), (rows // 3, rows), (rows // 3, rows // 3 + 1)):
            assert torch.equal(export.read_block(weight, (slice(first, last),)), full[first:last]), weight
            if len(shape) > 1:
                block = (slice(first, last), slice(shape[1] // 4, shape[1] // 2))
                assert torch.equal(export.read_block(weight, block), full[block]), weight


@given(data=st.data(), groups=st.sampled_from([1, 2, 4]))
def test_rows_of_fused_weights(data: st.DataObject, groups: int) -> None:
    model = tiny_config(model={"num_query_groups": groups}).model
    rows = model.hidden_size + 2 * groups * model.head_dim
    weight = torch.arange(rows)[:, None].float()
    parts = split(f"trunk.0{QKV}weight", weight, model)
    assert torch.equal(fuse(f"trunk.0{QKV}weight", parts, model), weight)
    first = data.draw(st.integers(0, rows - 1))
    last = data.draw(st.integers(first + 1, rows))
    pieces = [parts[part][rows] for part, rows in fused_rows(f"trunk.0{QKV}weight", first, last, model)]
    assert torch.equal(torch.cat(pieces), weight[first:last])


def test_another_architecture_or_tokenizer_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "step_00000007"
    write_model(folder, heads={"count": 2, "kind": "anticausal"})
    label = f"checkpoint.initial_weights = '{folder}'"
    different = {"hidden_size": 64, "rope_theta": 500.0, "num_query_groups": 4}
    with pytest.raises(ConfigError) as raised:
        find(folder, vocab_size=300, model=different, heads={"count": 1, "kind": "parallel"})
    assert str(raised.value).splitlines() == [
        f"model.hidden_size is 64, {label} was trained with 32: set model.hidden_size=32",
        f"model.num_query_groups is 4, {label} was trained with 2: set model.num_query_groups=2",
        f"model.rope_theta is 500.0, {label} was trained with 10000.0: set model.rope_theta=10000.0",
        f"heads.kind is parallel, {label} was trained with anticausal: set heads.kind=anticausal",
        f"model.vocab_size is 300, {label} has 257 tokens: use its data.tokenizer, 'bytes', and set "
        "model.vocab_size=257",
        f"heads.count is 1, {label} was trained with 2: head 1 of kind 'anticausal' runs through all others, so their "
        "number cannot change: set heads.count=2",
    ]
    same = {"count": 2, "kind": "anticausal"}
    assert find(folder, model={"init_std": 0.5, "ffn_hidden_size": 48}, heads=same).loaded == 39
    write_model(tmp_path / "far" / "step_00000007", heads={"count": 3, "prediction_distances": (1, 3, 5)})
    assert error_of(ConfigError, find, tmp_path / "far", heads={"count": 4}) == (
        "heads.prediction_distances begins with [1, 2, 3], checkpoint.initial_weights = "
        f"'{tmp_path / 'far' / 'step_00000007'}' was trained with [1, 3, 5]: give its heads the same distances"
    )
    further = {"count": 4, "prediction_distances": (1, 3, 5, 7)}
    assert find(tmp_path / "far", heads=further).describe().endswith("\nInitialized: heads.4 (6 weights)")
    other = str(byte_pairs(tmp_path / "other"))
    assert error_of(ConfigError, find, folder, other, heads=same) == (
        f"data.tokenizer is '{other}', {label} was trained with 'bytes': set data.tokenizer=bytes"
    )


def test_weighted_hidden_states_are_kept_or_added(tmp_path: Path) -> None:
    weighted = {"weighted_hidden_states": True}
    write_model(tmp_path / "plain" / "step_00000007")
    write_model(folder := tmp_path / "weighted" / "step_00000007", heads=weighted)
    added = find(tmp_path / "plain", heads=weighted)
    assert not added.unused and added.describe().endswith("\nInitialized: weighted_hidden_states.logits")
    assert not find(folder, heads=weighted).unused
    assert error_of(ConfigError, find, folder) == (
        f"heads.weighted_hidden_states is false, checkpoint.initial_weights = '{folder}' was trained with true: set "
        "heads.weighted_hidden_states=true"
    )


def test_condition_is_kept_or_added(tmp_path: Path) -> None:
    condition = {"count": 3, "condition": "previous_token", "condition_rank": 6}
    write_model(tmp_path / "plain" / "step_00000007", heads={"count": 3})
    write_model(folder := tmp_path / "conditioned" / "step_00000007", heads=condition)
    weights = "condition.embedding.weight, condition.2.weight, condition.3.weight"
    added = find(tmp_path / "plain", heads=condition)
    assert not added.unused and added.describe().endswith(f"\nInitialized: {weights}")
    assert find(folder, heads=condition | {"count": 4}).describe().endswith("heads.4 (6 weights), condition.4.weight")
    assert {*weights.split(", ")} < {*find(folder, heads={"count": 1}).unused}
    label = f"checkpoint.initial_weights = '{folder}' was trained with"
    rank = f"{label} 6: set heads.condition_rank=6"
    message = error_of(ConfigError, find, folder, heads=condition | {"condition_rank": None})
    assert message == f"heads.condition_rank is 4, {rank}"
    with pytest.raises(ConfigError) as raised:
        find(folder, heads={"count": 3})
    assert str(raised.value).splitlines() == [
        f"heads.condition is none, {label} previous_token: set heads.condition=previous_token",
        f"heads.condition_rank is 0, {rank}",
    ]
    export_checkpoint(folder, tmp_path / "hf", "fp32")
    message = error_of(ConfigError, import_from, tmp_path, "heads.condition_rank=4")
    assert message.startswith("heads.condition_rank is 4, the heads in ") and " have 6: keep it" in message


def test_folders_without_a_model(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for folder, problem in (
        (tmp_path, "contains neither a checkpoint nor an export"),
        (tmp_path / "x", "does not exist"),
    ):
        message = error_of(CheckpointError, find, folder)
        assert message.startswith(f"checkpoint.initial_weights = '{folder}' {problem}")
    write_llama(tmp_path / "llama")
    message = error_of(CheckpointError, find, tmp_path / "llama")
    assert message.endswith("or a model of Hugging Face, which mtp-dist import converts")
    tokenizer = byte_pairs(tmp_path / "tokenizer")
    size = build_tokenizer(str(tokenizer)).vocab_size
    write_model(tmp_path / "step_00000007", size, data={"tokenizer": str(tokenizer)})
    export_checkpoint(tmp_path, tmp_path / "hf", None)
    copy = str(byte_pairs(tmp_path / "copy"))
    shutil.rmtree(tmp_path / "tokenizer")
    assert find(tmp_path / "hf", copy, size).is_export, "its own tokenizer is compared"
    assert not caplog.messages
    find(tmp_path, copy, size)
    model = str(train_sentencepiece(tmp_path))
    pieces = {"vocab_size": build_tokenizer(model).vocab_size}
    write_model(tmp_path / "pieces" / "step_00000007", **pieces, data={"tokenizer": model})
    export_checkpoint(tmp_path / "pieces", tmp_path / "pieces-hf", None)
    for path in (tmp_path / "pieces", tmp_path / "pieces-hf"):
        assert find(path, model, **pieces).loaded, "the export has it converted too"
    assert "which is not here: data.tokenizer is not compared with it" in caplog.text
    edit_json(tmp_path / "step_00000007" / "config.json", lambda values: values["config"]["heads"].update(count=5))
    flip(tmp_path / "hf" / "mtp_heads.safetensors", 0)
    message = error_of(CheckpointError, find, tmp_path / "hf")
    assert message.startswith(f"checkpoint.initial_weights = '{tmp_path / 'hf'}' is a corrupt export: ")
    (tmp_path / "step_00000007" / "model.safetensors.index.json").unlink()
    assert "model.safetensors.index.json is missing" in error_of(CheckpointError, find, tmp_path)


def test_weights_and_a_checkpoint_to_resume_from_contradict() -> None:
    values = TINY | {"checkpoint": {"initial_weights": "x", "resume": "y"}}
    message = error_of(ConfigError, build_config, values)
    assert message == (
        "checkpoint.initial_weights = 'x' starts a new run, checkpoint.resume = 'y' continues one: remove one of them"
    )
