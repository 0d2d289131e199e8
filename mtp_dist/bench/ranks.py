"""Ranks that a benchmark starts itself on this machine."""

from collections.abc import Callable
from typing import TypeVar

from rich.progress import Progress
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from mtp_dist.errors import LaunchError

Result = TypeVar("Result")

NewProgress = Callable[[bool], Progress]
"""Function of a module, called on each rank with whether it is the first one, which shows its progress bar."""


def run_on_ranks(ranks: int, name: str, function: Callable[..., Result], *arguments: object) -> Result:
    """Run a module's function on each rank and return what rank 0 returns. Raise LaunchError if a rank fails."""
    launch = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=ranks,
        run_id=name,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
    )
    try:
        results: dict[int, Result] = elastic_launch(launch, function)(*arguments)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        raise LaunchError(f"rank {rank} ended with status {failure.exitcode}: its output is above") from None
    return results[0]
