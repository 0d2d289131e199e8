"""Limits of files and functions, asserts without effects, no path of one machine. Imports: see pyproject.toml."""

import ast
import subprocess
from pathlib import Path

import pytest

PROJECT = Path(__file__).resolve().parents[2]
PACKAGE = "mtp_dist"
MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60
PERSONAL_PATH = r"(?<![\w.~$}/-])/(?:(?:home|Users)/\w|(?:root|work)/)[^\s'\"`)]*"


def python_files(root):
    for path in sorted((root / PACKAGE).rglob("*.py")):
        yield path.relative_to(root), path.read_text()


def size_faults(root):
    faults = []
    for path, source in python_files(root):
        if (lines := len(source.splitlines())) > MAX_FILE_LINES:
            faults.append(f"{path}: {lines} lines are more than {MAX_FILE_LINES}")
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines, start = node.end_lineno - node.lineno + 1, f"{path}:{node.lineno}: {node.name}"
                faults += [f"{start} has {lines} lines, more than {MAX_FUNCTION_LINES}"] * (lines > MAX_FUNCTION_LINES)
    return faults


# What an assert may call: nothing that would be missing if `python -O` left the assert out.
PURE_CALLS = {"isinstance", "len", "max", "min", "set", "sum", "tuple", "alphabet", "get_rank", "keys", "values"}


def asserts_with_effects(root):
    faults = []
    for path, source in python_files(root):
        asserts = (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Assert))
        for call in (node for statement in asserts for node in ast.walk(statement.test) if isinstance(node, ast.Call)):
            name = call.func.attr if isinstance(call.func, ast.Attribute) else ast.unparse(call.func)
            if name not in PURE_CALLS:
                faults.append(f"{path}:{call.lineno}: an assert calls {name}")
    return faults


def path_faults(root):
    """Find absolute paths into someone's home or work folder, in text files of every kind that git does not ignore."""
    command = ["git", "grep", "--no-index", "--exclude-standard", "-nIoP", PERSONAL_PATH]
    found = subprocess.run(command, cwd=root, capture_output=True, text=True)
    assert found.returncode in (0, 1), found.stderr
    return [f"{line} exists on one machine only" for line in found.stdout.splitlines()]


@pytest.mark.parametrize("find_faults", [size_faults, path_faults, asserts_with_effects])
def test_project_has_no_faults(find_faults):
    assert find_faults(PROJECT) == []


def test_every_folder_is_a_package():
    """Others are not installed by setuptools."""
    folders = {path.parent for path in (PROJECT / PACKAGE).rglob("*.py")}
    assert [folder for folder in sorted(folders) if not (folder / "__init__.py").exists()] == []


HOME = "/" + "home/ada/data"


@pytest.mark.parametrize(
    ("find_faults", "file", "text", "fault"),
    [
        (size_faults, "a.py", "x = 1\n" * 401, ": 401 lines are more than 400"),
        (size_faults, "a.py", "def f():\n" + "    x = 1\n" * 60, ":1: f has 61 lines, more than 60"),
        (asserts_with_effects, "a.py", "assert f()\nassert len(x)", ":1: an assert calls f"),
        (size_faults, "a.py", "def f():\n" + "    x = 1\n" * 59 + "x = 1\n" * 340, None),
        (path_faults, "notes.txt", f"see\n{HOME}", f":2:{HOME} exists on one machine only"),
        (path_faults, "a.py", f"'https://host{HOME} .{HOME} /data/corpus' # /homework/{HOME[1:]}", None),
    ],
)
def test_faults_are_found(tmp_path, find_faults, file, text, fault):
    (tmp_path / PACKAGE).mkdir()
    (tmp_path / PACKAGE / file).write_text(text)
    assert find_faults(tmp_path) == ([f"{PACKAGE}/{file}{fault}"] if fault else [])
