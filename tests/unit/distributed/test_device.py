"""The device of a rank on machines that the tests do not have: with GPUs, with broken ones, with one per task."""

import os
from pathlib import Path

import pytest
import torch

from mtp_dist.config import Config
from mtp_dist.distributed.device import select_device
from mtp_dist.errors import ConfigError
from tests.tiny import tiny_config


@pytest.fixture
def chosen(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The GPUs that were made current; what select_device changes is undone."""
    monkeypatch.setattr(os, "environ", dict(os.environ))
    monkeypatch.setattr(torch.cuda, "current_device", torch.cuda.current_device)
    gpus: list[int] = []
    monkeypatch.setattr(torch.cuda, "set_device", gpus.append)
    return gpus


def config_for(device: str) -> Config:
    return tiny_config(run={"device": device})


def test_a_task_that_sees_one_gpu_takes_it(monkeypatch: pytest.MonkeyPatch, chosen: list[int]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    os.environ["LOCAL_RANK"] = "3"
    assert select_device(config_for("auto")) == torch.device("cuda", 0) and chosen == [0]


def test_ranks_of_a_node_take_one_gpu_each(monkeypatch: pytest.MonkeyPatch, chosen: list[int]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    os.environ["LOCAL_RANK"] = "3"
    assert select_device(config_for("auto")) == torch.device("cuda", 3) and chosen == [3]
    os.environ["LOCAL_RANK"] = "4"
    with pytest.raises(ConfigError, match="local rank 4 has no GPU, this machine has 4"):
        select_device(config_for("auto"))


def pci_device(folder: Path, vendor: str, kind: str) -> None:
    device = folder / "sys" / "bus" / "pci" / "devices" / "0000:17:00.0"
    device.mkdir(parents=True)
    (device / "vendor").write_text(f"{vendor}\n")
    (device / "class").write_text(f"{kind}\n")


def loaded_driver(folder: Path) -> None:
    (folder / "proc" / "driver" / "nvidia" / "gpus" / "0000:17:00.0").mkdir(parents=True)


@pytest.mark.parametrize("kind", ["0x030200", "0x030000", "driver"])
def test_auto_does_not_leave_a_gpu_idle(
    monkeypatch: pytest.MonkeyPatch, chosen: list[int], tmp_path: Path, kind: str
) -> None:
    """A broken driver, a build of PyTorch for CPUs, or a job that did not ask for GPUs."""
    from mtp_dist.distributed import gpus

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(gpus, "ROOT", tmp_path)
    if kind == "driver":
        loaded_driver(tmp_path)
    else:
        pci_device(tmp_path, "0x10de", kind)
    with pytest.raises(ConfigError, match=r"run.device = 'auto', but PyTorch cannot use the NVIDIA GPU of .*'cpu'"):
        select_device(config_for("auto"))
    assert select_device(config_for("cpu")) == torch.device("cpu")


@pytest.mark.parametrize(("vendor", "kind"), [("0x10de", "0x040300"), ("0x8086", "0x030000")])
def test_auto_takes_the_cpu_of_a_machine_without_a_gpu(
    monkeypatch: pytest.MonkeyPatch, chosen: list[int], tmp_path: Path, vendor: str, kind: str
) -> None:
    """A graphics card's sound device and another vendor's graphics are none."""
    from mtp_dist.distributed import gpus

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(gpus, "ROOT", tmp_path)
    assert select_device(config_for("auto")) == torch.device("cpu")
    pci_device(tmp_path, vendor, kind)
    assert select_device(config_for("auto")) == torch.device("cpu")
