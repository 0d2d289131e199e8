"""Progress of a run on standard output: a live bar on a terminal, plain lines in a file or a launcher's pipe."""

from collections.abc import Iterable
from datetime import timedelta
from time import monotonic

from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.text import Text

from mtp_dist.monitoring.scalars import Scalars
from mtp_dist.monitoring.writers.writer import MetricsWriter


def _numbers(scalars: Scalars, prefix: str) -> str:
    """Return the values of heads 1..n, in this order."""
    return " ".join(_number(value) for name, value in scalars.items() if name.startswith(f"{prefix}/head_"))


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _describe_step(scalars: Scalars) -> str:
    mfu = scalars["throughput/mfu"]
    return " | ".join(
        (
            f"head losses {_numbers(scalars, 'loss')}",
            f"total {_number(scalars['loss/total'])}",
            f"lr {scalars['train/learning_rate']:.2e}",
            f"grad norm {scalars['train/grad_norm']:.3g}",
            f"{scalars['throughput/tokens_per_second']:,.0f} tokens/s",
            *([f"{mfu:.1%} MFU"] if mfu else []),  # 0 if the peak of the device is not known
        )
    )


def _describe_validation(step: int, scalars: Scalars) -> str:
    prefix = next(name for name in scalars if name.endswith("/loss/total")).removesuffix("/loss/total")
    return " | ".join(
        (
            f"{prefix.replace('/', ' on ')} at step {step}",
            f"head losses {_numbers(scalars, f'{prefix}/loss')}",
            f"bits per byte {_numbers(scalars, f'{prefix}/bits_per_byte')}",
            f"accuracies {_numbers(scalars, f'{prefix}/accuracy')}",
        )
    )


class _Bar(Progress):
    """A line of progress and, below it, the last logged step."""

    status = ""

    def get_renderables(self) -> Iterable[RenderableType]:
        yield self.make_tasks_table(self.tasks)
        yield Text(self.status)


class ProgressBar(MetricsWriter):
    """Completed steps, time left and the last logged scalars: a bar on a terminal, else one line per logged step."""

    name = "standard output"

    def __init__(self, total_steps: int, console: Console | None = None) -> None:
        """Write to `console`, by default standard output."""
        self._total_steps = total_steps
        self._console = console or Console()
        self._first: tuple[int, float] | None = None  # the first step seen and when it ended
        self._left = "?"
        self._bar = _Bar(
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(None),
            TextColumn("{task.description} left"),
            console=self._console,
            expand=True,
        )
        self._task = self._bar.add_task(self._left, total=total_steps)

    def advance(self, step: int) -> None:
        self._left = self._time_left(step)
        if self._console.is_interactive:
            self._bar.start()
            self._bar.update(self._task, completed=step, description=self._left)

    def write(self, step: int, scalars: Scalars) -> None:
        if "loss/total" not in scalars:
            self._print(_describe_validation(step, scalars))
        elif self._console.is_interactive:
            self._bar.status = _describe_step(scalars)
        else:
            self._print(f"step {step}/{self._total_steps} | {_describe_step(scalars)} | {self._left} left")

    def _print(self, text: str) -> None:
        # Text and soft_wrap: one line stays one line in a log file, and brackets are not taken for markup.
        self._console.print(Text(text), soft_wrap=True)

    def rewind(self, completed_steps: int) -> None:
        self._first = None

    def close(self, failed: bool) -> None:
        if self._console.is_interactive:
            self._bar.stop()

    def _time_left(self, step: int) -> str:
        """Estimate it from the mean pace since the first step's end: that step also compiles and allocates."""
        now = monotonic()
        if self._first is None:
            self._first = (step, now)
            return "?"
        first_step, first_time = self._first
        seconds = (now - first_time) / (step - first_step) * (self._total_steps - step)
        return str(timedelta(seconds=round(seconds)))
