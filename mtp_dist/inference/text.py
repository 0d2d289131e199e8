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
    """The unfinished texts of a batch, each from position 0 on, and the tokens that all texts have gained."""

    def __init__(self, prompts: Tensor, mask: Tensor | None, rules: StoppingRules) -> None:
        """prompts: `[B, P]`, padded on the left if `mask`, shaped like it, has zeros."""
        rows, columns = prompts.shape
        self.prompts, self.rules, self.columns = prompts, rules, columns
        real = torch.full((rows,), columns, device=prompts.device) if mask is None else mask.to(prompts.device).sum(1)
        self.rows = list(range(rows))
        """Prompt of each unfinished text."""
        self.new_tokens: list[list[int]] = [[] for _ in self.rows]
        """New tokens after each prompt."""
        self.lengths = real
        """`[b]`: number of tokens of each unfinished text."""
        self.host_lengths: list[int] = real.tolist()
        self.prompt_lengths = list(self.host_lengths)
        self.token_ids = prompts.new_zeros(rows, max(columns, rules.max_length))
        """`[b, T]`: the unfinished texts, and after them drafts or anything."""
        shifted = torch.arange(columns, device=prompts.device) + (columns - real)[:, None]
        self.token_ids[:, :columns] = prompts.gather(1, shifted.clamp(max=columns - 1))

    def reserve(self, drafts: int) -> None:
        """Make room for that many drafts after the longest text."""
        self.token_ids = F.pad(self.token_ids, (0, drafts + 1))

    @property
    def remaining(self) -> int:
        """Largest number of tokens that any unfinished text lacks."""
        return self.rules.max_length - self.columns - min(len(self.new_tokens[row]) for row in self.rows)

    def prefix(self, index: int, length: int) -> Tensor:
        """Return the first `length` tokens of a text after its padding, as transformers' own decoding has them."""
        row = self.rows[index]
        return torch.cat([self.prompts[row], self.token_ids[index, self.prompt_lengths[row] : length]])

    def extend(self, tokens: Tensor, host_tokens: Sequence[Sequence[int]]) -> tuple[list[list[int]], list[bool]]:
        """Append tokens `[b, q]`, of which `host_tokens` has those that count, to each text, up to where it ends.

        Return the appended tokens of each text, and whether it has ended.
        """
        places = self.lengths[:, None] + torch.arange(tokens.shape[1], device=tokens.device)
        self.token_ids.scatter_(1, places, tokens)
        kept = [self._until_end(index, new) for index, new in enumerate(host_tokens)]
        appended, ended = [new for new, _ in kept], [is_ended for _, is_ended in kept]
        for row, new in zip(self.rows, appended, strict=True):
            self.new_tokens[row] += new
        self.host_lengths = [length + len(new) for length, new in zip(self.host_lengths, appended, strict=True)]
        self.lengths = torch.tensor(self.host_lengths, device=tokens.device)
        return appended, ended

    def _until_end(self, index: int, tokens: Sequence[int]) -> tuple[list[int], bool]:
        made = len(self.new_tokens[self.rows[index]])
        for count, token in enumerate(tokens, 1):
            ended = token in self.rules.eos_token_ids or self.columns + made + count >= self.rules.max_length
            if not ended and self.rules.others:
                text = self.prefix(index, self.host_lengths[index] + count)
                ended = bool(self.rules.others(text[None], None).any())
            if ended:
                return list(tokens[:count]), True
        return list(tokens), False

    def keep(self, indices: Sequence[int]) -> None:
        """Remove all but these of the unfinished texts."""
        self.rows, self.host_lengths = ([values[i] for i in indices] for values in (self.rows, self.host_lengths))
        chosen = torch.tensor(indices, dtype=torch.long, device=self.lengths.device)
        self.lengths, self.token_ids = self.lengths[chosen], self.token_ids[chosen]

    def padded(self, prompts: Tensor, pad_token_id: int) -> Tensor:
        """Return the prompts as they were given, followed by the new tokens, padded on the right."""
        width = max(map(len, self.new_tokens))
        rows = [tokens + [pad_token_id] * (width - len(tokens)) for tokens in self.new_tokens]
        return torch.cat([prompts, torch.tensor(rows, dtype=prompts.dtype, device=prompts.device)], 1)
