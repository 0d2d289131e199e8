"""Files that are no configuration, and what YAML can do in one that is."""

from pathlib import Path

import pytest

from mtp_dist.config import load_config
from tests.unit.test_config import BASE_TEXT, message_of, message_of_text


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("run: {name: a}\nrun: {name: b}", "run.yaml is not valid YAML: the key 'run' is given twice in"),
        ("train: {steps: 1, steps: 2}", "run.yaml is not valid YAML: the key 'steps' is given twice in"),
        ("train: [", "run.yaml is not valid YAML: while parsing a flow node"),
        ("a: 1\n b: 2", "run.yaml is not valid YAML: mapping values are not allowed here"),
        ("model: !!python/object:os.system x", "run.yaml is not valid YAML: could not determine a constructor"),
        ("a: 1\n---\nb: 2", "run.yaml is not valid YAML: expected a single document"),
        ("[a]: 1", "run.yaml is not valid YAML: while constructing a mapping found unhashable key"),
        ("", "run.yaml is not a mapping of sections such as `model:` and `train:`"),
        ("[1, 2]", "run.yaml is not a mapping of sections such as `model:` and `train:`"),
    ],
)
def test_files_that_are_no_configuration(tmp_path: Path, text: str, sentence: str) -> None:
    message = message_of_text(tmp_path, text)
    assert message.startswith(sentence) and "\n" not in message


def test_unreadable_files(tmp_path: Path) -> None:
    missing = tmp_path / "missing.yaml"
    assert message_of(missing) == f"cannot read the configuration {missing}: No such file or directory"
    assert message_of(tmp_path) == f"cannot read the configuration {tmp_path}: Is a directory"


def test_file_that_is_not_utf8(tmp_path: Path) -> None:
    message = message_of_text(tmp_path, b"run: {name: caf\xe9}")
    assert message == "the configuration run.yaml is not UTF-8 text: byte 15 is wrong"


def test_merge_keys(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(
        BASE_TEXT.replace("train: [{path: python-stdlib", "train: [&x {path: python-stdlib").replace(
            "validation: [{path: python-stdlib, split", "validation: [{<<: *x, split"
        )
    )
    assert load_config(path).data.validation[0].path == "python-stdlib"


def test_override_into_an_empty_section(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(BASE_TEXT[: BASE_TEXT.index("log:")] + "log:\n")
    assert load_config(path, ["log.every=3"]).log.every == 3
