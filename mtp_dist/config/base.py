"""What every section of a configuration is."""

from pydantic import BaseModel, ConfigDict


class ConfigError(ValueError):
    """A mistake of the user; its message is one sentence that names the key and what to do."""


class Section(BaseModel):
    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )
