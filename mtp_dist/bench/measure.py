"""Memory, collectives and time of one step, which is a function without arguments."""

import os
import time
from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate
from typing import Any

import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mtp_dist.distributed.device import synchronize

Step = Callable[[], object]


def peak_bytes(step: Step, device: torch.device) -> int:
    """Return the peak bytes of tensors during `step`, above those allocated when it begins.

    PyTorch counts its own allocations, not those of libraries. On a CPU, tensors from before that `step` frees are not
    subtracted.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    # Otherwise the profiler prints lines at each start and stop.
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    assert profiler.profiler is not None
    events = (event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]")
    changes = (event.nbytes() for event in sorted(events, key=lambda event: event.start_ns()))
    return max(accumulate(changes, initial=0))


class CollectiveCounter(TorchDispatchMode):
    """A mode that counts the collectives that this rank starts, in backward passes too."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.count = 0
        self.bytes = 0
        """Bytes of this rank's input tensors."""

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func.namespace == "c10d":
            names = (argument.name for argument in func._schema.arguments)
            arguments = dict(zip(names, args, strict=False)) | dict(kwargs or {})
            given = [arguments[name] for name in arguments if name == "tensors" or name.startswith("input")]
            if given:  # a barrier has none
                self.count += 1
                self.bytes += sum(leaf.nbytes for leaf in tree_leaves(given) if isinstance(leaf, torch.Tensor))
        return func(*args, **(kwargs or {}))


def paired_seconds(
    steps: Mapping[str, Step], rounds: int, device: torch.device, after_each: Callable[[str], None] = lambda _: None
) -> dict[str, list[float]]:
    """Return the seconds of every step in every round. A round runs each step once, so that noise affects all of them.

    The first step rotates from round to round. Steps must be warm. All ranks call this and start each step together.
    `after_each` gets the step's name and is not timed.
    """
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    names = list(steps)
    for number in range(rounds):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            _wait_for_all(device)
            start = time.perf_counter()
            steps[name]()
            synchronize(device)
            seconds[name].append(time.perf_counter() - start)
            after_each(name)
    return seconds


def _wait_for_all(device: torch.device) -> None:
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.barrier()
    synchronize(device)
