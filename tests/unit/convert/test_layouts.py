"""An import reads the weights that transformers reads from a folder, however it is laid out, or refuses it."""

import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

from mtp_dist.convert.plain_weights import plain_weights, split
from mtp_dist.convert.weight_folder import INDEX, SINGLE
from mtp_dist.errors import UserError
from tests.tiny import LINEAR_ROPE, LLAMA3_ROPE
from tests.unit.convert.folders import change_config, change_weights, check_logits, import_from, open_model, write_llama


def shard(folder: Path, change: Callable[[dict[str, torch.Tensor]], object] = lambda tensors: None) -> dict[str, str]:
    """Write the weights, changed, as two files next to the single file, with an index, and return the index."""
    tensors = load_file(folder / SINGLE)
    change(tensors)
    names = sorted(tensors)
    files = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, its_names in files.items():
        save_file({name: tensors[name] for name in its_names}, folder / file, {"format": "pt"})
    weight_map = {name: file for file, its_names in files.items() for name in its_names}
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return weight_map


def wrong_index(folder: Path) -> None:
    """Let the index name the other file for each weight; transformers reads all of both."""
    weight_map = shard(folder)
    swapped = dict(zip(weight_map, reversed(weight_map.values()), strict=True))
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": swapped}))
    (folder / SINGLE).unlink()


def in_two_files(folder: Path) -> None:
    shard(folder)
    (folder / SINGLE).rename(folder / "b.safetensors")


def in_bf16(folder: Path) -> None:
    LlamaForCausalLM.from_pretrained(folder).bfloat16().save_pretrained(folder, max_shard_size="20KB")
    assert len(list(folder.glob("*-of-*.safetensors"))) > 2
    (folder / SINGLE).unlink()


