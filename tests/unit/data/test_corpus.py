"""A prepared corpus opens as it was written; damage is reported."""

import struct
from dataclasses import replace
from functools import partial
from operator import itemgetter, methodcaller
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder

from mtp_dist.data.build_tokenizer import build_tokenizer
from mtp_dist.data.corpus import check_document_ends, check_ids, check_tokenizer, open_corpus
from mtp_dist.data.datasets import load_datasets
from mtp_dist.errors import DataError
from tests.unit.data.preparing import data_config, documents_of, error_of, made, request, write_jsonl

HEADER_BYTES = 34


@pytest.fixture
def prefix(tmp_path):
    """A corpus of three documents of bytes: "one", "two" and a longer one."""
    prefix = tmp_path / "v1.0" / "corpus.small"
    made(request(write_jsonl(tmp_path / "a.jsonl", ("one", "two", "x" * 50)), prefix))
    return prefix


def write_with_megatron(prefix, documents, dtype=np.int32):
    """Write documents of several sequences, as Megatron-LM's own tools do."""
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype)
    for document in documents:
        for sequence in document:
            builder.add_item(torch.tensor(sequence))
        builder.end_document()
    builder.finalize(f"{prefix}.idx")
    return prefix


def test_prepared_corpus_opens_here_and_in_megatron(prefix):
    corpus = open_corpus(prefix, "here")
    assert isinstance(corpus.tokens, np.memmap) and corpus.tokens.dtype == np.uint16
    assert bytes(corpus.tokens[:3].astype(np.uint8)) == b"one" and corpus.tokens[3] == 256
    assert corpus.documents == 3 and corpus.document_lengths.tolist() == [4, 4, 51]
    assert isinstance(corpus.document_lengths, np.memmap)
    assert corpus.num_bytes == 56 and corpus.description.source.inputs[0].endswith("a.jsonl")
    corpus.verify()
    dataset, documents = IndexedDataset(str(prefix)), [[*document, 256] for document in documents_of(prefix)]
    assert [sequence.tolist() for sequence in dataset] == documents
    assert dataset.document_indices.tolist() == [0, 1, 2, 3] and dataset.index.dtype == np.uint16
    open_corpus(write_with_megatron(prefix, [[document] for document in documents], np.uint16), "here").verify()


@pytest.mark.parametrize("dtype", [np.int32, np.uint16])
def test_megatron_corpus_opens_without_metadata(tmp_path, dtype):
    corpus = open_corpus(write_with_megatron(tmp_path / "a", [[[1, 2, 3]], [[4], [5, 6]], [[7]]], dtype), "here")
    assert corpus.tokens.tolist() == [1, 2, 3, 4, 5, 6, 7] and corpus.tokens.dtype == dtype
    assert corpus.documents == 3 and corpus.document_lengths.tolist() == [3, 3, 1]
    assert corpus.num_bytes is None and corpus.description is None
    check_tokenizer(corpus, build_tokenizer("bytes"))
    assert "no a.json lists the hash of" in error_of(DataError, corpus.verify)


def overwrite(offset, form, value):
    new = struct.pack(form, value)
    return lambda content: content[:offset] + new + content[offset + len(new) :]


replaced = partial(methodcaller, "replace")
DAMAGES = [
    ("bin", None, "is missing"),
    ("idx", None, "is missing"),
    ("bin", itemgetter(slice(-10)), "has 108 bytes, its index {prefix}.idx lists 59 tokens of 2 bytes = 118"),
    *(("idx", itemgetter(slice(n)), "is not a valid .idx file") for n in (0, 20)),
    *(("idx", itemgetter(slice(n)), "102 are needed for the 3 sequences and 4 document") for n in (34, 64, -1)),
    ("idx", overwrite(0, "<B", 0), "is not a valid .idx file"),
    ("idx", overwrite(9, "<Q", 2), "version 2 or dtype 8 of its header is unknown"),
    ("idx", overwrite(17, "<B", 99), "version 1 or dtype 99 of its header is unknown"),
    ("idx", overwrite(17, "<B", 7), "lists float32 numbers"),
    ("idx", overwrite(17, "<B", 4), "contradicts itself"),
    ("idx", overwrite(18, "<Q", 2**60), "has 102 bytes"),
    ("idx", overwrite(HEADER_BYTES, "<i", 5), "add up to 120 bytes of tokens, its last sequence ends at byte 118"),
    ("idx", overwrite(HEADER_BYTES + 4, "<i", -4), "contradicts itself"),
    ("idx", overwrite(HEADER_BYTES + 12, "<q", 2), "contradicts itself"),
    ("idx", overwrite(HEADER_BYTES + 28, "<q", 0), "contradicts itself"),
    ("idx", overwrite(HEADER_BYTES + 36, "<q", 1), "boundaries do not rise from 0 to its 3 sequences"),
    ("idx", overwrite(HEADER_BYTES + 52, "<q", 0), "boundaries do not rise"),
    ("idx", overwrite(HEADER_BYTES + 60, "<q", 9), "boundaries do not rise"),
    (
        "json",
        replaced(b": 59,", b": 60,"),
        "lists 60 tokens in 3 documents, the index {prefix}.idx lists 59 in 3",
    ),
    (
        "json",
        replaced(b'"format": 1', b'"format": 2'),
        "does not describe a corpus: format: Input should be 1",
    ),
    ("json", lambda content: b"{", "does not describe a corpus: the file: Invalid JSON"),
]


