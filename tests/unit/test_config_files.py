"""Files that are not a valid configuration."""

import pytest
import yaml

from tests.unit.conftest import BASE_TEXT
from tests.unit.test_config_errors import message_of


def message_of_text(folder, text):
    path = folder / "run.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return message_of(path).replace(str(path), "run.yaml")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("run: {name: a}\nrun: {name: b}", "run.yaml is not valid YAML: the key 'run' is given twice in"),
        ("train: {steps: 1, steps: 2}", "run.yaml is not valid YAML: the key 'steps' is given twice in"),
        ("train: [", "run.yaml is not valid YAML: while parsing a flow node"),
        ("a: 1\n b: 2", "run.yaml is not valid YAML: mapping values are not allowed here"),
        ("run:\n\tname: a\n", "run.yaml is not valid YAML"),
        ("model: !!python/object:os.system x", "run.yaml is not valid YAML: could not determine a constructor"),
        ("run: {name: !!timestamp 2024-99-99}", "run.yaml is not valid YAML: "),
        ("run: {name: !!int x}", "run.yaml is not valid YAML: "),
        ("run: {name: !!bool x}", "run.yaml is not valid YAML: "),
        ("run: {name: !!float [1]}", "run.yaml is not valid YAML: "),
        ("a: 1\n---\nb: 2", "run.yaml is not valid YAML: expected a single document"),
        ("[a]: 1", "run.yaml is not valid YAML: while constructing a mapping found unhashable key"),
        ("", "run.yaml is not a mapping of sections such as `model:` and `train:`"),
        ("[1, 2]", "run.yaml is not a mapping of sections such as `model:` and `train:`"),
        (b"run: {name: caf\xe9}", "the configuration run.yaml is not UTF-8 text: byte 15 is invalid"),
        (BASE_TEXT.replace("  steps: 300\n", ""), "train.steps is missing: give it a value"),
        (
            yaml.safe_dump({name: keys for name, keys in yaml.safe_load(BASE_TEXT).items() if name != "model"}),
            "model is missing: give it a value",
        ),
    ],
)
def test_invalid_file(tmp_path, text, message):
    found = message_of_text(tmp_path, text)
    assert found.startswith(message) and "\n" not in found


def test_unreadable_files(tmp_path):
    missing = tmp_path / "missing.yaml"
    assert message_of(missing) == f"cannot read the configuration {missing}: No such file or directory"
    assert message_of(tmp_path) == f"cannot read the configuration {tmp_path}: Is a directory"
