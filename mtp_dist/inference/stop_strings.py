"""The end of a text at a string, for the tokenizers of training, which are not transformers' own."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteria

from mtp_dist.data.tokenizer import Tokenizer
from mtp_dist.inference.detokenizer import CONTEXT_TOKENS


class StopStrings(StoppingCriteria):
    """A criterion that a text meets with the token that completes one of some strings after the prompt."""

    def __init__(self, tokenizer: Tokenizer, strings: Sequence[str], prompt_columns: int) -> None:
        self.tokenizer, self.strings, self.prompt_columns = tokenizer, strings, prompt_columns
        # A token has at least one byte, but for special ones.
        self.window = max(len(string.encode()) for string in strings) + CONTEXT_TOKENS

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        last = input_ids[:, self.prompt_columns :][:, -self.window :]
        texts = [self.tokenizer.decode(row) for row in last.tolist()]
        met = [any(string in text for string in self.strings) for text in texts]
        return torch.tensor(met, device=input_ids.device)
