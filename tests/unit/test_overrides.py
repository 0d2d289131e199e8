"""What an override gives its key, and which values no key takes."""

from pathlib import Path
from typing import Any

import pytest

from mtp_dist.config import load_config
from tests.unit.test_config import message_of

FAR_KEYS = {
    "train.gradient_accumulation_steps=3": "train.gradient_accumulation_steps is not a known key",
    "optimizer.learning_rate=1e-3": "optimizer.learning_rate is not a known key",
    "train.grad_accum=3": "train.grad_accum is not a known key",
    "parallel.expert=2": "parallel.expert is not a known key",
    "model.dropout=0": "model.dropout is not a known key",
}
"""Keys of other programs, which are like none of ours."""


@pytest.mark.parametrize("override", list(FAR_KEYS))
def test_no_hint_to_a_key_that_means_something_else(base: Path, override: str) -> None:
    assert message_of(base, [override]) == FAR_KEYS[override]


@pytest.mark.parametrize("override", ["train.steps", "steps=1", "=1", ".steps=1", "train.=1", "train..steps=1", ""])
def test_malformed_overrides(base: Path, override: str) -> None:
    assert message_of(base, [override]) == f"the override '{override}' is not of the form section.key=value"


def test_overrides_into_what_has_no_keys(base: Path) -> None:
    expected = "in 'train.steps.x=1' train.steps has no keys of its own: give it as a whole"
    assert message_of(base, ["train.steps.x=1"]) == expected
    assert "is not valid YAML" in message_of(base, ["data.train=["])


def test_overrides_are_yaml_and_the_last_one_wins(base: Path) -> None:
    config = load_config(
        base,
        [
            "optimizer.lr=1e-3",
            "optimizer.eps=5E-6",
            "train.steps=7",
            "train.steps=8",
            "heads.loss_weights=[1, 0.5, 0, 2e-1]",
            "run.name=a=b",
            "parallel.partition=[3, 1]",
            "checkpoint.every=5",
        ],
    )
    assert config.optimizer.lr == 1e-3 and config.optimizer.eps == 5e-6
    assert config.train.steps == 8
    assert config.heads.loss_weights == (1.0, 0.5, 0.0, 0.2)
    assert config.run.name == "a=b"
    assert config.parallel.partition == (3, 1)
    assert config.checkpoint.every == 5, "a section that the file does not have"


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("run.output_dir=/x/run #1", "/x/run #1"),
        ("log.sample_prompt=def f(x): # the sum of", "def f(x): # the sum of"),
        ("run.name=010", "010"),
        ("run.name=no", "no"),
        ("run.name=[a, b]", "[a, b]"),
        ("run.name=2024-99-99", "2024-99-99"),
        ("data.tokenizer=null", "null"),
        ("train.steps=010", 10),
        ("model.rope_scaling.factor=010", 10.0),
    ],
)
def test_overrides_have_the_type_of_their_key(base: Path, override: str, value: object) -> None:
    scaling = ["model.rope_scaling={rope_type: linear, factor: 2}"] if "rope_scaling" in override else []
    found: Any = load_config(base, [*scaling, override])
    for part in override.partition("=")[0].split("."):
        found = getattr(found, part)
    assert found == value


@pytest.mark.parametrize("override", ["train.steps=5 # a few", "run.seed=1:30"])
def test_overrides_that_are_no_number(base: Path, override: str) -> None:
    key, _, value = override.partition("=")
    assert message_of(base, [override]) == f"{key} = {value!r} is wrong: it should be a valid integer"


@pytest.mark.parametrize(
    "override",
    [
        "model.trunk_layers=100000000",
        "heads.count=100000000",
        "train.global_batch_size=100000000000000000",
        "model.hidden_size=100000000000000000000",
        "run.join_timeout=1e300",
    ],
)
def test_values_that_no_machine_can_hold(base: Path, override: str) -> None:
    assert "is wrong: it should be less than or equal to" in message_of(base, [override])


def test_optional_text_is_taken_back_with_null(base: Path) -> None:
    assert load_config(base, ["run.output_dir=/x", "run.output_dir=null"]).run.output_dir is None
