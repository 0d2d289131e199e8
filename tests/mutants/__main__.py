"""Show that the tests find deliberate faults.

`python -m tests.mutants [NAME ...] [--jobs N]` applies each patch of this folder, or those whose names contain one of
the given words, to a temporary copy of the working tree, and runs the tests that its header names. It prints one row
per mutant with the test that failed and why, and ends with status 1 if a mutant survived or no longer applies.

To add a mutant: commit your work, put one fault into `mtp_dist/` (one to six lines, a mistake that somebody could
really make), write `git diff -U2 mtp_dist > tests/mutants/NNN-short-name.patch`, take the fault back, and put two lines
in front of the diff:

    # fault: the gradient of the hidden states is not summed over the tensor-parallel ranks
    # tests: "tests/unit/loss/test_sequential.py::test_equals_fp64_on_one_rank[(2, False)-shared-eager]"

`tests` has pytest's arguments: as few and as fast tests as find the fault. If none does, write one. A patch that no
longer applies after a refactoring is ported by hand: the same fault at the code's new place.
"""

import argparse
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TIMEOUT_S = 900
TESTS_FAILED = 1
"""pytest's exit status; 2 is an error while it collects, 4 and 5 are tests that do not exist."""
FAILURE = re.compile(r"^(FAILED|ERROR) (.+?)(?: - .*)?$", re.MULTILINE)
REASON = re.compile(r"^E +(\S.*)$", re.MULTILINE)
ERRORS = "ImportError|ModuleNotFoundError|SyntaxError|NameError|UnboundLocalError|AttributeError"
BROKEN_CODE = re.compile(rf"^E +(?:\w+\.)*({ERRORS})\b", re.MULTILINE)
"""Errors of a patch that does not fit the code, rather than of a test that finds a fault."""


@dataclass(frozen=True)
class Mutant:
    """One deliberate fault."""

    patch: Path
    fault: str
    tests: tuple[str, ...]
    """Arguments of pytest."""

    name = property(lambda self: self.patch.stem)


def read_mutant(patch):
    """Return the mutant of a patch. Raise ValueError if its header lacks a line."""
    header = dict(re.findall(r"^# (fault|tests): (.+)$", patch.read_text(encoding="utf-8"), re.MULTILINE))
    if header.keys() != {"fault", "tests"}:
        raise ValueError(f"{patch} must begin with the lines '# fault: ...' and '# tests: ...'")
    return Mutant(patch, header["fault"], tuple(shlex.split(header["tests"])))


def read_mutants(words=()):
    """Return the mutants whose names contain one of the words, or all of them, by name."""
    patches = sorted(Path(__file__).parent.glob("*.patch"))
    return [read_mutant(patch) for patch in patches if not words or any(word in patch.stem for word in words)]


def apply(patch, tree, *options):
    """Apply a patch to a tree. Return why it does not apply, or None if it does."""
    run = subprocess.run(["git", "apply", "-p1", *options, str(patch)], cwd=tree, capture_output=True, text=True)
    return run.stderr.strip() if run.returncode else None


def copy_tree(target):
    """Copy the files of the working tree that git tracks, or would track."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, names.split("\0")):
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        with suppress(FileNotFoundError):  # deleted, and not yet committed so
            shutil.copy2(ROOT / name, target / name, follow_symlinks=False)


def run_tests(tree, tests):
    """Run pytest in a tree until the first failure. Return its exit status and its output."""
    command = [sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider", "--tb=short", "-rfE", *tests]
    environment = os.environ | {"PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1", "COLUMNS": "300"}
    options = {"cwd": tree, "env": environment, "capture_output": True, "text": True, "timeout": TIMEOUT_S}
    try:
        run = subprocess.run(command, **options)
    except subprocess.TimeoutExpired:
        return -1, f"E  no result within {TIMEOUT_S} s"
    return run.returncode, run.stdout + run.stderr


def judge(status, output):
    """Return whether a test found the fault, which one, and the first line of its reason."""
    failure, reasons = FAILURE.search(output), REASON.findall(output)
    # The error of another process comes as its traceback, of which the last line names the error.
    first = next((line for line in reasons if "Traceback (most recent call last)" not in line), "")
    reason = reasons[-1] if reasons and first != reasons[0] else first
    found = status == TESTS_FAILED and bool(failure) and not BROKEN_CODE.search(output)
    test = failure[2] if failure else f"pytest ended with status {status}"
    return found, test, reason[:160]


def try_mutant(mutant):
    """Run a mutant's tests in a copy of the working tree with its fault. Return whether one failed, and a table row."""
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="mutant-") as folder:
        copy_tree(Path(folder))
        if error := apply(mutant.patch, folder):
            found, test, reason = False, "the patch does not apply", error.splitlines()[0]
        else:
            found, test, reason = judge(*run_tests(folder, mutant.tests))
    verdict, seconds = "found" if found else "SURVIVED", time.monotonic() - started
    return found, f"{mutant.name:44} {verdict:8} {seconds:4.0f} s  {test}: {reason}"


def main():
    parser = argparse.ArgumentParser(prog="python -m tests.mutants", description=__doc__.partition("\n")[0])
    parser.add_argument("names", nargs="*", help="parts of the mutants' names; all of them by default")
    parser.add_argument("--jobs", type=int, default=1, help="mutants that are tried at the same time")
    arguments = parser.parse_args()
    mutants, survivors = read_mutants(arguments.names), []
    with ThreadPoolExecutor(arguments.jobs) as pool:
        for mutant, (found, row) in zip(mutants, pool.map(try_mutant, mutants), strict=True):
            print(row, flush=True)
            survivors += [] if found else [mutant.name]
    print(f"{len(mutants) - len(survivors)} of {len(mutants)} mutants were found")
    sys.exit(f"survived: {', '.join(survivors)}" if survivors or not mutants else 0)


if __name__ == "__main__":
    main()
