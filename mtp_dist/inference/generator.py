"""A trained model with its tokenizer: from prompts to text."""

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, StoppingCriteriaList

from mtp_dist.checkpoint.manifest import ProgressCallback
from mtp_dist.config import Config
from mtp_dist.data.tokenizer import Tokenizer
from mtp_dist.errors import ConfigError, DataError
from mtp_dist.inference.loading import read_folder
from mtp_dist.inference.model import MTPForCausalLM
from mtp_dist.inference.packing import can_pack, pack_linear_layers
from mtp_dist.inference.speculation import Speculation
from mtp_dist.inference.stop_strings import StopStrings

logger = logging.getLogger(__name__)

MIN_TEMPERATURE = 0.001
"""Smallest temperature above 0: logits divided by it do not overflow."""


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
        **options: Any,
    ) -> "Generator":
        """Open an export, a checkpoint or a run with the errors of `read_folder` and the options of `from_folder`.

        Without a `device_map` the model is on the CPU, packed, which means for inference only.
        """
        read = read_folder(folder, on_verified)
        model = MTPForCausalLM.from_folder(read, dtype, **options)
        if not options.get("device_map") and can_pack(model.lm_head.weight):
            pack_linear_layers(model)
        return cls(model, read.tokenizer, read.config)

    @classmethod
    def open_on_device(cls, folder: Path, on_verified: ProgressCallback = lambda done, total: None) -> "Generator":
        """Open a model on the GPUs of this machine, or on its CPU, with the errors of `read_folder`."""
        options: dict[str, Any] = {"device_map": "auto"} if torch.cuda.is_available() else {}
        return cls.open(folder, on_verified=on_verified, **options)

    @property
    def positions(self) -> int:
        """Number of tokens of the longest text that the model was trained on."""
        return self.config.train.sequence_length

    def prompt_ids(self, prompt: str) -> list[int]:
        """Return the tokens of a text that begins a document.

        The end of the document before it is the first, as in training, unless attention stops there. Surrogates stand
        for bytes that are not UTF-8, as in arguments of a command. Raise DataError for a text that the tokenizer cannot
        encode.
        """
        try:
            text = self.tokenizer.encode(prompt.encode(errors="surrogateescape")).tolist()
        except (DataError, UnicodeEncodeError) as error:
            raise DataError(f"--prompt cannot be encoded: {error}") from None
        end = self.tokenizer.end_of_document
        return [end, *text] if self.config.data.attention_across_documents or not text else text

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
        options: those of transformers' `generate`. Texts end when the longest one has as many tokens as those of the
        training. Raise ConfigError for a longer prompt, more heads than the model has, or a number that makes no sense.
        """
        speculation = speculation or Speculation()
        longest = max(map(len, prompts))
        self._check(prompts, max_new_tokens, temperature, speculation.heads)
        if longest + max_new_tokens > self.positions:
            max_new_tokens = self.positions - longest
            logger.warning(
                "The texts end after %d new tokens: the model was trained on texts of %d",
                max_new_tokens,
                self.positions,
            )
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
        count = self.config.heads.count
        if heads is not None and not 1 <= heads <= count:
            raise ConfigError(
                f"--speculative = {heads}, but the model has {count} heads: use 1 for plain decoding, or up to {count}"
            )

    def _check(
        self, prompts: Sequence[Sequence[int]], max_new_tokens: int, temperature: float, heads: int | None
    ) -> None:
        """Raise ConfigError for arguments that make no sense."""
        prompt_tokens = max(map(len, prompts))
        self.check_heads(heads)
        if prompt_tokens >= self.positions:
            raise ConfigError(
                f"--prompt has {prompt_tokens} tokens, but the model was trained on texts of {self.positions}: "
                "shorten it"
            )
        if not all(prompts):
            raise ConfigError("--prompt has no tokens: begin it with the end of a document, as prompt_ids does")
        if max_new_tokens < 1:
            raise ConfigError(f"--max-new-tokens = {max_new_tokens} is below 1: use at least 1")
        if temperature and not MIN_TEMPERATURE <= temperature < math.inf:
            raise ConfigError(
                f"--temperature = {temperature}: use 0 for the most probable tokens, or a number from "
                f"{MIN_TEMPERATURE} on, such as 0.7"
            )


def _until(tokens: list[int], ends: Sequence[int]) -> list[int]:
    """Return the tokens up to the first one in `ends` and with it."""
    place = next((place for place, token in enumerate(tokens) if token in ends), len(tokens))
    return tokens[: place + 1]
