"""How fast samples and the heads' targets come out of a corpus on disk that is in the page cache.

A run makes the targets as well, and masks them by document where a key of `data` asks for it.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mtp_dist.data.blending import BlendedSamples
from mtp_dist.data.samples import PackedCorpus
from mtp_dist.model.targets import document_ids, head_targets

CORPUS_TOKENS = 100_000_000
SEQUENCE_LENGTHS = (512, 2048, 8192)
BATCH_TOKENS = 65_536
HEADS = 4
SOURCES = (3.0, 1.0)
"""Weights of the blend."""


def measure_loader(rounds: int, corpus_tokens: int = CORPUS_TOKENS, seconds: float = 1.0) -> list[dict[str, Any]]:
    """A row for each sequence length: million tokens a second of one process, medians over the rounds."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "tokens.bin")
        np.random.default_rng(0).integers(0, 50_000, corpus_tokens, dtype=np.uint16).tofile(file)
        tokens = np.memmap(file, mode="r", dtype=np.uint16)
        tokens.max()  # in the page cache
        return [_row(tokens, length, rounds, seconds) for length in SEQUENCE_LENGTHS]


def _row(tokens: np.ndarray[Any, Any], length: int, rounds: int, seconds: float) -> dict[str, Any]:
    batch = max(1, BATCH_TOKENS // length)
    corpora = [PackedCorpus(half, length, HEADS) for half in np.split(tokens, [len(tokens) // 2])]
    rates: dict[str, list[float]] = {name: [] for name in ("samples", "with_targets", "with_document_masks")}
    for seed in range(rounds):
        samples = BlendedSamples(corpora, SOURCES, seed)
        for name, of_round in rates.items():
            start, read = time.perf_counter(), 0
            while (spent := time.perf_counter() - start) < seconds:
                read_batch = torch.from_numpy(samples.read(read, batch))
                if name != "samples":
                    documents = document_ids(read_batch, 0) if name == "with_document_masks" else None
                    head_targets(read_batch, range(1, HEADS + 1), length, documents)
                read += batch
            of_round.append(read * length / spent)
    return {"sequence_length": length, "batch": batch} | {
        f"{name}_tokens_per_second": statistics.median(of_round) for name, of_round in rates.items()
    }
