"""`mtp-dist prepare` beside the bare tokenizer: what reading, writing and joining cost."""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast
from unittest.mock import patch

import torch

from mtp_dist.bench.data.timed_tokenizer import TimedTokenizer
from mtp_dist.bench.measure import Step, paired_seconds
from mtp_dist.data.prepare import prepare as preparation
from mtp_dist.data.prepare.prepare import Request, prepare
from mtp_dist.data.prepare.tokenize import UnitSummary, in_batches
from mtp_dist.data.prepare.worker_pool import map_in_order
from mtp_dist.data.sources.text_sources import UNIT_BYTES, InputOptions, open_inputs
from mtp_dist.data.sources.work_units import WorkUnit
from mtp_dist.data.text_tokenizers import END_TOKENS, HuggingFaceTokenizer
from mtp_dist.data.tokenizer import Tokenizer, build_tokenizer
from mtp_dist.errors import ConfigError

TRAINED = "trained"
"""The tokenizer that the benchmark trains on the text itself."""
VOCAB_SIZE = 32_768
TRAINING_BYTES = 8 << 20


@dataclass(frozen=True)
class _BareTokenizer:
    """Encodes a work unit, in batches that are in memory already, and says how many seconds that alone took.

    Of a Hugging Face tokenizer only the library's own call counts, which the ids are still to be fetched from.
    """

    tokenizer: Tokenizer

    def __call__(self, unit: WorkUnit) -> float:
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
        seconds = 0.0
        for batch in in_batches(unit.documents(), len):
            if isinstance(self.tokenizer, HuggingFaceTokenizer):
                texts = [document.decode(errors="replace") for document in batch]
                start = time.perf_counter()
                self.tokenizer.encode_texts(texts)
            else:
                start = time.perf_counter()
                self.tokenizer.encode_batch(batch)
            seconds += time.perf_counter() - start
        return seconds


class _FirstUnit:
    """A progress that notes when the first work unit is in its place: listing files and starting processes are over."""

    at = 0.0
    bytes = 0

    def start(self, total: int | None) -> None:
        self.bytes = 0

    def advance(self, size: int, summary: UnitSummary, reused: bool) -> None:
        if not self.bytes:
            self.at, self.bytes = time.perf_counter(), summary.bytes


def measure_preparation(
    folder: str, glob: str, tokenizers: Sequence[str], workers: int, rounds: int, unit_bytes: int = UNIT_BYTES
) -> list[dict[str, Any]]:
    """A row for each tokenizer: megabytes of text a second of `prepare` and of the tokenizer alone, and their ratio.

    Both use the same number of processes, in turns. The bare tokenizer's rate is the bytes over the seconds within it,
    averaged over the processes; `prepare`'s over the seconds from call to finished corpus, with its processes' starts,
    but not with the first import of Megatron-core. Of a Hugging Face tokenizer also the share of the processes' time in
    `prepare` itself that is spent within the tokenizer, which knows no noise between runs. Raises ConfigError.
    """
    with tempfile.TemporaryDirectory() as scratch:
        return [_row(folder, glob, name, workers, rounds, unit_bytes, Path(scratch)) for name in tokenizers]


def _timed(tokenizer: Tokenizer, notes: Path) -> Tokenizer:
    """The same, which notes its seconds where it is one of Hugging Face."""
    if isinstance(tokenizer, HuggingFaceTokenizer):
        tokenizer.__class__ = TimedTokenizer
        cast(TimedTokenizer, tokenizer).notes = notes
    return tokenizer


def _row(
    folder: str, glob: str, name: str, workers: int, rounds: int, unit_bytes: int, scratch: Path
) -> dict[str, Any]:
    options = InputOptions(glob=glob)
    source = open_inputs([folder], options)[0]
    path = str(_train(source.units(unit_bytes), scratch)) if name == TRAINED else name
    bare = _BareTokenizer(build_tokenizer(path, "--tokenizer"))
    prefix = scratch / "corpus"
    request = Request((folder,), prefix, path, options, "replace", workers, unit_bytes)
    within: list[float] = []
    first = _FirstUnit()
    prepared = prepare(request, first)  # imports Megatron-core, and has the files in the page cache
    after_the_start: list[float] = []
    notes, shares = scratch / "seconds", list[float]()

    def clear(_: str) -> None:
        for suffix in (".bin", ".idx", ".json"):
            Path(f"{prefix}{suffix}").unlink(missing_ok=True)

    def run_bare() -> None:
        timed = map_in_order(bare, source.units(unit_bytes), workers)
        within.append(sum(seconds for _, seconds in timed) / workers)

    def run_prepare() -> None:
        notes.unlink(missing_ok=True)
        timed = _timed(build_tokenizer(path, "--tokenizer"), notes)
        with patch.object(preparation, "build_tokenizer", lambda *_: timed):
            start = time.perf_counter()
            size = prepare(request, first).description.bytes
        if notes.exists():
            in_tokenizer = sum(map(float, notes.read_text(encoding="utf-8").split()))
            shares.append(in_tokenizer / workers / (time.perf_counter() - start))
        after_the_start.append((size - first.bytes) / 1e6 / (time.perf_counter() - first.at))

    clear("")
    steps: dict[str, Step] = {"bare": run_bare, "prepare": run_prepare}
    whole = paired_seconds(steps, rounds, torch.device("cpu"), clear)["prepare"]
    megabytes = prepared.description.bytes / 1e6
    return {
        "tokenizer": name,
        "megabytes": megabytes,
        "tokens": prepared.description.tokens,
        "prepare_megabytes_per_second": megabytes / statistics.median(whole),
        "after_the_start_megabytes_per_second": statistics.median(after_the_start),
        "bare_megabytes_per_second": megabytes / statistics.median(within),
        "ratio": statistics.median(alone / all_of_it for alone, all_of_it in zip(within, whole, strict=True)),
        "share_in_tokenizer": statistics.median(shares) if shares else None,
        "shares_by_round": shares,
        "seconds_by_round": {"prepare": whole, "bare": within},
    }


def _train(units: Iterable[WorkUnit], folder: Path) -> Path:
    """Byte pairs of the text's first megabytes."""
    from tokenizers import Tokenizer as Trainable
    from tokenizers import decoders, models, pre_tokenizers, trainers

    texts, size = [], 0
    for unit in units:
        for document in unit.documents():
            texts.append(document.decode(errors="replace"))
            size += len(document)
        if size >= TRAINING_BYTES:
            break
    if not size:
        raise ConfigError("the files have no text to train a tokenizer on: choose others")
    tokenizer = Trainable(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[END_TOKENS[0]],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    file = folder / "tokenizer.json"
    tokenizer.save(str(file))
    return file
