"""Models of each architecture are imported, compute what transformers computes, and come back as they were."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from mtp_dist.cli import app
from mtp_dist.convert.architectures.registry import ARCHITECTURES
from mtp_dist.convert.exported import exported_weights
from mtp_dist.convert.from_huggingface import import_model
from mtp_dist.convert.import_config import ImportRequest
from mtp_dist.convert.to_huggingface import export_checkpoint
from mtp_dist.convert.weight_folder import INDEX, SINGLE
from mtp_dist.errors import ConfigError
from mtp_dist.model.reference import ReferenceModel
from tests.tiny import LINEAR_ROPE, LLAMA3_ROPE
from tests.unit.convert.folders import (
    change_config,
    change_weights,
    check_logits,
    check_weights,
    import_from,
    open_model,
    write_architecture,
    write_model,
)

Settings = dict[str, Any]
LARGER = {"hidden_size": 48, "intermediate_size": 100, "num_attention_heads": 6, "num_hidden_layers": 3}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
YARN_KEYS = YARN | {"beta_fast": 8.0, "beta_slow": 0.5, "mscale": 0.7, "mscale_all_dim": 0.3, "truncate": False}


def rope(theta: float, scaling: Settings) -> Settings:
    return {"rope_parameters": {"rope_theta": theta} | scaling}


ROPES: dict[str, Settings] = {
    "theta": rope(500.0, {"rope_type": "default"}),
    "linear": rope(500.0, LINEAR_ROPE),
    "llama3": rope(500.0, LLAMA3_ROPE),
    "yarn": rope(10_000.0, YARN),
    "yarn, all keys": rope(500.0, YARN_KEYS),
    "yarn, attention factor": rope(500.0, YARN | {"attention_factor": 1.3}),
    "dynamic": rope(10_000.0, {"rope_type": "dynamic", "factor": 4.0}) | {"max_position_embeddings": 16},
}
COMMON: dict[str, Settings] = {
    "default": {},
    "tied": {"tie_word_embeddings": True},
    "no grouped queries": {"num_key_value_heads": 4},
    "one key for all": {"num_key_value_heads": 1},
    "larger": LARGER | {"num_key_value_heads": 3},
    "epsilon": {"rms_norm_eps": 1e-2},
    "head_dim": {"head_dim": 12, "tie_word_embeddings": True},
    **ROPES,
}
NO_GROUPS = ("no grouped queries", "one key for all", "head_dim", "epsilon")
WINDOWED = {"use_sliding_window": True, "max_window_layers": 0}
UNUSED = {"sliding_window": 5, "max_window_layers": 0}
CASES: dict[str, dict[str, Settings]] = {
    "LlamaForCausalLM": COMMON | {"biases": {"attention_bias": True, "mlp_bias": True}},
    "MistralForCausalLM": {name: {"sliding_window": 7} | case for name, case in COMMON.items()}
    | {"one position": {"sliding_window": 1}, "longer than the text": {"sliding_window": 50}},
    "Qwen2ForCausalLM": COMMON
    | {"window": WINDOWED | UNUSED, "unused window": UNUSED, "window of no layer": {"use_sliding_window": True}},
    "Qwen3ForCausalLM": COMMON | {"window": WINDOWED | UNUSED, "unused window": UNUSED, "wide": {"head_dim": 20}},
    "GPTNeoXForCausalLM": {name: case for name, case in COMMON.items() if name not in NO_GROUPS}
    | {
        "larger": LARGER,
        "dynamic": ROPES["dynamic"] | {"rotary_pct": 1.0},
        "epsilon": {"layer_norm_eps": 1e-2},
        "serial": {"use_parallel_residual": False},
        "half": {"rotary_pct": 0.5},
        "full": {"rotary_pct": 1.0, "tie_word_embeddings": True},
        "base": {"rotary_emb_base": 500.0},
    },
}
assert CASES.keys() == ARCHITECTURES.keys() and all(len(cases) >= 12 for cases in CASES.values())
OTHER_KEYS = {"_name_or_path", "transformers_version", "dtype", "bos_token_id", "eos_token_id", "pad_token_id"}
OTHER_KEYS |= {"original_max_position_embeddings"}
"""Keys of config.json that do not define what a model computes; rope_parameters has the original length too."""


def meaning(folder: Path) -> Settings:
    """Return what config.json defines, as transformers reads it."""
    values = AutoConfig.from_pretrained(folder).to_dict()
    if "sliding_attention" not in values.get("layer_types", ["sliding_attention"]):
        values |= {"use_sliding_window": False, "sliding_window": None, "max_window_layers": None}
    return {key: value for key, value in values.items() if key not in OTHER_KEYS}


@pytest.mark.parametrize(("name", "case"), [(name, case) for name, cases in CASES.items() for case in cases])
def test_import_computes_the_same_and_export_restores_it(tmp_path: Path, name: str, case: str) -> None:
    expected = write_architecture(tmp_path / "hf", name, **CASES[name][case])
    if case == "unused window":  # in config.json as Qwen writes it; transformers writes layer_types instead
        change_config(**UNUSED, layer_types=None)(tmp_path / "hf")
    # The length of the samples is max_position_embeddings of an export, unless the rotary embeddings need another.
    longer = ["train.sequence_length=40"] if case == "dynamic" else []
    model = open_model(import_from(tmp_path, "heads.count=2", *longer))
    check_logits(model, expected)
    exported = export_checkpoint(tmp_path / "c", tmp_path / "out", "fp32")
    assert exported.title == ARCHITECTURES[name].title
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    held, restored = expected.state_dict(), again.state_dict()
    assert type(again) is type(expected) and held.keys() == restored.keys()
    assert all(torch.equal(tensor, restored[weight]) for weight, tensor in held.items())
    assert meaning(tmp_path / "out") == meaning(tmp_path / "hf")
    check_weights(model, ReferenceModel(model.config, dict(exported_weights(tmp_path / "out")[1])))
    chat = [{"role": "user", "content": "x = 2"}, {"role": "assistant", "content": "Größe"}]
    before, after = (AutoTokenizer.from_pretrained(tmp_path / folder) for folder in ("hf", "out"))
    assert before.apply_chat_template(chat).input_ids == after.apply_chat_template(chat).input_ids


def test_settings_of_generation_are_kept(tmp_path: Path) -> None:
    write_architecture(tmp_path / "hf", "Qwen2ForCausalLM")
    given = {"temperature": 0.7, "top_p": 0.8, "do_sample": True, "eos_token_id": [255, 256], "pad_token_id": 256}
    (tmp_path / "hf" / "generation_config.json").write_text(json.dumps(given))
    import_from(tmp_path)
    export_checkpoint(tmp_path / "c", tmp_path / "out", None)
    written = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert written == given | {"bos_token_id": 256}


@pytest.mark.parametrize("name", ["embed_out.weight", "lm_head.weight"])
def test_older_and_newer_files_of_gpt_neox_are_read(tmp_path: Path, name: str) -> None:
    expected = write_architecture(tmp_path / "hf", "GPTNeoXForCausalLM")

    def rename(tensors: dict[str, torch.Tensor]) -> None:
        [old] = [key for key in tensors if key in ("embed_out.weight", "lm_head.weight")]
        tensors[name] = tensors.pop(old)
        for buffer in ("bias", "masked_bias", "rotary_emb.inv_freq"):
            tensors[f"gpt_neox.layers.0.attention.{buffer}"] = torch.ones(3)

    change_weights(rename)(tmp_path / "hf")
    imported = import_model(ImportRequest(tmp_path / "hf", tmp_path / "c"))
    check_logits(open_model(tmp_path / "c"), expected)
    assert len(imported.unused) == 3 and all("computed from config.json" in each for each in imported.unused)


def test_building_blocks_of_no_architecture_are_named(tmp_path: Path) -> None:
    write_model(tmp_path / "c", model={"qk_norm": True, "qkv_bias": True})
    with pytest.raises(
        ConfigError, match=r"^model.qkv_bias = True, model.qk_norm = True belong to no architecture that "
    ):
        export_checkpoint(tmp_path / "c", tmp_path / "out", None)


def lose_a_file(folder: Path) -> None:
    (folder / INDEX).write_text(json.dumps({"weight_map": {"lm_head.weight": "model-2.safetensors"}}))
    (folder / SINGLE).unlink()


BAD_INPUT = {
    "has a Qwen2MoeForCausalLM, a mixture of experts: only LlamaForCausalLM, ": change_config(
        architectures=["Qwen2MoeForCausalLM"], num_experts=8
    ),
    "has quantization_config = ": change_config(quantization_config={"bits": 4}),
    "model-2.safetensors cannot be read": lose_a_file,
}


@pytest.mark.parametrize("message", BAD_INPUT)
def test_bad_input_is_one_message_and_exit_status_2(tmp_path: Path, message: str) -> None:
    write_architecture(tmp_path / "hf", "Qwen2ForCausalLM")
    BAD_INPUT[message](tmp_path / "hf")
    result = CliRunner().invoke(app, ["import", "--from", str(tmp_path / "hf"), "--to", str(tmp_path / "c")])
    assert result.exit_code == 2 and len(result.output.strip().splitlines()) == 1
    assert message in result.output and not (tmp_path / "c").exists()
