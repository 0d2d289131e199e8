"""Progress on standard error: bars, shown in a terminal only, and one line per run of an experiment."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text

if TYPE_CHECKING:
    from mtp_dist.experiments.tasks import Task


def progress_bar(speed_period_s: float = 30) -> Progress:
    """Return a bar that averages the speed over a time, which must be longer than the time between two updates."""
    console = Console(stderr=True)
    return Progress(
        console=console,
        transient=True,
        disable=not console.is_terminal,
        speed_estimate_period=speed_period_s,
    )


def updates(bar: Progress, title: str) -> Callable[[float, float], None]:
    """Return a function that updates a task of the bar, given the amount done and the total. Its first call adds it."""
    tasks: list[TaskID] = []

    def update(done: float, total: float) -> None:
        if not tasks:
            tasks.append(bar.add_task(title))
        bar.update(tasks[0], completed=done, total=total)

    return update


def bench_progress(is_first: bool) -> Progress:
    """Return the bar of a benchmark that starts ranks, which only the first one shows."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(None),
        TimeRemainingColumn(),
        TextColumn("left"),
        console=Console(stderr=True, quiet=not is_first),
        expand=True,
        speed_estimate_period=3600,
    )


class TaskProgress:
    """The progress of an experiment: a bar over all tasks, one per running task, and a line for each evaluated run."""

    def __init__(self, title: str, tasks: Sequence[Task]) -> None:
        console = Console(stderr=True)
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.percentage:3.0f}%"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("left"),
            console=console,
            transient=True,
            disable=not console.is_terminal,
            speed_estimate_period=3600,
        )
        self._total, self._ended = len(tasks), 0
        self._runs, self._evaluated = sum(task.kind == "evaluation" for task in tasks), 0
        self._all = self._bar.add_task(title, total=self._total)
        self._rows: dict[Task, TaskID] = {}

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def show(self, message: str) -> None:
        self._bar.console.print(Text(message), soft_wrap=True)

    def on_start(self, task: Task) -> None:
        self._rows[task] = self._bar.add_task(f"  {task.label}: {task.kind}", total=1)

    def on_poll(self, running: Sequence[Task]) -> None:
        fractions = {task: task.fraction() for task in running}
        for task, fraction in fractions.items():
            self._bar.update(self._rows[task], completed=fraction)
        self._bar.update(self._all, completed=self._ended + sum(fractions.values()))

    def on_end(self, task: Task, failure: str | None) -> None:
        if task in self._rows:
            self._bar.remove_task(self._rows.pop(task))
            self._ended += 1
        else:  # done by an earlier start, or not started since another one has failed
            self._total -= 1
            self._bar.update(self._all, total=self._total)
        if failure:
            self.show(f"FAILED: {task.label}: {task.kind}: {failure}")
        elif task.kind == "evaluation":
            self._evaluated += 1
            self.show(f"{task.label}: done ({self._evaluated} of {self._runs} runs)")
