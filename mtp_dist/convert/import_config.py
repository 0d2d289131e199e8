"""The configuration of an imported model."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mtp_dist.config import Config, build_config, override_values, read_values
from mtp_dist.convert.huggingface_folder import HuggingFaceFolder
from mtp_dist.convert.plain_weights import layers_after_trunk
from mtp_dist.convert.saved_heads import SavedHeads
from mtp_dist.convert.tokenizer_files import find_tokenizer
from mtp_dist.data.build_tokenizer import build_tokenizer
from mtp_dist.data.tokenizer import ByteTokenizer
from mtp_dist.errors import CheckpointError, ConfigError


@dataclass(frozen=True)
class ImportRequest:
    """The options of `mtp-dist import`."""

    source: Path
    target: Path
    config: str | None = None
    """Path of a YAML file."""
    overrides: Sequence[str] = ()
    heads: int | None = None
    """Number of heads, instead of `heads.count`."""
    copy_heads: bool = False


def import_config(request: ImportRequest, source: HuggingFaceFolder, saved: SavedHeads) -> Config:
    """Return the user's configuration, or that of the export, with the model of the source.

    Raise ConfigError if these disagree. By default the sections on training have only the keys that a Config requires:
    the training will set them.
    """
    values = _start(request, source, saved)
    override_values(values, request.overrides)
    for name in ("model", "heads", "data"):
        values[name] = values.get(name) or {}
    if request.heads:
        values["heads"]["count"] = request.heads
    _set_tokenizer(values["data"], request, source, saved)
    requested, num_layers = values["model"], source.config.num_hidden_layers
    # The heads' section gives the number of head 1's layers, which the layout depends on: check it first.
    values["model"] = requested | source.model | {"trunk_layers": num_layers}
    heads = build_config({name: section for name, section in values.items() if name != "parallel"}).heads
    layers = num_layers - len(layers_after_trunk(heads))
    if layers < 1:
        raise CheckpointError(
            f"--from = '{request.source}' has {num_layers} layers, of which head 1 of kind '{heads.kind}' needs "
            f"{num_layers - layers} after the trunk: use another heads.kind or fewer layers"
        )
    model = source.model | {"trunk_layers": layers}
    for key, value in requested.items():
        if value != model.get(key, value):
            raise ConfigError(f"model.{key} = {value!r} is {model[key]!r} in --from = '{request.source}': leave it out")
    values["model"] = requested | model
    return build_config(values)


def _start(request: ImportRequest, source: HuggingFaceFolder, saved: SavedHeads) -> dict[str, Any]:
    if request.config:
        return read_values(request.config)
    if saved.config:
        values = saved.config.model_dump(mode="json")
        values["model"] = {"init_std": saved.config.model.init_std}
        del values["data"]["tokenizer"]  # its path may exist on another machine only
        return values
    length = source.config.max_position_embeddings
    train = {"steps": 1, "global_batch_size": 1, "micro_batch_size": 1, "sequence_length": length}
    return {"data": {"train": [{"path": "python-stdlib"}]}, "train": train}


def _set_tokenizer(data: dict[str, Any], request: ImportRequest, source: HuggingFaceFolder, saved: SavedHeads) -> None:
    """Set the tokenizer that the user names, or else the folder's, which is copied into the new folder."""
    folder, name = request.source, data.get("tokenizer")
    if name is None and saved.config and saved.config.data.tokenizer == ByteTokenizer.name:
        name = ByteTokenizer.name
    if name is None and find_tokenizer(folder) is None:
        raise CheckpointError(
            f"--from = '{folder}' has no tokenizer: name the one it was trained with as data.tokenizer="
        )
    needed = build_tokenizer(name or str(folder)).vocab_size
    if needed > source.config.vocab_size:
        raise ConfigError(
            f"--from = '{folder}' has a vocabulary of {source.config.vocab_size} tokens, data.tokenizer = "
            f"'{name or folder}' one of {needed}: name the tokenizer that the model was trained with"
        )
    data["tokenizer"] = name or str(request.target)
