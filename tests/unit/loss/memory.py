"""Exact memory of a computation on the CPU, from what PyTorch's profiler sees its allocator do."""

import itertools
from collections.abc import Iterator
from contextlib import contextmanager

from torch.profiler import ProfilerActivity, profile


@contextmanager
def allocations() -> Iterator[list[int]]:
    """Collects the bytes of every allocation within, in order; negative where memory is freed."""
    found: list[int] = []
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        yield found
    assert profiler.profiler is not None
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    found += [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]


def peak(found: list[int]) -> int:
    """The most bytes held at once, beyond what was held before."""
    return max(itertools.accumulate(found), default=0)
