"""Messages for the errors that pydantic finds in a mapping of keys, with the nearest valid key of a misspelled one."""

import difflib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, get_args

import pydantic

MIN_NAME_SIMILARITY = 0.75
"""Smallest difflib ratio of a misspelling: `stps` and `steps` have 0.89, `grad_accum` and `grad_clip` 0.63."""

Model = type[pydantic.BaseModel]


def _models(annotation: Any) -> set[Model]:
    """Return the models anywhere in a type."""
    if isinstance(annotation, type) and issubclass(annotation, pydantic.BaseModel):
        return {annotation}
    return set[Model]().union(*map(_models, get_args(annotation)))


def _section_models(root: Model, section: Sequence[str]) -> set[Model]:
    """Return the models of a key's value; an item of a list or a mapping has those of the whole."""
    models = {root}
    for name in section:
        if fields := [model.model_fields[name] for model in models if name in model.model_fields]:
            models = set[Model]().union(*(_models(field.annotation) for field in fields))
    return models


def _nearest_key(root: Model, parts: Sequence[str]) -> str | None:
    """Return the known key with the most similar name, preferably of the same section; None if none is similar.

    Only names are compared: with the section, any two of its keys would be similar.
    """
    *section, name = parts
    own = [".".join([*section, key]) for model in _section_models(root, section) for key in model.model_fields]
    sections = root.model_fields if len(section) == 1 else ()
    others = [
        f"{other}.{key}" for other in sections for model in _section_models(root, [other]) for key in model.model_fields
    ]
    for candidates in (own, others):
        by_name = {key.rpartition(".")[2]: key for key in candidates}
        if close := difflib.get_close_matches(name, by_name, 1, MIN_NAME_SIMILARITY):
            return by_name[close[0]]
    return None


def describe_errors(error: pydantic.ValidationError, root: Model) -> Iterator[str]:
    """Yield one message per invalid key of a model; pydantic has one error per type that the key may have."""
    union_types, union_members = {"float", "int", "str"}, ("literal", "tuple", "constrained-", "bool", "dict[", "[key]")
    by_key: dict[str, list[Mapping[str, Any]]] = {}
    for each in error.errors():
        loc = map(str, each["loc"])
        parts = [part for part in loc if part not in union_types and not part.startswith(union_members)]
        by_key.setdefault(".".join(parts), []).append(each)
    for key, key_errors in by_key.items():
        # An invalid item of a list makes the list invalid too: report it once.
        if not any(other.startswith(f"{key}.") for other in by_key):
            yield _message(root, key, key_errors)


_MESSAGES = {
    "tuple_type": "should be a list",
    "model_type": "should have keys of its own",
    "dict_type": "should have keys of its own",
    "too_short": "is too short",
    "string_too_short": "is empty",
    "too_long": "is too long",
    "invalid_key": "should be text",
    "string_pattern_mismatch": "should be a plain name, without '/' and not starting with a dot",
}


def _message(root: Model, key: str, errors: Sequence[Mapping[str, Any]]) -> str:
    parts, error = key.split("."), errors[0]
    if error["type"] == "missing":
        return f"{key} is missing: give it a value"
    if error["type"] == "extra_forbidden":
        near = _nearest_key(root, parts)
        return f"{key} is not a known key" + (f": did you mean {near}?" if near else "")
    messages = (
        _MESSAGES.get(e["type"]) or e["msg"].removeprefix("Input ").removeprefix("Value error, ") for e in errors
    )
    return f"{key} = {error['input']!r} is invalid: it {', or it '.join(dict.fromkeys(messages))}"
