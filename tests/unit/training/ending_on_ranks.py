"""A whole run on every rank, of which the order of its last acts is recorded."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any


def order_of_the_end(config: Path) -> list[str]:
    """Train, and return what this rank does after the last save."""
    import torch.distributed as dist

    from mtp_dist import pretrain, run

    done: list[str] = []

    def recorded(name: str, action: Callable[..., Any]) -> Callable[..., Any]:
        def record(*arguments: Any, **options: Any) -> Any:
            done.append(name)
            return action(*arguments, **options)

        return record

    def sample(*_: Any) -> str:
        written = (config.parent / "out" / "summary.json").exists()
        done.append("sample, with a summary" if written else "sample, without a summary")
        return "def f"

    saved = run._sample, run.close_topology, dist.barrier
    run._sample = sample
    run.close_topology = recorded("close", run.close_topology)
    dist.barrier = recorded("barrier", dist.barrier)
    os.environ.setdefault("LOCAL_RANK", "0")
    try:
        pretrain.main(["--config", str(config)])
    except SystemExit as end:
        assert not end.code, end.code
    finally:
        run._sample, run.close_topology, dist.barrier = saved
    last = max((index for index, name in enumerate(done) if name == "barrier"), default=-1)
    return [name for index, name in enumerate(done) if name != "barrier" or index == last]
