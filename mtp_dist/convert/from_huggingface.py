"""Import of a model of transformers as a checkpoint at step 0 whose head 1 computes the same."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import yaml
from torch import Tensor

from mtp_dist.checkpoint.format import METADATA_FILE, CheckpointMetadata
from mtp_dist.checkpoint.manifest import ProgressCallback, record_of, write_manifest
from mtp_dist.checkpoint.writer import new_folder, report_progress, write_weights
from mtp_dist.config import Config
from mtp_dist.convert.head_layout import part_shapes
from mtp_dist.convert.huggingface_folder import HuggingFaceFolder
from mtp_dist.convert.import_config import ImportRequest, import_config
from mtp_dist.convert.new_heads import NewHeads
from mtp_dist.convert.plain_weights import fuse, plain_weights
from mtp_dist.convert.saved_heads import SavedHeads
from mtp_dist.convert.tokenizer_files import copy_tokenizer, find_tokenizer
from mtp_dist.model.parameters import parameter_shapes

RUN = "run.yaml"
"""The configuration next to the weights, to start a training with."""


@dataclass(frozen=True)
class Imported:
    """A checkpoint that was imported."""

    folder: Path
    config: Config
    unused: Sequence[str]
    """Names in the source that are not in the checkpoint, each with the reason."""

    def describe(self) -> str:
        """Return what was imported, what was left out, and how to train from it."""
        model, heads = self.config.model, self.config.heads
        lines = [f"{self.folder}: {model.trunk_layers} trunk layers, {heads.count} {heads.kind} heads, at step 0"]
        if self.unused:
            lines.append(f"Not used: {', '.join(self.unused)}")
        lines.append(
            f"Train from it: mtp-dist launch --config {self.folder / RUN} "
            f"checkpoint.initial_weights={self.folder} run.name=... train.steps=..."
        )
        return "\n".join(lines)


def import_model(request: ImportRequest, on_progress: ProgressCallback = lambda done, total: None) -> Imported:
    """Write the new checkpoint folder `request.target`.

    Head 1's own layers, if it has any, are the last layers of the source. `on_progress` counts weights. Raise
    CheckpointError if the folder has no model, or one that mtp_dist does not support, or if the target exists or cannot
    be written; ConfigError if the configuration does not fit the model.
    """
    source, saved = HuggingFaceFolder(request.source), SavedHeads(request.source)
    training = import_config(request, source, saved)
    config = training.without_adapters()
    saved.check_fits(config.heads)
    in_plain = plain_weights(config)
    source_shapes, shapes = part_shapes(config, plain_weights(config).items()), parameter_shapes(config)
    source.check_shapes(source_shapes)
    unused = [*source.unused(source_shapes.keys() | saved.model_parts), *sorted(saved.names - shapes.keys())]

    def from_source(name: str) -> Tensor:
        return fuse(name, [source.read(part).float() for part in in_plain[name]], config.model)

    new = NewHeads(config, request.copy_heads, from_source)

    def tensor(name: str) -> Tensor:
        if name in in_plain:
            return from_source(name)
        if name in saved.names:
            return saved.read(name, shapes[name]).float()
        return new.weight(name)

    with new_folder(request.target) as folder:
        tokenizer = find_tokenizer(request.source)
        if tokenizer and config.data.tokenizer == str(request.target):
            copy_tokenizer(tokenizer, folder)
        written = write_weights(
            folder, shapes, torch.float32, report_progress(map(tensor, shapes), len(shapes), on_progress)
        )
        CheckpointMetadata(0, 0, config).write(folder)
        write_manifest(folder, {name: record_of(folder / name) for name in (*written, METADATA_FILE)})
        values = training.model_dump(mode="json", exclude_defaults=True)
        (folder / RUN).write_text(yaml.safe_dump(values, sort_keys=False), encoding="utf-8")
    return Imported(request.target, config, unused)
