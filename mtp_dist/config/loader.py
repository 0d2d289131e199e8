"""Reads a YAML file and `section.key=value` overrides into a checked configuration. Errors have one line per key."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import pydantic
import yaml

from mtp_dist.config.messages import describe_errors
from mtp_dist.config.schema import Config
from mtp_dist.config.synthetic import SyntheticConfig
from mtp_dist.config.validation import incompatible_settings
from mtp_dist.errors import ConfigError


class _YamlLoader(yaml.SafeLoader):
    """A loader of YAML 1.2 scalars: 1e-4 is a number, 010 is ten, 1:30 and no are text. A repeated key is an error.

    PyYAML implements YAML 1.1, which requires 1.0e-4 and reads the others as 8, 90 and false.
    """

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012, as PyYAML declares it

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: list[Any] = []
        for key, _ in node.value:
            if key.value in seen and key.tag != "tag:yaml.org,2002:merge":
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key '{key.value}' is given twice", key.start_mark
                )
            seen.append(key.value)
        return super().construct_mapping(node, deep)

    def construct_integer(self, node: yaml.ScalarNode) -> int:
        digits = str(self.construct_scalar(node)).replace("_", "")
        return int(digits, 0 if digits.lstrip("+-")[:2] in ("0x", "0o") else 10)


_YamlLoader.add_constructor("tag:yaml.org,2002:int", _YamlLoader.construct_integer)
for _tag, _pattern, _first in (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("int", r"[-+]?[0-9][0-9_]*|[-+]?0x[0-9a-fA-F_]+|[-+]?0o[0-7_]+", "-+0123456789"),
    (
        "float",
        r"[-+]?([0-9][0-9_]*\.[0-9_]*|\.[0-9][0-9_]*|[0-9][0-9_]*(?=[eE]))([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)"
        r"|\.(nan|NaN|NAN)",
        "-+0123456789.",
    ),
    ("merge", r"<<", "<"),
):
    _YamlLoader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(rf"^(?:{_pattern})$"), list(_first))


def _read_yaml(text: str, origin: str) -> Any:
    try:
        return yaml.load(text, _YamlLoader)  # noqa: S506, a subclass of SafeLoader
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(f"{origin} is not valid YAML: {' '.join(str(error).split())}") from None
    except (KeyError, TypeError, AttributeError, IndexError):  # PyYAML's own constructors: `!!bool x`, `!!int ''`
        raise ConfigError(f"{origin} is not valid YAML: a tag such as !!int has a value of another type") from None


def _read_number(text: str) -> Any:
    """Return the number or boolean of a YAML scalar; other text unchanged, which the key's type rejects."""
    loader = _YamlLoader("")
    try:
        tag = loader.resolve(yaml.ScalarNode, text, (True, False))  # type: ignore[no-untyped-call]
        return loader.construct_object(yaml.ScalarNode(tag, text))
    except ValueError:
        return text
    finally:
        loader.dispose()


def typed_config(values: Mapping[str, Any]) -> Config:
    """Return a configuration with values of valid types, which may be incompatible with each other.

    Raise ConfigError with one line per invalid value.
    """
    try:
        return Config.model_validate(values)
    except pydantic.ValidationError as error:
        raise ConfigError("\n".join(describe_errors(error, Config))) from None


def synthetic_options(values: Mapping[str, Any], key: str = "") -> SyntheticConfig:
    """Return the parameters of a synthetic task. Raise ConfigError with one line per error.

    key: start of their names in errors.
    """
    try:
        return SyntheticConfig.model_validate(values)
    except pydantic.ValidationError as error:
        raise ConfigError("\n".join(key + message for message in describe_errors(error, SyntheticConfig))) from None


def read_options(options: Sequence[str]) -> dict[str, Any]:
    """Return the numbers given as `key=value`. Raise ConfigError if one has another form."""
    values = {}
    for option in options:
        key, separator, value = option.partition("=")
        if not separator or not key:
            raise ConfigError(f"'{option}' is not of the form key=value")
        values[key] = _read_number(value)
    return values


def build_config(values: Mapping[str, Any]) -> Config:
    """Return the checked configuration of nested mappings. Raise ConfigError with one line per error."""
    config = typed_config(values)
    if wrong := list(incompatible_settings(config)):
        raise ConfigError("\n".join(wrong))
    return config


def _value_types(annotation: Any) -> set[Any]:
    """Return the types that a value may have."""
    if get_origin(annotation) in (Union, UnionType):
        return set().union(*map(_value_types, get_args(annotation)))
    if get_origin(annotation) is Annotated:
        return _value_types(get_args(annotation)[0])
    return {annotation}


def _key_types(key: Sequence[str]) -> set[Any]:
    """Return the types that a key's value may have; none if the key is not known."""
    types: set[Any] = {Config}
    for name in key:
        fields = [kind.model_fields[name] for kind in types if name in getattr(kind, "model_fields", {})]
        types = set().union(*(_value_types(field.annotation) for field in fields))
    return types


def _override_value(key: Sequence[str], text: str, override: str) -> Any:
    """Return the value of an override: for a text key everything after "=", for a number or boolean one scalar, for
    other keys any YAML."""
    types = _key_types(key)
    given = types - {NoneType}
    if given and all(kind is str or get_origin(kind) is Literal for kind in given):
        return None if text == "null" and NoneType in types else text
    if given and given <= {int, float, bool}:
        return _read_number(text)
    return _read_yaml(text, f"the value of the override '{override}'")


def _subsection(section: Any, name: str) -> Any:
    """Return the mapping of that name in a section, created if absent or empty; None if the section is not one."""
    if not isinstance(section, dict):
        return None
    if section.get(name) is None:
        section[name] = {}
    return section[name]


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML file and apply overrides such as `train.steps=100`, whose lists and mappings are YAML too.

    Raise ConfigError, naming the key, its value and the allowed ones.
    """
    values = read_values(path)
    override_values(values, overrides)
    return build_config(values)


def read_values(path: str | Path) -> dict[str, Any]:
    """Return the unchecked sections of a YAML file. Raise ConfigError if it cannot be read or has no sections."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"cannot read the configuration {path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"the configuration {path} is not UTF-8 text: byte {error.start} is invalid") from None
    except ValueError as error:
        raise ConfigError(f"cannot read the configuration {path!r}: {error}") from None
    values = _read_yaml(text, str(path))
    if not isinstance(values, dict):
        raise ConfigError(f"{path} is not a mapping of sections such as `model:` and `train:`")
    return values


def override_values(values: dict[str, Any], overrides: Sequence[str]) -> None:
    """Set the keys of overrides such as `train.steps=100`. Raise ConfigError if one has another form."""
    for override in overrides:
        key, separator, value = override.partition("=")
        parts = key.split(".")
        if not separator or not all(parts) or len(parts) < 2:
            raise ConfigError(f"the override '{override}' is not of the form section.key=value")
        section: Any = values
        for part in parts[:-1]:
            section = _subsection(section, part)
        if not isinstance(section, dict):
            raise ConfigError(f"in '{override}' {'.'.join(parts[:-1])} has no keys of its own: set the whole key")
        section[parts[-1]] = _override_value(parts, value, override)
