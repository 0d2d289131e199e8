"""An import reads the weights that transformers reads from a folder, however it is laid out, or refuses it."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM
from typer.testing import CliRunner

from mtp_dist.convert.from_huggingface import import_llama
from mtp_dist.convert.import_config import ImportRequest
from mtp_dist.convert.llama import llama_weights, split
from mtp_dist.convert.to_huggingface import export_checkpoint
from mtp_dist.errors import ConfigError
from tests.tiny import LLAMA3_ROPE
from tests.unit.convert.folders import check_same_logits, open_checkpoint, write_checkpoint, write_llama

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


def change_config(folder: Path, **changes: Any) -> None:
    values = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(values))


def add_tensors(folder: Path, **tensors: torch.Tensor) -> None:
    names = {name.replace("__", "."): tensor for name, tensor in tensors.items()}
    save_file(load_file(folder / SINGLE) | names, folder / SINGLE, {"format": "pt"})


def shard(folder: Path, change: Callable[[dict[str, torch.Tensor]], object] = lambda tensors: None) -> dict[str, str]:
    """Write the weights, changed, as two shards beside the single file, with an index, which is returned."""
    tensors = load_file(folder / SINGLE)
    change(tensors)
    names = sorted(tensors)
    parts = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, part in parts.items():
        save_file({name: tensors[name] for name in part}, folder / file, {"format": "pt"})
    weight_map = {name: file for file, part in parts.items() for name in part}
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return weight_map


def tied_with_the_same(folder: Path) -> None:
    add_tensors(folder, lm_head__weight=load_file(folder / SINGLE)["model.embed_tokens.weight"].clone())


def stale_shards(folder: Path) -> None:
    shard(folder, lambda tensors: tensors["model.norm.weight"].mul_(3))


def wrong_index(folder: Path) -> None:
    """The index names the other file for each weight; transformers reads all of both."""
    weight_map = shard(folder)
    other = {"a.safetensors": "b.safetensors", "b.safetensors": "a.safetensors"}
    swapped = {name: other[file] for name, file in weight_map.items()}
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": swapped}))
    (folder / SINGLE).unlink()


def in_two_shards(folder: Path) -> None:
    shard(folder)
    (folder / SINGLE).unlink()
    tensors = load_file(folder / "a.safetensors") | load_file(folder / "b.safetensors")
    save_file(tensors, folder / "b.safetensors", {"format": "pt"})


LLAMA3 = {"rope_parameters": LLAMA3_ROPE | {"rope_theta": 500.0}}
LAYOUTS: dict[str, tuple[dict[str, Any], Callable[[Path], object], str | None, tuple[pytest.MarkDecorator, ...]]] = {
    "one file": ({}, lambda folder: None, None, ()),
    "tied": ({"tie_word_embeddings": True}, lambda folder: None, None, ()),
    "tied, and twice in the files": ({"tie_word_embeddings": True}, tied_with_the_same, None, ()),
    "tied, and another lm_head in the files": (
        {"tie_word_embeddings": True},
        lambda folder: add_tensors(folder, lm_head__weight=torch.randn(257, 32)),
        "has tie_word_embeddings = True in config.json, but lm_head.weight differs from model.embed_tokens.weight",
        (),
    ),
    "frequencies": ({}, lambda folder: add_tensors(folder, model__rotary_emb__inv_freq=torch.ones(4)), None, ()),
    "a stale index": ({}, stale_shards, None, ()),
    "an index with the wrong files": ({}, wrong_index, None, ()),
    "weights in two files": ({}, in_two_shards, r"has lm_head\.weight in a\.safetensors and in b\.safet", ()),
    "another variant only": (
        {},
        lambda folder: (folder / SINGLE).rename(folder / "model.fp16.safetensors"),
        "has no weights",
        (),
    ),
    "an adapter": (
        {},
        lambda folder: (folder / "adapter_config.json").write_text("{}"),
        r"has a PEFT adapter, adapter_config\.json",
        (),
    ),
    "another model_type": (
        {},
        lambda folder: change_config(folder, model_type="mistral"),
        "has model_type = 'mistral' in config.json, its architectures",
        (),
    ),
    "weights elsewhere": (
        {},
        lambda folder: change_config(folder, transformers_weights="a.safetensors"),
        "has transformers_weights = 'a.safetensors' in config.json",
        (),
    ),
    "a scaling's length outside of it": (
        LLAMA3,
        lambda folder: change_config(folder, original_max_position_embeddings=32),
        None,
        (),
    ),
    "a rotation of all channels, named": ({"partial_rotary_factor": 1.0}, lambda folder: None, None, ()),
}


@pytest.mark.parametrize("layout", [pytest.param(name, marks=case[3]) for name, case in LAYOUTS.items()])
def test_every_weight_is_the_one_that_transformers_holds(tmp_path: Path, layout: str) -> None:
    settings, change, refusal, _ = LAYOUTS[layout]
    write_llama(tmp_path / "hf", **settings)
    change(tmp_path / "hf")
    request = ImportRequest(tmp_path / "hf", tmp_path / "c")
    if refusal:
        with pytest.raises(ConfigError, match=f"^--from = '{tmp_path}/hf' {refusal}"):
            import_llama(request)
        return
    import_llama(request)
    model = open_checkpoint(tmp_path / "c")
    llama = LlamaForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32).eval()
    held = llama.state_dict()
    ours = {
        part: tensor
        for name, parts in llama_weights(model.config).items()
        for part, tensor in zip(parts, split(name, model.weight(name), model.config.model), strict=True)
    }
    assert held.keys() - ours.keys() == ({"lm_head.weight"} if settings.get("tie_word_embeddings") else set())
    assert all(torch.equal(tensor, held[part]) for part, tensor in ours.items())
    check_same_logits(model, llama)


def test_tensors_that_are_not_used_are_reported(tmp_path: Path) -> None:
    from mtp_dist.cli import app

    def reported(*options: str) -> str:
        result = CliRunner().invoke(app, ["import", "--from", str(tmp_path / "hf"), *options])
        assert result.exit_code == 0, result.output
        return result.stdout

    write_llama(tmp_path / "hf", tie_word_embeddings=True)
    assert "Not used" not in reported("--to", str(tmp_path / "none"))
    tied_with_the_same(tmp_path / "hf")
    add_tensors(tmp_path / "hf", model__layers__0__self_attn__rotary_emb__inv_freq=torch.ones(4))
    assert (
        "Not used: lm_head.weight (tied: it equals model.embed_tokens.weight), "
        "model.layers.0.self_attn.rotary_emb.inv_freq (computed from config.json)\n"
    ) in reported("--to", str(tmp_path / "some"))

    write_checkpoint(tmp_path / "c")
    (tmp_path / "hf").rename(tmp_path / "other")
    export_checkpoint(tmp_path / "c", tmp_path / "hf", "fp32")
    fewer = reported("--to", str(tmp_path / "fewer"), "--heads", "3")
    assert "\nNot used: heads.4.0." in fewer and "heads.3.0." not in fewer


def outside(folder: Path, name: str) -> None:
    """Shards whose index names a file that has the last weight, and is not in the folder."""
    weight_map = shard(folder)
    (folder / SINGLE).rename(folder.parent / "outside.safetensors")
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map | {"model.norm.weight": name}}))


@pytest.mark.parametrize("name", ["../outside.safetensors", "{}/outside.safetensors", "sub/../../outside.safetensors"])
def test_no_file_outside_the_folder_is_read(tmp_path: Path, name: str) -> None:
    write_llama(tmp_path / "hf")
    (tmp_path / "hf" / "sub").mkdir()
    outside(tmp_path / "hf", name.format(tmp_path))
    with pytest.raises(ConfigError, match=rf"^--from = '{tmp_path}/hf': {INDEX} names '.*', which is not a file of"):
        import_llama(ImportRequest(tmp_path / "hf", tmp_path / "c"))


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
            import_llama(ImportRequest(tmp_path / "hf", tmp_path / f"c{number}"))
        except ConfigError as error:
            assert "\n" not in str(error) and len(str(error)) < 1000, changed
            refused += 1
    assert refused > len(tried) / 4
    for text in ("[" * 100_000, '{"a":' * 100_000, "", "[]", "3", "null", "\ud800".encode("utf-8", "surrogatepass")):
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        with pytest.raises(ConfigError, match=r"config\.json is not"):
            import_llama(ImportRequest(tmp_path / "hf", tmp_path / "c"))


@pytest.mark.parametrize("wrong", [3, None, [], {}, True, "", "..", "."])
def test_a_weight_map_of_another_type_is_refused(tmp_path: Path, wrong: Any) -> None:
    write_llama(tmp_path / "hf")
    outside(tmp_path / "hf", wrong)
    with pytest.raises(ConfigError, match=rf"^--from = '{tmp_path}/hf': {INDEX} names .*, which is not a file of"):
        import_llama(ImportRequest(tmp_path / "hf", tmp_path / "c"))


def test_a_weight_map_names_no_file_that_can_be(tmp_path: Path) -> None:
    write_llama(tmp_path / "hf")
    for name in ("missing.safetensors", "a\0b", "config.json", "x" * 5000):
        outside(tmp_path / "hf", name)
        with pytest.raises(ConfigError, match=rf"^--from = '{tmp_path}/hf': .* cannot be read: "):
            import_llama(ImportRequest(tmp_path / "hf", tmp_path / "c"))
        (tmp_path / "outside.safetensors").rename(tmp_path / "hf" / SINGLE)
