"""Prompts and completions: which tokens are read, and which of them are targets."""

import gzip
import json

import datasets
import numpy as np
import pandas
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mtp_dist.cli.data_tables import describe
from mtp_dist.config import HeadsConfig
from mtp_dist.data.build_tokenizer import build_tokenizer
from mtp_dist.data.corpus import open_corpus, unigram_entropy
from mtp_dist.data.dataloader import Batches
from mtp_dist.data.datasets import load_datasets
from mtp_dist.data.prepare.inspection import PROMPT, inspect_corpus
from mtp_dist.distributed.topology import Topology
from mtp_dist.errors import ConfigError, DataError
from mtp_dist.model.targets import IGNORE_INDEX
from tests.unit.data.preparing import data_config, error_of, made, request

END = 256
RECORDS = [{"id": i, "q": f"ask {i}: é" * (i % 3), "a": f"answer {i}\n" * (i % 4)} for i in range(24)]
"""Some without a prompt, some without a completion."""
FIELDS = {"prompt_field": "q", "completion_field": "a"}
STREAM = [
    token
    for record in RECORDS
    if record["a"]
    for token in (*(~byte for byte in record["q"].encode()), *record["a"].encode(), END)
]
"""All tokens, those of prompts as complements."""
JSON_LINES = "".join(json.dumps(record) + "\n" for record in RECORDS).encode()
FRAME = pandas.DataFrame(RECORDS)
FILES = {
    "a.jsonl": JSON_LINES,
    "a.jsonl.gz": gzip.compress(JSON_LINES),
    "a.json": json.dumps(RECORDS).encode(),
    "a.csv": FRAME.to_csv(index=False).encode(),
    "a.parquet": FRAME.to_parquet(row_group_size=7),
}


