import json
import math
from contextlib import suppress
from unittest.mock import Mock, create_autospec

import numpy as np
import pytest
import torch
from datasets import Dataset

from mtp_dist.data import corpus, text_tokenizers
from mtp_dist.data.blending import BlendedSamples
from mtp_dist.data.datasets import load_datasets
from mtp_dist.data.sources.dataset_input import DatasetInput
from mtp_dist.data.sources.files_input import FilesInput
from mtp_dist.data.streaming import StreamedSamples
from mtp_dist.errors import ConfigError, DataError
from mtp_dist.pretrain import main
from tests.unit.data.preparing import data_config, error_of, made, request, write_jsonl
from tests.unit.data.test_corpus import write_with_megatron

TEXTS = ["abc" * 20, "defg" * 15, "h" * 33]


def write(path, text):
    path.write_text(text)
    return {"path": str(path)}


@pytest.fixture
def prefix(tmp_path):
    """A corpus of bytes."""
    made(request(write_jsonl(tmp_path / "documents.jsonl", TEXTS), tmp_path / "corpus"))
    return tmp_path / "corpus"


def test_run_gets_samples_and_baselines_of_its_validation(tmp_path):
    train, one = write(tmp_path / "t.txt", "abc" * 50), write(tmp_path / "one.txt", "a" * 15) | {"name": "one"}
    two = write(tmp_path / "two.txt", "aaab" * 10) | {"name": "two"}
    datasets = load_datasets(data_config(train, [one, two], validation_samples=3))
    assert datasets.train.read(19, 1).shape == (1, 10)
    assert datasets.train_names == ("0",) and datasets.epochs(36) == {"0": 2.0}, "of 18 samples"
    assert [(found.name, len(found.samples)) for found in datasets.validation] == [("one", 1), ("two", 3)]
    assert [found.bytes_per_token for found in datasets.validation] == [15 / 16, 40 / 41]
    # In nats, of the samples: three times "aaabaaabaa".
    entropy = 0.8 * math.log(5 / 4) + 0.2 * math.log(5)
    assert [found.unigram_entropy for found in datasets.validation] == [0, pytest.approx(entropy)]
    (unnamed,) = load_datasets(data_config(train, train)).validation
    assert unnamed.name is None and load_datasets(data_config(train)).validation == ()


def test_prepared_corpus_equals_its_documents(prefix, tmp_path):
    paths = [prefix, f"{prefix}.bin", tmp_path / "documents.jsonl"]
    from_corpus, from_bin, from_text = (load_datasets(data_config(path, path)) for path in paths)
    for other in (from_bin, from_text):
        assert np.array_equal(from_corpus.train.read(0, 20), other.train.read(0, 20))
        assert from_corpus.validation[0].bytes_per_token == other.validation[0].bytes_per_token == 153 / 156
    assert isinstance(from_corpus.train, BlendedSamples)
    assert isinstance(from_corpus.train.corpora[0].tokens, np.memmap), "it stays on disk"


def test_megatron_corpus_is_read_unchanged(tmp_path):
    """Without our metadata; int32 tokens; documents of several sequences."""
    documents = [[*b"abcdef" * 9, 256], [*b"xyz" * 20, 256]]
    path = write_with_megatron(tmp_path / "theirs", [[document[:10], document[10:]] for document in documents])
    (validation,) = load_datasets(data_config(path, path, validation_samples=99)).validation
    stream = np.concatenate(documents)
    for index in range(len(validation.samples)):
        assert np.array_equal(validation.samples[index], stream[index * 8 : index * 8 + 10])
    assert 0.97 < validation.bytes_per_token < 1, "decoded, because the bytes are unknown"


def test_prepared_corpus_has_its_tokenizer_and_no_parts_to_choose(prefix, trained_tokenizers):
    other = trained_tokenizers / "tokenizer.json"
    message = error_of(DataError, load_datasets, data_config(prefix, data={"tokenizer": str(other)}))
    assert message.startswith(f"data.train.0.path = '{prefix}' was prepared with the tokenizer 'bytes' ")
    assert f"which is not '{other}'" in message
    for option, value in (("split", "train"), ("subset", "en"), ("stream", True)):
        message = error_of(ConfigError, load_datasets, data_config(prefix, {"path": str(prefix), option: value}))
        assert message.startswith(f"data.validation.0.{option} does not apply to '{prefix}'")


