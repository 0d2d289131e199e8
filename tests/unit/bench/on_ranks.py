"""Functions that the tests of this folder run on every rank."""

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from tests.tiny import load_resolved

TOKENS = 6
WIDTH = 4


class SumInBackward(torch.autograd.Function):
    """Identity; the gradient is summed over the ranks."""

    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        gradient = gradient.clone()
        dist.all_reduce(gradient)
        return gradient


def count_collectives() -> tuple[list[tuple[int, int]], tuple[int, int]]:
    """Return (collectives, bytes) after each kind forward and after the backward pass, and of an idle counter."""
    from mtp_dist.bench.measure import CollectiveCounter

    value = torch.ones(TOKENS, WIDTH, requires_grad=True)
    counter, idle = CollectiveCounter(), CollectiveCounter()
    with idle:
        dist.barrier()
        (value * 2).sum().backward()
    counts = []
    with counter:
        dist.all_reduce(torch.ones(TOKENS, WIDTH))
        counts.append((counter.count, counter.bytes))
        dist.all_gather_into_tensor(torch.empty(2 * TOKENS, WIDTH), torch.ones(TOKENS, WIDTH))
        counts.append((counter.count, counter.bytes))
        dist.reduce_scatter_tensor(torch.empty(TOKENS // 2, WIDTH), torch.ones(TOKENS, WIDTH))
        counts.append((counter.count, counter.bytes))
        loss = SumInBackward.apply(value).double().sum()
        counts.append((counter.count, counter.bytes))
        loss.backward()
        counts.append((counter.count, counter.bytes))
    return counts, (idle.count, idle.bytes)


def head_loss(dtype: str, modes: str | None = None) -> dict[str, Any]:
    """Run a tiny benchmark, by default of all modes that run on a CPU and compile nothing."""
    from mtp_dist.bench.head_loss.measurement import measure_on_rank
    from mtp_dist.bench.head_loss.settings import read_settings
    from mtp_dist.cli.progress import head_loss_progress

    settings = read_settings("2,1", 1, modes, "cpu", tokens=64, hidden=32, vocab=300, dtype=dtype)
    return measure_on_rank(settings, head_loss_progress)


def head_loss_without_memory_for_pytorch() -> dict[str, Any]:
    """Run it with a PyTorch baseline that allocates more memory than there is."""
    from dataclasses import replace

    from mtp_dist.bench.head_loss.baselines import BASELINES

    def loss(*_: Any) -> Tensor:
        return torch.empty(2**50)

    baseline = BASELINES["pytorch"]
    BASELINES["pytorch"] = replace(baseline, loss=loss)
    try:
        return head_loss("fp32", "naive,eager,pytorch")
    finally:
        BASELINES["pytorch"] = baseline


def monitored(path: Path) -> dict[str, Any]:
    """Return the result of one round."""
    from mtp_dist.bench.monitoring import measure_monitoring
    from mtp_dist.data.run_sources import RunSources
    from mtp_dist.distributed.device import select_device
    from mtp_dist.distributed.topology import initialize_topology

    config = load_resolved(path)
    topology = initialize_topology(config, select_device(config))
    return measure_monitoring(config, RunSources(config), topology, rounds=1)
