"""The results of windows in a file of JSON lines, with which an interrupted measurement continues."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from mtp_dist.errors import DataError
from mtp_dist.fs import append_durably, explain_os_errors


class WindowRecords:
    """The windows that are done, in a file if there is one."""

    def __init__(self, file: Path | None, settings: dict[str, Any]) -> None:
        """Read the file and remove a last line that was not written to its end.

        settings: what the results depend on, as JSON. Raise DataError if the file has results of others.
        """
        self._file, self._settings = file, settings
        self._found: dict[int, dict[str, Any]] = {}
        if file is None:
            return
        with explain_os_errors(file, "write"):
            file.parent.mkdir(parents=True, exist_ok=True)
            append_durably(file, "")  # an error of the disk comes before the work
            content = file.read_bytes()
            complete = content[: content.rfind(b"\n") + 1]
            if complete != content:
                os.truncate(file, len(complete))
        for number, line in enumerate(complete.splitlines(), 1):
            record = self._parse(line, number)
            self._found[record["window"]] = record

    def find(self, window: int, text: str) -> dict[str, Any] | None:
        """Return the record of a window, or None. text: fingerprint of its text. Raise DataError if it had another."""
        record = self._found.get(window)
        if record and record["text"] != text:
            raise DataError(
                f"--output = '{self._file}' has results of another text, or of one that has changed since: name a new "
                "file"
            )
        return record

    def append(self, window: int, text: str, record: dict[str, Any]) -> None:
        """Append a window to the file, if there is one."""
        if self._file is not None:
            line = {"window": window, "text": text, **record, "settings": self._settings}
            with explain_os_errors(self._file, "write"):
                append_durably(self._file, json.dumps(line) + "\n")

    def _parse(self, line: bytes, number: int) -> dict[str, Any]:
        try:
            record = json.loads(line)
            settings = record["settings"]
            complete = {"window", "text", "rows", "seconds"} <= record.keys()
        except (AttributeError, KeyError, TypeError, ValueError):
            complete = False
        if not complete:
            raise DataError(
                f"--output = '{self._file}' line {number} is not a result of mtp-dist analyze marginalize: name a new "
                "file"
            )
        for name, value in self._settings.items():
            if settings.get(name) != value:
                raise DataError(
                    f"--output = '{self._file}' has results with {name} = {settings.get(name)}, not {value}: name a "
                    "new file, or repeat the command that wrote it"
                )
        return record
