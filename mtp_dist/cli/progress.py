"""Progress bars on standard error, shown in a terminal only."""

from collections.abc import Callable

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn


def progress_bar() -> Progress:
    console = Console(stderr=True)
    return Progress(console=console, transient=True, disable=not console.is_terminal)


def updates(bar: Progress, title: str) -> Callable[[int, int], None]:
    """Add a task to the bar. Return the function that updates it, given the amount done and the total."""
    task = bar.add_task(title)
    return lambda done, total: bar.update(task, completed=done, total=total)


def head_loss_progress(is_first: bool) -> Progress:
    """Return the bar of `mtp-dist bench head-loss`, which only the first rank shows."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(None),
        TimeRemainingColumn(),
        TextColumn("left"),
        console=Console(stderr=True, quiet=not is_first),
        expand=True,
        speed_estimate_period=3600,
    )
