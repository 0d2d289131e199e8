"""Models of each architecture are imported, compute what transformers computes, and come back as they were."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, Qwen2Tokenizer

from mtp_dist.convert.architectures.registry import ARCHITECTURES
from mtp_dist.convert.exported import exported_weights
from mtp_dist.convert.to_huggingface import export_checkpoint
from mtp_dist.convert.tokenizer_files import byte_level_tokenizer
from mtp_dist.model.reference import ReferenceModel
from tests.tiny import LINEAR_ROPE, LLAMA3_ROPE
from tests.unit.convert.folders import (
    VOCAB_SIZE,
    check_logits,
    check_weights,
    import_from,
    lively,
    open_model,
)

Settings = dict[str, Any]
SIZES = {"vocab_size": VOCAB_SIZE, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
SIZES |= {"num_attention_heads": 4, "max_position_embeddings": 64}
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
CASES: dict[str, dict[str, Settings]] = {
    "LlamaForCausalLM": COMMON | {"biases": {"attention_bias": True, "mlp_bias": True}},
    "MistralForCausalLM": {name: {"sliding_window": 7} | case for name, case in COMMON.items()}
    | {"one position": {"sliding_window": 1}, "longer than the text": {"sliding_window": 50}},
    "Qwen2ForCausalLM": COMMON | {"window": WINDOWED | {"sliding_window": 5}, "no layer": {"use_sliding_window": True}},
    "Qwen3ForCausalLM": COMMON | {"window": WINDOWED | {"sliding_window": 5}, "wide": {"head_dim": 20}},
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


CHAT_TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{{ eos_token }}{% endfor %}"


def write_qwen_tokenizer(folder: Path) -> None:
    """Write a tokenizer with one token per byte, and a chat template.

    It splits as Qwen2's does: of a Qwen2, transformers loads the vocabulary of every tokenizer into that class.
    """
    vocab = byte_level_tokenizer().get_vocab()
    Qwen2Tokenizer(vocab=vocab, merges=[], chat_template=CHAT_TEMPLATE).save_pretrained(folder)


def write_architecture(folder: Path, name: str, dtype: torch.dtype = torch.float32, **changes: Any) -> PreTrainedModel:
    """Write a tiny model of an architecture as transformers saves it, with a tokenizer, and return that model."""
    model_type = ARCHITECTURES[name].model_type
    groups = {} if model_type == "gpt_neox" else {"num_key_value_heads": 2}
    if model_type == "qwen3":
        groups["head_dim"] = 8
    config = AutoConfig.for_model(model_type, **SIZES | groups | changes)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for weight_name, weight in model.named_parameters():
            noise = lively(tuple(weight.shape), generator)
            weight.copy_(noise - 1 if weight_name.endswith("bias") else noise)
    model.save_pretrained(folder)
    write_qwen_tokenizer(folder)
    return model


def meaning(folder: Path) -> Settings:
    """Return what config.json defines, as transformers reads it."""
    values = AutoConfig.from_pretrained(folder).to_dict()
    if "sliding_attention" not in values.get("layer_types", ["sliding_attention"]):
        values |= {"use_sliding_window": False, "sliding_window": None, "max_window_layers": None}
    return {key: value for key, value in values.items() if key not in OTHER_KEYS}


@pytest.mark.parametrize(("name", "case"), [(name, case) for name, cases in CASES.items() for case in cases])
def test_import_computes_the_same_and_export_restores_it(tmp_path: Path, name: str, case: str) -> None:
    expected = write_architecture(tmp_path / "hf", name, **CASES[name][case])
    model = open_model(import_from(tmp_path, "heads.count=2"))
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
