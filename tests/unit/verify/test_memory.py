"""Runs that the memory cannot hold are refused before anything is built, with what would fit."""

import re

import psutil
import pytest
import torch

from mtp_dist.errors import ConfigError
from mtp_dist.planner.fit import fit
from mtp_dist.verify.memory import check_memory
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
    size, fitting = re.search(r"use train.micro_batch_size=(\d+) \(([\d.]+) GB\)", text).groups()
    assert int(size) < 16 and float(fitting) <= 90
    assert "train.activation_checkpointing=" in text and "parallel.check_memory=false starts the run anyway" in text


def test_ranks_of_one_machine_share_its_memory(monkeypatch):
    config = on_ranks(unresolved(precision="fp32", batch=2), 2, pipeline=2, partition=[27, 1])
    sizes = [rank.memory.total / 1e9 for rank in fit(config, "cpu").ranks]
    assert sizes[0] > 1.5 * sizes[1]
    with_memory(monkeypatch, sum(sizes) + 0.1, ranks=2)
    check_memory(config, CPU)
    with_memory(monkeypatch, sum(sizes) - 0.1, ranks=2)
    message(config)
    with_memory(monkeypatch, sum(sizes) + 0.1, ranks=1)
    check_memory(config, CPU)
    with_memory(monkeypatch, (sizes[0] - 0.1) * 4, ranks=4)
    message(config)


def test_check_can_be_switched_off(monkeypatch):
    with_memory(monkeypatch, 0.001)
    refused = on_ranks(unresolved(), 1)
    assert message(refused).endswith("parallel.check_memory=false starts the run anyway")
    assert "start more ranks or make the model smaller" in message(refused)
    check_memory(on_ranks(unresolved(), 1, check_memory=False), CPU)


def test_samples_of_a_step_must_fit(monkeypatch):
    with_memory(monkeypatch, 200)
    text = message(on_ranks(unresolved(batch=2**23), 1))
    assert text.startswith("train.global_batch_size = 8388608 gives each data-parallel rank 275")
