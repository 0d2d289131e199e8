"""An imported Llama is head 1 of the new checkpoint, whatever the kind of heads."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

from mtp_dist.checkpoint import writer
from mtp_dist.checkpoint.find import find_resume_point
from mtp_dist.checkpoint.format import read_metadata
from mtp_dist.checkpoint.reader import load_weights
from mtp_dist.config import build_config, load_config
from mtp_dist.convert.from_huggingface import import_llama
from mtp_dist.convert.import_config import ImportRequest
from mtp_dist.convert.to_huggingface import export_checkpoint
from mtp_dist.errors import ConfigError
from mtp_dist.model.parameters import initial_weight
from tests.tiny import LINEAR_ROPE, LLAMA3_ROPE
from tests.unit.convert.folders import (
    VOCAB_SIZE,
    check_same_logits,
    config_of,
    open_checkpoint,
    write_checkpoint,
    write_llama,
)

ROPE_500 = {"rope_type": "default", "rope_theta": 500.0}
LLAMAS: dict[str, dict[str, Any]] = {
    "grouped queries": {},
    "no grouped queries": {"num_key_value_heads": 4},
    "one key for all": {"num_key_value_heads": 1},
    "tied": {"tie_word_embeddings": True},
    "theta and epsilon": {"rope_parameters": ROPE_500, "rms_norm_eps": 1e-2},
    "linear rope scaling": {"rope_parameters": ROPE_500 | LINEAR_ROPE},
    "llama3 rope scaling": {"rope_parameters": ROPE_500 | LLAMA3_ROPE},
}
KINDS: dict[str, tuple[list[str], int]] = {
    "parallel": ([], 2),
    "two layers a head": (["heads.layers_per_head=2"], 1),
    "causal": (["heads.kind=causal"], 2),
    "anticausal": (["heads.kind=anticausal", "heads.count=2"], 1),
    "linear": (["heads.kind=linear"], 3),
    "mlp": (["heads.kind=mlp"], 3),
    "sequential": (["heads.kind=sequential"], 3),
    "repeated": (["heads.kind=sequential", "heads.repeated=true"], 3),
    "separate": (["heads.unembedding=separate", "heads.token_order=0.5"], 2),
}
"""Overrides, and the layers that the trunk gets of three."""


def import_from(folder: Path, *overrides: str, **options: Any) -> Path:
    """Import `folder/hf` as `folder/c`."""
    import_llama(ImportRequest(folder / "hf", folder / "c", overrides=overrides, **options))
    return folder / "c"


@pytest.mark.parametrize("case", LLAMAS)
def test_head_1_computes_what_the_llama_computes(tmp_path: Path, case: str) -> None:
    llama = write_llama(tmp_path / "hf", **LLAMAS[case])
    model = open_checkpoint(import_from(tmp_path, heads=3))
    check_same_logits(model, llama)
    assert (model.config.heads.count, model.config.model.trunk_layers) == (3, 2)
    assert model.config.model.tie_embeddings == (case == "tied")


@pytest.mark.parametrize("key", ["rope_type", "type"])
def test_rope_scaling_as_before_transformers_5(tmp_path: Path, key: str) -> None:
    llama = write_llama(tmp_path / "hf", rope_parameters=ROPE_500 | LINEAR_ROPE)
    scaling = {key: "linear", "factor": 4}
    change_config(rope_parameters=None, rope_theta=500, rope_scaling=scaling)(tmp_path / "hf")
    check_same_logits(open_checkpoint(import_from(tmp_path)), llama)


def test_bf16_and_several_files(tmp_path: Path) -> None:
    write_llama(tmp_path / "hf").bfloat16().save_pretrained(tmp_path / "hf", max_shard_size="20KB")
    assert len(list((tmp_path / "hf").glob("*-of-*.safetensors"))) > 2
    (tmp_path / "hf" / "model.safetensors").unlink()
    llama = LlamaForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32)
    check_same_logits(open_checkpoint(import_from(tmp_path)), llama)


@pytest.mark.parametrize("copy", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_head_1_is_the_llama_for_every_kind(tmp_path: Path, kind: str, copy: bool) -> None:
    overrides, trunk_layers = KINDS[kind]
    llama = write_llama(tmp_path / "hf")
    if copy and kind in ("anticausal", "mlp", "linear"):
        with pytest.raises(ConfigError, match=r"^--copy-heads has nothing to copy: heads.kind = "):
            import_from(tmp_path, *overrides, copy_heads=True)
        return
    model = open_checkpoint(import_from(tmp_path, *overrides, copy_heads=copy))
    check_same_logits(model, llama)
    assert model.config.model.trunk_layers == trunk_layers
    assert all(logits.isfinite().all() for logits in model(torch.arange(24)[None], 16).values())


def test_other_heads_are_new_or_copies(tmp_path: Path) -> None:
    write_llama(tmp_path / "hf")
    new = open_checkpoint(import_from(tmp_path)).named_weights()
    name = "heads.3.0.mlp.linear_fc1.weight"
    assert torch.equal(new[name], initial_weight(config_of(tmp_path / "c"), name, new[name].shape))
    import_llama(ImportRequest(tmp_path / "hf", tmp_path / "copies", copy_heads=True))
    model = open_checkpoint(tmp_path / "copies")
    logits = model(torch.arange(16)[None])
    assert all(torch.equal(logits[k], logits[1]) for k in (2, 3, 4))


EXPORTS: dict[str, dict[str, Any]] = {
    "one head": {"heads": {"count": 1}},
    "parallel": {},
    "tied": {"model": {"tie_embeddings": True}},
    "anticausal": {"heads": {"kind": "anticausal"}},
    "repeated": {"heads": {"kind": "sequential", "repeated": True}},
    "separate": {"heads": {"kind": "mlp", "unembedding": "separate", "token_order": 0.1}},
    "rope scaling": {"model": {"rope_scaling": LLAMA3_ROPE}},
}


@pytest.mark.parametrize("case", EXPORTS)
def test_our_export_comes_back_bit_for_bit(tmp_path: Path, case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer, "FILE_BYTES", 20_000)
    model = write_checkpoint(tmp_path / "before", **{name: dict(section) for name, section in EXPORTS[case].items()})
    export_checkpoint(tmp_path / "before", tmp_path / "hf", "fp32")
    config, weights = load_weights(import_from(tmp_path))
    before = model.named_weights()
    assert weights.keys() == before.keys() and config.vocab_size == VOCAB_SIZE
    assert all(torch.equal(weight, before[name]) for name, weight in weights.items())
    assert config.heads == model.config.heads and config.data == model.config.data
    assert config.model.rope_scaling == model.config.model.rope_scaling
    description = read_metadata(tmp_path / "c")
    assert (description.step, description.optimizer_updates, description.samples) == (0, 0, None)


def test_more_heads_than_were_exported(tmp_path: Path) -> None:
    before = write_checkpoint(tmp_path / "before").named_weights()
    export_checkpoint(tmp_path / "before", tmp_path / "hf", "fp32")
    after = open_checkpoint(import_from(tmp_path, heads=6)).named_weights()
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert {name.split(".")[1] for name in after.keys() - before.keys()} == {"5", "6"}
    with pytest.raises(
        ConfigError, match=r"^heads\.kind is 'causal', the heads in .*mtp_heads.safetensors have 'paral"
    ):
        import_llama(ImportRequest(tmp_path / "hf", tmp_path / "d", overrides=["heads.kind=causal"]))


SCALED = "model.rope_scaling={rope_type: linear, factor: 2}"


def test_the_folder_trains_as_it_is(tmp_path: Path) -> None:
    """With the tokenizer in it, by its own configuration, whatever that training is."""
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


def test_the_users_configuration_counts(tmp_path: Path) -> None:
    write_llama(tmp_path / "hf")
    values = config_of(import_from(tmp_path)).model_dump(mode="json")
    values["model"] = {"init_std": 0.5}
    values["train"]["steps"] = 77
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(values))
    request = ImportRequest(tmp_path / "hf", tmp_path / "d", str(tmp_path / "mine.yaml"), ["heads.count=2"])
    config = import_llama(request).config
    assert (config.train.steps, config.heads.count, config.model.init_std) == (77, 2, 0.5)
    assert config_of(tmp_path / "d") == config == build_config(config.model_dump(mode="json"))
    values["model"] = {"hidden_size": 64}
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(values))
    with pytest.raises(ConfigError, match=r"^model\.hidden_size = 64 is 32 in --from = '.*hf': leave it out$"):
        import_llama(ImportRequest(tmp_path / "hf", tmp_path / "e", str(tmp_path / "mine.yaml")))


def change_config(**changes: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        values = json.loads((folder / "config.json").read_text()) | changes
        (folder / "config.json").write_text(json.dumps(values))

    return change


def change_weights(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    def rewrite(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors")

    return rewrite


def pickled(folder: Path) -> None:
    torch.save({}, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def truncated(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-7])


def without_tokenizer(folder: Path) -> None:
    for path in folder.glob("tokenizer*"):
        path.unlink()


BIAS = {"model.layers.0.self_attn.q_proj.bias": torch.zeros(32)}
MISTAKES: dict[str, tuple[Callable[[Path], None], str]] = {
    "no configuration": (lambda folder: (folder / "config.json").unlink(), "config.json cannot be read: No such file"),
    "not JSON": (lambda folder: (folder / "config.json").write_text("{"), "config.json is not JSON"),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "has no weights: model.safetensors is mis"),
    "pickle": (pickled, "has its weights as a pickle, pytorch_model.bin, which can run any code"),
    "truncated": (truncated, "model.safetensors cannot be read"),
    "architecture": (change_config(architectures=["GPT2LMHeadModel"]), "has a GPT2LMHeadModel: only LlamaForCausalLM"),
    "Qwen2": (change_config(architectures=["Qwen2ForCausalLM"]), "has a Qwen2ForCausalLM, whose attention has biases"),
    "sizes": (change_config(hidden_size=None), "config.json lacks hidden_size"),
    "attention bias": (change_config(attention_bias=True), "has attention_bias = True in config.json: our attention"),
    "MLP bias": (change_config(mlp_bias=True), "has mlp_bias = True"),
    "window": (
        change_config(architectures=["MistralForCausalLM"], model_type="mistral", sliding_window=4096),
        "has sliding_window = 4096 in config.json: our attention sees all earlier positions",
    ),
    "activation": (change_config(hidden_act="gelu"), "has hidden_act = 'gelu' in config.json: our MLP is SwiGLU"),
    "head size": (
        change_config(head_dim=16),
        "has head_dim = 16 in config.json: ours is hidden_size / num_attention_h",
    ),
    "quantized": (change_config(quantization_config={"bits": 4}), "has quantization_config = "),
    "yarn": (
        change_config(rope_parameters={"rope_type": "yarn", "factor": 8.0}),
        "has rope_scaling = {'rope_type': 'yarn', .*: only the types default, linear, llama3 map to ours",
    ),
    "dynamic": (change_config(rope_scaling={"type": "dynamic", "factor": 8.0}), "only the types default, linear, lla"),
    "half of a scaling": (
        change_config(rope_scaling={"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0}),
        "has rope_scaling = .*: it lacks high_freq_factor$",
    ),
    "rotary embedding by layer": (
        change_config(rope_parameters={"full_attention": {"rope_type": "linear", "factor": 8.0}}),
        "has rope_scaling = .*: ours have no full_attention$",
    ),
    "no scaling at all": (
        change_config(rope_scaling="linear"),
        "has rope_scaling = 'linear' .*it is not a JSON object",
    ),
    "partly rotary": (change_config(partial_rotary_factor=0.5), "has partial_rotary_factor = 0.5 in config.json: our"),
    "partly rotary since transformers 5": (
        change_config(rope_parameters=ROPE_500 | {"partial_rotary_factor": 0.5}),
        "has rope_scaling = .*: our rotary embeddings rotate all channels$",
    ),
    "missing weight": (
        change_weights(lambda tensors: tensors.pop("model.norm.weight")),
        "lacks 1 weights, the first is model.norm.weight",
    ),
    "unknown weight": (
        change_weights(lambda tensors: tensors.update(BIAS)),
        "has weights that our model does not have, such as model.layers.0.self_attn.q_proj.bias",
    ),
    "shape": (
        change_weights(lambda tensors: tensors.update({"model.norm.weight": torch.ones(31)})),
        r"has model.norm.weight as \[31\], its config.json says \[32\]",
    ),
    "integers": (
        change_weights(lambda tensors: tensors.update({"model.norm.weight": torch.ones(32).char()})),
        "model.norm.weight is torch.int8: only floating point can be imported",
    ),
    "no tokenizer": (without_tokenizer, "has no tokenizer: name the one it was trained with as data.tokenizer="),
    "too few layers": (change_config(num_hidden_layers=1), "has 1 layers, of which head 1 of kind 'parallel' needs 1"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_what_is_no_model_of_ours(tmp_path: Path, case: str) -> None:
    change, sentence = MISTAKES[case]
    write_llama(tmp_path / "hf")
    change(tmp_path / "hf")
    with pytest.raises(ConfigError, match=f"^--from = '{tmp_path}/hf'.*{sentence}"):
        import_from(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["hf"], "nothing unfinished is left"


def test_other_vocabulary_than_the_tokenizers(tmp_path: Path) -> None:
    write_llama(tmp_path / "hf", vocab_size=200, eos_token_id=1)
    for overrides in ([], ["data.tokenizer=bytes"]):
        with pytest.raises(ConfigError, match=r"has a vocabulary of 200 tokens, data.tokenizer = '.*' one of 257: "):
            import_from(tmp_path, *overrides)


def test_folders_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^--from = '.*hf' is not a folder: "):
        import_from(tmp_path)
    write_llama(tmp_path / "hf")
    import_from(tmp_path)
    with pytest.raises(ConfigError, match=r"^--to = '.*c' exists: "):
        import_from(tmp_path)


def test_a_mistral_without_a_window_is_a_llama(tmp_path: Path) -> None:
    llama = write_llama(tmp_path / "hf")
    change_config(architectures=["MistralForCausalLM"], model_type="mistral", sliding_window=None)(tmp_path / "hf")
    check_same_logits(open_checkpoint(import_from(tmp_path)), llama)
