"""Speed of turning text into a corpus, compared with the tokenizer alone, and a corpus into training samples.

The samples are read from a corpus in the page cache. A run makes the heads' targets as well, and masks them by document
if a key of `data` asks for it.
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mtp_dist.bench.measure import Step, paired_seconds
from mtp_dist.data.blending import BlendedSamples
from mtp_dist.data.build_tokenizer import build_tokenizer
from mtp_dist.data.prepare.prepare import Request, prepare
from mtp_dist.data.prepare.tokenize import BATCH_BYTES, UnitSummary
from mtp_dist.data.prepare.worker_pool import map_in_order
from mtp_dist.data.samples import PackedCorpus
from mtp_dist.data.sources.input import UNIT_BYTES, InputOptions
from mtp_dist.data.sources.open_inputs import open_inputs
from mtp_dist.data.sources.work_units import WorkUnit, in_batches
from mtp_dist.data.text_tokenizers import END_TOKENS, HuggingFaceTokenizer
from mtp_dist.data.tokenizer import Tokenizer
from mtp_dist.errors import DataError
from mtp_dist.model.targets import document_ids, head_targets

TRAINED = "trained"
"""Name of the tokenizer that the benchmark trains on the text itself."""
VOCAB_SIZE = 32_768
TRAINING_BYTES = 8 << 20
CORPUS_TOKENS = 100_000_000
SEQUENCE_LENGTHS = (512, 2048, 8192)
BATCH_TOKENS = 65_536
HEADS = 4
SOURCES = (3.0, 1.0)
"""Sampling weights of the blended corpora."""


@dataclass(frozen=True)
class _BareTokenizer:
    """A function that encodes a work unit and returns the seconds spent in the tokenizer alone.

    For a Hugging Face tokenizer that is the library's own call, without converting the ids.
    """

    tokenizer: Tokenizer

    def __call__(self, unit: WorkUnit) -> float:
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
        seconds = 0.0
        for batch in in_batches(unit.documents(), len, BATCH_BYTES):
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
    """The time when the first work unit is written, which ends the start-up: files are listed, processes run."""

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
    """Return one row per tokenizer: megabytes of text per second of `prepare` and of the tokenizer alone, their ratio.

    Both use the same number of processes, in turns. The tokenizer's rate is the bytes over the seconds spent in it,
    averaged over the processes; that of `prepare` includes starting the processes, but not the first import of
    Megatron-core. Raise UserError if the folder or a tokenizer cannot be read.
    """
    with tempfile.TemporaryDirectory() as scratch:
        return [_row(folder, glob, name, workers, rounds, unit_bytes, Path(scratch)) for name in tokenizers]


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

    def clear(_: str) -> None:
        for suffix in (".bin", ".idx", ".json"):
            Path(f"{prefix}{suffix}").unlink(missing_ok=True)

    def run_bare() -> None:
        timed = map_in_order(bare, source.units(unit_bytes), workers)
        within.append(sum(seconds for _, seconds in timed) / workers)

    def run_prepare() -> None:
        size = prepare(request, first).description.bytes
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
        "seconds_by_round": {"prepare": whole, "bare": within},
    }


def _train(units: Iterable[WorkUnit], folder: Path) -> Path:
    """Train byte pairs on the first megabytes of the text and return the tokenizer's file."""
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
        raise DataError("the files have no text to train a tokenizer on: choose others")
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


def measure_loader(rounds: int, corpus_tokens: int = CORPUS_TOKENS, seconds: float = 1.0) -> list[dict[str, Any]]:
    """Return one row per sequence length: tokens per second of one process, medians over the rounds."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "tokens.bin")
        np.random.default_rng(0).integers(0, 50_000, corpus_tokens, dtype=np.uint16).tofile(file)
        tokens = np.memmap(file, mode="r", dtype=np.uint16)
        tokens.max()  # in the page cache
        return [_loader_row(tokens, length, rounds, seconds) for length in SEQUENCE_LENGTHS]


def _loader_row(tokens: np.ndarray[Any, Any], length: int, rounds: int, seconds: float) -> dict[str, Any]:
    batch = max(1, BATCH_TOKENS // length)
    corpora = [PackedCorpus(half, length, HEADS) for half in np.split(tokens, [len(tokens) // 2])]
    rates: dict[str, list[float]] = {name: [] for name in ("samples", "with_targets", "with_document_masks")}
    for seed in range(rounds):
        samples = BlendedSamples(corpora, SOURCES, seed)
        for name, round_rates in rates.items():
            start, read = time.perf_counter(), 0
            while (spent := time.perf_counter() - start) < seconds:
                read_batch = torch.from_numpy(samples.read(read, batch))
                if name != "samples":
                    documents = document_ids(read_batch, 0) if name == "with_document_masks" else None
                    head_targets(read_batch, range(1, HEADS + 1), length, documents)
                read += batch
            round_rates.append(read * length / spent)
    return {"sequence_length": length, "batch": batch} | {
        f"{name}_tokens_per_second": statistics.median(round_rates) for name, round_rates in rates.items()
    }
