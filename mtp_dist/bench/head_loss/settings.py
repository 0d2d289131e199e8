"""The settings of `mtp-dist bench head-loss`."""

from dataclasses import dataclass
from typing import Any

import torch

from mtp_dist.bench.head_loss.baselines import BASELINES
from mtp_dist.config import Config, build_config, resolve
from mtp_dist.errors import LaunchError

OWN_MODES = ("naive", "eager", "recompute")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
DEFAULTS: dict[str, dict[str, Any]] = {
    "cpu": {"tokens": 2048, "hidden": 512, "vocab": 32000, "dtype": "fp32"},
    "cuda": {"tokens": 8192, "hidden": 4096, "vocab": 128256, "dtype": "bf16"},
}


@dataclass(frozen=True)
class Settings:
    """The sizes, modes and device to measure."""

    tokens: int
    """Tokens T per micro-batch."""
    hidden: int
    """Hidden size D."""
    vocab: int
    """Vocabulary size V over all ranks, before padding."""
    heads: tuple[int, ...]
    """Numbers of heads, in increasing order."""
    tp: int
    dtype: str
    modes: tuple[str, ...]
    device: str

    @property
    def flops_per_head(self) -> int:
        """FLOPs of the three matmuls with the unembedding: logits, gradients of the hidden states and of the weight."""
        return 6 * self.tokens * self.hidden * self.vocab

    @property
    def config(self) -> Config:
        """Configuration of a model with such heads, of which tensor parallelism and the unembedding use a part."""
        config = build_config(
            {
                "run": {"device": self.device},
                "model": {
                    "hidden_size": self.hidden,
                    "trunk_layers": 1,
                    "num_attention_heads": self.tp,
                    "ffn_hidden_size": self.tp,
                },
                "heads": {"count": max(self.heads)},
                "parallel": {"tensor": self.tp},
                "data": {"train": [{"path": "python-stdlib"}]},
                "train": {"steps": 1, "global_batch_size": 1, "micro_batch_size": 1, "sequence_length": self.tokens},
            }
        )
        return resolve(config, self.vocab, self.tp)


def read_settings(heads: str, tp: int, modes: str | None, device: str, **sizes: int | str | None) -> Settings:
    """Return the settings that the options ask for, with the device's defaults. Raise LaunchError if one is invalid."""
    if device not in ("auto", "cpu", "cuda"):
        raise LaunchError(f"--device {device} is not known: use auto, cpu or cuda")
    if device == "cuda" and not torch.cuda.is_available():
        raise LaunchError("--device cuda: PyTorch sees no GPU on this machine, use cpu or auto")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    values = DEFAULTS[device] | {name: value for name, value in sizes.items() if value is not None}
    if values["dtype"] not in DTYPES:
        raise LaunchError(f"--dtype {values['dtype']} is not known: use {' or '.join(DTYPES)}")
    _check_sizes(tp=tp, **{name: value for name, value in values.items() if name != "dtype"})
    if device == "cuda" and tp > torch.cuda.device_count():
        raise LaunchError(f"--tp {tp} needs {tp} GPUs, this machine has {torch.cuda.device_count()}")
    return Settings(
        heads=_read_heads(heads), tp=tp, modes=_read_modes(modes, device, values["dtype"], tp), device=device, **values
    )


def _check_sizes(tokens: int, hidden: int, vocab: int, tp: int) -> None:
    for name, value, least in (("tokens", tokens, 1), ("tp", tp, 1), ("vocab", vocab, 2), ("hidden", hidden, 1)):
        if value < least:
            raise LaunchError(f"--{name} {value} is too small: use {least} or more")
    if hidden % (2 * tp):
        raise LaunchError(f"--hidden {hidden} must be a multiple of 2 * tp = {2 * tp}, as in a model")


def _read_heads(text: str) -> tuple[int, ...]:
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise LaunchError(f"--heads {text} is not a list of numbers above 0 such as 1,2,4,8")
    return tuple(sorted({int(part) for part in parts}))


def _read_modes(text: str | None, device: str, dtype: str, tp: int) -> tuple[str, ...]:
    if text is None:
        wanted = BASELINES if device == "cuda" else ("pytorch",)
        return (*OWN_MODES, *(name for name in wanted if BASELINES[name].obstacle(device, dtype, tp) is None))
    modes = tuple(dict.fromkeys(part.strip() for part in text.split(",")))
    for mode in modes:
        if mode not in (*OWN_MODES, *BASELINES):
            raise LaunchError(f"--modes: {mode} is not known, use some of {', '.join((*OWN_MODES, *BASELINES))}")
        if mode in BASELINES and (obstacle := BASELINES[mode].obstacle(device, dtype, tp)):
            raise LaunchError(f"--modes: {mode} {obstacle}")
    return modes
