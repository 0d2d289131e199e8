"""Whether a machine has NVIDIA GPUs, also if PyTorch cannot use them."""

from pathlib import Path

ROOT = Path("/")


def has_nvidia_gpu() -> bool:
    """Return whether the driver or the PCI bus lists one; a container shows those of its machine."""
    if any((ROOT / "proc/driver/nvidia/gpus").glob("*")):
        return True
    return any(
        (device / "vendor").read_text().strip() == "0x10de" and (device / "class").read_text().startswith("0x03")
        for device in (ROOT / "sys/bus/pci/devices").glob("*")
    )
