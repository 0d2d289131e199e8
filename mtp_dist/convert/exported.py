"""The weights of an exported folder under their global names."""

from collections.abc import Iterator
from pathlib import Path

from torch import Tensor

from mtp_dist.config import Config
from mtp_dist.convert.llama import fuse, llama_shapes, llama_weights
from mtp_dist.convert.saved_heads import HEADS, HEADS_CONFIG, SavedHeads
from mtp_dist.convert.weight_folder import WeightFolder
from mtp_dist.errors import CheckpointError
from mtp_dist.model.parameters import parameter_shapes


def exported_weights(folder: Path, option: str = "--model") -> tuple[Config, Iterator[tuple[str, Tensor]]]:
    """Return the configuration of an export and an iterator over all full weights by global name.

    The weights have the precision of the files and are read one by one. option: the one that names the folder, for
    messages. Raise CheckpointError if the folder is not an export of mtp-dist, lacks a weight or is corrupt; the
    iterator raises it if a file's data is.
    """
    saved = SavedHeads(folder, option)
    if saved.config is None:
        raise CheckpointError(f"{option} = '{folder}' is not an export of mtp-dist: it has no {HEADS_CONFIG}")
    config, llama = saved.config, WeightFolder(folder, option)
    in_llama, shapes = llama_weights(config), parameter_shapes(config)
    llama.check_shapes(llama_shapes(config))
    if missing := [name for name in shapes if name not in in_llama and name not in saved.names]:
        raise CheckpointError(f"{option} = '{folder}' is incomplete: {missing[0]} is not in {HEADS}")

    def weights() -> Iterator[tuple[str, Tensor]]:
        for name, shape in shapes.items():
            if name in in_llama:
                yield name, fuse(name, [llama.read(part) for part in in_llama[name]], config.model)
            else:
                yield name, saved.read(name, shape)

    return config, weights()
