"""Pretraining of language models that predict several future tokens at once.

The names for notebooks and scripts are imported at their first use: `from mtp_dist import Generator, Speculation`.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mtp_dist.config import load_config
    from mtp_dist.inference.generator import Generator
    from mtp_dist.inference.model import MTPForCausalLM
    from mtp_dist.inference.speculation import Speculation

    __version__: str | None

__all__ = ["Generator", "MTPForCausalLM", "Speculation", "__version__", "load_config"]

_MODULES = {
    "Generator": "mtp_dist.inference.generator",
    "MTPForCausalLM": "mtp_dist.inference.model",
    "Speculation": "mtp_dist.inference.speculation",
    "load_config": "mtp_dist.config",
}


def __getattr__(name: str) -> object:
    if name == "__version__":
        return import_module("mtp_dist.versions").installed_versions()["mtp-dist"]
    if name not in _MODULES:
        raise AttributeError(f"module 'mtp_dist' has no attribute '{name}'")
    return getattr(import_module(_MODULES[name]), name)
