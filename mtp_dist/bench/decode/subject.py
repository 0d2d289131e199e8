"""The models that are measured, and their prompts."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from mtp_dist.bench.decode.generated import cycle_tokens, generated_weights
from mtp_dist.bench.decode.settings import DTYPES, GeneratedModel, Settings
from mtp_dist.config import Config
from mtp_dist.convert.saved_heads import HEADS_CONFIG
from mtp_dist.convert.to_huggingface import export_checkpoint, llama_config
from mtp_dist.data.sources.python_stdlib import stdlib_files
from mtp_dist.data.tokenizer import Tokenizer
from mtp_dist.errors import LaunchError
from mtp_dist.inference.configuration import generation_model_config
from mtp_dist.inference.loading import model_weights, open_model
from mtp_dist.inference.model import MTPForCausalLM
from mtp_dist.inference.packing import can_pack, pack_linear_layers


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


def generated_subject(wanted: GeneratedModel, settings: Settings) -> Subject:
    config = wanted.config(settings.positions + wanted.heads)
    weights = dict(model_weights(config, generated_weights(config, wanted.acceptance).items()))
    in_llama = {name: weight for name, weight in weights.items() if not name.startswith("draft_")}
    model: MTPForCausalLM = MTPForCausalLM.from_pretrained(
        None, config=generation_model_config(config, 0, "fp32"), state_dict=weights
    )
    llama: LlamaForCausalLM = LlamaForCausalLM.from_pretrained(
        None, config=LlamaConfig(**llama_config(config, 0, "fp32")), state_dict=in_llama
    )
    _prepare(model, settings)
    _prepare(llama, settings)
    if can_pack(model.lm_head.weight):
        pack_linear_layers(model)
    text = cycle_tokens(config)

    def prompts(count: int) -> Tensor:
        starts = torch.arange(count) * len(text) // count
        return text[(starts[:, None] + torch.arange(settings.prompt_tokens)) % len(text)]

    return Subject(model, llama, config, prompts, "generated")


def trained_subject(folder: Path, settings: Settings) -> Subject:
    """Open a checkpoint or an export. Its prompts are from files of Python's standard library for validation.

    Raise CheckpointError if the folder has neither, LaunchError if the texts would exceed its positions.
    """
    options: dict[str, Any] = {"device_map": settings.device} if settings.device == "cuda" else {}
    model, tokenizer, config = open_model(folder, DTYPES[settings.dtype], **options)
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

    llama = _exported_llama(folder, settings.dtype) if config.heads.traits.exportable else None
    for opened in filter(None, (model, llama)):
        _prepare(opened, settings)
    return Subject(model, llama, config, prompts, folder.name)


def _exported_llama(folder: Path, dtype: str) -> LlamaForCausalLM:
    """Return trunk and head 1, as transformers loads them from an export."""
    with TemporaryDirectory() as temporary:
        if not (folder / HEADS_CONFIG).exists():
            checkpoint, folder = folder, Path(temporary, "export")
            export_checkpoint(checkpoint, folder, dtype)
        llama: LlamaForCausalLM = LlamaForCausalLM.from_pretrained(folder, dtype=DTYPES[dtype])
    return llama


def _validation_tokens(tokenizer: Tokenizer) -> Tensor:
    texts = (path.read_text(encoding="utf-8", errors="replace") for path in stdlib_files("validation"))
    return torch.cat([torch.as_tensor(tokenizer.encode(text)).long() for text in texts])


def _prepare(model: LlamaForCausalLM, settings: Settings) -> None:
    # Without an end of the text all decode the same number of tokens.
    model.generation_config = GenerationConfig(pad_token_id=0)
    nn.Module.to(model, settings.device, DTYPES[settings.dtype])