def test_ids_outside_the_vocabulary_are_reported_when_they_are_read(prefix, tmp_path):
    """Not at the start, when every rank would read the whole corpus."""
    prefix.with_suffix(".json").unlink()
    tokens = np.memmap(prefix.with_suffix(".bin"), mode="r+", dtype=np.uint16)
    tokens[77] = 300
    tokens.flush()
    train = load_datasets(data_config(prefix)).train
    reason = f"token 77 of {prefix}.bin has the id 300, the vocabulary has 257"
    assert reason in error_of(DataError, train.read, 0, 18)
    message = error_of(DataError, load_datasets, data_config(tmp_path / "documents.jsonl", prefix))
    assert message.startswith("data.validation.0.path = ") and reason in message

    readable = []
    for index in range(18):
        with suppress(DataError):
            readable.append(train.read(index, 1))
    assert 16 <= len(readable) < 18, "all but those with it"


def test_other_data_is_refused_on_resume_unless_it_may_change(tmp_path):
    first, second = (write(tmp_path / name, name * 99) for name in ("a.txt", "bb.txt"))
    for stream in (False, True):
        before, after = (load_datasets(data_config(source | {"stream": stream})) for source in (first, second))
        before.train.read(0, 4)
        state = json.loads(json.dumps(before.state(4, before.train.state())))
        assert load_datasets(data_config(first | {"stream": stream})).restore(state, may_change=False) == 4
        message = error_of(ConfigError, after.restore, state, may_change=False)
        assert message.startswith("data.train.0 differs from the data that the run was trained on so far")
        assert after.restore(state, may_change=True) == 4
        assert after.train.read(4, 1).shape == (1, 10)
    more = load_datasets(data_config([first | {"stream": True}, second | {"stream": True}]))
    assert error_of(ConfigError, more.restore, state, may_change=False).startswith("data.train.1 differs from the data")


def test_streams_train_and_validate(tmp_path):
    source = {"path": str(write_jsonl(tmp_path / "documents.jsonl", TEXTS)), "stream": True}
    datasets = load_datasets(data_config(source, source, validation_samples=2))
    assert isinstance(datasets.train, StreamedSamples)
    assert bytes(datasets.train.read(0, 1)[0].tolist()) == b"abcabcabca"
    assert len(datasets.validation[0].samples) == 2


def test_too_small_source_is_reported(tmp_path):
    good, small = write(tmp_path / "t.txt", "x" * 99), write(tmp_path / "v.txt", "x" * 8)
    message = error_of(DataError, load_datasets, data_config(good, small))
    assert message.startswith("data.validation.0.path = ") and "v.txt' is too small: 9 tokens" in message
    assert "8 + 2 = 10: add text, lower" in message


def test_prepare_and_start_build_the_tokenizer_once_and_open_each_source_once(
    tmp_path, trained_tokenizers, monkeypatch
):
    """From the command line to the opening of the process group; sources named twice are read once."""

    def spy(owner, name):
        monkeypatch.setattr(owner, name, create_autospec(getattr(owner, name), side_effect=getattr(owner, name)))
        return getattr(owner, name)

    kinds = (FilesInput, DatasetInput)
    once = [spy(text_tokenizers.HuggingFaceTokenizer, "__init__"), spy(corpus, "read_index")]
    once += [spy(kind, name) for kind in kinds for name in ("__init__", "units")]
    tokenizer = trained_tokenizers / "tokenizer.json"
    made(request(write_jsonl(tmp_path / "a.jsonl", ["abc" * 99]), tmp_path / "corpus", tokenizer))
    assert [mock.call_count for mock in once] == [1, 0, 1, 1, 0, 0]
    (tmp_path / "folder").mkdir()
    write(tmp_path / "folder" / "v.txt", "abc" * 99)
    Dataset.from_dict({"text": ["abc" * 99]}).save_to_disk(tmp_path / "saved")
    folder = {"path": str(tmp_path / "folder"), "glob": "*.txt"}
    validation = [folder | {"name": "folder"}, {"path": str(tmp_path / "saved"), "name": "saved"}]
    train = [tmp_path / "corpus", tmp_path / "corpus.bin", folder, folder | {"weight": 2.0}]
    values = data_config(train, validation, data={"tokenizer": str(tokenizer)}).model_dump(mode="json")
    values["run"] |= {"output_dir": str(tmp_path / "out")}
    (tmp_path / "config.yaml").write_text(json.dumps(values))
    for mock in once:
        mock.reset_mock()
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    monkeypatch.setattr(torch.cuda, "current_device", torch.cuda.current_device)
    monkeypatch.setattr("mtp_dist.run.initialize_topology", Mock(side_effect=KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        main(["--config", str(tmp_path / "config.yaml")])
    assert [mock.call_count for mock in once] == [1] * 6
