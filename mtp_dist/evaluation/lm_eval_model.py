"""A trained model as lm-eval's `mtp-dist` model.

Log-likelihoods and greedy texts are those of lm-eval's `hf` model on an export of the same weights in fp32.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import Collator, normalize_gen_kwargs, postprocess_generated_text
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from torch import Tensor

from mtp_dist.errors import ConfigError, DataError
from mtp_dist.inference.generator import Generator
from mtp_dist.inference.speculation import DecodingStatistics, Speculation

logger = logging.getLogger(__name__)

NEW_TOKENS = 256
"""Length of a generated text if its task does not set one; half of a shorter model's positions."""

Request = tuple[Any, list[int], list[int]]
"""The texts of a context and its continuation, the tokens of the context, and those of the continuation."""


@register_model("mtp-dist")
class MTPModel(TemplateLM):  # type: ignore[misc]
    """A trained model that scores and continues the texts of lm-eval's tasks."""

    def __init__(
        self,
        model: Generator | str,
        batch_size: int | str = 8,
        speculative: int | None = None,
        on_progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> None:
        """Open the model unless it is open.

        batch_size: texts per forward pass. speculative: number of heads that predict; by default as many as are
        fastest. on_progress: called with the number of answered requests of one kind, and the number of all of them.
        """
        super().__init__()
        self.generator = model if isinstance(model, Generator) else Generator.open_on_device(Path(model).expanduser())
        self.generator.check_heads(speculative)
        self.batch_size, self.speculative, self.on_progress = int(batch_size), speculative, on_progress
        self.max_length = self.generator.positions
        self.statistics = DecodingStatistics()
        """Counts over all generated texts."""

    @property
    def eot_token_id(self) -> int:
        return self.generator.tokenizer.end_of_document

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Return the tokens of a text, without special tokens as in training."""
        return self.generator.tokenizer.encode(string).tolist()

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        """Return the log-likelihood of each continuation, and whether greedy decoding would write it."""
        return super().loglikelihood(requests, disable_tqdm=True)

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = True) -> list[float]:
        """Return the log-likelihood of each text, in windows of as many tokens as the model has positions for."""
        windows = [
            [
                (None, *make_disjoint_window(window))
                for window in get_rolling_token_windows(self.tok_encode(text), self.eot_token_id, self.max_length, 1)
            ]
            for (text,) in (request.args for request in requests)
        ]
        scores = iter(self._loglikelihood_tokens([window for text in windows for window in text]))
        return [sum(next(scores)[0] for _ in text) for text in windows]

    def _loglikelihood_tokens(self, requests: Sequence[Request], **kwargs: Any) -> list[tuple[float, bool]]:
        self._check(requests)
        # Requests that differ in the last token only, such as the letters of a choice, take one row of a batch.
        order = Collator(
            requests,
            sort_fn=lambda request: (-len(request[1]) - len(request[2]), request[1] + request[2]),
            group_by="contexts",
            group_fn=lambda request: request[1] + request[2][:-1],
        )
        answers: list[tuple[float, bool]] = []
        for batch in order.get_batched(n=self.batch_size):
            for (texts, context, continuation), scores in zip(batch, self._log_probabilities(batch), strict=True):
                for _, tokens, row in order.get_cache(texts, context, continuation, scores[None]):
                    answers.append(_answer(row[0, -len(tokens) :], tokens))
            self.on_progress(len(answers), len(requests))
        return order.get_original(answers)

    def _check(self, requests: Sequence[Request]) -> None:
        """Raise DataError for a continuation that cannot be scored. Warn of contexts that lose their beginning."""
        for texts, _, continuation in requests:
            if not 1 <= len(continuation) <= self.max_length:
                raise DataError(
                    f"a continuation that a task scores has {len(continuation)} tokens, but the model was trained on "
                    f"texts of {self.max_length} and needs at least 1: leave out the task with {texts!r:.80}"
                )
        truncated = sum(len(context) + len(continuation) > self.max_length + 1 for _, context, continuation in requests)
        if truncated:
            logger.warning(
                "%d of %d contexts lose their beginning: with the continuation they exceed the texts of %d tokens that "
                "the model was trained on",
                *(truncated, len(requests), self.max_length),
            )

    @torch.inference_mode()
    def _log_probabilities(self, batch: Sequence[Request]) -> Iterator[Tensor]:
        """Yield the log-probabilities `[T, V]` of all tokens at the places of each continuation's T tokens."""
        model = self.generator.model
        rows = [(context + continuation)[-self.max_length - 1 : -1] for _, context, continuation in batch]
        longest = max(map(len, rows))
        # Padding on the right changes nothing before it.
        padded = [row + [self.eot_token_id] * (longest - len(row)) for row in rows]
        hidden = model.model(torch.tensor(padded, device=model.device), use_cache=False).last_hidden_state
        for row, states, (_, _, continuation) in zip(rows, hidden, batch, strict=True):
            logits = model.lm_head(states[len(row) - len(continuation) : len(row)])
            yield logits.float().log_softmax(-1)

    def generate_until(self, requests: list[Any], disable_tqdm: bool = True) -> list[str]:
        """Return the text after each context, up to the first of its task's stop strings."""
        order = Collator(
            [request.args for request in requests],
            sort_fn=lambda arguments: (-len(self.tok_encode(arguments[0])), arguments[0]),
            group_by="gen_kwargs",
            group_fn=lambda arguments: arguments[1],
        )
        texts: list[str] = []
        for batch in order.get_batched(n=self.batch_size):
            contexts, settings = zip(*batch, strict=True)
            texts += self._continue(contexts, settings[0])
            self.on_progress(len(texts), len(requests))
        return order.get_original(texts)

    def _continue(self, contexts: Sequence[str], settings: dict[str, Any]) -> list[str]:
        """Return the text after each context. settings: `generation_kwargs` of their task."""
        options: dict[str, Any] = normalize_gen_kwargs(settings, min(NEW_TOKENS, self.max_length // 2))
        stop = [text for text in options.pop("until") if text]
        new_tokens, do_sample = options.pop("max_gen_toks"), options.pop("do_sample")
        temperature = options.pop("temperature", 1.0) if do_sample else 0.0
        options.pop("temperature", None)
        longest = self.max_length - new_tokens
        if longest < 1:
            raise ConfigError(
                f"a task generates up to max_gen_toks = {new_tokens} tokens, but the model was trained on texts of "
                f"{self.max_length}: set fewer in the generation_kwargs of the task's YAML file"
            )
        prompts = [self.tok_encode(context)[-longest:] or [self.eot_token_id] for context in contexts]
        heads = self.speculative
        if do_sample and heads is None:  # the fastest number depends on the machine's load, and so would the text
            heads = self.generator.config.heads.count
        speculation = Speculation(heads, statistics=self.statistics)
        rows = self.generator.generate(prompts, new_tokens, temperature, speculation, stop_strings=stop, **options)
        decode = self.generator.tokenizer.decode
        return [postprocess_generated_text(decode(row), stop, None) for row in rows]


def _answer(scores: Tensor, tokens: Sequence[int]) -> tuple[float, bool]:
    """Return the log-likelihood of tokens and whether each is the most probable one, for log-probabilities `[T, V]`."""
    chosen = torch.tensor(tokens, device=scores.device)
    total = scores.gather(1, chosen[:, None]).sum()
    return float(total), bool((scores.argmax(-1) == chosen).all())
