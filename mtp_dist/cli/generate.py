"""`mtp-dist generate`."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.text import Text

from mtp_dist.cli.options import AsJson, model_folder
from mtp_dist.cli.progress import progress_bar, updates
from mtp_dist.cli.tables import explain_output_errors, fact_lines
from mtp_dist.errors import ConfigError, exits_with_user_errors
from mtp_dist.inference.request import check_model, check_numbers, prompt_ids

if TYPE_CHECKING:  # transformers takes seconds to import
    from mtp_dist.inference.detokenizer import Detokenizer
    from mtp_dist.inference.generator import Generator
    from mtp_dist.inference.loading import ModelFolder
    from mtp_dist.inference.speculation import DecodingStatistics

DEFAULT_NEW_TOKENS = 200
WARM_UP_TOKENS = 16
PROMPT_STYLE, ACCEPTED_STYLE = "bold", "black on green"
CONTROL_PICTURES = {code: 0x2400 + code for code in range(32) if chr(code) not in "\t\n"}
"""Visible characters instead of those that would move a terminal's cursor or change its state."""


Heads = Annotated[
    int | None,
    typer.Option(
        metavar="K", help="Number of heads that predict; 1 is plain decoding. By default as many as are fastest."
    ),
]
NewTokens = Annotated[
    int | None, typer.Option(help=f"By default {DEFAULT_NEW_TOKENS}, or as many as the model has positions for.")
]
Seed = Annotated[
    int | None,
    typer.Option(
        min=0, max=2**32 - 1, help="Draw the same random tokens each time; without --speculative all heads predict."
    ),
]


