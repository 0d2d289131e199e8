"""The base class of the sections of a configuration, and types that several of them share."""

import os
from collections.abc import Iterator
from typing import Annotated, Literal, NamedTuple

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, NonNegativeFloat

MAX_INTEGER = 2**31 - 1
"""Largest count in a configuration. The product of two of them fits into the 64 bits of PyTorch and NumPy."""

MAX_NAME_BYTES, MAX_PATH_BYTES = 255, 4095
"""Limits of Linux for one name in a path and for the full path."""


DeviceType = Literal["cpu", "cuda"]
"""A device's type as PyTorch names it."""


class DeviceMemory(NamedTuple):
    """The memory of one rank's device."""

    device: DeviceType
    bytes: float


class Section(BaseModel):
    """A part of a configuration: frozen, strictly typed and without unknown keys."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


def messages_if(*rules: tuple[object, str]) -> Iterator[str]:
    """Return the messages of the rules (condition, message) whose condition is true."""
    return (message for condition, message in rules if condition)


def expand_path(path: str) -> str:
    """Return the path with a leading `~` or `~user` replaced. Raise ValueError if no file can have such a path."""
    expanded = os.path.expanduser(path)
    if expanded.startswith("~"):
        raise ValueError("begins with the home folder of an unknown user")
    try:
        encoded = os.fsencode(expanded)
    except UnicodeEncodeError:
        raise ValueError("is not valid text") from None
    if b"\0" in encoded:
        raise ValueError("contains a null character")
    if len(encoded) > MAX_PATH_BYTES or max(map(len, encoded.split(b"/"))) > MAX_NAME_BYTES:
        raise ValueError(f"is too long: {MAX_NAME_BYTES} bytes per name and {MAX_PATH_BYTES} in all are the limits")
    return expanded


PositiveInt = Annotated[int, Field(gt=0, le=MAX_INTEGER)]
NonNegativeInt = Annotated[int, Field(ge=0, le=MAX_INTEGER)]
Seconds = Annotated[float, Field(gt=0, le=MAX_INTEGER)]
PathText = Annotated[str, Field(min_length=1), AfterValidator(expand_path)]
"""A path in which `~` is expanded to the user's home folder."""
StepValue = Annotated[tuple[PositiveInt, NonNegativeFloat], Field(strict=False)]
"""A step, and the value from that step on."""
StepValues = Annotated[tuple[StepValue, ...], Field(strict=False, min_length=1)]
"""Values of all steps, which increase from 1."""


def value_at_step(values: float | StepValues, step: int) -> float:
    """Return the number itself, or the value of the last pair that has begun."""
    if not isinstance(values, tuple):
        return values
    return [value for first, value in values if first <= step][-1]


def invalid_steps(key: str, values: object) -> Iterator[str]:
    """Yield a message if the values of a key are StepValues whose steps do not increase from 1."""
    if isinstance(values, tuple):
        starts = [step for step, _ in values]
        if starts[0] != 1 or sorted(set(starts)) != starts:
            yield f"{key} has the steps {starts}: they must begin with 1 and increase"