@pytest.fixture
def lines(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(JSON_LINES)
    return path


def packed(read):
    """Return all samples of 8 + 2 tokens of the stream in the order of their first token, and those that were read."""
    expected = [STREAM[i : i + 10] for i in range(0, len(STREAM) - 9, 8)]
    return sorted(expected), sorted(read.tolist())


@pytest.mark.parametrize("name", [*FILES, "saved"])
def test_every_kind_of_records_marks_its_prompts(tmp_path, name):
    path = tmp_path / name
    if name in FILES:
        path.write_bytes(FILES[name])
    else:
        datasets.Dataset.from_pandas(FRAME).save_to_disk(path)
    for source in ({"path": str(path)}, {"path": str(path), "stream": True}):
        train = load_datasets(data_config(source, data=FIELDS)).train
        expected, read = packed(train.read(0, (len(STREAM) - 2) // 8))
        assert read == expected
    prepared = made(request(path, tmp_path / "corpus", field="a", prompt_field="q"))
    marked = [token for token in STREAM if token < 0]
    assert prepared.description.prompt_tokens == len(marked) and prepared.description.empty_documents == 6
    assert f"{len(marked)} tokens are those of prompts" in describe(tmp_path / "corpus", prepared)
    assert open_corpus(tmp_path / "corpus", "x").tokens.tolist() == STREAM
    from_corpus, from_text = (
        load_datasets(data_config(tmp_path / "corpus")),
        load_datasets(data_config(path, data=FIELDS)),
    )
    assert np.array_equal(from_corpus.train.read(0, 40), from_text.train.read(0, 40)), "the mark comes with the corpus"


def test_prompts_are_read_and_shown_but_counted_apart(lines, tmp_path, trained_tokenizers):
    name = str(trained_tokenizers / "tokenizer.json")
    tokenizer = build_tokenizer(name)
    made(request(lines, tmp_path / "corpus", name, field="a", prompt_field="q", invalid_utf8="replace"))
    corpus = open_corpus(tmp_path / "corpus", "x")
    expected = []
    for record in RECORDS:
        prompt, completion = (tokenizer.encode(record[field]).tolist() for field in ("q", "a"))
        if completion:
            expected += [*(~token for token in prompt), *completion, tokenizer.end_of_document]
    assert corpus.tokens.tolist() == expected, "a prompt is encoded on its own, as at inference"
    report = inspect_corpus(corpus, tokenizer, 2, 40, 1, 5, lambda done: None)
    assert report.prompt_tokens == (corpus.tokens < 0).sum() > 0
    shown = [text == PROMPT for text in report.samples[0].targets[0]]
    assert shown == (corpus.tokens[1:41] < 0).tolist() and 0 < sum(shown) < 40
    assert PROMPT not in report.samples[0].tokens

    [validation] = load_datasets(data_config(lines, lines, FIELDS, validation_samples=1000)).validation
    read = np.concatenate([STREAM[i : i + 10] for i in range(0, len(STREAM) - 9, 8)])
    counts = np.bincount(read[read >= 0])
    assert validation.unigram_entropy == unigram_entropy(counts)
    assert validation.bytes_per_token == pytest.approx(1 - counts[END] / counts.sum())


def batch_of(config, validation=False):
    """Return the first batch of a run in one process, as one micro-batch."""
    loaded = load_datasets(config)
    batches = Batches(config, Topology(1, 1, 1, 0, 0, 0, torch.device("cpu")), loaded)
    batch = batches.validation_batch(loaded.validation[0].samples) if validation else batches.next_train_batch()
    batches.close()
    return batch


def read_samples(source):
    return load_datasets(data_config(source, data=FIELDS)).train.read(0, 9)


TEXT = st.text("xyz", max_size=9)


@settings(max_examples=25)
@given(
    pairs=st.lists(st.tuples(TEXT, TEXT.filter(bool)), min_size=6, max_size=12),
    heads=st.integers(1, 4),
    across=st.booleans(),
    validation=st.booleans(),
)
def test_targets_are_those_of_completions_and_ends(tmp_path_factory, pairs, heads, across, validation):
    path = tmp_path_factory.getbasetemp() / "pairs.jsonl"
    path.write_text("".join(json.dumps({"q": prompt, "a": completion}) + "\n" for prompt, completion in pairs))
    config = data_config(
        path, path, FIELDS | {"loss_across_documents": across}, heads, micro_batch_size=4, sequence_length=3
    )
    try:
        batch = batch_of(config, validation)
    except DataError as error:
        assert "has only prompts in its" in str(error) or "is too small" in str(error)
        return
    tokens, counts, document = [], [], []
    for number, (prompt, completion) in enumerate(pairs):
        tokens += [*prompt.encode(), *completion.encode(), END]
        counts += [False] * len(prompt) + [True] * (len(completion) + 1)
        document += [number] * (len(prompt) + len(completion) + 1)
    windows = {}
    for start in range(0, len(tokens) - heads - 2, 3):
        windows.setdefault(tuple(tokens[start : start + 3 + heads]), []).append(start)
    for part in batch.micro_batches:
        for sample, targets in zip(part.samples.tolist(), part.targets.transpose(0, 1).tolist(), strict=True):
            allowed = [
                [
                    [
                        tokens[t + k] if counts[t + k] and (across or document[t] == document[t + k]) else IGNORE_INDEX
                        for t in range(start, start + 3)
                    ]
                    for k in range(1, heads + 1)
                ]
                for start in windows[tuple(sample)]
            ]
            repeated = validation and {x for head in targets for x in head} == {IGNORE_INDEX}
            assert targets in allowed or repeated
    valid = sum((part.targets != IGNORE_INDEX).sum((1, 2)) for part in batch.micro_batches)
    assert batch.valid_targets.tolist() == valid.tolist()


def test_mistakes_name_the_key(lines, tmp_path):
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"q": "x", "a": "y"}\n\n{"q": "x", "b": "y"}\n')
    for source in ({"path": str(broken)}, {"path": str(broken), "stream": True}):
        message = error_of(DataError, read_samples, source)
        assert message == (
            f"data.train.0.path = '{broken}': {broken}, line 3 has no field 'a', it has 'q', 'b': choose another "
            "completion_field"
        )
    options = {"field": "a", "prompt_field": "question"}
    message = error_of(DataError, made, request(lines, tmp_path / "corpus", **options))
    assert message.endswith("has no field 'question', it has 'id', 'q', 'a': choose another prompt_field")
    text = tmp_path / "a.txt"
    text.write_text("no records")
    message = error_of(DataError, load_datasets, data_config(text, data=FIELDS))
    assert message.endswith("a.txt is text, not records with the fields 'q' and 'a': convert it to JSON lines")

    made(request(lines, tmp_path / "plain", field="a"))
    message = error_of(ConfigError, load_datasets, data_config(tmp_path / "plain", data=FIELDS))
    assert message.startswith(f"data.prompt_field does not apply to data.train.0.path = '{tmp_path / 'plain'}', a ")
    for stream in (False, True):
        config = data_config({"path": str(lines), "stream": stream}, data=FIELDS)
        config = config.model_copy(update={"heads": HeadsConfig(count=2, token_order=1.0)})
        message = error_of(ConfigError, load_datasets, config)
        assert message.startswith("heads.token_order ranks the tokens of the next document, and data.train.0 has prom")
    message = error_of(ConfigError, data_config, lines, data={"prompt_field": "q"})
    assert message == "data.prompt_field = 'q' and data.completion_field = null belong together: give both or neither"
    message = error_of(ConfigError, data_config, {"path": "x", "field": "b"}, data=FIELDS)
    assert message == "data.train.0.field = 'b' has no effect with data.completion_field = 'a': remove it"
