"""The models that are measured, and their prompts."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedModel
from transformers.modeling_layers import MtpModel

from mtp_dist.bench.decode.generated import cycle_tokens, generated_weights
from mtp_dist.bench.decode.settings import DTYPES, GeneratedModel, Settings, check_memory
from mtp_dist.config import Config
from mtp_dist.convert.architectures.llama import LLAMA
from mtp_dist.convert.architectures.registry import architecture_of
from mtp_dist.convert.saved_heads import HEADS_CONFIG
from mtp_dist.convert.to_huggingface import export_checkpoint, plain_config
from mtp_dist.data.sources.python_stdlib import stdlib_files
from mtp_dist.data.tokenizer import Tokenizer
from mtp_dist.errors import LaunchError
from mtp_dist.inference.configuration import generation_model_config
from mtp_dist.inference.generator import Generator
from mtp_dist.inference.loading import model_weights
from mtp_dist.inference.model import MTPForCausalLM
from mtp_dist.inference.packing import PackedLinear, can_pack, pack_linear_layers


@dataclass(frozen=True)
class Subject:
    """A model and what it continues."""

    model: MTPForCausalLM
    llama: LlamaForCausalLM | None
    """Trunk and head 1 as transformers' own class; None if no Llama computes them."""
    config: Config
    prompts: Callable[[int], Tensor]
    """Function that returns that many prompts `[B, P]`."""
    source: str
    """The name of a trained model's folder; `generated` for others."""
    exported: "ExportedModel | None" = None
    """A checkpoint as transformers opens its export that drafts."""


@dataclass(frozen=True)
class ExportedModel:
    """A model that drafts in transformers, with the code of its export."""

    model: Any
    mtp: MtpModel | None
    """The heads that `use_mtp` drafts with; None if the export's own code drafts."""
    folder: "TemporaryDirectory[str]"
    """The export, which exists as long as this object: its code reads the heads when it drafts first."""

    @classmethod
    def of_checkpoint(cls, checkpoint: Path, settings: Settings) -> "ExportedModel":
        temporary = TemporaryDirectory()
        folder = Path(temporary.name, "export")
        exported = export_checkpoint(checkpoint, folder, settings.dtype, engine="transformers")
        uses_mtp = "use_mtp" in (exported.drafts_with or "")
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=DTYPES[settings.dtype], trust_remote_code=True)
        _prepare(model, settings)
        return cls(model, MtpModel.from_pretrained(model) if uses_mtp else None, temporary)

    def generate(self, prompts: Tensor, **options: Any) -> Tensor:
        """Generate with drafts; use_mtp loads the heads at each call, which is not the time to measure."""
        with patch.object(MtpModel, "from_pretrained", return_value=self.mtp):
            result: Tensor = self.model.generate(prompts, **options, **{"use_mtp": True} if self.mtp else {})
        return result


def generated_subject(wanted: GeneratedModel, settings: Settings) -> Subject:
    """Make a model and its prompts. Raise LaunchError if they do not fit in the device's memory."""
    config = wanted.config(settings.positions + wanted.heads)
    check_memory(config, settings)
    weights = dict(model_weights(config, generated_weights(config, wanted.acceptance).items()))
    model: MTPForCausalLM = MTPForCausalLM.from_pretrained(
        None, config=generation_model_config(config, 0, "fp32"), state_dict=weights
    )
    _prepare(model, settings)
    if can_pack(model.lm_head.weight):
        pack_linear_layers(model)
    text = cycle_tokens(config)

    def prompts(count: int) -> Tensor:
        starts = torch.arange(count) * len(text) // count
        return text[(starts[:, None] + torch.arange(settings.prompt_tokens)) % len(text)]

    return Subject(model, _llama(model, config, settings), config, prompts, "generated")


def trained_subject(folder: Path, settings: Settings) -> Subject:
    """Open a checkpoint or an export. Its prompts are from files of Python's standard library for validation.

    Raise CheckpointError if the folder has neither, LaunchError if the texts would exceed its positions.
    """
    options: dict[str, Any] = {"device_map": settings.device} if settings.device == "cuda" else {}
    generator = Generator.open(folder, DTYPES[settings.dtype], **options)
    model, tokenizer, config = generator.model, generator.tokenizer, generator.config
    if config.heads.count == 1:
        raise LaunchError(f"--model {folder} has one head, which drafts nothing: give a model with more heads")
    longest = config.train.sequence_length
    if settings.positions > longest:
        raise LaunchError(
            f"--prompt-tokens {settings.prompt_tokens} and --new-tokens {settings.new_tokens} exceed the {longest} "
            f"tokens of the texts that {folder} was trained on: lower one of them"
        )
    tokens = _validation_tokens(tokenizer)

    def prompts(count: int) -> Tensor:
        starts = torch.arange(count) * (len(tokens) - settings.prompt_tokens) // count
        return tokens[starts[:, None] + torch.arange(settings.prompt_tokens)]

    _prepare(model, settings)
    is_export = (folder / HEADS_CONFIG).exists()
    exported = None if is_export else ExportedModel.of_checkpoint(folder, settings)
    return Subject(model, _llama(model, config, settings), config, prompts, folder.name, exported)


def _llama(model: MTPForCausalLM, config: Config, settings: Settings) -> LlamaForCausalLM | None:
    """Return trunk and head 1 as the plain export has them; None if no Llama computes them."""
    if not config.heads.traits.exportable or architecture_of(config.model) is not LLAMA:
        return None
    weights = {name: weight for name, weight in model.state_dict().items() if not name.startswith("draft_")}
    for name, module in model.named_modules():
        if isinstance(module, PackedLinear) and not name.startswith("draft_"):
            weights[f"{name}.weight"] = module.packed.to_dense()
    llama: LlamaForCausalLM = LlamaForCausalLM.from_pretrained(
        None, config=LlamaConfig(**plain_config(config, 0, settings.dtype)), state_dict=weights
    )
    _prepare(llama, settings)
    return llama


def _validation_tokens(tokenizer: Tokenizer) -> Tensor:
    texts = (path.read_text(encoding="utf-8", errors="replace") for path in stdlib_files("validation"))
    return torch.cat([torch.as_tensor(tokenizer.encode(text)).long() for text in texts])


def _prepare(model: PreTrainedModel, settings: Settings) -> None:
    # Without an end of the text all decode the same number of tokens.
    model.generation_config = GenerationConfig(pad_token_id=0)
    nn.Module.to(model, settings.device, DTYPES[settings.dtype])
