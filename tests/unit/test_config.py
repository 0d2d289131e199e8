"""How files and overrides become a configuration, and what follows from its keys."""

import json
from functools import reduce
from operator import attrgetter, getitem
from pathlib import Path
from typing import get_args

import pytest
import yaml

from mtp_dist.config import Config, HeadsConfig, build_config, load_config, override_values, read_values, resolve
from mtp_dist.config.heads import KINDS, KindName
from mtp_dist.errors import ConfigError
from tests.unit.conftest import BASE_TEXT

ROUND_TRIPS = [
    "",
    "parallel.partition=[3, 1] & heads.loss_weights=[1, 0.5, 0, 2]",
    "parallel.partition=uniform & model.vocab_size=1000 & log.sample_prompt=null",
    "deepspeed.comms_logger.enabled=true & optimizer.lr=1e-5 & train.grad_clip=0.0 & run.output_dir=/data/x",
    *(f"heads.kind={kind}" for kind in KINDS),
    "heads={kind: sequential, repeated: true, layers_per_head: 2, detach: true, unembedding: separate}",
    "heads={kind: sequential, prediction_distances: [1, 2, 3, 4]}",
    "heads={prediction_distances: [1, 3, 5, 7], schedule: forward, loss_weights: [1, 0.5, 0, 0.25]}",
    "heads={auxiliary_weight: 0.3, schedule: reverse, kind: causal}",
    "heads={auxiliary_weight: [[1, 0.3], [10, 0]], token_order: 0.5, token_order_window: 8, kind: anticausal}",
    "heads={loss_decay: 0.6, distillation: 1, distillation_top: 7, token_order: 1, z_loss: 1.0e-4, detach: full}",
    "heads={condition: previous_token, condition_rank: 16, kind: mlp, detach: full}",
    "heads={count: 1, prediction_distances: [1], schedule: forward}",
    "heads={loss_weights: [0, 0, 0, 0], token_order: 1}",
]


@pytest.mark.parametrize("changes", ROUND_TRIPS)
def test_round_trip_through_json(base, changes):
    """As in a checkpoint."""
    values = read_values(base)
    if changes.startswith("heads={"):
        values["heads"] = yaml.safe_load(changes.removeprefix("heads="))
    elif changes:
        override_values(values, changes.split(" & "))
    config = build_config(values)
    again = build_config(json.loads(json.dumps(config.model_dump(mode="json"))))
    assert again == build_config(config.model_dump()) == config and isinstance(again, Config)
    dumped = config.heads.model_dump(mode="json")
    assert {key: dumped[key] for key in values["heads"]} == values["heads"]


@pytest.mark.parametrize(
    ("overrides", "value"),
    [
        ("optimizer.lr=1e-3", 1e-3),
        ("optimizer.eps=5E-6", 5e-6),
        ("train.steps=7 & train.steps=8", 8),
        ("run.output_dir=/x & run.output_dir=null", None),
        ("heads.loss_weights=[1, 0.5, 0, 2e-1]", (1.0, 0.5, 0.0, 0.2)),
        ("parallel.partition=[3, 1]", (3, 1)),
        ("checkpoint.every=5", 5),  # a section that the file does not have
        ("deepspeed.comms_logger.enabled=true", True),
        ("run.name=a=b", "a=b"),
        ("run.output_dir=/x/run #1", "/x/run #1"),
        ("log.sample_prompt=def f(x): # the sum of", "def f(x): # the sum of"),
        ("run.name=010", "010"),
        ("run.name=no", "no"),
        ("run.name=[a, b]", "[a, b]"),
        ("run.name=2024-99-99", "2024-99-99"),
        ("data.tokenizer=null", "null"),
        ("train.steps=010", 10),
        ("model.rope_scaling={rope_type: linear, factor: 2} & model.rope_scaling.factor=010", 10.0),
    ],
)
def test_the_last_override_wins_and_has_the_type_of_its_key(base, overrides, value):
    config, key = load_config(base, overrides.split(" & ")), overrides.split(" & ")[-1].partition("=")[0]
    assert reduce(getitem, key.split("."), config.model_dump()) == value


@pytest.mark.parametrize(
    ("given", "key", "value"),
    [
        *(("steps: 300", f"steps: {text}", n) for text, n in (("010", 10), ("0o10", 8), ("0x10", 16), ("1_000", 1000))),
        *(("lr: 2e-3", f"lr: {text}", 1e-3) for text in "1e-3 1E-3 +1e-3 1.0e-3 0.001 1.e-3 10e-4".split()),
    ],
)
def test_numbers_of_a_file(tmp_path, given, key, value):
    """Integers are decimal with a leading zero, and an exponent needs no point."""
    path = tmp_path / "run.yaml"
    path.write_text(BASE_TEXT.replace(given, key))
    config = load_config(path)
    assert value in (config.train.steps, config.optimizer.lr)


