"""Runs that the memory cannot hold are refused before anything is built, with what would fit."""

import re

import psutil
import pytest
import torch

from mtp_dist.errors import ConfigError
from mtp_dist.planner.fit import fit
from mtp_dist.planner.layouts import with_layout
from mtp_dist.planner.partition import pipeline_stages
from mtp_dist.verify.memory import agree_on_memory, check_memory
from tests.unit.planner.models import on_ranks, unresolved

CPU = torch.device("cpu")


def with_memory(monkeypatch, gigabytes, ranks=1):
    """Let this machine have so much memory, for so many ranks."""
    total = type(psutil.virtual_memory())(*[int(gigabytes * 1e9)] * len(psutil.virtual_memory()))
    monkeypatch.setattr(psutil, "virtual_memory", lambda: total)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(ranks))


def message(config):
    with pytest.raises(ConfigError) as error:
        check_memory(config, CPU)
    return str(error.value)


def test_refusal_names_the_largest_component_and_what_would_fit(monkeypatch):
    config = on_ranks(unresolved(micro_batch_size=16), 64, tensor=4, pipeline=2)
    with_memory(monkeypatch, 1000, ranks=2)
    check_memory(config, CPU)
    with_memory(monkeypatch, 200, ranks=2)
    text = message(config)
    assert "parallel.tensor = 4 and parallel.pipeline = 2" in text and "position 0 of the pipeline" in text
    sizes = re.search(r"need ([\d.]+) GB, of which ([\d.]+) GB are activations, but CPU has ([\d.]+)", text)
    needed, largest, memory = map(float, sizes.groups())
    assert needed > memory == 100 and largest < needed
    size, fitting = re.search(r"use .*?train.micro_batch_size=(\d+) \(([\d.]+) GB\)", text).groups()
    assert int(size) < 16 and float(fitting) <= 90
    assert "train.activation_checkpointing=" in text and "parallel.check_memory=false starts the run anyway" in text


def test_ranks_of_one_machine_share_its_memory(monkeypatch):
    config = on_ranks(unresolved(precision="fp32", batch=2), 2, pipeline=2, partition=[27, 1])
    sizes = [rank.memory.total / 1e9 for rank in fit(config, "cpu").ranks]
    assert sizes[0] > 1.5 * sizes[1]
    with_memory(monkeypatch, sum(sizes) + 0.1, ranks=2)
    check_memory(config, CPU)
    with_memory(monkeypatch, sum(sizes) - 0.1, ranks=2)
    text = message(config)
    assert f"the 2 ranks need {sum(sizes):,.1f} GB together, of which " in text
    assert "at position 0 of the pipeline" in text
    assert f"but the machine has {sum(sizes) - 0.1:,.1f} GB of memory" in text
    option, total = re.search(r"use (\S+) \(([\d.]+) GB\)", text).groups()
    changed = with_layout(config, {"train.activation_checkpointing": option.partition("=")[2]})
    assert float(total) == pytest.approx(sum(rank.memory.total for rank in fit(changed, "cpu").ranks) / 1e9, abs=0.1)
    with_memory(monkeypatch, sum(sizes) + 0.1, ranks=1)
    check_memory(config, CPU)
    with_memory(monkeypatch, (sizes[0] - 0.1) * 4, ranks=4)
    message(config)


def test_ranks_split_by_the_memory_that_they_have(monkeypatch):
    """The split that is checked is the one that is trained; ranks that share a machine's memory are not bounded."""
    config = on_ranks(unresolved(precision="fp32", batch=8), 8, pipeline=4)
    free = fit(config, "cpu")
    gigabytes = free.binding.memory.total / 1e9 / 0.9
    for memory, ranks, expected in ((gigabytes + 0.1, 1, True), (gigabytes - 0.1, 1, False), (8 * gigabytes, 8, True)):
        with_memory(monkeypatch, memory, ranks)
        checked = check_memory(config, CPU)
        assert (pipeline_stages(checked) == free.stages) == expected, (memory, ranks)
        assert (checked.device_memory is None) == (ranks == 8)
    with_memory(monkeypatch, gigabytes - 0.1)
    unchecked = on_ranks(config, 8, check_memory=False)
    assert check_memory(unchecked, CPU).device_memory is None


def test_agreed_memory_bounds_a_measured_split(monkeypatch):
    config = on_ranks(unresolved(precision="fp32", batch=8), 8, pipeline=4)
    size = fit(config, "cpu").binding.memory.total
    gathered = "mtp_dist.distributed.collectives.all_gather_floats"
    monkeypatch.setattr(gathered, lambda values, topology: [values, [size / 2], [9e20]])
    with_memory(monkeypatch, 1000)
    agreed = agree_on_memory(check_memory(config, CPU), topology=None)
    assert agreed.device_memory.bytes == size / 2
    assert agree_on_memory(config, topology=None) is config, "not known"
    with pytest.raises(ConfigError, match=f"CPU has {size / 2e9:,.1f} GB"):
        check_memory(agreed, CPU)


def test_check_can_be_switched_off(monkeypatch):
    with_memory(monkeypatch, 0.001)
    refused = on_ranks(unresolved(), 1)
    assert message(refused).endswith("parallel.check_memory=false starts the run anyway")
    assert "use more machines or a smaller model" in message(refused)
    check_memory(on_ranks(unresolved(), 1, check_memory=False), CPU)


def test_samples_of_a_step_must_fit(monkeypatch):
    with_memory(monkeypatch, 200)
    text = message(on_ranks(unresolved(batch=2**23), 1))
    assert text.startswith("train.global_batch_size = 8388608 gives each data-parallel rank 275")
