"""The files of an export: weights, configuration and model card."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from mtp_dist.checkpoint import writer
from mtp_dist.convert.exported import exported_weights
from mtp_dist.convert.to_huggingface import export_checkpoint
from mtp_dist.errors import CheckpointError, ConfigError
from tests.tiny import LLAMA3_ROPE
from tests.unit.checkpoint.folders import flip, write_checkpoint
from tests.unit.convert.folders import STEP, VOCAB_SIZE, check_logits, write_model


def test_files_are_small_and_indexed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer, "FILE_BYTES", 20_000)
    write_model(tmp_path / "c")
    progress: list[tuple[int, int]] = []
    export_checkpoint(tmp_path / "c", tmp_path / "out", "fp32", lambda *done: progress.append(done))
    files = sorted((tmp_path / "out").glob("model-*.safetensors"))
    assert len(files) > 3 and files[0].name == f"model-00001-of-{len(files):05d}.safetensors"
    sizes = [path.stat().st_size for path in files]
    assert [size > 22_000 for size in sizes] == [True, *[False] * (len(sizes) - 2), True], "embedding and unembedding"
    assert progress[-1] == (len(progress), len(progress)), "progress counts every weight"


def test_bf16_rounds_once(tmp_path: Path) -> None:
    model = write_model(tmp_path / "c")
    assert export_checkpoint(tmp_path / "c", tmp_path / "out", "bf16").dtype == "bf16"
    head = load_file(tmp_path / "out" / "model-00001-of-00001.safetensors")["lm_head.weight"]
    assert torch.equal(head, model.weight("unembedding.weight").bfloat16())
    llama = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert llama.dtype == torch.bfloat16
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 2 * sum(weight.numel() for weight in llama.parameters())


@pytest.mark.parametrize("scaling", [None, LLAMA3_ROPE])
def test_older_programs_read_the_same_configuration(tmp_path: Path, scaling: dict[str, Any] | None) -> None:
    model = write_model(tmp_path / "c", model={"rope_theta": 500.0, "rope_scaling": scaling})
    export_checkpoint(tmp_path / "c", tmp_path / "out", None)
    values = json.loads((tmp_path / "out" / "config.json").read_text())
    assert values["rope_theta"] == values["rope_parameters"]["rope_theta"] == 500.0
    assert values["rope_scaling"] == scaling, "the keys before transformers 5"
    for kept in ({"rope_theta", "rope_scaling"}, {"rope_parameters"}):
        others = {"rope_theta", "rope_scaling", "rope_parameters"} - kept
        alone = {key: value for key, value in values.items() if key not in others}
        (tmp_path / "out" / "config.json").write_text(json.dumps(alone))
        check_logits(model, AutoModelForCausalLM.from_pretrained(tmp_path / "out"))
    assert (values["vocab_size"], values["max_position_embeddings"]) == (VOCAB_SIZE, 16)
    assert values["eos_token_id"] == values["bos_token_id"] == 256


def write_run(folder: Path, checkpoints: Path, **changes: Any) -> Path:
    """Write a checkpoint, and the summary of its run in that folder."""
    checkpoint = checkpoints / f"step_{STEP:08d}"
    write_model(checkpoint, run={"name": "books", "output_dir": str(folder)})
    summary = {"name": "books", "steps": STEP, "validation": [{"name": None, "heads": HEADS}]}
    folder.mkdir(exist_ok=True)
    (folder / "summary.json").write_text(json.dumps(summary | {"checkpoint": str(checkpoint)} | changes))
    return checkpoint


def losses_in_card(checkpoint: Path, to: Path) -> list[str]:
    export_checkpoint(checkpoint, to, None)
    return (to / "README.md").read_text().partition("## Validation\n\n")[2].partition("\n\n")[0].splitlines()


def test_configuration_and_card(tmp_path: Path) -> None:
    """The card's prompt begins a document as in training, with the run's own prompt."""
    for name, log, prompt in (
        ("a", {"sample_prompt": 'Es "war" {{ 1 }}\n'}, '<|endoftext|>Es "war" {{ 1 }}\n'),
        ("b", {}, "<|endoftext|>"),
    ):
        write_model(tmp_path / name, log=log)
        out = tmp_path / f"out-{name}"
        export_checkpoint(tmp_path / name, out, None)
        card, saved = (out / "README.md").read_text(), json.loads((out / "mtp_config.json").read_text())
        assert (saved["step"], saved["vocab_size"], saved["config"]["heads"]["count"]) == (STEP, VOCAB_SIZE, 4)
        _, front_matter, text = card.split("---\n", 2)
        assert yaml.safe_load(front_matter)["library_name"] == "transformers"
        assert text.startswith(f"# out-{name}\n\nStep 7 of the run ") and "`heads.2`, `heads.3`, `heads.4`" in text
        [line] = [line for line in card.splitlines() if line.startswith("prompt = tokenizer(")]
        assert line == f'prompt = tokenizer({prompt!r}, return_tensors="pt")'
        ids = [256, *prompt.removeprefix("<|endoftext|>").encode()]
        assert AutoTokenizer.from_pretrained(out)(prompt).input_ids == ids


HEADS = [{"head": k, "loss": 1.0 + k, "bits_per_byte": None, "accuracy": 0.5} for k in range(1, 3)]
SETS = [{"name": name, "heads": [HEADS[0] | {"loss": None, "bits_per_byte": 2.5}]} for name in ("prose", "co|de")]
ROW = "| {} | 1 | 2.5000 | 0.5000 |"
LOSSES: list[tuple[dict[str, Any], list[str]]] = [
    ({}, ["| head | loss (nats per token) | accuracy |", "| 1 | 2.0000 | 0.5000 |", "| 2 | 3.0000 | 0.5000 |"]),
    ({"validation": SETS}, ["| set | head | bits per byte | accuracy |", *map(ROW.format, ("prose", r"co\|de"))]),
    *((changes, []) for changes in ({"steps": STEP + 1}, {"validation": []}, {"validation": None})),
    ({"checkpoint": None}, []),
]
"""Changes of a run's summary, and the rows of losses in the card, without the line below the titles."""


