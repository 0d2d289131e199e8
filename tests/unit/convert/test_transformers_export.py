"""An export for transformers keeps every weight in a documented layout, can be imported, and explains how to draft."""

import inspect
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaForCausalLM
from typer.testing import CliRunner

from mtp_dist.checkpoint.format import CheckpointMetadata
from mtp_dist.checkpoint.manifest import record_of, write_manifest
from mtp_dist.cli import app
from mtp_dist.convert.architectures.llama import LAYER
from mtp_dist.convert.exported import exported_weights
from mtp_dist.convert.remote import generate as remote
from mtp_dist.convert.to_huggingface import export_checkpoint
from mtp_dist.errors import CheckpointError
from mtp_dist.model.reference import ReferenceModel
from tests.unit.convert.exports import CUSTOM, NATIVE, export, forward_passes
from tests.unit.convert.folders import STEP, VOCAB_SIZE, check_logits, import_from, open_model, write_model


@pytest.mark.parametrize("case", ["linear", "mlp, separate", "leaps", *NATIVE])
def test_import_restores_an_equivalent_model(tmp_path: Path, case: str) -> None:
    model, llama = export(tmp_path, *(NATIVE[case] if case in NATIVE else (CUSTOM[case],)))
    check_logits(model, llama)
    samples = torch.randint(0, VOCAB_SIZE, (2, 48), generator=torch.Generator().manual_seed(3))
    config, weights = exported_weights(tmp_path / "hf")
    with torch.no_grad():
        expected = model.logits(samples, 16)
        for other in (ReferenceModel(config, dict(weights)), open_model(import_from(tmp_path, to="d"))):
            logits = other.logits(samples, 16)
            torch.testing.assert_close(logits.heads, expected.heads, rtol=1e-5, atol=1e-5)
            if expected.token_order is not None:
                torch.testing.assert_close(logits.token_order, expected.token_order, rtol=1e-5, atol=1e-5)
    if case in NATIVE and model.config.heads.count > 2:
        fewer = open_model(import_from(tmp_path, to="fewer", heads=2))
        with torch.no_grad():
            torch.testing.assert_close(fewer(samples, 16)[2], expected.heads[2], rtol=1e-5, atol=1e-5)


def test_folders_open_without_remote_code(tmp_path: Path) -> None:
    for case, (heads, _) in {"parallel": (CUSTOM["parallel"], {}), "sequential": NATIVE["sequential"]}.items():
        model, _ = export(tmp_path / case, heads)
        llama = AutoModelForCausalLM.from_pretrained(tmp_path / case / "hf")
        assert type(llama) is LlamaForCausalLM and "generate" not in vars(llama)
        check_logits(model, llama)
    export(tmp_path, CUSTOM["linear"])
    with pytest.raises(ValueError, match="trust_remote_code"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "hf", trust_remote_code=False)


