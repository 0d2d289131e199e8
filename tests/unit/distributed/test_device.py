"""Selection of the device on machines with GPUs, with broken ones, or with one per task."""

import os

import pytest
import torch

from mtp_dist.distributed import gpus
from mtp_dist.distributed.device import select_device
from mtp_dist.errors import LaunchError
from tests.tiny import tiny_config


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """The GPUs that were made current; the changes of select_device are undone."""
    monkeypatch.setattr(os, "environ", dict(os.environ))
    monkeypatch.setattr(torch.cuda, "current_device", torch.cuda.current_device)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(gpus, "ROOT", tmp_path)
    current = []
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    return current


def select(device):
    return select_device(tiny_config(run={"device": device}))


@pytest.mark.parametrize(("visible", "index"), [(1, 0), (4, 3)], ids=["one GPU per task", "all GPUs per task"])
def test_ranks_take_one_gpu_each(machine, monkeypatch, visible, index):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: visible)
    os.environ["LOCAL_RANK"] = "3"
    assert select("auto") == torch.device("cuda", index) and machine == [index]
    os.environ["LOCAL_RANK"] = "4"
    if visible > 1:
        with pytest.raises(LaunchError, match="local rank 4 has no GPU, this machine has 4"):
            select("auto")


@pytest.mark.parametrize(
    ("vendor", "kind", "is_gpu"),
    [
        ("driver", None, True),
        ("0x10de", "0x030200", True),
        ("0x10de", "0x030000", True),
        ("0x10de", "0x040300", False),  # the sound device of a graphics card
        ("0x8086", "0x030000", False),  # graphics of another vendor
    ],
)
def test_auto_does_not_leave_an_nvidia_gpu_idle(machine, tmp_path, vendor, kind, is_gpu):
    """PyTorch cannot use it if the driver is broken, in a build for CPUs, or in a job that did not request GPUs."""
    assert select("auto") == torch.device("cpu")
    folder = "proc/driver/nvidia/gpus" if vendor == "driver" else "sys/bus/pci/devices"
    device = tmp_path / folder / "0000:17:00.0"
    device.mkdir(parents=True)
    (device / "vendor").write_text(f"{vendor}\n")
    (device / "class").write_text(f"{kind}\n")
    assert select("cpu") == torch.device("cpu")
    if is_gpu:
        with pytest.raises(LaunchError, match=r"run.device = 'auto', but PyTorch cannot use the NVIDIA GPU of .*'cpu'"):
            select("auto")
    else:
        assert select("auto") == torch.device("cpu")
