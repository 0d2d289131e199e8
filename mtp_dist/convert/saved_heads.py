"""The heads that an export of ours has beside its Llama."""

import json
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from mtp_dist.config import Config, HeadsConfig, saved_config
from mtp_dist.errors import ConfigError, UserError

HEADS, HEADS_CONFIG = "mtp_heads.safetensors", "mtp_config.json"


class SavedHeads:
    """None where the folder is not an export of ours."""

    config: Config | None = None
    names: frozenset[str] = frozenset()

    def __init__(self, source: Path) -> None:
        """Raises ConfigError where its files are damaged."""
        self.file = source / HEADS
        try:
            if (source / HEADS_CONFIG).exists():
                self.config = saved_config(json.loads((source / HEADS_CONFIG).read_text(encoding="utf-8")))
            if self.config and self.file.exists():
                with safe_open(self.file, "pt") as file:
                    self.names = frozenset(file.keys())
        except UserError as error:
            raise ConfigError(f"--from = '{source}' cannot be opened: {HEADS_CONFIG}: {error}") from None
        except (OSError, KeyError, TypeError, ValueError, AttributeError, RecursionError, SafetensorError) as error:
            raise ConfigError(f"--from = '{source}' is a damaged export: {HEADS_CONFIG} or {HEADS}: {error}") from None

    def check_fits(self, heads: HeadsConfig) -> None:
        """Raise ConfigError where these are not heads of that kind."""
        if self.config is None or not self.names:
            return
        for key in ("kind", "layers_per_head", "repeated", "unembedding"):
            ours, wanted = getattr(self.config.heads, key), getattr(heads, key)
            if ours != wanted:
                raise ConfigError(
                    f"heads.{key} is {wanted!r}, the heads in {self.file} have {ours!r}: keep it, or delete this file "
                    "to start with new heads"
                )

    def read(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """Return a weight in fp32. Raise ConfigError if its file is damaged, or it has another shape."""
        try:
            with safe_open(self.file, "pt") as file:
                tensor: Tensor = file.get_tensor(name)
        except (OSError, SafetensorError) as error:
            raise ConfigError(f"{self.file} cannot be read: {error}") from None
        if tensor.shape != shape:
            raise ConfigError(f"{self.file} has {name} as {list(tensor.shape)}, its configuration says {list(shape)}")
        return tensor.float()
