"""A trained model with its tokenizer: from prompts to text."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, StoppingCriteriaList

from mtp_dist.checkpoint.manifest import ProgressCallback
from mtp_dist.config import Config
from mtp_dist.data.tokenizer import Tokenizer
from mtp_dist.errors import ConfigError
from mtp_dist.inference.loading import ModelFolder, read_folder
from mtp_dist.inference.model import MTPForCausalLM
from mtp_dist.inference.packing import can_pack, pack_linear_layers
from mtp_dist.inference.request import (
    check_heads,
    check_model,
    check_numbers,
    describe_text_limit,
    prompt_ids,
    text_limit,
)
from mtp_dist.inference.speculation import Speculation
from mtp_dist.inference.stop_strings import StopStrings

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Generator:
    """A trained model that continues texts."""

    model: MTPForCausalLM
    tokenizer: Tokenizer
    config: Config
    """Configuration of the run that trained the model."""

    @classmethod
    def open(
        cls,
        folder: Path,
        dtype: torch.dtype | None = None,
        on_verified: ProgressCallback = lambda done, total: None,
        check: Callable[[ModelFolder], object] = lambda folder: None,
        **options: Any,
    ) -> "Generator":
        """Open an export, a checkpoint or a run with the errors of `read_folder` and the options of `from_folder`.

        check: function that is called before the weights are read, and may raise an error. Without a `device_map` the
        model is on the CPU, packed, which means for inference only.
        """
        read = read_folder(folder, on_verified)
        check(read)
        model = MTPForCausalLM.from_folder(read, dtype, **options)
        if not options.get("device_map") and can_pack(model.lm_head.weight):
            pack_linear_layers(model)
        return cls(model, read.tokenizer, read.config)

    @classmethod
    def open_on_device(
        cls,
        folder: Path,
        on_verified: ProgressCallback = lambda done, total: None,
        check: Callable[[ModelFolder], object] = lambda folder: None,
    ) -> "Generator":
        """Open a model as `open` does, on the GPUs of this machine or on its CPU."""
        options: dict[str, Any] = {"device_map": "auto"} if torch.cuda.is_available() else {}
        return cls.open(folder, None, on_verified, check, **options)

    @property
    def positions(self) -> int:
        """Number of tokens of the longest text that the model may generate, its prompt included."""
        return text_limit(self.config)

    def prompt_ids(self, prompt: str) -> list[int]:
        """Return the tokens of a text that begins a document.

        The end of the document before it is the first, as in training, unless attention stops there. Surrogates stand
        for bytes that are not UTF-8, as in arguments of a command. Raise DataError for a text that the tokenizer cannot
        encode.
        """
        return prompt_ids(prompt, self.config, self.tokenizer)

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        temperature: float = 0.0,
        speculation: Speculation | None = None,
        stop_strings: Sequence[str] = (),
        **options: Any,
    ) -> list[list[int]]:
        """Return the new tokens after each prompt, with the end of the document if the model has reached it.

        temperature: 0 for the most probable tokens. stop_strings: a text ends with the token that completes one.
        options: those of transformers' `generate`. Texts end when the longest one has `positions` tokens. Raise
        ConfigError for a longer prompt, more heads than the model has, or a number that makes no sense.
        """
        speculation = speculation or Speculation()
        longest = max(map(len, prompts))
        check_numbers(max_new_tokens, temperature, speculation.heads)
        check_model(self.config, longest, speculation.heads)
        if not all(prompts):
            raise ConfigError("--prompt has no tokens: begin it with the end of a document, as prompt_ids does")
        if longest + max_new_tokens > self.positions:
            max_new_tokens = self.positions - longest
            logger.warning("The texts end after %d new tokens: %s", max_new_tokens, describe_text_limit(self.config))
        end = self.tokenizer.end_of_document
        padding = [longest - len(prompt) for prompt in prompts]
        rows = [[end] * columns + list(prompt) for columns, prompt in zip(padding, prompts, strict=True)]
        mask = [[0] * columns + [1] * (longest - columns) for columns in padding]
        settings: dict[str, Any] = {"do_sample": False, "eos_token_id": end, "pad_token_id": end}
        if temperature:
            settings |= {"do_sample": True, "temperature": temperature, "top_k": 0}
        device = self.model.device
        stops = [StopStrings(self.tokenizer, stop_strings, longest)] if stop_strings else []
        result = self.model.generate(
            torch.tensor(rows, device=device),
            attention_mask=torch.tensor(mask, device=device),
            generation_config=GenerationConfig(max_new_tokens=max_new_tokens, **settings | options),
            stopping_criteria=StoppingCriteriaList(stops),
            speculation=speculation,
        )
        ends = torch.tensor((settings | options)["eos_token_id"]).view(-1).tolist()
        return [_until(row, ends) for row in result[:, longest:].tolist()]

    def check_heads(self, heads: int | None) -> None:
        """Raise ConfigError if the model does not have that many heads."""
        check_heads(self.config, heads)


def _until(tokens: list[int], ends: Sequence[int]) -> list[int]:
    """Return the tokens up to the first one in `ends` and with it."""
    place = next((place for place, token in enumerate(tokens) if token in ends), len(tokens))
    return tokens[: place + 1]
