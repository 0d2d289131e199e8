"""A prepared corpus opens as it was written, and says what is wrong where it is not."""

import json
import shutil
import struct
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder

from mtp_dist.config import build_config
from mtp_dist.data.corpus import Corpus, check_document_ends, check_ids, check_tokenizer, open_corpus
from mtp_dist.data.datasets import load_datasets
from mtp_dist.data.tokenizer import build_tokenizer
from mtp_dist.errors import UserError
from tests.tiny import resolved
from tests.unit.data.preparing import documents_of, made, request

HEADER_BYTES = 34


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with corpus.small, three documents of bytes: "one", "two" and a longer one."""
    folder = tmp_path_factory.mktemp("prepared")
    (folder / "a.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in ("one", "two", "x" * 50)))
    made(request(folder / "a.jsonl", folder / "v1.0" / "corpus.small"))
    return folder / "v1.0"


@pytest.fixture
def prefix(prepared: Path, tmp_path: Path) -> Path:
    """A copy of it that a test may spoil."""
    return Path(shutil.copytree(prepared, tmp_path / "v1.0")) / "corpus.small"


def path(prefix: Path, suffix: str) -> Path:
    return Path(f"{prefix}.{suffix}")


def message(prefix: Path) -> str:
    with pytest.raises(UserError) as error:
        open_corpus(prefix, "data.train.0.path")
    text = str(error.value)
    assert text.startswith(f"data.train.0.path = '{prefix}': ") and "\n" not in text
    return text


def write_with_megatron(prefix: Path, documents: list[list[list[int]]], dtype: type = np.int32) -> Path:
    """Documents of several sequences, as Megatron-LM's own tools write them."""
    builder = IndexedDatasetBuilder(str(path(prefix, "bin")), dtype=dtype)
    for document in documents:
        for sequence in document:
            builder.add_item(torch.tensor(sequence))
        builder.end_document()
    builder.finalize(str(path(prefix, "idx")))
    return prefix


def test_what_was_prepared_opens(prefix: Path) -> None:
    corpus = open_corpus(prefix, "here")
    assert isinstance(corpus.tokens, np.memmap) and corpus.tokens.dtype == np.uint16
    assert bytes(corpus.tokens[:3].astype(np.uint8)) == b"one" and corpus.tokens[3] == 256
    assert corpus.documents == 3 and corpus.document_lengths.tolist() == [4, 4, 51]
    assert isinstance(corpus.document_lengths, np.memmap)
    assert corpus.num_bytes == 56 and corpus.description is not None
    assert corpus.description.source.inputs[0].endswith("a.jsonl")
    corpus.verify()


def test_megatron_core_reads_what_was_prepared(prefix: Path) -> None:
    dataset = IndexedDataset(str(prefix))
    assert [sequence.tolist() for sequence in dataset] == [[*document, 256] for document in documents_of(prefix)]
    assert dataset.document_indices.tolist() == [0, 1, 2, 3]
    assert dataset.index.dtype == np.uint16


@pytest.mark.parametrize("dtype", [np.int32, np.uint16])
def test_what_megatron_core_wrote_opens_without_a_description(tmp_path: Path, dtype: type) -> None:
    written = write_with_megatron(tmp_path / "a", [[[1, 2, 3]], [[4], [5, 6]], [[7]]], dtype)
    corpus = open_corpus(written, "here")
    assert corpus.tokens.tolist() == [1, 2, 3, 4, 5, 6, 7] and corpus.tokens.dtype == dtype
    assert corpus.documents == 3 and corpus.document_lengths.tolist() == [3, 3, 1]
    assert corpus.num_bytes is None and corpus.description is None
    check_tokenizer(corpus, build_tokenizer("bytes"))
    with pytest.raises(UserError, match=r"no a\.json says what .*a\.bin should hold"):
        corpus.verify()


def test_a_description_beside_what_megatron_core_wrote_counts(prefix: Path) -> None:
    before = documents_of(prefix)
    write_with_megatron(prefix, [[[*document, 256]] for document in before], np.uint16)
    open_corpus(prefix, "here").verify()
    assert documents_of(prefix) == before


