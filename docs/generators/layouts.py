"""The table of configs/models: layouts by number of GPUs, from the overrides in each file's first comment."""

import re
from pathlib import Path

from generators.common import DOCS, table

from mtp_dist.config import load_config, resolve
from mtp_dist.planner.fit import fit
from mtp_dist.planner.flops import parameter_counts

CONFIGS = DOCS.parent / "configs"
VOCAB_SIZE = 32_000
"""Tokens of Llama 2's tokenizer."""
OVERRIDES = re.compile(r"^#   ([^:]+): (this file|\S+=\S+(?: \S+=\S+)*)$", re.MULTILINE)
SIZES = {"m": 1e6, "b": 1e9}


def overrides_by_name(path: Path) -> dict[str, list[str]]:
    """Return the overrides in a configuration's first comment by name, such as `n = 2` or `8, 32 GPUs`."""
    comment = path.read_text(encoding="utf-8").partition("\nrun:")[0]
    return {name: [] if text == "this file" else text.split() for name, text in OVERRIDES.findall(comment)}


def gpu_counts(name: str) -> list[int]:
    """Return the numbers in a name such as `1 GPU` or `8, 1,024 GPUs`; none of another one."""
    if not re.search(r" GPUs?$", name):
        return []
    return [int(number.replace(",", "")) for number in name.rpartition(" ")[0].split(", ")]


def nominal_size(name: str) -> float:
    """Return the parameters of a name such as `125m` or `1.3B`."""
    return float(name[:-1]) * SIZES[name[-1].lower()]


def tables() -> dict[str, str]:
    rows = []
    for path in sorted((CONFIGS / "models").glob("*.yaml"), key=lambda path: nominal_size(path.stem)):
        for name, overrides in overrides_by_name(path).items():
            if counts := gpu_counts(name):
                rows.append(_row(path, overrides, counts))
    header = ["file", "parameters", "heads", "GPUs", "tensor x pipeline", "memory", "overrides"]
    return {"layouts": table(header, rows)}


def _row(path: Path, overrides: list[str], gpus: list[int]) -> list[str]:
    config = resolve(load_config(path, overrides), VOCAB_SIZE, gpus[0])
    total, stages = parameter_counts(config).total, config.parallel.pipeline
    memory = fit(config).binding.memory.total
    return [
        f"[`{path.stem}.yaml`](../configs/models/{path.name})",
        f"{total / 1e9:.3g}B" if total >= 1e9 else f"{total / 1e6:.0f}M",
        str(config.heads.count),
        ", ".join(f"{number:,}" for number in gpus),
        f"{config.parallel.tensor} x {stages}",
        f"{memory / 1e9:.0f} GB",
        f"`{' '.join(overrides)}`" if overrides else "",
    ]
