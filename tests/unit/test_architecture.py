"""Holds the layout of the package: who imports whom, how long a file may be, no path of one machine."""

import ast
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

PROJECT = Path(__file__).resolve().parents[2]
PACKAGE = "mtp_dist"
MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60

# What a room may import of ours; what these may import is allowed as well.
DIRECTLY_BELOW: dict[str, set[str]] = {
    "errors": set(),
    "metrics": set(),
    "fs": {"errors"},
    "config": {"errors"},
    "model": {"config"},
    "loss": {"config"},
    "planner": {"config"},
    "distributed": {"config"},
    "data": {"model", "distributed", "fs"},
    "engine": {"model", "loss", "planner", "distributed", "metrics"},
    "checkpoint": {"engine", "fs"},
    "monitoring": {"distributed", "planner", "metrics", "checkpoint", "data"},
    "convert": {"checkpoint", "model", "data"},
    "training": {"checkpoint", "monitoring", "engine", "data"},
    "verify": {"training"},
    "inference": {"convert", "model"},
    "bench": {"verify"},
    "run": {"verify", "inference"},
    "pretrain": {"run"},
    "cli": {"convert", "verify", "bench", "pretrain"},
}
ROOMS = frozenset(DIRECTLY_BELOW)

# The rooms that may import a library.
LIBRARY_ROOMS = {
    "deepspeed": frozenset({"engine", "checkpoint", "bench"}),
    "megatron": frozenset({"model", "loss", "distributed", "engine", "data", "bench"}),
    "torch": ROOMS - {"planner", "config", "metrics", "errors", "fs"},
}

NOT_OURS = {".git", ".hypothesis", "runs", "build", "dist", "__pycache__"}
PERSONAL_PATH = re.compile(r"(?<![\w.~$}/-])/(?:(?:home|Users)/\w|(?:root|work)/)[^\s'\"`)]*")


class Import(NamedTuple):
    module: str
    line: int
    type_only: bool
    """Below `if TYPE_CHECKING:`, so that it does not happen at run time."""


def rooms_below(room: str) -> set[str]:
    direct = DIRECTLY_BELOW[room]
    return direct.union(*(rooms_below(other) for other in direct))


def python_files(root: Path) -> Iterator[tuple[Path, str]]:
    for path in sorted((root / PACKAGE).rglob("*.py")):
        yield path.relative_to(root), path.read_text()


def room_of(path: Path) -> str:
    """Name the room of a file: `mtp_dist/model/heads.py` is in `model`, `mtp_dist/cli.py` is `cli`."""
    return path.with_suffix("").parts[1]


def find_imports(path: Path, tree: ast.AST, type_only: bool = False) -> Iterator[Import]:
    """Yield every import, also those inside functions, with relative ones made absolute."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(alias.name, node.lineno, type_only)
        elif isinstance(node, ast.ImportFrom):
            parents = path.parts[: -node.level] if node.level else ()
            module = ".".join((*parents, *filter(None, [node.module])))
            for alias in node.names:
                yield Import(f"{module}.{alias.name}", node.lineno, type_only)
        elif isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            yield from find_imports(path, ast.Module(node.body, []), type_only=True)
            yield from find_imports(path, ast.Module(node.orelse, []), type_only)
        else:
            yield from find_imports(path, node, type_only)


def import_fault(room: str, imported: Import) -> str | None:
    library, _, rest = imported.module.partition(".")
    other = rest.partition(".")[0]
    if library == PACKAGE and other in ROOMS - {room} - rooms_below(room):
        return f"{room} must not import {other}"
    if room not in LIBRARY_ROOMS.get(library, ROOMS) and not imported.type_only:
        return f"{room} must not import {library}"
    return None


def import_faults(root: Path) -> list[str]:
    faults = []
    for path, source in python_files(root):
        room = room_of(path)
        tree = ast.parse(source)
        if room == "__init__":
            if any(find_imports(path, tree)):
                faults.append(f"{path}: the package itself must not import anything")
        elif room not in ROOMS:
            faults.append(f"{path}: {room} is not a room of the design")
        else:
            for imported in find_imports(path, tree):
                if fault := import_fault(room, imported):
                    faults.append(f"{path}:{imported.line}: {fault}")
    return faults


def size_faults(root: Path) -> list[str]:
    faults = []
    for path, source in python_files(root):
        if (lines := len(source.splitlines())) > MAX_FILE_LINES:
            faults.append(f"{path}: {lines} lines are more than {MAX_FILE_LINES}")
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = (node.end_lineno or node.lineno) - node.lineno + 1
                if lines > MAX_FUNCTION_LINES:
                    faults.append(
                        f"{path}:{node.lineno}: {node.name} has {lines} lines, more than {MAX_FUNCTION_LINES}"
                    )
    return faults


# What an assert may call: nothing that would be missing if `python -O` left the assert out.
PURE_CALLS = {"isinstance", "len", "max", "min", "set", "sum", "tuple", "alphabet", "get_rank", "keys", "values"}


def asserts_with_effects(root: Path) -> list[str]:
    faults = []
    for path, source in python_files(root):
        asserts = (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Assert))
        for call in (node for statement in asserts for node in ast.walk(statement.test) if isinstance(node, ast.Call)):
            name = call.func.attr if isinstance(call.func, ast.Attribute) else ast.unparse(call.func)
            if name not in PURE_CALLS:
                faults.append(f"{path}:{call.lineno}: an assert calls {name}")
    return faults


def project_files(root: Path) -> Iterator[Path]:
    for folder, folders, files in os.walk(root):
        here = Path(folder)
        folders[:] = sorted(
            name
            for name in folders
            if name not in NOT_OURS and not name.endswith("_cache") and not (here / name / "pyvenv.cfg").exists()
        )
        files = [name for name in files if name not in NOT_OURS]  # `.git` is a file in a git worktree
        yield from (here / name for name in sorted(files) if not (here / name).is_symlink())


def path_faults(root: Path) -> list[str]:
    """Find absolute paths into someone's home or work folder, in text files of every kind."""
    faults = []
    for path in project_files(root):
        try:
            lines = path.read_text().splitlines()
        except UnicodeDecodeError:
            continue
        for number, line in enumerate(lines, 1):
            if found := PERSONAL_PATH.search(line):
                faults.append(f"{path.relative_to(root)}:{number}: {found[0]} exists on one machine only")
    return faults