@pytest.mark.parametrize("case", ["parallel", "linear", "sequential"])
def test_command_and_card_show_how_to_draft(tmp_path: Path, case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    write_model(tmp_path / "c", heads=CUSTOM[case] if case in CUSTOM else NATIVE[case][0])
    command = ["export", "--checkpoint", str(tmp_path / "c"), "--to", str(tmp_path / "hf"), "--for", "transformers"]
    result = CliRunner().invoke(app, command)
    call = "generate(..., use_mtp=True)" if case == "sequential" else "generate(...)"
    assert f"\nOpened with trust_remote_code=True, model.{call} drafts with the other heads\n" in result.stdout
    card = (tmp_path / "hf" / "README.md").read_text()
    monkeypatch.chdir(tmp_path / "hf")
    example: dict[str, Any] = {}
    exec(card.partition("```python\n")[2].partition("```")[0].replace("=50", "=9"), example)
    with forward_passes(example["model"]) as passes:
        example["model"].generate(**example["prompt"], max_new_tokens=9)
    assert passes[0] and "several tokens per forward pass" in card


def test_changed_mtp_layers_are_refused(tmp_path: Path) -> None:
    export(tmp_path, *NATIVE["repeated, tied"])
    file, name = tmp_path / "hf" / "model-00001-of-00001.safetensors", "model.layers.5.mlp.down_proj.weight"
    tensors = load_file(file)
    for change, message in (
        (
            {name: tensors[name] + 1},
            r"^--from = '.*hf' has different weights in model\.layers\.4\.mlp.* and model\.layers",
        ),
        ({}, r"^--from = '.*hf' lacks 1 weights, the first is model\.layers\.5\.mlp\.down_proj\.weight$"),
    ):
        save_file({key: tensor for key, tensor in tensors.items() if key != name} | change, file)
        with pytest.raises(CheckpointError, match=message):
            import_from(tmp_path)


def test_unknown_weights_are_not_lost(tmp_path: Path) -> None:
    model = write_model(tmp_path / "with")
    config = model.config.model_copy(update={"heads": model.config.heads.model_copy(update={"count": 3})})
    CheckpointMetadata(STEP, 0, config).write(tmp_path / "with")
    (tmp_path / "with" / "manifest.json").unlink()
    write_manifest(tmp_path / "with", {path.name: record_of(path) for path in (tmp_path / "with").glob("*.*")})
    with pytest.raises(CheckpointError, match=r"has the weight heads\.4\.0\.input_layernorm\.weight, which an export"):
        export_checkpoint(tmp_path / "with", tmp_path / "hf", None)


def test_damaged_exports_are_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_model(tmp_path / "c", heads={"kind": "sequential"})
    original = export_checkpoint.__globals__["write_weights"]

    def damage(folder: Path, *rest: Any) -> Any:
        files = original(folder, *rest)
        with (folder / files[0]).open("r+b") as file:
            file.seek(-40, 2)
            file.write(b"\1")
        return files

    monkeypatch.setitem(export_checkpoint.__globals__, "write_weights", damage)
    for engine, message in (
        ("plain", r"^nothing was exported: lm_head\.weight would not be unembedding\.weight of the checkpoint$"),
        ("transformers", r"model\.layers\.6\.shared_head\.norm\.weight would not be final_norm\.weight of the checkp"),
    ):
        with pytest.raises(CheckpointError, match=message):
            export_checkpoint(tmp_path / "c", tmp_path / "hf", None, engine=engine)
    assert [path.name for path in tmp_path.iterdir()] == ["c"]


def test_code_in_a_folder_needs_no_mtp_dist() -> None:
    for file in Path(inspect.getfile(remote)).parent.glob("*.py"):
        assert "import mtp_dist" not in file.read_text() and "from mtp_dist" not in file.read_text()
    assert len(inspect.getsource(remote).splitlines()) <= 310


@pytest.mark.parametrize("case", ["two heads", "repeated, tied"])
def test_documented_layout_of_mimo(tmp_path: Path, case: str) -> None:
    """The recipe writes every weight under MiMo's names, with the halves of the block's matrix swapped."""
    heads, model = NATIVE[case]
    reference, _ = export(tmp_path, heads, model | {"rope_scaling": None})
    page = (Path(__file__).parents[3] / "docs" / "huggingface.md").read_text()
    recipe = page.partition("    import json, re, shutil\n")[2].partition("\n## ")[0]
    for name, folder in {"exports/sequential": "hf", "exports/mimo": "mimo"}.items():
        recipe = recipe.replace(name, str(tmp_path / folder))
    exec("import json, re, shutil\n" + textwrap.dedent(recipe), {})
    tensors = load_file(tmp_path / "mimo" / "model.safetensors")
    mtp = {name.removeprefix("model.mtp_layers.0.") for name in tensors if "mtp_layers" in name}
    parts = [f"{part}.weight" for parts in LAYER.values() for part in parts if "_norm" not in part]
    biases = [f"self_attn.{part}_proj.bias" for part in "qkv"]
    norms = ["token_layernorm", "hidden_layernorm", "final_layernorm"]
    assert mtp == {*parts, *biases, *(f"{name}.weight" for name in (*norms, "input_proj"))}
    assert not [name for name in tensors if "layers.5" in name], "one block"
    halves = reference.weight(f"heads.{'repeated' if 'repeated' in heads else 2}.eh_proj.weight").chunk(2, 1)
    assert torch.equal(tensors["model.mtp_layers.0.input_proj.weight"], torch.cat(halves[::-1], 1))
    check_logits(reference, AutoModelForCausalLM.from_pretrained(tmp_path / "mimo"))
