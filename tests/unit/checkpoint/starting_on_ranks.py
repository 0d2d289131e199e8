"""What a rank does with the files of a checkpoint until it trains on from it."""

import os
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

LISTING = ("os.listdir", "os.scandir")


@dataclass
class Seen:
    """By name of file."""

    opened: Counter[str] = field(default_factory=Counter)
    looked_at: Counter[str] = field(default_factory=Counter)
    """Their sizes and kinds were asked for, or their names listed."""
    bytes_read: int = 0
    """Of tensors."""
    share: float = 0
    """Bytes of the weights and moments that only this rank must read."""
    drawn: list[str] = field(default_factory=list)
    """Weights that got an initial value."""


class Started(BaseException):
    """Raised instead of the training."""


@dataclass
class _Slice:
    """Of safetensors, counted."""

    slice: Any
    seen: Seen

    def __getitem__(self, block: Any) -> Any:
        values = self.slice[block]
        self.seen.bytes_read += values.nbytes
        return values

    def get_shape(self) -> Any:
        return self.slice.get_shape()


class _File:
    """An open file of safetensors, counted."""

    def __init__(self, path: Path, seen: Seen, safe_open: Callable[..., Any]) -> None:
        self.file, self.seen = safe_open(path, "pt"), seen
        seen.opened[Path(path).name] += 1

    def __enter__(self) -> "_File":
        return self

    def __exit__(self, *_: object) -> None: ...

    def keys(self) -> Any:
        return self.file.keys()

    def get_slice(self, name: str) -> _Slice:
        return _Slice(self.file.get_slice(name), self.seen)

    def get_tensor(self, name: str) -> Any:
        tensor = self.file.get_tensor(name)
        self.seen.bytes_read += tensor.nbytes
        return tensor


_listeners: list[Callable[[str, tuple[Any, ...]], None]] = []
_hooked: list[bool] = []


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    for listener in _listeners:
        listener(event, arguments)


def train(config_file: Path, overrides: Sequence[str]) -> None:
    """Run the program."""
    from mtp_dist.pretrain import main

    try:
        main(["--config", str(config_file), *overrides])
    except SystemExit as end:
        assert not end.code


def start(config_file: Path, overrides: Sequence[str], folder: Path) -> Seen:
    """Start the program as far as its first step, from the checkpoint in folder."""
    from mtp_dist.checkpoint import restore as load
    from mtp_dist.model import parameters as weights
    from mtp_dist.training import recovery

    seen = Seen()
    if not _hooked:
        sys.addaudithook(_audit)  # for the life of this process
        _hooked.append(True)

    def opens_or_lists(event: str, arguments: tuple[Any, ...]) -> None:
        path = str(arguments[0]) if arguments else ""
        if path.startswith(str(folder)) and event in ("open", *LISTING):
            (seen.opened if event == "open" else seen.looked_at)[Path(path).name] += 1

    def counted(operation: Callable[..., Any]) -> Callable[..., Any]:
        def run(path: Any, *arguments: Any, **options: Any) -> Any:
            if str(path).startswith(str(folder)):
                seen.looked_at[Path(path).name] += 1
            return operation(path, *arguments, **options)

        return run

    def restore(engine: Any, *arguments: Any) -> None:
        numbers = sum(weight.numel() for _, weight in weights.named_weights(engine.stage))
        seen.share = 12 * numbers / engine.topology.dp_size
        restore_really(engine, *arguments)

    def draw(config: Any, name: str, shape: Any) -> Any:
        seen.drawn.append(name)
        return draw_really(config, name, shape)

    def stop(*_: Any) -> None:
        raise Started

    restore_really, draw_really = load.restore, weights.initial_weight
    _listeners.append(opens_or_lists)
    with pytest.MonkeyPatch.context() as patch:
        for name, module in list(sys.modules.items()):
            if name.startswith("mtp_dist.") and hasattr(module, "initial_weight"):
                patch.setattr(module, "initial_weight", draw)
            if name.startswith("mtp_dist.checkpoint.") and (safe_open := getattr(module, "safe_open", None)):
                patch.setattr(module, "safe_open", lambda path, _, safe_open=safe_open: _File(path, seen, safe_open))
        for name in ("stat", "lstat"):
            patch.setattr(os, name, counted(getattr(os, name)))
        patch.setattr(load, "restore", restore)
        patch.setattr(recovery, "fit_and_recover", stop)
        with suppress(Started):
            train(config_file, overrides)
    _listeners.clear()
    return seen