@exits_with_user_errors
def generate(
    model: Annotated[str, typer.Option(help="Folder of an export, of a checkpoint or of a run.")],
    prompt: Annotated[str, typer.Option(help="Beginning of the document to continue; - reads all of standard input.")],
    speculative: Heads = None,
    max_new_tokens: NewTokens = None,
    temperature: Annotated[float, typer.Option(help="0 takes the most probable tokens.")] = 0.0,
    seed: Seed = None,
    stream: Annotated[bool, typer.Option("--stream", help="Write the text while it is generated.")] = False,
    compare_plain: Annotated[
        bool, typer.Option("--compare-plain", help="Also measure plain decoding of the same text.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Continue a text with a trained model, whose heads predict several tokens per forward pass.

    Accepted drafts are highlighted in a terminal. The text goes to standard output, the figures to standard error.
    """
    check_numbers(DEFAULT_NEW_TOKENS if max_new_tokens is None else max_new_tokens, temperature, speculative)
    if prompt == "-":
        prompt = _read_standard_input()
    generator = _open(model, prompt, speculative)
    import torch

    from mtp_dist.inference.detokenizer import Detokenizer
    from mtp_dist.inference.speculation import Speculation

    token_ids = generator.prompt_ids(prompt)
    if max_new_tokens is None:
        max_new_tokens = min(DEFAULT_NEW_TOKENS, generator.positions - len(token_ids))
    if speculative is None and seed is not None:  # how many are fastest depends on the machine's load
        speculative = generator.config.heads.count

    def decode(heads: int | None, tokens: int, output: _Output | None = None) -> tuple[list[int], DecodingStatistics]:
        torch.seed() if seed is None else torch.manual_seed(seed)
        speculation = Speculation(heads, on_tokens=output.on_tokens if output else None)
        return generator.generate([token_ids], tokens, temperature, speculation)[0], speculation.statistics

    if compare_plain:
        for heads in (1, speculative):
            decode(heads, min(WARM_UP_TOKENS, max_new_tokens))
    output = _Output(Detokenizer(generator.tokenizer, token_ids), prompt, stream and not as_json)
    try:
        new_ids, statistics = decode(speculative, max_new_tokens, output)
    except KeyboardInterrupt:
        output.interrupt()
        raise
    output.end()
    statistics.seconds -= output.seconds
    result = {"text": output.text, "token_ids": new_ids, "prompt_tokens": len(token_ids), **_figures(statistics)}
    if compare_plain:
        plain_ids, plain = decode(1, len(new_ids))
        result["plain"] = _figures(plain) | {"same_text": None if temperature else plain_ids == new_ids}
    if as_json:
        with explain_output_errors():
            print(json.dumps(result), flush=True)
        return
    output.show()
    for line in fact_lines(_facts(result)):
        Console(stderr=True, highlight=False).print(line, soft_wrap=True)


def _read_standard_input() -> str:
    if sys.stdin is None:
        raise ConfigError("--prompt = - reads standard input, which is closed: pipe a text into it, or give the text")
    return sys.stdin.buffer.read().decode(errors="surrogateescape")


def _open(model: str, prompt: str, heads: int | None) -> Generator:
    """Open the model on the GPUs of this machine, or on its CPU, if it can continue the prompt with that many heads."""
    folder = model_folder(model)
    from transformers.utils import logging as transformers_logging

    from mtp_dist.inference.generator import Generator

    def check(found: ModelFolder) -> None:
        check_model(found.config, len(prompt_ids(prompt, found.config, found.tokenizer)), heads)

    transformers_logging.set_verbosity_error()
    with progress_bar() as bar:
        return Generator.open_on_device(folder, updates(bar, "verifying"), check)


class _Output:
    """The text on standard output, written while it is generated or at the end."""

    def __init__(self, detokenizer: Detokenizer, prompt: str, live: bool) -> None:
        self.detokenizer, self.prompt, self.live = detokenizer, prompt, live
        self.console = Console(highlight=False)
        self.pieces: list[tuple[str, bool]] = []
        """The text so far, and whether each piece consists of accepted drafts."""
        self.seconds = 0.0
        """Time in which nothing was generated because of the output."""
        if live:
            self._write_prompt()

    @property
    def text(self) -> str:
        return "".join(piece for piece, _ in self.pieces)

    def on_tokens(self, row: int, tokens: Sequence[int], accepted: int) -> None:
        start = time.perf_counter()
        self._add(self.detokenizer.add(tokens[:accepted]), True)
        self._add(self.detokenizer.add(tokens[accepted:]), False)
        self.seconds += time.perf_counter() - start

    def end(self) -> None:
        """Add what is left of the text."""
        self._add(self.detokenizer.end(), False)

    def interrupt(self) -> None:
        """End the line that is being written."""
        if self.live:
            self._write("\n", "")

    def show(self) -> None:
        """Write what has not been written."""
        if not self.live:
            self._write_prompt()
            for piece, is_accepted in self.pieces:
                self._write(piece, ACCEPTED_STYLE * is_accepted)
        self._write("\n", "")

    def _add(self, piece: str, is_accepted: bool) -> None:
        if piece:
            self.pieces.append((piece, is_accepted))
            if self.live:
                self._write(piece, ACCEPTED_STYLE * is_accepted)

    def _write_prompt(self) -> None:
        if self.console.is_terminal:
            self._write(self.prompt.encode(errors="surrogateescape").decode(errors="replace"), PROMPT_STYLE)

    def _write(self, piece: str, style: str) -> None:
        with explain_output_errors():
            if self.console.is_terminal:
                self.console.print(Text(piece.translate(CONTROL_PICTURES), style), end="", soft_wrap=True)
            else:
                print(piece, end="", flush=True)


def _figures(statistics: DecodingStatistics) -> dict[str, Any]:
    return {
        "new_tokens": statistics.tokens,
        "forward_passes": statistics.forward_passes,
        "tokens_per_forward": statistics.tokens_per_forward,
        "acceptance": statistics.acceptance,
        "seconds": statistics.seconds,
        "tokens_per_second": statistics.tokens / statistics.seconds,
    }


def _facts(result: dict[str, Any]) -> dict[str, str]:
    facts = {"Decoding": _speed(result)}
    if acceptance := result["acceptance"]:
        rates, last = ", ".join(f"{rate:.0%}" for rate in acceptance.values()), max(acceptance)
        distances = f"distances 2 to {last}" if last > 2 else "distance 2"
        facts["Accepted"] = f"{rates} at {distances}, of drafts whose predecessors were accepted"
    if plain := result.get("plain"):
        ratio = result["tokens_per_second"] / plain["tokens_per_second"]
        texts = {None: "", True: ", the same text", False: ", ANOTHER TEXT: rounding decided a near tie"}
        facts["Plain"] = f"{_speed(plain)}; {ratio:.2f}x as fast with drafts{texts[plain['same_text']]}"
    return facts


def _speed(figures: dict[str, Any]) -> str:
    return (
        f"{figures['new_tokens']} tokens in {figures['forward_passes']} forward passes "
        f"({figures['tokens_per_forward']:.2f} per pass), {figures['tokens_per_second']:,.0f} tokens/s"
    )