def test_merge_keys_and_overrides_of_empty_sections(tmp_path):
    path = tmp_path / "run.yaml"
    merged = BASE_TEXT.replace("train: [{path: python-stdlib", "train: [&x {path: python-stdlib")
    merged = merged.replace("validation: [{path: python-stdlib, split", "validation: [{<<: *x, split")
    path.write_text(merged.replace("log: {every: 10}", "log:"))
    config = load_config(path, ["log.every=3"])
    assert config.data.validation[0].path == "python-stdlib" and config.log.every == 3


def test_home_folder_in_every_path(base, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    keys = ("run.output_dir", "checkpoint.directory", "checkpoint.resume", "data.tokenizer")
    config = load_config(base, [*(f"{key}=~/x" for key in keys), "data.train=[{path: ~/x}]"])
    assert [*attrgetter(*keys)(config), config.data.train[0].path] == [str(tmp_path / "x")] * 5


def test_derived_values(base):
    config = load_config(base)
    assert config.model.head_dim == 32 and config.model.query_groups == 2 and config.model.ffn_size == 384
    assert config.output_dir == Path("runs/base") and config.checkpoint_dir == Path("runs/base/checkpoints")
    model = load_config(base, ["model.ffn_hidden_size=null", "model.num_query_groups=null"]).model
    assert model.ffn_size == 384, "8/3 * 128 = 341.3, up to a multiple of 64"
    assert model.query_groups == 4
    with pytest.raises(ValueError, match="frozen"):
        config.train.steps = 2


def test_derived_values_of_heads():
    assert HeadsConfig().distances == (1, 2, 3, 4) and HeadsConfig().lookahead == 4
    leaps = HeadsConfig(prediction_distances=(1, 3, 5, 7), token_order_window=9)
    assert leaps.distances == (1, 3, 5, 7) and leaps.lookahead == 7, "no token order is predicted"
    assert HeadsConfig(token_order=0.5, token_order_window=9).lookahead == 9
    assert HeadsConfig(token_order=0.5, token_order_window=2).lookahead == 4
    blocks = {"parallel": 4, "causal": 4, "anticausal": 4, "linear": 4, "mlp": 3, "sequential": 3}
    assert blocks.keys() == KINDS.keys() == set(get_args(KindName))
    for kind, number in blocks.items():
        heads = HeadsConfig.model_validate({"kind": kind})
        assert heads.num_blocks == number and heads.block_layers == (0 if kind in ("linear", "mlp") else 1)


def test_demo_resolves_at_its_layout():
    config = load_config(Path(__file__).parents[2] / "configs" / "demo.yaml")
    assert resolve(config, 257, config.parallel.tensor * config.parallel.pipeline).micro_batches >= 1


def test_resolved_values(base):
    config = resolve(load_config(base, ["parallel.tensor=2"]), 257, 8)
    assert (config.vocab_size, config.model.vocab_size, config.padded_vocab_size) == (257, 257, 384)
    assert (config.dp_size, config.micro_batches) == (2, 4)
    assert resolve(load_config(base, ["model.vocab_size=300"]), 257, 2).vocab_size == 300
    assert [resolve(load_config(base), 257, size).micro_batches for size in (2, 4, 16)] == [8, 4, 1]


@pytest.mark.parametrize(
    ("overrides", "world_size", "message"),
    [
        (
            ["parallel.tensor=2"],
            6,
            r"2 \* 2 = 4 does not divide the world size 6: use a multiple of 4 processes \(GPUs\)",
        ),
        ([], 6, r"train\.global_batch_size = 32 .* 4 \* 3 = 12: change one of the two batch sizes"),
        ([], 32, r"train\.global_batch_size = 32 .* 4 \* 16 = 64: change one of the two batch sizes"),
        (["parallel.schedule=dualpipev"], 16, r"least 4 micro-batches .* has 1 of 32 samples: raise it to 128"),
        (["model.vocab_size=100"], 2, r"model\.vocab_size = 100 is below the 257 tokens of data\.tokenizer = 'bytes'"),
    ],
)
def test_what_cannot_be_resolved(base, overrides, world_size, message):
    with pytest.raises(ConfigError, match=message):
        resolve(load_config(base, overrides), 257, world_size)