NORM, BIAS = "model.norm.weight", "model.layers.0.self_attn.q_proj.bias"
TIED = {"tie_word_embeddings": True}
MISTRAL = {"architectures": ["MistralForCausalLM"], "model_type": "mistral"}
QWEN2 = {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"}
QWEN3 = {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3"}
NEOX = {"architectures": ["GPTNeoXForCausalLM"], "model_type": "gpt_neox", "hidden_act": "gelu"}
MOE = {"architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe"}
WINDOW = ["sliding_attention"] * 2
YARN = {"rope_type": "yarn", "factor": 4.0}
ROPE_500 = {"rope_type": "default", "rope_theta": 500.0}
LLAMA3 = {"rope_parameters": ROPE_500 | LLAMA3_ROPE}
LINEAR = {"rope_parameters": ROPE_500 | LINEAR_ROPE}
OLD = {"rope_parameters": None, "rope_theta": 500}
SAME_HEAD = change_weights(lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
READ: dict[str, tuple[dict[str, Any], Callable[[Path], object]]] = {
    "tied": (TIED, lambda folder: None),
    "tied, and twice in the files": (TIED, SAME_HEAD),
    "frequencies": ({}, change_weights(lambda t: t.update({"model.rotary_emb.inv_freq": torch.ones(4)}))),
    "a stale index": ({}, lambda folder: shard(folder, lambda tensors: tensors["model.norm.weight"].mul_(3))),
    "an index with the wrong files": ({}, wrong_index),
    "bf16 in several files": ({}, in_bf16),
    "the length of a scaling outside of it": (LLAMA3, change_config(original_max_position_embeddings=32)),
    "rope_type before version 5": (LINEAR, change_config(**OLD, rope_scaling={"rope_type": "linear", "factor": 4})),
    "type before version 5": (LINEAR, change_config(**OLD, rope_scaling={"type": "linear", "factor": 4})),
    "rotation of all channels, named": ({"partial_rotary_factor": 1.0}, lambda folder: None),
    "Mistral without a window": ({}, change_config(**MISTRAL, sliding_window=None)),
}


@pytest.mark.parametrize("layout", READ)
def test_every_weight_is_the_one_that_transformers_holds(tmp_path: Path, layout: str) -> None:
    settings, change = READ[layout]
    write_llama(tmp_path / "hf", **settings)
    change(tmp_path / "hf")
    model = open_model(import_from(tmp_path))
    change_config(architectures=["LlamaForCausalLM"], model_type="llama")(tmp_path / "hf")
    llama = LlamaForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32).eval()
    held = llama.state_dict()
    imported = {
        part: tensor
        for name, parts in plain_weights(model.config).items()
        for part, tensor in zip(parts, split(name, model.weight(name), model.config.model), strict=True)
    }
    assert held.keys() - imported.keys() == ({"lm_head.weight"} if settings is TIED else set())
    assert all(torch.equal(tensor, held[part]) for part, tensor in imported.items())
    check_logits(model, llama)


REFUSED_CONFIGS: list[tuple[dict[str, Any], str]] = [
    ({"model_type": "mistral"}, "has model_type = 'mistral' in config.json, its architectures"),
    ({"transformers_weights": "a.safetensors"}, "has transformers_weights = 'a.safetensors' in config.json"),
    ({"architectures": ["GPT2LMHeadModel"]}, "has a GPT2LMHeadModel: only LlamaForCausalLM, MistralForCausalLM, Qw"),
    ({"hidden_size": None}, "config.json lacks hidden_size"),
    (
        {"attention_bias": True},
        "has attention_bias = True .*: biases are supported if attention_bias and mlp_bias are",
    ),
    ({"mlp_bias": True}, "has mlp_bias = True in config.json: biases are supported if"),
    ({"sliding_window": 9}, "has sliding_window = 9 in config.json: a Llama has none"),
    (
        QWEN2 | {"use_sliding_window": True, "max_window_layers": 1},
        "max_window_layers = 1 .* if all layers have it",
    ),
    (QWEN2 | {"layer_types": [*WINDOW, "full_attention"]}, "has layer_types = .* a window is supported if all layers"),
    (QWEN2 | {"layer_types": WINDOW}, "has layer_types = .* give no size"),
    (
        QWEN3 | {"attention_bias": True, "head_dim": 8},
        "has attention_bias = True .*: biases of the attention with",
    ),
    (NEOX | {"hidden_act": "gelu_fast"}, "has hidden_act = 'gelu_fast' in config.json: only gelu, the exact one"),
    (NEOX | {"attention_bias": False}, "has attention_bias = False in config.json: only attention with biases"),
    (NEOX | {"rotary_pct": 1.5}, "has rotary_pct = 1.5 in config.json: input should be less than or equal to 1"),
    (MOE | {"num_experts": 60}, "has a Qwen3MoeForCausalLM, a mixture of experts: only Llama.* and GPTNeoXForCausalLM"),
    ({"hidden_act": "gelu"}, "has hidden_act = 'gelu' in config.json: only SwiGLU"),
    ({"quantization_config": {"bits": 4}}, "has quantization_config = "),
    (
        {"rope_parameters": {"rope_type": "longrope", "factor": 8.0}},
        "has rope_scaling = .*'longrope'.*default, linear",
    ),
    ({"rope_scaling": {"type": "su", "factor": 8.0}}, "supports the rope types default, linear, llama3, yarn, dynamic"),
    ({"rope_scaling": YARN | {"truncate": 1}}, "has rope_scaling = .*: truncate is neither true nor false"),
    ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0}}, ": it lacks high_freq_factor$"),
    ({"rope_parameters": {"full_attention": {"rope_type": "linear"}}}, "mtp_dist does not support full_attention$"),
    ({"rope_scaling": "linear"}, "has rope_scaling = 'linear' .*it is not a JSON object"),
    ({"partial_rotary_factor": 0.5}, "has partial_rotary_factor = 0.5 in config.json: rotary embeddings of a part"),
    ({"rope_parameters": ROPE_500 | {"partial_rotary_factor": 0.5}}, "has rope_scaling = .*: rotary embeddings of a"),
    ({"num_hidden_layers": 1}, "has 1 layers, of which head 1 of kind 'parallel' needs 1"),
]


def set_weight(name: str, weight: torch.Tensor) -> Callable[[Path], None]:
    return change_weights(lambda tensors: tensors.update({name: weight}))


def rename(name: str, to: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).rename(folder / to)


