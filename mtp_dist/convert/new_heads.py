"""Initial values of the heads' weights that an imported model does not have."""

import re
from collections.abc import Callable

import torch
from torch import Tensor

from mtp_dist.config import Config
from mtp_dist.convert.plain_weights import plain_layers, plain_weights
from mtp_dist.errors import ConfigError
from mtp_dist.model.parameters import initial_weight, parameter_shapes

_IN_A_LAYER = re.compile(r"heads\.\w+\.(?:layers\.)?(\d+)\.(.+)")


class NewHeads:
    """The weights of new heads by global name: initial values, or copies of head 1's weights."""

    def __init__(self, config: Config, copy: bool, read: Callable[[str], Tensor]) -> None:
        """Raise ConfigError if there is nothing to copy. read: returns a weight of trunk or head 1."""
        self.config, self.copy, self.read = config, copy, read
        self.shapes = parameter_shapes(config)
        new = self.shapes.keys() - plain_weights(config).keys()
        if copy and not any(self._copied_weight(name) for name in new):
            raise ConfigError(
                f"--copy-heads has nothing to copy: heads.kind = '{config.heads.kind}' with heads.count = "
                f"{config.heads.count} has no head with layers that the model has: leave it out"
            )

    def weight(self, name: str) -> Tensor:
        if name == "heads.1.linear.weight":  # head 1 must compute what the imported model computes
            return torch.eye(self.config.model.hidden_size)
        if self.copy and (model := self._copied_weight(name)):
            return self.read(model)
        return initial_weight(self.config, name, self.shapes[name])

    def _copied_weight(self, name: str) -> str | None:
        """Return the weight that is copied to this one: of the last layers, which are head 1's if it has any."""
        if name.startswith("unembeddings."):
            return "unembeddings.1.weight"
        match = _IN_A_LAYER.fullmatch(name)
        if match is None:
            return None
        depth, part = int(match[1]), match[2]
        return f"{plain_layers(self.config)[depth - self.config.heads.layers_per_head]}.{part}"
