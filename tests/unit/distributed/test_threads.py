"""Cores per rank, on machines of several kinds."""

import os

import pytest
import torch

from mtp_dist.distributed import threads


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """A machine with eight CPUs without files that describe them, and an environment without launchers."""
    for name in ("OMP_NUM_THREADS", "LOCAL_WORLD_SIZE", "LOCAL_SIZE", "SLURM_CPUS_PER_TASK"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    monkeypatch.setattr(threads, "CPU_FOLDER", tmp_path)
    monkeypatch.setattr(threads, "CGROUP_FOLDER", tmp_path)
    before = torch.get_num_threads()
    yield tmp_path
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("variables", "cpus", "cores", "with_hyperthreads"),
    [
        ({}, range(8), 8, 4),
        ({"LOCAL_WORLD_SIZE": "4"}, range(8), 2, 1),
        ({"LOCAL_SIZE": "3"}, range(8), 2, 1),
        ({"LOCAL_WORLD_SIZE": "16"}, range(8), 1, 1),
        ({"SLURM_CPUS_PER_TASK": "4"}, range(8), 4, 2),
        ({"SLURM_CPUS_PER_TASK": "4"}, {0, 1, 4, 5}, 4, 2),  # bound to them
        ({"SLURM_CPUS_PER_TASK": "1"}, range(8), 1, 1),
        ({"SLURM_CPUS_PER_TASK": "2", "LOCAL_WORLD_SIZE": "2"}, range(8), 4, 2),
    ],
)
def test_cores_per_rank(machine, monkeypatch, variables, cpus, cores, with_hyperthreads):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(cpus))
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert threads.cores_per_rank() == cores
    for cpu in range(8):  # four cores with two hardware threads each
        (machine / f"cpu{cpu}" / "topology").mkdir(parents=True)
        (machine / f"cpu{cpu}" / "topology" / "thread_siblings_list").write_text(f"{cpu % 4},{cpu % 4 + 4}\n")
    assert threads.cores_per_rank() == with_hyperthreads


@pytest.mark.parametrize(
    ("files", "cores"),
    [
        ({"cpu.max": "200000 100000\n"}, 2),
        ({"cpu.max": "50000 100000\n"}, 1),
        ({"cpu.max": "max 100000\n"}, 8),
        ({"cpu.max": "6400000 100000\n"}, 8),
        ({"cpu/cpu.cfs_quota_us": "300000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 3),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, 8),
    ],
)
def test_container_limits(machine, files, cores):
    (machine / "cpu").mkdir()
    for name, text in files.items():
        (machine / name).write_text(text)
    assert threads.cores_per_rank() == cores


def test_environment_has_precedence_and_is_reported(machine, monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert threads.set_threads() is None and torch.get_num_threads() == 2
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    assert threads.set_threads() is None
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    torch.set_num_threads(1)
    assert threads.set_threads() == (
        "OMP_NUM_THREADS = 1 in the environment: each rank computes on the CPU with 1 threads; one per core would "
        "be OMP_NUM_THREADS=2"
    )
    assert torch.get_num_threads() == 1
