"""Selection of the device on machines with GPUs, with broken ones, or with one per task."""

import os
from pathlib import Path

import pytest
import torch

from mtp_dist.distributed import gpus
from mtp_dist.distributed.device import select_device
from mtp_dist.errors import LaunchError
from tests.tiny import tiny_config


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[int]:
    """The GPUs that were made current; the changes of select_device are undone."""
    monkeypatch.setattr(os, "environ", dict(os.environ))
    monkeypatch.setattr(torch.cuda, "current_device", torch.cuda.current_device)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(gpus, "ROOT", tmp_path)
    current: list[int] = []
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    return current


def select(device: str) -> torch.device:
    return select_device(tiny_config(run={"device": device}))


@pytest.mark.parametrize(("visible", "index"), [(1, 0), (4, 3)], ids=["one GPU per task", "all GPUs per task"])
def test_ranks_take_one_gpu_each(machine: list[int], monkeypatch: pytest.MonkeyPatch, visible: int, index: int) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: visible)
    os.environ["LOCAL_RANK"] = "3"
    assert select("auto") == torch.device("cuda", index) and machine == [index]
    os.environ["LOCAL_RANK"] = "4"
    if visible > 1:
        with pytest.raises(LaunchError, match="local rank 4 has no GPU, this machine has 4"):
            select("auto")


def add_pci_device(root: Path, vendor: str, kind: str) -> None:
    device = root / "sys" / "bus" / "pci" / "devices" / "0000:17:00.0"
    device.mkdir(parents=True)
    (device / "vendor").write_text(f"{vendor}\n")
    (device / "class").write_text(f"{kind}\n")


@pytest.mark.parametrize("kind", ["0x030200", "0x030000", "driver"])
def test_auto_does_not_leave_a_gpu_idle(machine: list[int], tmp_path: Path, kind: str) -> None:
    """Cases are a broken driver, a build of PyTorch for CPUs, and a job that did not request GPUs."""
    if kind == "driver":
        (tmp_path / "proc" / "driver" / "nvidia" / "gpus" / "0000:17:00.0").mkdir(parents=True)
    else:
        add_pci_device(tmp_path, "0x10de", kind)
    with pytest.raises(LaunchError, match=r"run.device = 'auto', but PyTorch cannot use the NVIDIA GPU of .*'cpu'"):
        select("auto")
    assert select("cpu") == torch.device("cpu")


@pytest.mark.parametrize(("vendor", "kind"), [("0x10de", "0x040300"), ("0x8086", "0x030000")])
def test_auto_selects_the_cpu_without_an_nvidia_gpu(machine: list[int], tmp_path: Path, vendor: str, kind: str) -> None:
    """Neither the sound device of a graphics card nor the graphics of another vendor is a GPU."""
    assert select("auto") == torch.device("cpu")
    add_pci_device(tmp_path, vendor, kind)
    assert select("auto") == torch.device("cpu")
