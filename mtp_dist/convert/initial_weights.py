"""The weights of another model that a new run starts from (`checkpoint.initial_weights`)."""

import json
import logging
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mtp_dist.checkpoint.find import find_named_checkpoint, warn_of_longer_samples
from mtp_dist.checkpoint.format import InvalidCheckpointError
from mtp_dist.checkpoint.manifest import check_quickly
from mtp_dist.checkpoint.merged import MergedWeights
from mtp_dist.checkpoint.reader import WeightReader
from mtp_dist.config import Config, ModelConfig
from mtp_dist.config.heads import weight_differences
from mtp_dist.convert.exported import ExportedWeights
from mtp_dist.convert.saved_heads import HEADS_CONFIG
from mtp_dist.data.build_tokenizer import build_tokenizer
from mtp_dist.data.tokenizer import ByteTokenizer, Tokenizer
from mtp_dist.errors import ConfigError, UserError
from mtp_dist.model.parameters import LORA_A, LORA_B, parameter_shapes

KEY = "checkpoint.initial_weights"

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class InitialWeights:
    """A checkpoint or an export whose weights fit the model of a run."""

    folder: Path
    is_export: bool
    loaded: int
    """Number of weights that the model takes from it."""
    unused: tuple[str, ...]
    """Names of its weights that the model does not have."""
    new: tuple[str, ...]
    """Global names of the model's weights that it does not have."""

    def open(self) -> WeightReader:
        """Open its files. Raise CheckpointError if one is corrupt."""
        return ExportedWeights(self.folder, KEY) if self.is_export else MergedWeights(self.folder)

    def describe(self) -> str:
        """Return what is loaded, what is left out and what is initialized."""
        lines = [f"{self.loaded} weights loaded from {self.folder}"]
        if self.unused:
            lines.append(f"Not used: {_grouped(self.unused)}")
        if self.new:
            lines.append(f"Initialized: {_grouped(self.new)}")
        return "\n".join(lines)


def find_initial_weights(config: Config, tokenizer: Tokenizer) -> InitialWeights:
    """Return what `checkpoint.initial_weights` names: an export, or the newest valid checkpoint. Read no weights.

    tokenizer: that of the run. Raise CheckpointError if there is neither, ConfigError if the model of the run differs.
    """
    path = Path(str(config.checkpoint.initial_weights))
    is_export = (path / HEADS_CONFIG).exists()
    folder = path if is_export else find_named_checkpoint(path, f"{KEY} = '{path}'", check_quickly)
    if is_export:
        export = ExportedWeights(folder, KEY)
        saved, shapes, unknown = export.config, export.shapes(), export.unknown
    else:
        checkpoint = MergedWeights(folder)
        saved, shapes, unknown = checkpoint.config, checkpoint.shapes(), []
        if shapes.items() - parameter_shapes(saved).items():
            raise InvalidCheckpointError(folder, "its weights are not those of its configuration")
    if problems := [*_differences(saved, config, folder), *_tokenizer_problems(saved, folder, is_export, tokenizer)]:
        raise ConfigError("\n".join(problems))
    warn_of_longer_samples(saved, config, folder)
    wanted = parameter_shapes(config)
    return InitialWeights(
        folder=folder,
        is_export=is_export,
        loaded=len(wanted.keys() & shapes.keys()),
        unused=(*(name for name in shapes if name not in wanted), *unknown),
        new=tuple(name for name in wanted if name not in shapes),
    )


def _model_keys(model: ModelConfig) -> dict[str, Any]:
    """Return the keys that define what the weights of a model compute, with their defaults filled in."""
    keys = model.model_dump(mode="json", exclude={"init_std", "vocab_size"})
    derived: dict[str, Any] = {
        "num_query_groups": model.query_groups,
        "ffn_hidden_size": model.ffn_size,
        "qkv_bias": model.has_qkv_bias,
    }
    if model.attention_size == model.hidden_size:
        derived["kv_channels"] = None
    return keys | derived


def _differences(saved: Config, wanted: Config, folder: Path) -> Iterator[str]:
    """Yield a message for each key that keeps the model of a run from having these weights."""
    before = _model_keys(saved.model)
    differences = [
        (f"model.{key}", before[key], value) for key, value in _model_keys(wanted.model).items() if value != before[key]
    ]
    for key, *values in weight_differences(saved.heads, wanted.heads, saved.model.hidden_size):
        differences.append((f"heads.{key}", *values))
    for key, trained, value in differences:
        yield (
            f"{key} is {_shown(value)}, {KEY} = '{folder}' was trained with {_shown(trained)}: set "
            f"{key}={_shown(trained)}"
        )
    if wanted.vocab_size != saved.vocab_size:
        yield (
            f"model.vocab_size is {wanted.vocab_size}, {KEY} = '{folder}' has {saved.vocab_size} tokens: use its "
            f"data.tokenizer, '{saved.data.tokenizer}', and set model.vocab_size={saved.vocab_size}"
        )
    before_count, count = saved.heads.count, wanted.heads.count
    common = min(before_count, count)
    trained, distances = saved.heads.distances[:common], wanted.heads.distances[:common]
    if distances != trained:
        yield (
            f"heads.prediction_distances begins with {list(distances)}, {KEY} = '{folder}' was trained with "
            f"{list(trained)}: give its heads the same distances"
        )
    if saved.heads.traits.reads == "next head" and count != before_count:
        yield (
            f"heads.count is {count}, {KEY} = '{folder}' was trained with {before_count}: head 1 of kind "
            f"'{saved.heads.kind}' runs through all others, so their number cannot change: set "
            f"heads.count={before_count}"
        )


def _tokenizer_problems(saved: Config, folder: Path, is_export: bool, tokenizer: Tokenizer) -> Iterator[str]:
    """Yield a message if the run's tokenizer gives other ids than the one that the model was trained with."""
    name = saved.data.tokenizer
    if is_export and name != ByteTokenizer.name:
        name = str(folder)
    try:
        trained_with = [build_tokenizer(each, KEY) for each in _tokenizer_names(name)]
    except UserError:
        logger.warning(
            "%s = '%s' was trained with the tokenizer '%s', which is not here: data.tokenizer is not compared with it",
            KEY,
            folder,
            name,
        )
        return
    if all(each.fingerprint != tokenizer.fingerprint for each in trained_with):
        yield (
            f"data.tokenizer is '{tokenizer.name}', {KEY} = '{folder}' was trained with '{name}': set "
            f"data.tokenizer={name}"
        )


def _tokenizer_names(name: str) -> list[str]:
    """Return the names of a tokenizer: in a folder, SentencePiece's own file has another fingerprint than its copy."""
    if not Path(name).is_dir():
        return [name]
    from mtp_dist.data.text_tokenizers import TOKENIZER_FILES  # its libraries take seconds to import

    files = [path for file in TOKENIZER_FILES if (path := Path(name, file)).exists()]
    return [str(path) for path in files] or [name]


def _shown(value: object) -> str:
    """Return a value as in an override."""
    return value if isinstance(value, str) else json.dumps(value)


def _grouped(names: Iterable[str]) -> str:
    """Return the names, those of one head together with their number, and those of all low-rank adapters."""
    groups = Counter(map(_group, names))
    return ", ".join(f"{name} ({number} weights)" if number > 1 else name for name, number in groups.items())


def _group(name: str) -> str:
    if name.endswith((LORA_A, LORA_B)):
        return "low-rank adapters"
    return ".".join(name.split(".")[:2]) if name.startswith(("heads.", "unembeddings.")) else name
