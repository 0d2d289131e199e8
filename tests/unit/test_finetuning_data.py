"""The programs of configs/ that write data with prompts."""

import ast
import json
import runpy
from pathlib import Path
from typing import Any

import datasets
import pytest

from mtp_dist.config import load_config
from mtp_dist.data.sources.python_stdlib import stdlib_files

CONFIGS = Path(__file__).parents[2] / "configs"


def program(name: str) -> dict[str, Any]:
    return runpy.run_path(str(CONFIGS / name))


def test_docstrings_ask_for_the_bodies_of_functions() -> None:
    examples, found, expected = program("docstrings.py")["examples"], [], set()
    for path in stdlib_files("validation"):
        text = path.read_text(encoding="utf-8", errors="replace")
        functions = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.FunctionDef)]
        expected |= {(function.name, ast.get_docstring(function)) for function in functions}
        found += examples(text)
    for record in found:
        [function] = ast.parse(record["prompt"] + record["completion"]).body
        assert isinstance(function, ast.FunctionDef) and (function.name, ast.get_docstring(function)) in expected
        [prompt] = ast.parse(record["prompt"]).body
        assert isinstance(prompt, ast.FunctionDef) and ast.get_docstring(prompt) and len(prompt.body) == 1
    assert len(found) > 50


def test_code_contests_are_solved_in_python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Languages 1 and 3 of the dataset are Python 2 and 3, 2 is C++."""
    right, wrong = (
        {"language": [2, 3, 1], "solution": [f"{name} {n}" for n in range(3)]} for name in ("right", "wrong")
    )
    problem = {"description": "Add.", "solutions": right, "incorrect_solutions": wrong}
    splits = []

    def load(name: str, split: str, streaming: bool) -> list[dict[str, Any]]:
        splits.append((name, split))
        return [problem]

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets, "load_dataset", load)
    program("paper/code_contests.py")["main"]()
    data = load_config(CONFIGS / "paper" / "codecontests.yaml", []).data
    assert splits == [("deepmind/code_contests", "train"), ("deepmind/code_contests", "valid")]
    for source in (*data.train, *data.validation):
        records = [json.loads(line) for line in Path(source.path).read_text().splitlines()]
        assert [(record[data.prompt_field], record[data.completion_field]) for record in records] == [
            ("Add.\n# correct\n", "right 1"),
            ("Add.\n# correct\n", "right 2"),
            ("Add.\n# incorrect\n", "wrong 1"),
            ("Add.\n# incorrect\n", "wrong 2"),
        ]