@pytest.mark.parametrize(("suffix", "damage", "reason"), DAMAGES)
def test_damaged_files_are_reported(prefix, suffix, damage, reason):
    file = Path(f"{prefix}.{suffix}")
    file.write_bytes(damage(file.read_bytes())) if damage else file.unlink()
    message = error_of(DataError, open_corpus, prefix, "data.train.0.path")
    assert message.startswith(f"data.train.0.path = '{prefix}': {file}") and reason.format(prefix=prefix) in message


def test_changed_and_unreadable_files_are_reported(prefix, monkeypatch):
    file = Path(f"{prefix}.bin")
    file.write_bytes(overwrite(40, "<B", 1)(file.read_bytes()))
    message = error_of(DataError, open_corpus(prefix, "here").verify)
    assert message.startswith(f"here = '{prefix}': {prefix}.bin has the SHA-256 ")
    monkeypatch.setattr(Path, "open", Mock(side_effect=PermissionError(13, "Permission denied", "a file")))
    assert "cannot read a file (Permission denied)" in error_of(DataError, open_corpus, prefix, "here")


def test_ids_outside_the_vocabulary_are_reported(tmp_path, prefix, monkeypatch):
    monkeypatch.setattr("mtp_dist.data.corpus.SCAN_BLOCK_TOKENS", 3)
    corpus = open_corpus(write_with_megatron(tmp_path / "a", [[[1, 2, 3, 4, 9, 5]]]), "here")
    check_ids(corpus, 10)
    message = error_of(DataError, check_ids, corpus, 9)
    assert f"token 4 of {tmp_path}/a.bin has the id 9, the vocabulary has 9 (0 to 8)" in message
    negative = open_corpus(write_with_megatron(tmp_path / "b", [[[1, 2, 3, -1]]]), "here")
    assert "token 3 of" in (message := error_of(DataError, check_ids, negative, 10**6)) and "the id -1" in message
    assert "token 3 of" in error_of(DataError, check_ids, open_corpus(prefix, "here"), 200)
    Path(f"{prefix}.bin").write_bytes(b"\xff\xff" * 59)
    check_ids(open_corpus(prefix, "here"), 257)  # metadata with this vocabulary is trusted
    assert "token 0 of" in error_of(DataError, check_ids, open_corpus(prefix, "here"), 256)


@pytest.mark.parametrize("ends", [[], [0], [256, 10]], ids=["no end", "another id", "an end that is not the last"])
@pytest.mark.parametrize("key", ["loss_across_documents", "attention_across_documents"])
def test_document_masks_require_document_ends(tmp_path, ends, key):
    """Megatron's tools write no end without --append-eod, or another tokenizer's: masks would have no effect."""
    texts = [[[*b"abcdef" * 9], [*b"g" * 9]], [[*b"xyz" * 20]]]
    wrong = write_with_megatron(tmp_path / "wrong", [[*text[:-1], [*text[-1], *ends]] for text in texts])
    right = write_with_megatron(tmp_path / "right", [[*text, [256]] for text in texts])
    load_datasets(data_config(wrong))
    load_datasets(data_config(right, data={key: False}))
    message = error_of(DataError, load_datasets, data_config(wrong, data={key: False}))
    assert message.startswith(f"data.train.0.path = '{wrong}': 2 of 2 checked documents do not end with ")
    assert "token 256" in message and f"data.{key} = false" in message and "--append-eod" in message


def test_document_ends_are_checked_without_reading_all_lengths(tmp_path):
    """A large corpus has gigabytes of lengths; a document's last sequence may be empty."""

    def check(end):
        corpus = open_corpus(write_with_megatron(tmp_path / str(end), [[[1, 2], [3, end]], [[4, 256], []], [[]]]), "a")
        corpus = replace(corpus, index=replace(corpus.index, lengths=None))
        check_document_ends(corpus, build_tokenizer("bytes"), "masks")

    check(256)
    message = error_of(DataError, check, 7)
    assert "1 of 2 checked documents" in message and "(most of them end with 7)" in message
