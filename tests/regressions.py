"""Show that the regression tests fail at the commit whose faults they guard against.

`python -m tests.regressions` checks that commit out, gives it these tests and runs every test with the
marker `regression`, or those of the given files. It prints one row per test, and ends with status 1 if one of them does
not fail there.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FAULTY_COMMIT = "9e30c7b"
FILE_TIMEOUT_S = 1200
MOVED_MODULES = {
    "mtp_dist.checkpoint.reader": "mtp_dist.checkpoint.format",
    "mtp_dist.config.validation": "mtp_dist.config.schema",
}
"""Modules that have another name at the faulty commit."""


@dataclass(eq=False)
class Recorder:
    """A pytest plugin that records each marked test's lines and why it failed."""

    lines: dict[str, list[str]] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)
    passed: list[str] = field(default_factory=list)

    def pytest_collection_modifyitems(self, items: Sequence[pytest.Item]) -> None:
        for item in items:
            if lines := [line for mark in item.iter_markers("regression") for line in mark.args]:
                self.lines[item.nodeid] = sorted(set(lines))

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self.failures.setdefault(report.nodeid, _reason(report.longreprtext))
        elif report.when == "call" and report.passed:
            self.passed.append(report.nodeid)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self.failures[report.nodeid] = _reason(report.longreprtext)


def _reason(text: str) -> str:
    """Return the first line that pytest marks as the error, or the last one of a collection error."""
    errors = [line[1:].strip() for line in text.splitlines() if line.startswith("E ")]
    return (errors or text.splitlines() or [""])[0][:160]


def record(target: Path, arguments: Sequence[str]) -> None:
    """Run pytest in this process and write what the recorder has seen as JSON."""
    # An editable install finds modules that this tree does not have yet in the tree that is installed.
    sys.meta_path = [finder for finder in sys.meta_path if not finder.__module__.startswith("__editable__")]
    recorder = Recorder()
    pytest.main([*arguments, "-m", "regression", "--continue-on-collection-errors"], plugins=[recorder])
    target.write_text(json.dumps(vars(recorder)))


def _run_pytest(tree: Path, results: Path, *arguments: str) -> dict[str, dict[str, str]]:
    """Return what the recorder has seen of a pytest run in `tree`."""
    environment = os.environ | {"PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.regressions", "--record", str(results), *arguments]
    subprocess.run(command, cwd=tree, env=environment, timeout=FILE_TIMEOUT_S, capture_output=True, check=False)
    seen: dict[str, dict[str, str]] = json.loads(results.read_text())
    return seen


def _copy_tests(tree: Path) -> None:
    """Give an old tree today's tests, with today's names of modules replaced by those of that time."""
    shutil.rmtree(tree / "tests")
    shutil.copytree(ROOT / "tests", tree / "tests", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tree / "pytest.toml")
    for path in (tree / "tests").rglob("*.py"):
        text = path.read_text()
        for now, then in MOVED_MODULES.items():
            text = re.sub(rf"\b{re.escape(now)}\b(?=[. ])", then, text)
        if path.name != Path(__file__).name:
            path.write_text(text)


@cache
def _commit_of(test: str) -> str:
    """Return the commit that added a test, whatever file it was in then."""
    function = test.partition("[")[0].rpartition("::")[2]
    search = ["git", "log", "--reverse", "--format=%h", f"-Sdef {function}(", "--", "tests"]
    return subprocess.run(search, cwd=ROOT, capture_output=True, text=True, check=True).stdout.partition("\n")[0]


def _outcomes(tree: Path, tests: dict[str, list[str]], scratch: Path) -> Iterator[tuple[str, str | None]]:
    """Yield each test's id and why it failed in `tree`, or None if it did not fail. One pytest process per file."""
    files = sorted({test.partition("::")[0] for test in tests})
    with ThreadPoolExecutor(2) as pool:
        groups = [[test for test in tests if test.startswith(f"{file}::")] for file in files]
        for outcomes in pool.map(partial(_outcomes_of, tree, scratch), files, groups):
            yield from outcomes.items()


def _outcomes_of(tree: Path, scratch: Path, selected: str, tests: Sequence[str]) -> dict[str, str | None]:
    """Return the outcome of tests that pytest runs if it is given `selected`, a file or a test's id.

    A test may end pytest itself. Then each one of the file gets a process of its own.
    """
    results = scratch / f"{abs(hash(selected))}.json"
    try:
        seen = _run_pytest(tree, results, "--config-file=pytest.toml", f"--rootdir={tree}", selected)
    except subprocess.TimeoutExpired:
        return dict.fromkeys(tests, f"did not end within {FILE_TIMEOUT_S} s")
    except FileNotFoundError:
        if selected in tests:
            return {selected: "ended pytest itself"}
        return {test: _outcomes_of(tree, scratch, test, [test])[test] for test in tests}
    absent = None if seen["lines"] else seen["failures"].get(selected.partition("::")[0], "cannot be collected")
    return {test: None if test in seen["passed"] else seen["failures"].get(test, absent) for test in tests}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--at", default=FAULTY_COMMIT, help="commit at which the tests must fail")
    parser.add_argument("files", nargs="*", help="test files; all when absent")
    parser.add_argument("--record", type=Path, help=argparse.SUPPRESS)
    options, arguments = parser.parse_known_args()
    if options.record:
        record(options.record, [*arguments, *options.files])
        return
    with tempfile.TemporaryDirectory() as folder:
        scratch, tree = Path(folder), Path(folder) / "tree"
        tests = _run_pytest(ROOT, scratch / "now.json", "--collect-only", *options.files)["lines"]
        subprocess.run(["git", "worktree", "add", "--detach", str(tree), options.at], cwd=ROOT, check=True)
        try:
            _copy_tests(tree)
            rows = [(tests[test], test, reason) for test, reason in _outcomes(tree, tests, scratch)]
        finally:
            subprocess.run(["git", "worktree", "remove", "--force", str(tree)], cwd=ROOT, check=True)
    print(f"| line | test | commit | at {options.at} |\n| --- | --- | --- | --- |")
    for lines, test, reason in sorted(rows, key=lambda row: (row[0], row[1])):
        outcome = reason.replace("|", "\\|") if reason else "DID NOT FAIL"
        print(f"| {', '.join(lines)} | `{test}` | {_commit_of(test)} | {outcome} |")
    sys.exit(any(reason is None for *_, reason in rows))


if __name__ == "__main__":
    main()
