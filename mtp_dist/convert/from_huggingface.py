"""Import: a Llama becomes a checkpoint without a step, whose head 1 computes what the Llama computes."""

from pathlib import Path

import torch
import yaml
from torch import Tensor

from mtp_dist.checkpoint.files import DESCRIPTION, Description
from mtp_dist.checkpoint.manifest import record_of, write_manifest
from mtp_dist.config import Config, ConfigError
from mtp_dist.convert.files import Watch, new_folder, watched, write_weights
from mtp_dist.convert.import_config import ImportRequest, import_config
from mtp_dist.convert.llama import fuse, llama_shapes, llama_weights
from mtp_dist.convert.llama_folder import LlamaFolder
from mtp_dist.convert.new_heads import NewHeads
from mtp_dist.convert.saved_heads import SavedHeads
from mtp_dist.convert.tokenizer_files import copy_tokenizer, find_tokenizer
from mtp_dist.model.weights import parameter_shapes

RUN = "run.yaml"
"""The configuration beside the weights, to start a training with."""


def import_llama(request: ImportRequest, watch: Watch = lambda done, total: None) -> Config:
    """Write the new checkpoint folder `request.target`. Returns its configuration.

    Head 1's own layers, where it has any, are the last ones of the Llama. Raises ConfigError where the folder has no
    Llama, or one that is no model of ours, and where the new one exists or cannot be written.
    """
    llama, saved = LlamaFolder(request.source), SavedHeads(request.source)
    config = import_config(request, llama, saved)
    saved.check_fits(config.heads)
    in_llama = llama_weights(config)
    of_llama = llama_shapes(config, llama.vocab_size)
    llama.check_names(list(of_llama))
    shapes = parameter_shapes(config, llama.vocab_size)

    def checked(name: str, tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
        if tensor.shape != shape:
            raise ConfigError(
                f"--from = '{request.source}' has {name} as {list(tensor.shape)}, its config.json says {list(shape)}"
            )
        return tensor

    def from_llama(name: str) -> Tensor:
        theirs = [checked(part, llama.read(part), of_llama[part]) for part in in_llama[name]]
        return fuse(name, theirs, config.model)

    new = NewHeads(config, llama.vocab_size, request.copy_heads, from_llama)

    def tensor_of(name: str) -> Tensor:
        if name in in_llama:
            return from_llama(name)
        if name in saved.names:
            return checked(name, saved.read(name), shapes[name])
        return new.weight(name)

    with new_folder(request.target) as folder:
        tokenizer = find_tokenizer(request.source)
        if tokenizer and config.data.tokenizer == str(request.target):
            copy_tokenizer(tokenizer, folder)
        written = write_weights(folder, shapes, torch.float32, watched(map(tensor_of, shapes), len(shapes), watch))
        Description(0, llama.vocab_size, 0, config).write(folder)
        write_manifest(folder, {name: record_of(folder / name) for name in (*written, DESCRIPTION)})
        values = config.model_dump(mode="json", exclude_defaults=True)
        (folder / RUN).write_text(yaml.safe_dump(values, sort_keys=False), encoding="utf-8")
    return config


def describe(config: Config, folder: Path) -> str:
    """What was made, and how to train from it."""
    model, heads = config.model, config.heads
    return (
        f"{folder}: {model.trunk_layers} trunk layers, {heads.count} {heads.kind} heads, at step 0\n"
        f"Train from it: deepspeed launchers/pretrain.py --config {folder / RUN} checkpoint.resume={folder} "
        "run.name=... data.train=... train.steps=..."
    )
