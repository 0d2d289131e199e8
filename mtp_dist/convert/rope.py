"""Rotary embeddings in config.json: `rope_theta` and `rope_scaling`, or `rope_parameters` since transformers 5."""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mtp_dist.config import ModelConfig
from mtp_dist.errors import CheckpointError

LLAMA3 = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
KEYS: dict[str, tuple[str, ...]] = {"default": (), "linear": ("factor",), "llama3": LLAMA3}
"""Keys of each supported rope type."""


def read_rope(values: Mapping[str, Any], source: Path) -> dict[str, Any]:
    """Return the rotary keys of the section `model`. Raise CheckpointError if mtp_dist does not support them."""
    # In the order in which transformers 5 looks them up.
    written = values.get("rope_scaling") or values.get("rope_parameters") or {}
    prefix = f"--from = '{source}' has rope_scaling = {written!r} in config.json: "
    if not isinstance(written, dict):
        raise CheckpointError(f"{prefix}it is not a JSON object")
    kind = str(written.get("rope_type", written.get("type", "default")))
    if kind not in KEYS:
        raise CheckpointError(f"{prefix}mtp_dist supports the rope types {', '.join(KEYS)}")
    if unknown := sorted(written.keys() - {"rope_type", "type", "rope_theta", "partial_rotary_factor", *LLAMA3}):
        raise CheckpointError(f"{prefix}mtp_dist does not support {', '.join(unknown)}")
    if written.get("partial_rotary_factor") not in (None, 1):
        raise CheckpointError(f"{prefix}rotary embeddings of a part of the channels are not supported")
    known = {"original_max_position_embeddings": values["max_position_embeddings"]} | written
    if values["original_max_position_embeddings"] is not None:  # transformers 5 prefers it to the scaling's own
        known["original_max_position_embeddings"] = values["original_max_position_embeddings"]
    if missing := [key for key in KEYS[kind] if key not in known]:
        raise CheckpointError(f"{prefix}it lacks {', '.join(missing)}")
    known.setdefault("rope_theta", 10000.0 if values["rope_theta"] is None else values["rope_theta"])
    for key in ("rope_theta", *KEYS[kind]):
        if type(known[key]) not in (int, float) or not 0 < known[key] <= sys.float_info.max:
            raise CheckpointError(f"{prefix}{key} is not a positive number")
    scaling = {"rope_type": kind} | {key: known[key] for key in KEYS[kind]}
    return {"rope_theta": float(known["rope_theta"]), "rope_scaling": scaling if KEYS[kind] else None}


def write_rope(model: ModelConfig) -> dict[str, Any]:
    """Return the rotary keys of config.json, for transformers of any version."""
    scaling = model.rope_scaling.model_dump(exclude_none=True) if model.rope_scaling else {}
    original = "original_max_position_embeddings"
    return {
        "rope_theta": model.rope_theta,
        "rope_scaling": scaling or None,
        "rope_parameters": {"rope_type": "default"} | scaling | {"rope_theta": model.rope_theta},
        **({original: scaling[original]} if original in scaling else {}),  # llama.cpp's converter reads it here
    }