@pytest.mark.parametrize(
    "find_faults",
    [
        import_faults,
        size_faults,
        path_faults,
        pytest.param(asserts_with_effects),
    ],
)
def test_project_keeps_its_layout(find_faults):
    assert find_faults(PROJECT) == []


def test_every_room_is_read():
    rooms = {room_of(path) for path, _ in python_files(PROJECT)}
    assert {"__init__", "config", "model", "engine"} <= rooms


def test_planner_runs_without_torch():
    names = [path.stem for path in (PROJECT / PACKAGE / "planner").glob("*.py")]
    modules = [f"{PACKAGE}.planner" if name == "__init__" else f"{PACKAGE}.planner.{name}" for name in names]
    code = f"import sys, {', '.join(modules)}; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=PROJECT, check=True)


HOME = "/" + "home/ada/data"
ROOT_HOME = "/" + "root/.cache"


@pytest.mark.parametrize(
    ("find_faults", "file", "text", "fault"),
    [
        (import_faults, "model/a.py", "from mtp_dist.engine.engine import x", ":1: model must not import engine"),
        (import_faults, "model/a.py", "import mtp_dist.loss", ":1: model must not import loss"),
        (import_faults, "config.py", "from mtp_dist import data", ":1: config must not import data"),
        (import_faults, "loss/a.py", "from ..training import x", ":1: loss must not import training"),
        (import_faults, "loss/b/a.py", "from ...cli import main", ":1: loss must not import cli"),
        (import_faults, "data/a.py", "def f():\n    from mtp_dist import engine", ":2: data must not import engine"),
        (import_faults, "training/a.py", "import deepspeed.comm", ":1: training must not import deepspeed"),
        (import_faults, "inference/a.py", "from megatron.core import x", ":1: inference must not import megatron"),
        (import_faults, "planner/a.py", "try:\n    import torch\nfinally: ...", ":2: planner must not import torch"),
        (import_faults, "helpers.py", "", ": helpers is not a room of the design"),
        (import_faults, "__init__.py", "import torch", ": the package itself must not import anything"),
        (size_faults, "model/a.py", "x = 1\n" * 401, ": 401 lines are more than 400"),
        (size_faults, "model/a.py", "def f():\n" + "    x = 1\n" * 60, ":1: f has 61 lines, more than 60"),
        (path_faults, "data/notes.txt", f"see\n{HOME}", f":2: {HOME} exists on one machine only"),
        (path_faults, "a.py", f"x = '{ROOT_HOME}'", f":1: {ROOT_HOME} exists on one machine only"),
    ],
)
def test_fault_is_found(tmp_path, find_faults, file, text, fault):
    path = tmp_path / PACKAGE / file
    path.parent.mkdir(parents=True)
    path.write_text(text)
    assert find_faults(tmp_path) == [f"{PACKAGE}/{file}{fault}"]


@pytest.mark.parametrize(
    ("find_faults", "file", "text"),
    [
        (import_faults, "checkpoint/a.py", "import deepspeed, torch, json\nfrom mtp_dist.model.heads import x"),
        (import_faults, "engine/a.py", "from . import engine\nfrom .engine import build\nimport megatron.core"),
        (import_faults, "inference/a.py", "from mtp_dist import config\nfrom mtp_dist.convert import x"),
        (import_faults, "planner/a.py", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import torch"),
        (size_faults, "model/a.py", "def f():\n" + "    x = 1\n" * 59 + "x = 1\n" * 340),
        (path_faults, "a.py", f"'https://host{HOME} .{HOME} /data/corpus' # /homework/{HOME[1:]}"),
    ],
)
def test_no_false_alarm(tmp_path, find_faults, file, text):
    path = tmp_path / PACKAGE / file
    path.parent.mkdir(parents=True)
    path.write_text(text)
    assert find_faults(tmp_path) == []
