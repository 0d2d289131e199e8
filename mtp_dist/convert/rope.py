"""Rotary embeddings in config.json: `rope_theta` and `rope_scaling`, or `rope_parameters` since transformers 5."""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mtp_dist.config import ModelConfig
from mtp_dist.config.rope import ORIGINAL_LENGTH, ROPE_KEYS, RopeKeys
from mtp_dist.errors import CheckpointError

KEYS: dict[str, RopeKeys] = {"default": RopeKeys()}
KEYS |= {kind: RopeKeys(("factor", *keys.required), keys.optional) for kind, keys in ROPE_KEYS.items()}
"""Keys of each supported rope type."""
KNOWN = {"rope_type", "type", "rope_theta", "partial_rotary_factor"}.union(*(sum(keys, ()) for keys in KEYS.values()))


def read_rope(values: Mapping[str, Any], source: Path, has_partial: bool = False) -> dict[str, Any]:
    """Return the rotary keys of the section `model`. Raise CheckpointError if mtp_dist does not support them.

    has_partial: whether models of the architecture may rotate a part of the channels.
    """
    # In the order in which transformers 5 looks them up.
    written = values.get("rope_scaling") or values.get("rope_parameters") or {}
    prefix = f"--from = '{source}' has rope_scaling = {written!r} in config.json: "
    if not isinstance(written, dict):
        raise CheckpointError(f"{prefix}it is not a JSON object")
    kind = str(written.get("rope_type", written.get("type", "default")))
    if kind not in KEYS:
        raise CheckpointError(f"{prefix}mtp_dist supports the rope types {', '.join(KEYS)}")
    if unknown := sorted(written.keys() - KNOWN):
        raise CheckpointError(f"{prefix}mtp_dist does not support {', '.join(unknown)}")
    rotary_percent = written.get("partial_rotary_factor", values.get("partial_rotary_factor"))
    if not has_partial and rotary_percent not in (None, 1):
        raise CheckpointError(f"{prefix}rotary embeddings of a part of the channels are not supported")
    required, optional = KEYS[kind]
    known = {ORIGINAL_LENGTH: values["max_position_embeddings"]}
    known |= {key: value for key, value in written.items() if value is not None or key not in optional}
    if values["original_max_position_embeddings"] is not None:  # transformers 5 prefers it to the scaling's own
        known[ORIGINAL_LENGTH] = values["original_max_position_embeddings"]
    if kind == "dynamic":  # for which transformers reads no other length
        known[ORIGINAL_LENGTH] = values["max_position_embeddings"]
    if missing := [key for key in required if key not in known]:
        raise CheckpointError(f"{prefix}it lacks {', '.join(missing)}")
    known.setdefault("rope_theta", 10000.0 if values["rope_theta"] is None else values["rope_theta"])
    scaling = {key: known[key] for key in (*required, *optional) if key in known}
    for key, value in {"rope_theta": known["rope_theta"], **scaling}.items():
        if key == "truncate":
            if type(value) is not bool:
                raise CheckpointError(f"{prefix}{key} is neither true nor false")
        elif type(value) not in (int, float) or not 0 < value <= sys.float_info.max:
            raise CheckpointError(f"{prefix}{key} is not a positive number")
    if "attention_factor" in scaling or not scaling.keys() >= {"mscale", "mscale_all_dim"}:  # then they have no effect
        scaling = {key: value for key, value in scaling.items() if not key.startswith("mscale")}
    if rotary_percent is not None and (type(rotary_percent) not in (int, float) or not 0 < rotary_percent <= 1):
        raise CheckpointError(f"{prefix}partial_rotary_factor is not a number above 0 and up to 1")
    return {
        "rope_theta": float(known["rope_theta"]),
        "rope_scaling": {"rope_type": kind} | scaling if scaling else None,
        "rotary_percent": 1.0 if rotary_percent is None else float(rotary_percent),
    }


def write_rope(model: ModelConfig) -> dict[str, Any]:
    """Return the rotary keys of config.json, for transformers of any version."""
    scaling = model.rope_scaling.model_dump(exclude_none=True) if model.rope_scaling else {}
    length: dict[str, Any] = {ORIGINAL_LENGTH: scaling[ORIGINAL_LENGTH]} if ORIGINAL_LENGTH in scaling else {}
    if scaling.get("rope_type") == "dynamic":  # which transformers scales from max_position_embeddings on
        length = {"max_position_embeddings": scaling.pop(ORIGINAL_LENGTH)}
    partial = {} if model.rotary_percent == 1 else {"partial_rotary_factor": model.rotary_percent}
    return {
        "rope_theta": model.rope_theta,
        "rope_scaling": scaling or None,
        "rope_parameters": {"rope_type": "default"} | scaling | {"rope_theta": model.rope_theta} | partial,
        **length,  # llama.cpp's converter reads the original length here
    }
