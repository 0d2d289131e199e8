"""The growing texts of a batch, and where each ends."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import StoppingCriteriaList
from transformers.generation.stopping_criteria import EosTokenCriteria, MaxLengthCriteria


@dataclass
class StoppingRules:
    """When a text ends: with one of some tokens, at a length, or when a criterion is met."""

    eos_token_ids: frozenset[int]
    max_length: int
    """Largest number of columns of the result, padding of the prompts included."""
    others: StoppingCriteriaList

    @classmethod
    def from_criteria(cls, criteria: StoppingCriteriaList) -> "StoppingRules":
        ends = [criterion.eos_token_id for criterion in criteria if isinstance(criterion, EosTokenCriteria)]
        handled = (EosTokenCriteria, MaxLengthCriteria)
        others = StoppingCriteriaList([criterion for criterion in criteria if not isinstance(criterion, handled)])
        assert criteria.max_length is not None, "generate always adds this criterion"
        return cls(frozenset(token for tensor in ends for token in tensor.tolist()), criteria.max_length, others)


class TextBatch:
    """The texts of a batch, each from position 0 on."""

    def __init__(self, prompts: Tensor, mask: Tensor | None, rules: StoppingRules) -> None:
        """prompts: `[B, P]`, padded on the left if `mask`, shaped like it, has zeros."""
        rows, columns = prompts.shape
        self.prompts, self.rules, self.columns = prompts, rules, columns
        real = torch.full((rows,), columns, device=prompts.device) if mask is None else mask.to(prompts.device).sum(1)
        self.lengths = real
        """`[B]`: number of tokens of each text."""
        self.host_lengths: list[int] = real.tolist()
        self.prompt_lengths = list(self.host_lengths)
        self.token_ids = prompts.new_zeros(rows, max(columns, rules.max_length))
        """`[B, T]`: the texts, and after them drafts or anything."""
        shifted = torch.arange(columns, device=prompts.device) + (columns - real)[:, None]
        self.token_ids[:, :columns] = prompts.gather(1, shifted.clamp(max=columns - 1))
        self.finished = [False] * rows

    def reserve(self, drafts: int) -> None:
        """Make room for that many drafts after the longest text."""
        self.token_ids = F.pad(self.token_ids, (0, drafts + 1))

    @property
    def remaining(self) -> int:
        """Largest number of tokens that any text lacks."""
        rows = zip(self.finished, self.host_lengths, self.prompt_lengths, strict=True)
        made = min((length - prompt for finished, length, prompt in rows if not finished), default=0)
        return self.rules.max_length - self.columns - made

    def prefix(self, row: int, length: int) -> Tensor:
        """Return the first `length` tokens of a text after its padding, as transformers' own decoding has them."""
        return torch.cat([self.prompts[row], self.token_ids[row, self.prompt_lengths[row] : length]])

    def new_tokens(self, row: int) -> list[int]:
        """Return the tokens after a prompt."""
        return self.token_ids[row, self.prompt_lengths[row] : self.host_lengths[row]].tolist()

    def extend(self, tokens: Tensor, counts: Sequence[int], host_tokens: Sequence[Sequence[int]]) -> list[list[int]]:
        """Append the first `counts[b]` of tokens `[B, q]` to each unfinished text, up to where it ends.

        Return the appended tokens of each row.
        """
        places = self.lengths[:, None] + torch.arange(tokens.shape[1], device=tokens.device)
        self.token_ids.scatter_(1, places, tokens)
        appended = [
            [] if finished else self._until_end(row, list(host_tokens[row][: counts[row]]))
            for row, finished in enumerate(self.finished)
        ]
        self.host_lengths = [length + len(new) for length, new in zip(self.host_lengths, appended, strict=True)]
        self.lengths = torch.tensor(self.host_lengths, device=tokens.device)
        return appended

    def _until_end(self, row: int, tokens: list[int]) -> list[int]:
        length, made = self.host_lengths[row], self.host_lengths[row] - self.prompt_lengths[row]
        for count, token in enumerate(tokens, 1):
            if token in self.rules.eos_token_ids or self.columns + made + count >= self.rules.max_length:
                self.finished[row] = True
            elif self.rules.others:
                self.finished[row] = bool(self.rules.others(self.prefix(row, length + count)[None], None).any())
            if self.finished[row]:
                return tokens[:count]
        return tokens

    def padded(self, prompts: Tensor, pad_token_id: int) -> Tensor:
        """Return the prompts as they were given, followed by the new tokens, padded on the right."""
        new = [self.new_tokens(row) for row in range(len(prompts))]
        width = max(map(len, new))
        rows = [tokens + [pad_token_id] * (width - len(tokens)) for tokens in new]
        return torch.cat([prompts, torch.tensor(rows, dtype=prompts.dtype, device=prompts.device)], 1)
