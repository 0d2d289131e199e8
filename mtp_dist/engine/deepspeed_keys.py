"""Check the `deepspeed` section against the keys that DeepSpeed reads, before any process group is open."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import pydantic
from deepspeed.runtime.config import DeepSpeedConfig

from mtp_dist.errors import ConfigError


class _ReadRecorder(dict[str, Any]):
    """A mapping that records which of its keys are read, also in nested mappings."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        super().__init__(
            {key: _ReadRecorder(value) if isinstance(value, dict) else value for key, value in values.items()}
        )
        self.read: set[object] = set()

    def __getitem__(self, key: str) -> Any:
        self.read.add(key)
        return super().__getitem__(key)

    def get(self, key: str, default: Any = None) -> Any:
        self.read.add(key)
        return super().get(key, default)

    def __contains__(self, key: object) -> bool:
        self.read.add(key)
        return super().__contains__(key)

    def __iter__(self) -> Iterator[str]:
        """Iterate as dict does; without this method `**mapping` would bypass __getitem__."""
        return super().__iter__()

    def unread(self, prefix: str = "") -> Iterator[str]:
        """Yield the full names of the keys that were not read.

        A mapping without a read key was passed to pydantic, which rejects unknown keys itself.
        """
        for key, value in self.items():
            if key not in self.read:
                yield f"{prefix}{key}"
            elif isinstance(value, _ReadRecorder) and value.read:
                yield from value.unread(f"{prefix}{key}.")


def check_deepspeed_section(section: Mapping[str, Any]) -> None:
    """Raise ConfigError if DeepSpeed would ignore one of the keys, or reject its value.

    DeepSpeed ignores unknown keys, so a misspelt one would have no effect.
    """
    recorder = _ReadRecorder({**section, "train_batch_size": 1, "train_micro_batch_size_per_gpu": 1})
    try:
        DeepSpeedConfig(recorder)
    except pydantic.ValidationError as error:
        raise ConfigError("\n".join(_invalid_values(section, error))) from None
    except Exception as error:  # DeepSpeed raises whatever the wrong value leads to
        raise ConfigError(f"DeepSpeed rejects the section deepspeed = {dict(section)}: {error}") from None
    if unread := list(recorder.unread("deepspeed.")):
        raise ConfigError("\n".join(f"{key} is not a key that DeepSpeed reads: remove it" for key in unread))


def _invalid_values(section: Mapping[str, Any], error: pydantic.ValidationError) -> Iterator[str]:
    """Yield one line per invalid value, with the key's full name if the section contains it."""
    for fault in error.errors():
        parts = [str(part) for part in fault["loc"]]
        parents = [key for key, value in section.items() if isinstance(value, dict) and parts and parts[0] in value]
        name = ".".join(["deepspeed", *parents[:1], *parts])
        yield f"{name} = {fault['input']!r} is invalid: {fault['msg']}"
