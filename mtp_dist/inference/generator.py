"""A trained model with its tokenizer: from prompts to text."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig

from mtp_dist.config import Config
from mtp_dist.data.tokenizer import Tokenizer
from mtp_dist.errors import ConfigError
from mtp_dist.inference.loading import open_model
from mtp_dist.inference.model import MTPForCausalLM
from mtp_dist.inference.speculation import Speculation

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Generator:
    """A trained model that continues texts."""

    model: MTPForCausalLM
    tokenizer: Tokenizer
    config: Config
    """Configuration of the run that trained the model."""

    @classmethod
    def open(cls, folder: Path, **options: Any) -> "Generator":
        """Open an export or a checkpoint. options and errors: see `open_model`."""
        return cls(*open_model(folder, **options))

    @property
    def positions(self) -> int:
        """Number of tokens of the longest text that the model was trained on."""
        return self.config.train.sequence_length

    def prompt_ids(self, prompt: str) -> list[int]:
        """Return the tokens of a text that begins a document.

        The end of the document before it is the first, as in training, unless attention stops there.
        """
        text = self.tokenizer.encode(prompt).tolist()
        end = self.tokenizer.end_of_document
        return [end, *text] if self.config.data.attention_across_documents or not text else text

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        temperature: float = 0.0,
        speculation: Speculation | None = None,
        **options: Any,
    ) -> list[list[int]]:
        """Return the new tokens after each prompt, with the end of the document if the model has reached it.

        temperature: 0 for the most probable tokens. options: those of transformers' `generate`. Raise ConfigError if a
        prompt is longer than the texts of the training, or more heads should draft than the model has. Texts end where
        the longest one would be longer than these.
        """
        speculation = speculation or Speculation()
        count, longest = self.config.heads.count, max(map(len, prompts))
        if speculation.heads and speculation.heads > count:
            raise ConfigError(
                f"--speculative = {speculation.heads}, but the model has {count} heads: use at most {count}"
            )
        if longest >= self.positions:
            raise ConfigError(
                f"--prompt has {longest} tokens, but the model was trained on texts of {self.positions}: shorten it"
            )
        if longest + max_new_tokens > self.positions:
            max_new_tokens = self.positions - longest
            logger.warning(
                "The texts end after %d new tokens: the model was trained on texts of %d",
                max_new_tokens,
                self.positions,
            )
        pad = self.tokenizer.end_of_document
        padding = [longest - len(prompt) for prompt in prompts]
        rows = [[pad] * columns + list(prompt) for columns, prompt in zip(padding, prompts, strict=True)]
        mask = [[0] * columns + [1] * (longest - columns) for columns in padding]
        sampling = {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature else {"do_sample": False}
        device = self.model.device
        result = self.model.generate(
            torch.tensor(rows, device=device),
            attention_mask=torch.tensor(mask, device=device),
            generation_config=GenerationConfig(
                max_new_tokens=max_new_tokens, eos_token_id=pad, pad_token_id=pad, **{**sampling, **options}
            ),
            speculation=speculation,
        )
        return [_until(row, pad) for row in result[:, longest:].tolist()]


def _until(tokens: list[int], end: int) -> list[int]:
    """Return the tokens up to the first `end` and with it."""
    return tokens[: tokens.index(end) + 1] if end in tokens else tokens