@pytest.mark.parametrize("suffix", ["bin", "idx"])
def test_a_missing_file_is_named(prefix: Path, suffix: str) -> None:
    path(prefix, suffix).unlink()
    assert f"{prefix}.{suffix} is missing" in message(prefix)


def test_a_cut_bin_is_told_with_both_sizes(prefix: Path) -> None:
    content = path(prefix, "bin").read_bytes()
    path(prefix, "bin").write_bytes(content[:-10])
    said = message(prefix)
    assert f"{prefix}.bin has 108 bytes, its index {prefix}.idx speaks of 59 tokens of 2 bytes = 118" in said


@pytest.mark.parametrize("left", [0, 20, HEADER_BYTES, HEADER_BYTES + 30, -1])
def test_a_cut_idx_is_told(prefix: Path, left: int) -> None:
    path(prefix, "idx").write_bytes(path(prefix, "idx").read_bytes()[:left])
    said = message(prefix)
    if 0 <= left < HEADER_BYTES:
        assert f"{prefix}.idx does not begin with the header of an index" in said
    else:
        assert f"{prefix}.idx has " in said and "102 are needed for the 3 sequences and 4 document" in said


def overwrite(prefix: Path, at: int, form: str, *values: int) -> None:
    content = bytearray(path(prefix, "idx").read_bytes())
    struct.pack_into(form, content, at, *values)
    path(prefix, "idx").write_bytes(content)


@pytest.mark.parametrize(
    ("at", "form", "value", "reason"),
    [
        (0, "<B", 0, "does not begin with the header"),
        (9, "<Q", 2, "version 2 and type 8, which are not known"),
        (17, "<B", 99, "version 1 and type 99, which are not known"),
        (17, "<B", 7, "speaks of float32 numbers"),
        (17, "<B", 4, "disagrees with itself"),
        (18, "<Q", 2**60, "has 102 bytes"),
        (HEADER_BYTES, "<i", 5, "lengths add up to 120 bytes of tokens, its last sequence ends at byte 118"),
        (HEADER_BYTES + 4, "<i", -4, "disagrees with itself"),
        (HEADER_BYTES + 12, "<q", 2, "disagrees with itself"),
        (HEADER_BYTES + 28, "<q", 0, "disagrees with itself"),
        (HEADER_BYTES + 36, "<q", 1, "boundaries do not rise from 0 to its 3 sequences"),
        (HEADER_BYTES + 52, "<q", 0, "boundaries do not rise"),
        (HEADER_BYTES + 60, "<q", 9, "boundaries do not rise"),
    ],
)
def test_a_damaged_index_is_told(prefix: Path, at: int, form: str, value: int, reason: str) -> None:
    overwrite(prefix, at, form, value)
    said = message(prefix)
    assert f"{prefix}.idx" in said and reason in said


def test_a_description_that_disagrees_is_told(prefix: Path) -> None:
    file = path(prefix, "json")
    content = json.loads(file.read_text())
    file.write_text(json.dumps(content | {"tokens": 60}))
    assert f"{file} speaks of 60 tokens in 3 documents, the index {prefix}.idx of 59 in 3" in message(prefix)
    file.write_text(json.dumps(content | {"format": 2}))
    assert f"{file} does not describe a corpus: format: Input should be 1" in message(prefix)
    file.write_text("{")
    assert f"{file} does not describe a corpus: all of it: Invalid JSON" in message(prefix)


def test_a_file_that_cannot_be_read_is_named(prefix: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Path, *_: object) -> None:
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "open", refuse)
    assert f"cannot read {prefix}.idx (Permission denied)" in message(prefix)


def test_changed_tokens_are_found_by_their_hash(prefix: Path) -> None:
    content = bytearray(path(prefix, "bin").read_bytes())
    content[40] ^= 1
    path(prefix, "bin").write_bytes(content)
    with pytest.raises(UserError, match=r"here = '.*corpus\.small': .*corpus\.small\.bin has the SHA-256"):
        open_corpus(prefix, "here").verify()


