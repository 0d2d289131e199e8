"""Detection of NVIDIA GPUs without PyTorch, which may be unable to use them."""

from pathlib import Path

ROOT = Path("/")


def has_nvidia_gpu() -> bool:
    """Return whether the driver or the PCI bus lists an NVIDIA GPU; a container lists those of its host."""
    if any((ROOT / "proc/driver/nvidia/gpus").glob("*")):
        return True
    return any(
        (device / "vendor").read_text().strip() == "0x10de" and (device / "class").read_text().startswith("0x03")
        for device in (ROOT / "sys/bus/pci/devices").glob("*")
    )
