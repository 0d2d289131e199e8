"""What a user may write, and the sentence that he gets when it is wrong."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from mtp_dist.config import Config, build_config, load_config, read_values, resolve
from mtp_dist.config.validation import DERIVED_DEEPSPEED_KEYS
from mtp_dist.errors import ConfigError

DEMO = Path(__file__).resolve().parents[2] / "configs" / "demo.yaml"
BASE_TEXT = """\
run:
  name: base

model:
  hidden_size: 128
  trunk_layers: 4
  num_attention_heads: 4
  num_query_groups: 2
  ffn_hidden_size: 384

heads:
  count: 4

parallel:
  pipeline: 2

data:
  train: [{path: python-stdlib, split: train}]
  validation: [{path: python-stdlib, split: validation}]

train:
  steps: 300
  global_batch_size: 32
  micro_batch_size: 4
  sequence_length: 256
  precision: fp32

optimizer:
  lr: 2e-3

log:
  every: 10
"""


def message_of(path: Path, overrides: Sequence[str] = ()) -> str:
    with pytest.raises(ConfigError) as error:
        load_config(path, overrides)
    return str(error.value)


def message_of_text(folder: Path, text: str | bytes, overrides: Sequence[str] = ()) -> str:
    path = folder / "run.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return message_of(path, overrides).replace(str(path), "run.yaml")


WRONG_KEYS = {
    "train.stps=3": "train.stps is not a known key: did you mean train.steps?",
    "train.seed=3": "train.seed is not a known key: did you mean run.seed?",
    "chekpoint.every=3": "chekpoint is not a known key: did you mean checkpoint?",
    "model.rope_scaling={rope_type: linear, factr: 2, factor: 2}": (
        "model.rope_scaling.factr is not a known key: did you mean model.rope_scaling.factor?"
    ),
    "qqqq.every=3": "qqqq is not a known key",
    "train.warmup_stps=3": "train.warmup_stps is not a known key: did you mean optimizer.warmup_steps?",
}
WRONG_VALUES = {
    "train.steps='5'": """train.steps = "'5'" is wrong: it should be a valid integer""",
    "train.steps=5.0": "train.steps = 5.0 is wrong: it should be a valid integer",
    "train.steps=1e2": "train.steps = 100.0 is wrong: it should be a valid integer",
    "train.steps=true": "train.steps = True is wrong: it should be a valid integer",
    "train.steps=0": "train.steps = 0 is wrong: it should be greater than 0",
    "train.steps=": "train.steps = None is wrong: it should be a valid integer",
    "parallel.sequence=1": "parallel.sequence = 1 is wrong: it should be a valid boolean",
    "optimizer.lr=fast": "optimizer.lr = 'fast' is wrong: it should be a valid number",
    "optimizer.lr=.inf": "optimizer.lr = inf is wrong: it should be a finite number",
    "train.precision=fp16": "train.precision = 'fp16' is wrong: it should be 'bf16' or 'fp32'",
    "train.activation_checkpointing=some": (
        "train.activation_checkpointing = 'some' is wrong: it should be 'none', 'selective' or 'full'"
    ),
    "model.rope_scaling=llama3": "model.rope_scaling = 'llama3' is wrong: it should have keys of its own",
    "model.rope_scaling={rope_type: yarn, factor: 2}": (
        "model.rope_scaling.rope_type = 'yarn' is wrong: it should be 'linear' or 'llama3'"
    ),
    "model.rope_scaling={rope_type: linear, factor: 0.5}": (
        "model.rope_scaling.factor = 0.5 is wrong: it should be greater than or equal to 1"
    ),
    "heads.loss_weights=[1, x, 1, 1]": "heads.loss_weights.1 = 'x' is wrong: it should be a valid number",
    "heads.z_loss=-1e-4": "heads.z_loss = -0.0001 is wrong: it should be greater than or equal to 0",
    "heads.chunk_tokens=0": "heads.chunk_tokens = 0 is wrong: it should be greater than 0",
    "heads.loss_mode=fast": "heads.loss_mode = 'fast' is wrong: it should be 'eager', 'recompute' or 'naive'",
    "optimizer.min_lr_ratio=1.5": ("optimizer.min_lr_ratio = 1.5 is wrong: it should be less than or equal to 1"),
}


@pytest.mark.parametrize("override", [*WRONG_KEYS, *WRONG_VALUES])
def test_one_sentence_for_one_mistake(base: Path, override: str) -> None:
    assert message_of(base, [override]) == (WRONG_KEYS | WRONG_VALUES)[override]


# The base has 4 attention heads, 2 query groups, ffn_hidden_size 384, 4 trunk layers, 2 stages, sequences of 256.
LLAMA3_SCALING = (
    "model.rope_scaling={rope_type: llama3, factor: 8, low_freq_factor: 1, high_freq_factor: 4, "
    "original_max_position_embeddings: 8192}"
)
CONTRADICTIONS = {
    ("model.hidden_size=130",): (
        "model.hidden_size = 130 is not divisible by model.num_attention_heads = 4: change one of the two"
    ),
    ("model.hidden_size=132",): (
        "model.hidden_size / model.num_attention_heads = 33 is odd: rotary embeddings need an even number of channels "
        "in an attention head"
    ),
    ("model.rope_scaling={rope_type: linear, factor: 2}",): None,
    ("model.rope_scaling={rope_type: linear, factor: 2, high_freq_factor: 4.0}",): (
        "model.rope_scaling.high_freq_factor = 4.0 has no effect with model.rope_scaling.rope_type = 'linear': remove "
        "it or use 'llama3'"
    ),
    (LLAMA3_SCALING,): None,
    (LLAMA3_SCALING, "model.rope_scaling.original_max_position_embeddings=null"): (
        "model.rope_scaling.original_max_position_embeddings is missing: model.rope_scaling.rope_type = 'llama3' needs "
        "it"
    ),
    (LLAMA3_SCALING, "model.rope_scaling.low_freq_factor=4"): (
        "model.rope_scaling.low_freq_factor = 4.0 must lie below model.rope_scaling.high_freq_factor = 4.0"
    ),
    ("checkpoint.keep_last=2", "checkpoint.keep_every=100"): None,
    ("checkpoint.keep_every=100",): (
        "checkpoint.keep_every = 100 needs checkpoint.keep_last: without that every checkpoint is kept"
    ),
    ("model.num_query_groups=3",): (
        "model.num_attention_heads = 4 is not divisible by model.num_query_groups = 3: change one of the two"
    ),
    ("parallel.tensor=8", "model.num_query_groups=8", "model.num_attention_heads=8"): None,
    ("parallel.tensor=3", "model.num_query_groups=2", "model.num_attention_heads=4", "model.ffn_hidden_size=384"): (
        "model.num_attention_heads = 4 is not divisible by parallel.tensor = 3: change one of the two\n"
        "model.num_query_groups = 2 is not divisible by parallel.tensor = 3: change one of the two"
    ),
    ("parallel.tensor=4",): (
        "model.num_query_groups = 2 is not divisible by parallel.tensor = 4: change one of the two"
    ),
    ("parallel.tensor=2", "model.ffn_hidden_size=385"): (
        "model.ffn_hidden_size = 385 is not divisible by parallel.tensor = 2: change one of the two"
    ),
    ("parallel.pipeline=4",): None,
    ("parallel.pipeline=5",): (
        "parallel.pipeline = 5 stages are more than model.trunk_layers = 4 layers: use at most 4 stages"
    ),
    ("parallel.pipeline=3",): None,
    ("parallel.pipeline=3", "parallel.partition=uniform"): (
        "model.trunk_layers = 4 is not divisible by parallel.pipeline = 3: change one of the two"
    ),
    ("parallel.partition=[4, 0]",): None,
    ("parallel.partition=[2, 1]",): (
        "parallel.partition = [2, 1] must list parallel.pipeline = 2 numbers with the sum model.trunk_layers = 4"
    ),
    ("parallel.partition=[2, 1, 1]",): (
        "parallel.partition = [2, 1, 1] must list parallel.pipeline = 2 numbers with the sum model.trunk_layers = 4"
    ),
    ("parallel.partition=[0, 4]",): (
        "parallel.partition = [0, 4] leaves a stage without a layer: only the last stage, which has the heads, may "
        "have 0 trunk layers"
    ),
    ("parallel.tensor=2", "train.sequence_length=255"): None,
    ("parallel.tensor=2", "parallel.sequence=true"): None,
    ("parallel.tensor=2", "parallel.sequence=true", "train.sequence_length=255"): (
        "train.sequence_length = 255 is not divisible by parallel.tensor = 2: change one of the two"
    ),
    ("parallel.sequence=true",): (
        "parallel.sequence = true needs parallel.tensor above 1: it shards over the tensor-parallel ranks"
    ),
    ("parallel.zero_stage=1",): None,
    ("parallel.grad_reduce_dtype=bf16", "train.precision=bf16"): None,
    ("parallel.grad_reduce_dtype=bf16",): (
        "parallel.grad_reduce_dtype = 'bf16' needs train.precision = 'bf16', not 'fp32': gradients in fp32 are "
        "summed in fp32"
    ),
    ("parallel.zero_stage=2",): (
        "parallel.zero_stage = 2 is not 0 or 1: stages 2 and 3 shard gradients and weights within a step, which the "
        "pipeline's micro-batch loop cannot do"
    ),
    ("heads.loss_weights=[1, 2]",): "heads.loss_weights has 2 numbers, heads.count is 4: give one per head",
    ("heads.loss_weights=[0, 0, 0, 0]",): (
        "heads.loss_weights are all 0: nothing would be trained, give at least one head a weight above 0"
    ),
    ("model.tie_embeddings=true",): None,
    ("heads.unembedding=separate",): None,
    ("heads.unembedding=separate", "model.tie_embeddings=true"): (
        "model.tie_embeddings = true ties the embedding to the one unembedding that all heads share: use "
        "heads.unembedding = 'shared' or set model.tie_embeddings = false"
    ),
    ("heads.loss_mode=naive",): None,
    ("heads.loss_mode=recompute", "heads.chunk_tokens=64"): None,
    ("heads.loss_mode=naive", "heads.chunk_tokens=64"): (
        "heads.chunk_tokens has no effect with heads.loss_mode = 'naive': remove it or use 'eager' or 'recompute'"
    ),
    ("optimizer.betas=[0.9, 1.0]",): "optimizer.betas = [0.9, 1.0] must lie below 1",
}


@pytest.mark.parametrize(("overrides", "sentence"), list(CONTRADICTIONS.items()), ids=lambda x: str(x)[:60])
def test_keys_that_contradict_each_other(base: Path, overrides: tuple[str, ...], sentence: str | None) -> None:
    if sentence is None:
        load_config(base, overrides)
    else:
        assert message_of(base, overrides) == sentence


@pytest.mark.parametrize("key", sorted(DERIVED_DEEPSPEED_KEYS))
def test_deepspeed_section_cannot_replace_what_is_derived(base: Path, key: str) -> None:
    assert message_of(base, [f"deepspeed.{key}=1"]) == f"deepspeed.{key} is derived from the other sections: remove it"


def test_deepspeed_section_takes_other_keys(base: Path) -> None:
    assert load_config(base, ["deepspeed.comms_logger.enabled=true"]).deepspeed == {"comms_logger": {"enabled": True}}


def test_missing_keys(tmp_path: Path) -> None:
    without_steps = BASE_TEXT.replace("  steps: 300\n", "")
    assert message_of_text(tmp_path, without_steps) == "train.steps is missing: give it a value"
    sections = yaml.safe_load(BASE_TEXT)
    del sections["model"]
    assert message_of_text(tmp_path, yaml.safe_dump(sections)) == "model is missing: give it a value"


def test_every_mistake_has_its_line(base: Path) -> None:
    lines = message_of(base, ["train.stps=3", "optimizer.lr=-1"]).splitlines()
    assert sorted(lines) == [
        "optimizer.lr = -1 is wrong: it should be greater than 0",
        "train.stps is not a known key: did you mean train.steps?",
    ]


@pytest.mark.parametrize(
    "key", ["run.output_dir", "checkpoint.directory", "checkpoint.resume", "data.tokenizer", "data.train.0.path"]
)
def test_home_folder_in_every_path(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    values = read_values(base)
    *parents, name = key.split(".")
    section = values
    for parent in parents:
        section = section[int(parent)] if parent.isdecimal() else section.setdefault(parent, {})
    section[name] = "~/x"
    found: Any = build_config(values).model_dump()
    for part in key.split("."):
        found = found[int(part)] if part.isdecimal() else found[part]
    assert found == str(tmp_path / "x")


def test_home_of_an_unknown_user(base: Path) -> None:
    assert message_of(base, ["checkpoint.directory=~nouser/x"]) == (
        "checkpoint.directory = '~nouser/x' is wrong: it begins with the home folder of an unknown user"
    )


@pytest.mark.parametrize(
    ("text", "steps"),
    [
        pytest.param("010", 10),
        pytest.param("0o10", 8),
        ("0x10", 16),
        ("1_000", 1000),
    ],
)
def test_integers_of_a_file_are_decimal(tmp_path: Path, text: str, steps: int) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(BASE_TEXT.replace("steps: 300", f"steps: {text}"))
    assert load_config(path).train.steps == steps


@pytest.mark.parametrize("text", ["1e-3", "1E-3", "+1e-3", "1.0e-3", "0.001", "1.e-3", "10e-4"])
def test_numbers_with_an_exponent(tmp_path: Path, text: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(BASE_TEXT.replace("lr: 2e-3", f"lr: {text}"))
    assert load_config(path).optimizer.lr == 1e-3


def test_what_follows_from_the_keys(base: Path) -> None:
    config = load_config(base)
    assert config.model.head_dim == 32 and config.model.query_groups == 2 and config.model.ffn_size == 384
    assert config.output_dir == Path("runs/base") and config.checkpoint_dir == Path("runs/base/checkpoints")


def test_demo() -> None:
    config = load_config(DEMO, ["train.steps=1"])
    assert config.train.steps == 1
    assert resolve(config, 257, config.parallel.tensor * config.parallel.pipeline).micro_batches >= 1, (
        "it runs at its own layout"
    )


def test_defaults_that_follow_from_other_keys(base: Path) -> None:
    model = load_config(base, ["model.ffn_hidden_size=null", "model.num_query_groups=null"]).model
    assert model.ffn_size == 384, "8/3 * 128 = 341.3, up to a multiple of 64"
    assert model.query_groups == 4


def test_configuration_is_frozen(base: Path) -> None:
    config = load_config(base)
    with pytest.raises(ValueError, match="frozen"):
        config.train.steps = 2  # type: ignore[misc]


def test_world_size(base: Path) -> None:
    config = load_config(base, ["parallel.tensor=2"])
    assert [resolve(config, 257, size).dp_size for size in (4, 8, 16)] == [1, 2, 4]
    for size in (1, 2, 6):
        with pytest.raises(ConfigError) as error:
            resolve(config, 257, size)
        assert str(error.value) == (
            f"parallel.tensor * parallel.pipeline = 2 * 2 = 4 does not divide the world size {size}: "
            "start a multiple of 4 processes or lower a degree"
        )


def test_global_batch_size(base: Path) -> None:
    config = load_config(base)
    assert [resolve(config, 257, size).micro_batches for size in (2, 4, 16)] == [8, 4, 1]
    for size, data in ((6, 3), (32, 16)):
        with pytest.raises(ConfigError) as error:
            resolve(config, 257, size)
        assert str(error.value) == (
            f"train.global_batch_size = 32 is not divisible by train.micro_batch_size * data-parallel degree = "
            f"4 * {data} = {4 * data}: change one of the two batch sizes"
        )


ROUND_TRIPS: list[list[str]] = [
    [],
    ["parallel.partition=[3, 1]", "heads.loss_weights=[1, 0.5, 0, 2]"],
    ["parallel.partition=uniform", "model.vocab_size=1000", "log.sample_prompt=null"],
    ["deepspeed.comms_logger.enabled=true", "optimizer.lr=1e-5", "train.grad_clip=0.0", "run.output_dir=/data/x"],
]


@pytest.mark.parametrize("overrides", ROUND_TRIPS, ids=str)
def test_round_trip_through_json(base: Path, overrides: list[str]) -> None:
    """As a checkpoint stores it."""
    config = load_config(base, overrides)
    again = build_config(json.loads(json.dumps(config.model_dump(mode="json"))))
    assert again == config and isinstance(again, Config)
    assert build_config(config.model_dump()) == config


@pytest.mark.parametrize("value", ["balancd", "4", "[2, x]", "[]"])
def test_wrong_partition_is_one_sentence(base: Path, value: str) -> None:
    message = message_of(base, [f"parallel.partition={value}"])
    assert len(message.splitlines()) == 1 and message.startswith("parallel.partition")


def test_misspelt_key_of_a_source(tmp_path: Path) -> None:
    text = BASE_TEXT.replace("path: python-stdlib, split: train", "path: python-stdlib, splt: train")
    assert message_of_text(tmp_path, text) == "data.train.0.splt is not a known key: did you mean data.train.0.split?"


@pytest.mark.parametrize("value", ["!!timestamp 2024-99-99", "!!int x", "!!bool x", "!!float [1]"])
def test_values_that_yaml_cannot_construct(tmp_path: Path, value: str) -> None:
    message = message_of_text(tmp_path, BASE_TEXT.replace("name: base", f"name: {value}"))
    assert message.startswith("run.yaml is not valid YAML: ") and len(message.splitlines()) == 1


def test_every_derived_deepspeed_key_is_owned(base: Path) -> None:
    assert "derived" in message_of(base, ["deepspeed.zero_allow_untested_optimizer=false"])
