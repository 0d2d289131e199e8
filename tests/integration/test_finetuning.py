"""Finetuning as a user does it: a pretrained model, conversations, other layouts and heads, a restart."""

import json
from pathlib import Path

import pytest

from tests.chat import messages, write_chat_tokenizer
from tests.integration import jobs
from tests.unit.convert.folders import import_from, write_architecture


def write_records(path: Path) -> None:
    turns = [[f"def f{i}(x, y):", f"    return x * {i} + y", "shorter", f"    return {i}"] for i in range(40)]
    records = [{"messages": messages(*each)} for each in turns]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def train(config: Path, *overrides: str, processes: int = 2, status: int = 0) -> jobs.Result:
    command = jobs.forked(jobs.PRETRAIN, "--config", str(config), *overrides, processes=processes)
    return jobs.run(command, status=status)


def validations(folder: Path, name: str, step: int) -> list[float]:
    """Return the losses of the heads."""
    [line] = [line for line in jobs.metrics(folder) if line["step"] == step and f"{name}/loss/head_1" in line]
    return [value for key, value in line.items() if key.startswith(f"{name}/loss/head_")]


def test_finetuning_starts_where_the_pretraining_ended(tmp_path: Path) -> None:
    tokenizer = str(write_chat_tokenizer(tmp_path / "tokenizer"))
    data = {"tokenizer": tokenizer}
    config = jobs.write_config(tmp_path, train={"steps": 2}, log={"tensorboard": False}, data=data)
    train(config, processes=1)
    before = validations(tmp_path / "out", "validation", 2)
    write_records(tmp_path / "records.jsonl")
    prepare = ["prepare", str(tmp_path / "records.jsonl"), "--to", str(tmp_path / "asked"), "--tokenizer", tokenizer]
    prepare += ["--messages-field", "messages", "--workers", "1"]
    assert "tokens are those of prompts" in jobs.run(jobs.forked("-m", "mtp_dist.cli", *prepare), status=0).stdout
    sets = f"{{path: {tmp_path / 'corpus' / 'module_0.py'}, name: same}}, {{path: {tmp_path / 'asked'}, name: asked}}"
    overrides = [f"checkpoint.initial_weights={tmp_path / 'out'}", f"data.train=[{{path: {tmp_path / 'asked'}}}]"]
    overrides += [f"data.validation=[{sets}]", "parallel.tensor=2", "heads.count=1"]
    new = [*overrides, f"run.output_dir={tmp_path / 'new'}", "train.steps=1"]
    result = train(config, *new)
    checkpoint = tmp_path / "out" / "checkpoints" / "step_00000002"
    assert f"Starting from the weights of {checkpoint}, 2 ranks" in result.output
    assert "Not used: heads.2 (6 weights), heads.3 (6 weights), heads.4 (6 weights)\n" in result.output
    assert validations(tmp_path / "new", "validation/same", 0) == pytest.approx(before[:1], rel=1e-6)
    assert len(validations(tmp_path / "new", "validation/asked", 1)) == 1
    steps = [line["train/learning_rate"] for line in jobs.metrics(tmp_path / "new") if "loss/head_1" in line]
    assert steps == [1e-3 / 2], "the schedule starts again"

    longer = [*new[:-1], "train.steps=2", "checkpoint.allow_changes=[train.steps]"]
    assert f"Resuming from step 1 ({tmp_path / 'new'}" in train(config, *longer).output, "a restart goes on"
    assert [line["step"] for line in jobs.metrics(tmp_path / "new") if "loss/head_1" in line] == [1, 2]

    wrong = [*overrides, f"run.output_dir={tmp_path / 'wrong'}", "model.ffn_hidden_size=128"]
    result = train(config, *wrong, status=2)
    assert [line for line in result.stderr.splitlines() if line.startswith("error")] == [
        f"error: model.ffn_hidden_size is 128, checkpoint.initial_weights = '{checkpoint}' was trained with 64: set "
        "model.ffn_hidden_size=64"
    ]
    assert "Traceback" not in result.output and not (tmp_path / "wrong" / "checkpoints").exists()


def test_heads_on_a_frozen_model(tmp_path: Path) -> None:
    """A Qwen2 of transformers gets heads at one layout, and more training at another."""
    write_architecture(tmp_path / "hf", "Qwen2ForCausalLM", num_hidden_layers=4)
    imported = import_from(tmp_path, to="imported")
    config = jobs.write_config(
        tmp_path,
        model={"ffn_hidden_size": 48, "qkv_bias": True, "norm_eps": 1e-6},
        data={"tokenizer": str(imported)},
        train={"steps": 2},
        log={"tensorboard": False},
    )
    frozen = ["train.freeze=[trunk]", f"run.output_dir={tmp_path / 'new'}"]
    result = train(config, *frozen, processes=1, status=2)
    assert "error: train.freeze = [trunk] would freeze random weights: name a trained model in" in result.stderr
    assert "Traceback" not in result.output
    frozen += [f"checkpoint.initial_weights={imported}", "heads.count=5", "parallel.pipeline=2"]
    assert " M of them trained), 5 heads" in train(config, *frozen, "train.validate_every=1").output
    before, *after = (validations(tmp_path / "new", "validation", step) for step in (0, 1, 2))
    assert all(losses[0] == before[0] for losses in after), "bitwise the same"
    assert after[-1][4] < before[4]
    longer = ["train.steps=3", "parallel.pipeline=1", "parallel.tensor=2", "checkpoint.allow_changes=[train.steps]"]
    assert f"Resuming from step 2 ({tmp_path / 'new'}" in train(config, *frozen, *longer).output
    assert validations(tmp_path / "new", "validation", 3)[0] == pytest.approx(before[0], rel=1e-6)
