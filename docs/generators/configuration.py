"""The page configuration.md, from the configuration's JSON schema."""

import json
from collections.abc import Iterator
from typing import Any

from generators.common import table

from mtp_dist.config import Config
from mtp_dist.config.base import MAX_INTEGER

NAMES_OF_TYPES = {"boolean": "true / false", "string": "text", "object": "mapping"}
BOUNDS = {"exclusiveMinimum": ">", "minimum": ">=", "exclusiveMaximum": "<", "maximum": "<="}
SCHEMA = Config.model_json_schema()
CLASSES = SCHEMA["$defs"]


def describe_type(schema: dict[str, Any]) -> str:
    """Return the values that a JSON schema allows, as a user writes them."""
    if "$ref" in schema:
        name = schema["$ref"].rpartition("/")[2]
        return "source" if name == "SourceConfig" else "keys below"
    if "anyOf" in schema:
        return " / ".join(describe_type(kind) for kind in schema["anyOf"] if kind.get("type") != "null")
    if "enum" in schema or "const" in schema:
        return " / ".join(f"`{value}`" for value in schema.get("enum") or [schema["const"]])
    if "prefixItems" in schema:
        return f"[{', '.join(map(describe_type, schema['prefixItems']))}]"
    if schema["type"] == "array":
        items = describe_type(schema["items"])
        return "list of sources" if items == "source" else f"list of {items}"
    bounds = [
        f"{sign} {schema[name]:,}" for name, sign in BOUNDS.items() if schema.get(name, MAX_INTEGER) < MAX_INTEGER
    ]
    return " ".join([NAMES_OF_TYPES.get(schema["type"], schema["type"]), *[", ".join(bounds)] * bool(bounds)])


def field_rows(section: dict[str, Any]) -> Iterator[list[str]]:
    """Yield a table's row per key of a section."""
    for key, schema in section["properties"].items():
        default = schema.get("default")
        shown = default if isinstance(default, str) else json.dumps(default)
        default = f"`{shown}`" if "default" in schema else "**required**"
        yield [f"`{key}`", describe_type(schema), default, " ".join(schema["description"].split())]


def page() -> str:
    header = ["key", "value", "default", "meaning"]
    parts = [
        "# Configuration\n",
        "Look up every key. A run is one YAML file, such as [configs/demo.yaml](../configs/demo.yaml), and any number "
        "of overrides on the command line:\n",
        "    mtp-dist launch --config configs/demo.yaml train.steps=50 parallel.pipeline=1\n",
        "An invalid key or value, such as `train.step=50`, ends the program with one message and exit status 2 before "
        "any rank does work:\n",
        "    error: train.step is not a known key: did you mean train.steps?\n",
        "This page is generated from the JSON schema of [config/](../mtp_dist/config) by `python docs/generate.py`.\n",
    ]
    for name, schema in SCHEMA["properties"].items():
        if "$ref" in schema:
            parts += [f"## {name}\n", table(header, field_rows(CLASSES[schema["$ref"].rpartition("/")[2]]))]
        else:
            parts += [f"## {name}\n", f"{schema['description']}\n"]
        if name == "model":
            rows = field_rows(CLASSES["RopeScalingConfig"])
            parts += ["`rope_scaling`, by the names of Hugging Face:\n", table(header, rows)]
        if name == "data":
            parts += ["A source:\n", table(header, field_rows(CLASSES["SourceConfig"]))]
            rows = field_rows(CLASSES["SyntheticConfig"])
            parts += ["`options` of a [synthetic task](synthetic.md):\n", table(header, rows)]
    return "\n".join(parts)
