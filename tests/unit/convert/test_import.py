"""The configuration of an import, and what it leaves out of the source."""

from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from mtp_dist.checkpoint.find import find_resume_point
from mtp_dist.checkpoint.reader import load_weights
from mtp_dist.cli import app
from mtp_dist.config import build_config, load_config
from mtp_dist.convert.from_huggingface import import_model
from mtp_dist.convert.import_config import ImportRequest
from mtp_dist.convert.to_huggingface import export_checkpoint
from mtp_dist.errors import CheckpointError, ConfigError
from tests.unit.convert.folders import SINGLE, change_weights, import_from, write_llama, write_model

SCALED = "model.rope_scaling={rope_type: linear, factor: 2}"


def test_imported_folder_trains_with_its_own_configuration(tmp_path: Path) -> None:
    write_llama(tmp_path / "hf")
    folder = import_from(tmp_path)
    config = load_config(folder / "run.yaml", [f"checkpoint.resume={folder}", "train.steps=9", "optimizer.lr=1e-5"])
    assert config.data.tokenizer == str(folder) and config.train.sequence_length == 64
    found = find_resume_point(config)
    assert found is not None and (found.folder, found.step) == (folder, 0)
    for override in ("heads.kind=causal", "data.tokenizer=bytes", "model.rope_theta=7.0", SCALED):
        changed = load_config(folder / "run.yaml", [f"checkpoint.resume={folder}", override])
        with pytest.raises(ConfigError, match=f"^{override.split('=')[0]} is "):
            find_resume_point(changed)


def test_users_configuration_counts(tmp_path: Path) -> None:
    write_llama(tmp_path / "hf")
    file = tmp_path / "mine.yaml"
    values = load_weights(import_from(tmp_path))[0].model_dump(mode="json")
    values["model"], values["train"]["steps"] = {"init_std": 0.5}, 77
    file.write_text(yaml.safe_dump(values))
    config = import_model(ImportRequest(tmp_path / "hf", tmp_path / "d", str(file), ["heads.count=2"])).config
    assert (config.train.steps, config.heads.count, config.model.init_std) == (77, 2, 0.5)
    assert load_weights(tmp_path / "d")[0] == config == build_config(config.model_dump(mode="json"))
    values["model"] = {"hidden_size": 64}
    file.write_text(yaml.safe_dump(values))
    with pytest.raises(ConfigError, match=r"^model\.hidden_size = 64 is 32 in --from = '.*hf': leave it out$"):
        import_from(tmp_path, to="e", config=str(file))


def test_vocabulary_of_another_tokenizer_is_refused(tmp_path: Path) -> None:
    write_llama(tmp_path / "hf", vocab_size=200, eos_token_id=1)
    for overrides in ([], ["data.tokenizer=bytes"]):
        with pytest.raises(ConfigError, match=r"has a vocabulary of 200 tokens, data.tokenizer = '.*' one of 257: "):
            import_from(tmp_path, *overrides)


def test_tensors_that_are_not_used_are_reported(tmp_path: Path) -> None:
    def report(*options: str) -> str:
        result = CliRunner().invoke(app, ["import", "--from", str(tmp_path / "hf"), *options])
        assert result.exit_code == 0, result.output
        return result.stdout

    write_llama(tmp_path / "hf", tie_word_embeddings=True)
    assert "Not used" not in report("--to", str(tmp_path / "none"))
    tied = load_file(tmp_path / "hf" / SINGLE)["model.embed_tokens.weight"]
    extra = {"lm_head.weight": tied.clone(), "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    change_weights(lambda tensors: tensors.update(extra))(tmp_path / "hf")
    assert (
        "Not used: lm_head.weight (tied: it equals model.embed_tokens.weight), "
        "model.layers.0.self_attn.rotary_emb.inv_freq (computed from config.json)\n"
    ) in report("--to", str(tmp_path / "some"))

    write_model(tmp_path / "c")
    (tmp_path / "hf").rename(tmp_path / "other")
    export_checkpoint(tmp_path / "c", tmp_path / "hf", "fp32")
    fewer = report("--to", str(tmp_path / "fewer"), "--heads", "3")
    assert "\nNot used: heads.4.0." in fewer and "heads.3.0." not in fewer


def test_corrupt_heads_are_refused(tmp_path: Path) -> None:
    write_model(tmp_path / "saved")
    export_checkpoint(tmp_path / "saved", tmp_path / "hf", "fp32")
    heads, config = tmp_path / "hf" / "mtp_heads.safetensors", tmp_path / "hf" / "mtp_config.json"
    tensors = load_file(heads)
    save_file(tensors | {"heads.2.0.mlp.linear_fc2.weight": torch.ones(3)}, heads)
    with pytest.raises(CheckpointError, match=r"linear_fc2.weight as \[3\], its configuration requires \[32, 48\]$"):
        import_from(tmp_path)
    save_file(tensors, heads)
    for file in (heads, config):
        content = file.read_bytes()
        file.write_bytes(content[:-9])
        with pytest.raises(CheckpointError, match=rf"hf' is a corrupt export: {file.name}: "):
            import_from(tmp_path)
        file.write_bytes(content)
