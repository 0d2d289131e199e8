"""The architectures by name, and the one that a model is exported as."""

from mtp_dist.config import ModelConfig
from mtp_dist.convert.architectures.base import Architecture
from mtp_dist.convert.architectures.llama import LLAMA
from mtp_dist.convert.architectures.mistral import MISTRAL

ARCHITECTURES = {architecture.name: architecture for architecture in (LLAMA, MISTRAL)}


def architecture_of(model: ModelConfig) -> Architecture:
    """Return the architecture that a model is exported as."""
    return LLAMA