@pytest.mark.parametrize(("changes", "rows"), LOSSES)
def test_card_has_the_losses_of_the_step(tmp_path: Path, changes: dict[str, Any], rows: list[str]) -> None:
    checkpoint = write_run(tmp_path / "run", tmp_path / "run" / "checkpoints", **changes)
    assert [row for row in losses_in_card(checkpoint, tmp_path / "out") if "---" not in row] == rows


def test_card_has_the_losses_of_its_own_run(tmp_path: Path) -> None:
    """A folder of checkpoints may be elsewhere, next to another run's summary."""
    checkpoint = write_run(tmp_path / "run", tmp_path / "shared" / "checkpoints")
    assert losses_in_card(checkpoint, tmp_path / "own"), "from the run's folder, by the checkpoint's configuration"
    other = json.loads((tmp_path / "run" / "summary.json").read_text()) | {"name": "code"}
    (tmp_path / "shared" / "summary.json").write_text(json.dumps(other))
    (tmp_path / "run" / "summary.json").unlink()
    assert not losses_in_card(checkpoint, tmp_path / "another's")


def test_errors_leave_nothing(tmp_path: Path) -> None:
    write_model(tmp_path / "c", heads={"kind": "linear"})
    write_model(tmp_path / "d")
    write_model(tmp_path / "truncated")
    file = next((tmp_path / "truncated").glob("model-*.safetensors"))
    file.write_bytes(file.read_bytes()[:-100])
    config = tmp_path / "c" / "config.json"
    for source, target, dtype, message in (
        ("c", tmp_path / "out", None, r"heads\.kind = 'linear': its head 1 multiplies the trunk's output"),
        ("missing", tmp_path / "out", None, r"^--checkpoint = '.*missing' has no checkpoint"),
        ("truncated", tmp_path / "out", None, r"is not a valid mtp_dist checkpoint"),
        ("d", tmp_path, None, r"^--to = '.*' exists: "),
        ("d", config, None, r"^--to = '.*' exists: "),
        ("d", config / "out", None, r"^cannot write --to = '.*': Not a directory"),
    ):
        with pytest.raises(CheckpointError, match=message):
            export_checkpoint(tmp_path / source, target, dtype)
    with pytest.raises(ConfigError, match=r"^--dtype = 'fp16' is not one of bf16, fp32$"):
        export_checkpoint(tmp_path / "c", tmp_path / "out", "fp16")
    with pytest.raises(ConfigError, match=r"^--for = 'vllm' is not one of plain, transformers$"):
        export_checkpoint(tmp_path / "c", tmp_path / "out", None, engine="vllm")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c", "d", "truncated"], "no staging directory remains"


def test_only_weights_are_verified(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The moments are two thirds of a checkpoint; neither an export nor a sample reads them."""
    monkeypatch.setattr("mtp_dist.convert.to_huggingface.write_tokenizer", lambda *rest: ("<|endoftext|>", 256))
    folder = write_checkpoint(tmp_path / "checkpoints", 3)
    files = sorted(folder.glob("model-*.safetensors"))
    for path in folder.glob("optimizer-*.safetensors"):
        flip(path, 5000)
    progress: list[tuple[int, int]] = []
    export_checkpoint(tmp_path / "checkpoints", tmp_path / "out", None, on_verified=lambda *done: progress.append(done))
    size = sum(path.stat().st_size for path in files)
    assert progress[-1] == (size, size), "progress counts the bytes of the weights"
    flip(files[1], 5000)
    with pytest.raises(CheckpointError, match=r"model-00002-of-00002\.safetensors has the SHA-256"):
        export_checkpoint(tmp_path / "checkpoints", tmp_path / "other", None)


def test_weights_of_an_incomplete_export_are_refused(tmp_path: Path) -> None:
    write_model(tmp_path / "c")
    export_checkpoint(tmp_path / "c", tmp_path / "out", None)
    heads, model = tmp_path / "out" / "mtp_heads.safetensors", tmp_path / "out" / "model-00001-of-00001.safetensors"
    for file, name, message in (
        (heads, "heads.3.0.mlp.linear_fc2.weight", r"^--model = '.*out' is incomplete: heads\.3\.0\.mlp\.linear_fc2"),
        (model, "model.norm.weight", r"^--model = '.*out' lacks 1 weights, the first is model\.norm\.weight$"),
    ):
        tensors = load_file(file)
        save_file({key: tensor for key, tensor in tensors.items() if key != name}, file)
        with pytest.raises(CheckpointError, match=message):
            exported_weights(tmp_path / "out")
        save_file(tensors, file)
    (tmp_path / "out" / "mtp_config.json").unlink()
    with pytest.raises(CheckpointError, match=r"^--model = '.*out' is not an export of mtp-dist: it has no mtp_config"):
        exported_weights(tmp_path / "out")
