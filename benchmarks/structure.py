"""Count how far a batch and a loss travel through the package, and what it costs to start.

    python benchmarks/structure.py [--json]

Train one step of a tiny model in this process under `sys.setprofile` and report
- the files of mtp_dist that a batch passes from disk to the weights' update, and the frames entered there;
- the functions that hand on the loss of head 3 from the kernel to TensorBoard: the kernel, which adds it to its row of
  sums; functions whose result contains it, as a sum or as a mean; and those on the stack when TensorBoard's writer
  gets it;
- statements of the package (docstrings excluded), lines of the tests, processor time of `mtp-dist --help`, and that of
  a run of three steps of one process beyond the import of torch.
"""

import argparse
import ast
import json
import math
import os
import resource
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = f"{ROOT / 'mtp_dist'}{os.sep}"
SIZES = ["hidden_size=32", "trunk_layers=2", "num_attention_heads=2", "num_query_groups=1", "ffn_hidden_size=48"]
OVERRIDES = [
    *(f"model.{size}" for size in SIZES),
    "run.device=cpu",
    "parallel.pipeline=1",
    "train.steps=3",
    "train.global_batch_size=2",
    "train.micro_batch_size=2",
    "train.sequence_length=32",
    "train.validation_samples=2",
    "checkpoint.every=3",
    "log.every=1",
    "log.sample_prompt=null",
]
STEP = 2
"""The profiled step: the first one also builds what later ones reuse."""
WINDOWS = ("TrainingEngine.train_step", "Batches._read")
"""Functions between whose call and return a batch is processed."""
KERNEL = "linear_cross_entropy"
WRITER = "TensorBoardWriter.write"
TOKENS = 64
"""Targets of one head in a step."""


def package_stack(frame: FrameType | None) -> Iterator[str]:
    """Yield the functions of the package on the stack, innermost first; a comprehension counts as its function."""
    last = None
    while frame:
        if frame.f_code.co_filename.startswith(PACKAGE):
            function = frame.f_code.co_qualname.partition(".<locals>.<")[0]
            name = f"{frame.f_code.co_filename.removeprefix(PACKAGE)}:{function}"
            if name != last:
                yield name
            last = name
        frame = frame.f_back


def numbers_in(value: Any, depth: int = 4) -> Iterator[float]:
    """Yield the numbers in a local variable or a result, also those in small tensors, records and collections."""
    if isinstance(value, float):
        yield value
    elif type(value).__module__.startswith("torch") and hasattr(value, "numel"):
        if value.is_floating_point() and 0 < value.numel() <= 64:
            yield from value.detach().flatten().tolist()
    elif depth:
        if isinstance(value, dict):
            children = list(value.values())
        elif isinstance(value, (list, tuple)):
            children = list(value)
        elif hasattr(value, "__dataclass_fields__"):
            children = [getattr(value, field, None) for field in value.__dataclass_fields__]
        else:
            children = []
        for child in children:
            yield from numbers_in(child, depth - 1)


class Profile:
    """A profile function that records the frames of the package during one training step."""

    def __init__(self, loss: float | None) -> None:
        """Follow the mean loss of head 3 at the profiled step; None: follow nothing."""
        self.wanted = () if loss is None else (loss, loss * TOKENS)
        self.batch_files: set[str] = set()
        self.batch_frames = 0
        self.hops: list[str] = []
        self._is_written = False
        self._callers: list[str] = []
        self._steps = 0
        self._inside: dict[int, int] = {}

    def __call__(self, frame: FrameType, event: str, result: Any) -> None:
        if event not in ("call", "return") or not frame.f_code.co_filename.startswith(PACKAGE):
            return
        thread, function = threading.get_ident(), frame.f_code.co_qualname
        enters_window = function in WINDOWS
        if event == "call" and function == WINDOWS[0]:
            self._steps += 1
        if enters_window:
            self._inside[thread] = self._inside.get(thread, 0) + (1 if event == "call" else -1)
        # The reader is some steps ahead. Its reads are alike, so all of them count.
        is_profiled = self._steps == STEP or threading.current_thread() is not threading.main_thread()
        if event == "call" and is_profiled and (self._inside.get(thread) or enters_window):
            self.batch_files.add(frame.f_code.co_filename.removeprefix(PACKAGE))
            self.batch_frames += self._steps == STEP
        if self.wanted and self._steps == STEP:
            self._follow_loss(frame, event, result)

    def _follow_loss(self, frame: FrameType, event: str, result: Any) -> None:
        stack = list(package_stack(frame))
        if event == "call" and stack[0].endswith(f":{WRITER}") and not self._is_written:
            self._is_written = any(self._is_wanted(number) for number in numbers_in(frame.f_locals.get("scalars")))
            if self._is_written:
                self.hops += [name for name in reversed(stack) if name not in self.hops and name not in self._callers]
        elif event == "call" and stack[0].endswith(f":{WINDOWS[0]}"):
            self._callers = stack[1:]
        elif event == "return" and not self._is_written and stack[0] not in self.hops:
            in_other_writer = any(name.endswith(".write") for name in stack)
            handed_on = frame.f_locals["sums"] if frame.f_code.co_qualname == KERNEL else result
            if not in_other_writer and any(self._is_wanted(number) for number in numbers_in(handed_on)):
                self.hops.append(stack[0])

    def _is_wanted(self, number: float) -> bool:
        return any(math.isclose(number, wanted, rel_tol=2e-7) for wanted in self.wanted)


