"""The heads that an export of mtp_dist contains in addition to its Llama."""

import json
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from mtp_dist.config import Config, HeadsConfig, saved_config
from mtp_dist.errors import CheckpointError, ConfigError, UserError

HEADS, HEADS_CONFIG = "mtp_heads.safetensors", "mtp_config.json"


class SavedHeads:
    """Configuration and head weights of an exported folder; empty if mtp_dist has not exported it."""

    config: Config | None = None
    names: frozenset[str] = frozenset()

    def __init__(self, source: Path, option: str = "--from") -> None:
        """Raise CheckpointError if its files are corrupt. option: the one that names the folder."""
        self.file = source / HEADS
        try:
            if (source / HEADS_CONFIG).exists():
                self.config = saved_config(json.loads((source / HEADS_CONFIG).read_text(encoding="utf-8")))
            if self.config and self.file.exists():
                with safe_open(self.file, "pt") as file:
                    self.names = frozenset(file.keys())
        except UserError as error:
            raise CheckpointError(f"{option} = '{source}' cannot be opened: {HEADS_CONFIG}: {error}") from None
        except (OSError, KeyError, TypeError, ValueError, AttributeError, RecursionError, SafetensorError) as error:
            raise CheckpointError(
                f"{option} = '{source}' is a corrupt export: {HEADS_CONFIG} or {HEADS}: {error}"
            ) from None

    def check_fits(self, heads: HeadsConfig) -> None:
        """Raise ConfigError if these are not heads of that kind."""
        if self.config is None or not self.names:
            return
        for key in ("kind", "layers_per_head", "repeated", "unembedding"):
            saved, wanted = getattr(self.config.heads, key), getattr(heads, key)
            if saved != wanted:
                raise ConfigError(
                    f"heads.{key} is {wanted!r}, the heads in {self.file} have {saved!r}: keep it, or delete this file "
                    "to start with new heads"
                )

    def read(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """Return a weight as it is stored. Raise CheckpointError if its file is corrupt, or it has another shape."""
        try:
            with safe_open(self.file, "pt") as file:
                tensor: Tensor = file.get_tensor(name)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{self.file} cannot be read: {error}") from None
        if tensor.shape != shape:
            raise CheckpointError(
                f"{self.file} has {name} as {list(tensor.shape)}, its configuration requires {list(shape)}"
            )
        return tensor