def test_another_tokenizer_is_told(prefix: Path, trained_tokenizers: Path) -> None:
    corpus = open_corpus(prefix, "here")
    check_tokenizer(corpus, build_tokenizer("bytes"))
    with pytest.raises(UserError, match=r"was prepared with the tokenizer 'bytes' .* which is not '.*tokenizer\.json'"):
        check_tokenizer(corpus, build_tokenizer(str(trained_tokenizers / "tokenizer.json")))


def ids_message(corpus: Corpus, vocab_size: int) -> str:
    with pytest.raises(UserError) as error:
        check_ids(corpus, vocab_size)
    return str(error.value)


def test_an_id_beyond_the_vocabulary_is_told_with_its_place(
    tmp_path: Path, prefix: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mtp_dist.data.corpus.SCAN_BLOCK_TOKENS", 3)
    corpus = open_corpus(write_with_megatron(tmp_path / "a", [[[1, 2, 3, 4, 9, 5]]]), "here")
    check_ids(corpus, 10)
    assert f"token 4 of {tmp_path}/a.bin has the id 9, the vocabulary has 9 (0 to 8)" in ids_message(corpus, 9)
    negative = open_corpus(write_with_megatron(tmp_path / "b", [[[1, 2, 3, -1]]]), "here")
    assert "token 3 of" in (said := ids_message(negative, 10**6)) and "the id -1" in said
    prepared = open_corpus(prefix, "here")
    check_ids(prepared, 257)
    assert "token 3 of" in ids_message(prepared, 200)


def test_ids_are_not_read_where_the_description_vouches_for_them(prefix: Path) -> None:
    path(prefix, "bin").write_bytes(b"\xff\xff" * 59)
    check_ids(open_corpus(prefix, "here"), 257)
    assert "token 0 of" in ids_message(open_corpus(prefix, "here"), 256)


@pytest.mark.parametrize("ends", [[], [0], [256, 10]], ids=["no end", "another id", "an end that is not the last"])
@pytest.mark.parametrize("key", ["loss_across_documents", "attention_across_documents"])
def test_document_masks_need_documents_that_end(tmp_path: Path, ends: list[int], key: str) -> None:
    """Megatron's tools write no end without --append-eod, or another tokenizer's: the masks would have no effect."""
    texts = [[[*b"abcdef" * 9], [*b"g" * 9]], [[*b"xyz" * 20]]]
    wrong = write_with_megatron(tmp_path / "wrong", [[*text[:-1], [*text[-1], *ends]] for text in texts])
    right = write_with_megatron(tmp_path / "right", [[*text, [256]] for text in texts])

    def load(prefix: Path, **keys: bool) -> None:
        model = {"hidden_size": 8, "trunk_layers": 1, "num_attention_heads": 1}
        train = {"steps": 5, "global_batch_size": 4, "micro_batch_size": 1, "sequence_length": 8}
        data = {"train": [{"path": str(prefix)}], **keys}
        load_datasets(resolved(build_config({"model": model, "heads": {"count": 2}, "data": data, "train": train})))

    load(wrong)
    load(right, **{key: False})
    with pytest.raises(UserError) as error:
        load(wrong, **{key: False})
    said = str(error.value)
    assert said.startswith(f"data.train.0.path = '{wrong}': 2 of 2 documents looked at do not end with ")
    assert "token 256" in said and f"data.{key} = false" in said and "--append-eod" in said


def test_the_ends_of_documents_are_found_without_reading_all_lengths(tmp_path: Path) -> None:
    """Which a large corpus has gigabytes of; a document's last sequence may be empty."""

    class Unread:
        def __getitem__(self, part: object) -> None:
            raise AssertionError(f"lengths {part} are read")

    for end, documents in ((256, [[[1, 2], [3, 256]], [[4, 256], []], [[]]]), (7, [[[1, 2], [3, 7]], [[4, 256], []]])):
        corpus = open_corpus(write_with_megatron(tmp_path / f"{end}", documents), "here")
        corpus = replace(corpus, index=replace(corpus.index, lengths=Unread()))
        if end == 256:
            check_document_ends(corpus, build_tokenizer("bytes"), "masks")
        else:
            with pytest.raises(UserError, match=r"1 of 2 documents .* \(most of them end with 7\)"):
                check_document_ends(corpus, build_tokenizer("bytes"), "masks")
