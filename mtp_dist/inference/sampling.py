"""Choice of tokens from logits, and of the drafts to accept."""

from collections.abc import Callable, Sequence
from typing import NamedTuple, cast

import torch
from torch import LongTensor, Tensor
from transformers import LogitsProcessorList
from transformers.generation import logits_process

WARPERS = (
    logits_process.TemperatureLogitsWarper,
    logits_process.TopKLogitsWarper,
    logits_process.TopPLogitsWarper,
    logits_process.MinPLogitsWarper,
    logits_process.TypicalLogitsWarper,
    logits_process.EpsilonLogitsWarper,
    logits_process.EtaLogitsWarper,
)
"""Processors that read nothing but the logits."""


class Texts(NamedTuple):
    """The texts that a batch of logits is for, as processors read them."""

    rows: Sequence[int]
    """Prompt of each text."""
    num_prompts: int
    before: Callable[[int, int], Tensor]
    """Returns the tokens before the one that the logits at an index and a column are for, as transformers has them."""


class Drafts(NamedTuple):
    """Tokens that may come next."""

    token_ids: Tensor
    """`[B, m]`: at distances 2..m + 1 from the last position whose trunk output is known."""
    probabilities: Tensor | None
    """`[B, m, V]`: the distributions that they were drawn from; None if each was the most probable token."""


class Sampler:
    """The choice of tokens: the most probable ones, or random ones from the processed distribution."""

    def __init__(self, processors: LogitsProcessorList, do_sample: bool) -> None:
        self.processors, self.do_sample = processors, do_sample
        self.warpers = LogitsProcessorList([processor for processor in processors if isinstance(processor, WARPERS)])

    def choose_draft(self, logits: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return a token `[B]` for logits `[B, V]` of a head, and the distribution that it was drawn from."""
        if not self.do_sample:
            return logits.argmax(-1), None
        probabilities = self._warp(logits.float()).softmax(-1)
        return draw(probabilities), probabilities

    def accept(self, logits: Tensor, drafts: Drafts, texts: Texts) -> tuple[Tensor, Tensor]:
        """Return the next tokens `[B, m + 1]` and the number of accepted drafts `[B]`, of which they begin with.

        logits: `[B, m + 1, V]` of head 1, at the last known token and at each draft. The accepted drafts are followed
        by one more token, which head 1 alone decides.
        """
        scores = self._process(logits, texts)
        if not self.do_sample:
            chosen = scores.argmax(-1)
            return chosen, _leading(chosen[:, :-1] == drafts.token_ids)
        return speculative_sample(scores.softmax(-1), drafts)

    def choose(self, logits: Tensor, texts: Texts) -> Tensor:
        """Return a token for each of the logits `[B, N, V]`: `[B, N]`."""
        scores = self._process(logits, texts)
        return draw(scores.softmax(-1).flatten(0, 1)).view(scores.shape[:2]) if self.do_sample else scores.argmax(-1)

    def _process(self, logits: Tensor, texts: Texts) -> Tensor:
        if not self.processors:
            return logits.float() if self.do_sample else logits
        scores = logits.to(torch.float32, copy=True)
        if len(self.warpers) == len(self.processors):
            return self._warp(scores.flatten(0, 1)).view_as(scores)
        for column in range(scores.shape[1]):
            before = [texts.before(index, column) for index in range(len(scores))]
            for length in {len(text) for text in before}:
                # Processors may keep something for each prompt, so each call has as many rows.
                indices = [index for index, text in enumerate(before) if len(text) == length]
                rows = [texts.rows[index] for index in indices]
                token_ids = before[indices[0]].repeat(texts.num_prompts, 1)
                token_ids[rows] = torch.stack([before[index] for index in indices])
                together = scores.new_zeros(texts.num_prompts, scores.shape[2])
                together[rows] = scores[indices, column]
                scores[indices, column] = self.processors(cast(LongTensor, token_ids), together)[rows]
        return scores

    def _warp(self, scores: Tensor) -> Tensor:
        for warper in self.warpers:
            scores = warper(None, scores)
        return scores


def speculative_sample(target: Tensor, drafts: Drafts) -> tuple[Tensor, Tensor]:
    """Accept drafts so that the tokens are distributed as `target` `[B, m + 1, V]`. Return what `Sampler.accept` does.

    A draft x with probability q(x) is accepted with probability min(1, p(x) / q(x)); the token in the place of the
    first rejected one is drawn from the normalized max(p - q, 0): Leviathan et al. 2023 (arXiv:2211.17192), algorithm
    1.
    """
    token_ids, draft_probabilities = drafts
    rows = torch.arange(len(target), device=target.device)
    accepted = token_ids.new_zeros(len(target))
    at_end = target
    if token_ids.shape[1]:
        assert draft_probabilities is not None
        p = target[:, :-1].gather(-1, token_ids[..., None]).squeeze(-1)
        q = draft_probabilities.gather(-1, token_ids[..., None]).squeeze(-1)
        accepted = _leading(torch.rand_like(q) * q < p)
        at_end = torch.cat([(target[:, :-1] - draft_probabilities).clamp(min=0), target[:, -1:]], 1)
    residual = at_end[rows, accepted]
    # p = q up to rounding leaves nothing, and has rejected with probability 0 up to rounding.
    last = draw(torch.where(residual.sum(-1, keepdim=True) > 0, residual, target[rows, accepted]))
    tokens = torch.cat([token_ids, token_ids.new_zeros(len(target), 1)], 1)
    return tokens.scatter(1, accepted[:, None], last[:, None]), accepted


def draw(weights: Tensor) -> Tensor:
    """Draw one index per row `[B]` with probabilities in proportion to `[B, V]`."""
    return torch.multinomial(weights, 1).squeeze(1)


def _leading(matches: Tensor) -> Tensor:
    """Return the number of True before the first False in each row `[B]`."""
    return matches.long().cumprod(1).sum(1)
