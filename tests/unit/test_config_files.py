"""Files that are not a valid configuration."""

import re

import pytest

from tests.unit.conftest import BASE_TEXT
from tests.unit.test_config_errors import message_of

NOT_YAML = "run.yaml is not valid YAML"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("run: {name: a}\nrun: {name: b}", f"{NOT_YAML}: the key 'run' is given twice in"),
        ("train: {steps: 1, steps: 2}", f"{NOT_YAML}: the key 'steps' is given twice in"),
        ("train: [", f"{NOT_YAML}: while parsing a flow node"),
        ("a: 1\n b: 2", f"{NOT_YAML}: mapping values are not allowed here"),
        ("run:\n\tname: a\n", NOT_YAML),
        ("model: !!python/object:os.system x", f"{NOT_YAML}: could not determine a constructor"),
        *((f"run: {{name: !!{x}}}", f"{NOT_YAML}: ") for x in ("timestamp 2024-99-99", "int x", "bool x", "float [1]")),
        ("a: 1\n---\nb: 2", f"{NOT_YAML}: expected a single document"),
        ("[a]: 1", f"{NOT_YAML}: while constructing a mapping found unhashable key"),
        ("", "run.yaml is not a mapping of sections such as `model:` and `train:`"),
        ("[1, 2]", "run.yaml is not a mapping of sections such as `model:` and `train:`"),
        (b"run: {name: caf\xe9}", "the configuration run.yaml is not UTF-8 text: byte 15 is invalid"),
        (BASE_TEXT.replace("steps: 300, ", ""), "train.steps is missing: give it a value"),
        (re.sub("model: .*\n", "", BASE_TEXT), "model is missing: give it a value"),
    ],
)
def test_invalid_file(tmp_path, text, message):
    path = tmp_path / "run.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    found = message_of(path).replace(str(path), "run.yaml")
    assert found.startswith(message) and "\n" not in found


def test_unreadable_files(tmp_path):
    missing = tmp_path / "missing.yaml"
    assert message_of(missing) == f"cannot read the configuration {missing}: No such file or directory"
    assert message_of(tmp_path) == f"cannot read the configuration {tmp_path}: Is a directory"
