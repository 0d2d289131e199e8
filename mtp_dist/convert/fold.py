"""Moving the final norm's gain into the matrices behind it, for engines whose MTP layers read the normalized state."""

from collections.abc import Callable

import torch
from torch import Tensor

from mtp_dist.config import Config

ReadWeight = Callable[[str], Tensor]
"""Return the full weight of a global name."""


def fold_final_norm(config: Config, read: ReadWeight) -> tuple[Config, ReadWeight]:
    """Return a model that computes the same, whose final norm has gains of 1.

    An MTP layer of transformers gets the state after the final norm, which its own norm then normalizes again. That is
    the norm of the state before it, as in training, only if the final norm has no gain. Tied embeddings are untied.
    """
    model = config.model.model_copy(update={"tie_embeddings": False})
    gain = read("final_norm.weight")
    sources = {"token_order.weight": "token_order.weight"}
    sources["unembedding.weight"] = "embedding.weight" if config.model.tie_embeddings else "unembedding.weight"

    def read_folded(name: str) -> Tensor:
        if name == "final_norm.weight":
            return torch.ones_like(gain)
        return read(sources[name]) * gain if name in sources else read(name)

    return config.model_copy(update={"model": model}), read_folded
