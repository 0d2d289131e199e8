"""The settings of `mtp-dist bench decode`."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from mtp_dist.config import Config, build_config, resolve
from mtp_dist.errors import LaunchError
from mtp_dist.planner.flops import parameter_counts

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
GENERATED_KINDS = ("parallel", "sequential")
DEFAULTS: dict[str, Any] = {
    "layers": 8,
    "hidden": 512,
    "heads": 4,
    "kind": "parallel",
    "vocab": 32000,
    "acceptance": 0.9,
}
HEAD_CHANNELS = 64
"""Channels of an attention head of a generated model."""


@dataclass(frozen=True)
class GeneratedModel:
    """A model that is made for the measurement, with heads that are right as often as wanted."""

    layers: int
    """Transformer layers that plain decoding runs: those of the trunk and of head 1."""
    hidden: int
    """Hidden size D."""
    heads: int
    """Number of prediction heads n."""
    kind: str
    """Kind of the heads, parallel or sequential."""
    vocab: int
    """Vocabulary size V."""
    acceptance: float
    """Probability that a draft is right if those before it are."""

    def config(self, positions: int) -> Config:
        """Return the configuration of the run that would train it. positions: those of the longest text."""
        config = build_config(
            {
                "model": {
                    "hidden_size": self.hidden,
                    "trunk_layers": self.layers - (self.kind == "parallel"),
                    "num_attention_heads": self.hidden // HEAD_CHANNELS,
                },
                "heads": {"count": self.heads, "kind": self.kind},
                "data": {"train": [{"path": "python-stdlib"}]},
                "train": {
                    "steps": 1,
                    "global_batch_size": 1,
                    "micro_batch_size": 1,
                    "sequence_length": positions,
                    "precision": "fp32",
                },
            }
        )
        return resolve(config, self.vocab, 1)


@dataclass(frozen=True)
class Settings:
    """Sizes and numbers of the texts to decode, and the device to decode on."""

    batch_sizes: tuple[int, ...]
    prompt_tokens: int
    new_tokens: int
    """New tokens per text; the end of a document does not end it."""
    rounds: int
    device: str
    dtype: str

    @property
    def positions(self) -> int:
        """Number of tokens of a text at the end."""
        return self.prompt_tokens + self.new_tokens


def read_settings(
    batch: str, prompt_tokens: int, new_tokens: int, rounds: int, device: str, dtype: str | None
) -> Settings:
    """Return the settings that the options ask for. Raise LaunchError if one is invalid."""
    sizes = [part.strip() for part in batch.split(",")]
    if not all(part.isdecimal() and int(part) > 0 for part in sizes):
        raise LaunchError(f"--batch {batch} is not a list of numbers above 0 such as 1,8,32")
    if device not in ("auto", "cpu", "cuda"):
        raise LaunchError(f"--device {device} is not known: use auto, cpu or cuda")
    if device == "cuda" and not torch.cuda.is_available():
        raise LaunchError("--device cuda: PyTorch finds no GPU on this machine, use cpu or auto")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = dtype or ("bf16" if device == "cuda" else "fp32")
    if dtype not in DTYPES:
        raise LaunchError(f"--dtype {dtype} is not known: use {' or '.join(DTYPES)}")
    batch_sizes = tuple(sorted({int(part) for part in sizes}))
    return Settings(batch_sizes, prompt_tokens, new_tokens, rounds, device, dtype)


def read_generated(values: Mapping[str, int | str | float | None]) -> GeneratedModel:
    """Return the model that the options ask for, with defaults. Raise LaunchError if there is none."""
    wanted = GeneratedModel(**DEFAULTS | {name: value for name, value in values.items() if value is not None})
    if wanted.kind not in GENERATED_KINDS:
        raise LaunchError(
            f"--kind {wanted.kind}: only {' and '.join(GENERATED_KINDS)} models are generated, use --model for others"
        )
    if wanted.hidden % HEAD_CHANNELS:
        raise LaunchError(f"--hidden {wanted.hidden} must be a multiple of {HEAD_CHANNELS}")
    if not 0 <= wanted.acceptance <= 1:
        raise LaunchError(f"--acceptance {wanted.acceptance} is not between 0 and 1")
    return wanted


def check_memory(config: Config, settings: Settings) -> None:
    """Raise LaunchError if the weights of a generated model and the cache of its texts exceed the device's memory."""
    layers = config.model.trunk_layers + config.heads.num_blocks * config.heads.block_layers
    keys_and_values = 2 * layers * config.model.hidden_size * settings.positions * max(settings.batch_sizes)
    needed = (parameter_counts(config).total + keys_and_values) * DTYPES[settings.dtype].itemsize
    if settings.device == "cuda":
        memory = torch.cuda.get_device_properties(0).total_memory
    else:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > memory:
        raise LaunchError(
            f"a generated model and {max(settings.batch_sizes):,} texts of {settings.positions:,} tokens need "
            f"{needed / 2**30:,.0f} GiB, but the device has {memory / 2**30:,.0f}: lower --new-tokens, "
            "--prompt-tokens, --batch or the sizes of the model"
        )