def profile_step(loss: float | None, folder: Path) -> Profile:
    """Train in this process; the result lies in `folder`."""
    from mtp_dist.pretrain import main

    profile = Profile(loss)
    threading.setprofile(profile)
    sys.setprofile(profile)
    try:
        main(["--config", str(ROOT / "configs/demo.yaml"), f"run.output_dir={folder}", *OVERRIDES])
    except SystemExit as ended:
        assert not ended.code, f"the training exited with status {ended.code}"
    finally:
        sys.setprofile(None)
        threading.setprofile(None)  # type: ignore[arg-type]
    return profile


def statements(source: str) -> int:
    """Return the number of statements, docstrings excluded."""
    nodes = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.stmt)]
    docstrings = [node for node in nodes if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)]
    return len(nodes) - sum(isinstance(node.value.value, str) for node in docstrings)  # type: ignore[attr-defined]


def processor_seconds(*command: str) -> float:
    """Return user and system time of a Python program."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, *command], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def measure_in_child(loss: float | None, folder: Path) -> dict[str, Any]:
    """Profile in a fresh process, as a job starts in one."""
    result = folder / "profile.json"
    command = [sys.executable, __file__, "--profile", str(folder), "--loss", json.dumps(loss), "--result", str(result)]
    subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    return json.loads(result.read_text())


def loss_of_head_3(folder: Path) -> float:
    lines = [json.loads(line) for line in (folder / "run/metrics.jsonl").read_text().splitlines()]
    return next(line["loss/head_3"] for line in lines if line["step"] == STEP and "loss/head_3" in line)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--profile", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--loss", type=json.loads, help=argparse.SUPPRESS)
    parser.add_argument("--result", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.profile:
        profile = profile_step(options.loss, options.profile / "run")
        found = {"files": sorted(profile.batch_files), "frames": profile.batch_frames, "hops": profile.hops}
        options.result.write_text(json.dumps(found))
        return
    with tempfile.TemporaryDirectory() as scratch:
        folders = [Path(scratch) / name for name in ("first", "second")]
        for folder in folders:
            folder.mkdir()
        measure_in_child(math.nan, folders[0])
        found = measure_in_child(loss_of_head_3(folders[0]), folders[1])
        first_step = processor_seconds(
            "-m",
            "mtp_dist.pretrain",
            "--config",
            "configs/demo.yaml",
            *OVERRIDES[:-1],
            f"run.output_dir={scratch}/timed",
            "log.sample_prompt=null",
        )
    found |= {
        "statements": sum(statements(path.read_text()) for path in (ROOT / "mtp_dist").rglob("*.py")),
        "test_lines": sum(len(path.read_text().splitlines()) for path in (ROOT / "tests").rglob("*.py")),
        "help_seconds": processor_seconds("-m", "mtp_dist.cli", "--help"),
        "run_seconds_without_torch": first_step - processor_seconds("-c", "import torch"),
    }
    if options.json:
        print(json.dumps(found))
        return
    print(f"a batch passes {len(found['files'])} files and {found['frames']} frames: {', '.join(found['files'])}")
    print(f"the loss of head 3 takes {len(found['hops'])} hops:", *found["hops"], sep="\n  ")
    for name in ("statements", "test_lines", "help_seconds", "run_seconds_without_torch"):
        print(f"{name}: {found[name]:.2f}" if isinstance(found[name], float) else f"{name}: {found[name]}")


if __name__ == "__main__":
    main()
