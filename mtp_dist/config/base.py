"""What every section of a configuration is, and the types that several of them share."""

import os
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

MAX_INTEGER = 2**31 - 1
"""Largest count in a configuration. The product of two of them fits into the 64 bits of PyTorch and NumPy."""


class ConfigError(ValueError):
    """A mistake of the user; its message is one sentence that names the key and what to do."""


class Section(BaseModel):
    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


def expand_user(path: str) -> str:
    """Return the path with a leading `~` or `~user` replaced. Raise ValueError if there is no such user."""
    expanded = os.path.expanduser(path)
    if expanded.startswith("~"):
        raise ValueError("begins with the home folder of an unknown user")
    return expanded


PositiveInt = Annotated[int, Field(gt=0, le=MAX_INTEGER)]
NonNegativeInt = Annotated[int, Field(ge=0, le=MAX_INTEGER)]
Seconds = Annotated[float, Field(gt=0, le=MAX_INTEGER)]
PathText = Annotated[str, Field(min_length=1), AfterValidator(expand_user)]
"""A path in which `~` is the home folder of the user."""
