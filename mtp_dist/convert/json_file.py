"""Reading the JSON files of a Hugging Face folder."""

import json
from pathlib import Path
from typing import Any

from mtp_dist.errors import CheckpointError


def read_json_object(path: Path, label: str) -> dict[str, Any]:
    """Return the content of a file. Raise CheckpointError if it is not a JSON object. label: its folder in messages."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{label}: {path.name} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{label}: {path.name} is not JSON: {error}") from None
    if not isinstance(values, dict):
        raise CheckpointError(f"{label}: {path.name} is not a JSON object")
    return values