UNTIED = "has tie_word_embeddings = True in config.json, but lm_head.weight differs from model.embed_tokens.weight"
REFUSED: dict[str, tuple[Callable[[Path], object], str]] = {
    **{str(changes): (change_config(**changes), message) for changes, message in REFUSED_CONFIGS},
    "tied, and another lm_head": (change_weights(lambda tensors: tensors["lm_head.weight"].add_(1)), UNTIED),
    "weights in two files": (in_two_files, r"has lm_head\.weight in a\.safetensors and in b\.safet"),
    "variant": (rename(SINGLE, "model.fp16.safetensors"), "has no weights: model.safetensors is missing"),
    "adapter": (lambda folder: (folder / "adapter_config.json").write_text("{}"), "has a PEFT adapter, adapter_c"),
    "no configuration": (rename("config.json", "other.json"), "config.json cannot be read: No such file"),
    "not JSON": (lambda folder: (folder / "config.json").write_text("{"), "config.json is not JSON"),
    "pickle": (rename(SINGLE, "model.bin"), "has its weights as a pickle, model.bin, which can run any code"),
    "truncated": (lambda folder: os.truncate(folder / SINGLE, 20_000), "model.safetensors cannot be read"),
    "missing weight": (change_weights(lambda t: t.pop(NORM)), f"lacks 1 weights, the first is {NORM}"),
    "unknown weight": (set_weight(BIAS, torch.zeros(32)), f"weights that mtp_dist does not support, such as {BIAS}"),
    "shape": (set_weight(NORM, torch.ones(31)), rf"has {NORM} as \[31\], its config.json requires \[32\]"),
    "integers": (set_weight(NORM, torch.ones(32).char()), f"{NORM} is torch.int8: only floating point can be imported"),
    "no tokenizer": (rename("tokenizer.json", "x"), "has no tokenizer: name the one it was trained with as data.tok"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_unsupported_folders_are_refused(tmp_path: Path, case: str) -> None:
    change, message = REFUSED[case]
    write_llama(tmp_path / "hf")
    change(tmp_path / "hf")
    if case.startswith("tied"):
        change_config(**TIED)(tmp_path / "hf")
    with pytest.raises(UserError, match=f"^--from = '{tmp_path}/hf'.*{message}"):
        import_from(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["hf"], "no staging directory remains"


WRONG: list[Any] = [None, "x", "", -1, 0, 0.5, True, 10**9, 10**30, 1e400, math.nan, [], [3], {}, {"a": None}]


def test_any_value_in_config_json_is_read_or_refused(tmp_path: Path) -> None:
    """Each key of config.json, and of its rotary embeddings, with values of every type."""
    write_llama(tmp_path / "hf", **LLAMA3)
    path = tmp_path / "hf" / "config.json"
    values = json.loads(path.read_text()) | {"sliding_window": None, "partial_rotary_factor": 1.0, "rope_scaling": None}
    values |= {"rope_theta": 500.0, "original_max_position_embeddings": 16, "quantization_config": None}
    rope = values["rope_parameters"]
    tried = [values | {key: wrong} for key in values for wrong in WRONG]
    tried += [values | {"rope_parameters": rope | {key: wrong}} for key in rope for wrong in WRONG]
    without = [{key: value for key, value in values.items() if key != left_out} for left_out in values]
    refused = 0
    for number, changed in enumerate([*tried, *without]):
        path.write_text(json.dumps(changed))
        try:
            import_from(tmp_path, to=f"c{number}")
        except UserError as error:
            assert "\n" not in str(error) and len(str(error)) < 1000, changed
            refused += 1
    assert refused > len(tried) / 4
    for text in ("[" * 100_000, '{"a":' * 100_000, "", "[]", "3", "null", "\ud800"):
        path.write_bytes(text.encode("utf-8", "surrogatepass"))
        with pytest.raises(UserError, match=r"config\.json is not"):
            import_from(tmp_path)


OUTSIDE = ("../outside.safetensors", "{}/outside.safetensors", "sub/../../outside.safetensors", "", "..", ".")
WRONG_FILES = {
    rf"{INDEX} names .*, which is not a file of": (*OUTSIDE, 3, None, [], {}, True),
    ".* cannot be read: ": ("missing.safetensors", "a\0b", "config.json", "x" * 5000),
}


@pytest.mark.parametrize("message", WRONG_FILES)
def test_index_that_names_another_file_is_refused(tmp_path: Path, message: str) -> None:
    write_llama(tmp_path / "hf")
    (tmp_path / "hf" / "sub").mkdir()
    weight_map = shard(tmp_path / "hf")
    (tmp_path / "hf" / SINGLE).rename(tmp_path / "outside.safetensors")
    for file in WRONG_FILES[message]:
        named = {"model.norm.weight": file.format(tmp_path) if isinstance(file, str) else file}
        (tmp_path / "hf" / INDEX).write_text(json.dumps({"weight_map": weight_map | named}))
        with pytest.raises(UserError, match=rf"^--from = '{tmp_path}/hf': {message}"):
            import_from(tmp_path)
