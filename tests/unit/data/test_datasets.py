import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from mtp_dist.config import Config, build_config
from mtp_dist.data import corpus, text_tokenizers
from mtp_dist.data.blending import BlendedSamples
from mtp_dist.data.datasets import TrainingSamples, ValidationSamples, load_datasets
from mtp_dist.data.prepare.prepare import Request, prepare
from mtp_dist.data.prepare.progress import PreparationProgress
from mtp_dist.data.samples import PackedCorpus
from mtp_dist.data.sources import text_sources as inputs
from mtp_dist.data.sources.text_sources import Input, InputOptions
from mtp_dist.data.streaming import StreamedSamples
from mtp_dist.errors import UserError
from mtp_dist.pretrain import main
from tests.tiny import resolved


def config(train: list[dict[str, Any]], validation: list[dict[str, Any]], **train_keys: int) -> Config:
    return resolved(
        build_config(
            {
                "model": {"hidden_size": 8, "trunk_layers": 1, "num_attention_heads": 1},
                "heads": {"count": 2},
                "data": {"train": train, "validation": validation},
                "train": {
                    "steps": 5,
                    "global_batch_size": 4,
                    "micro_batch_size": 1,
                    "sequence_length": 8,
                    **train_keys,
                },
            }
        )
    )


def write(path: Path, text: str) -> dict[str, Any]:
    path.write_text(text)
    return {"path": str(path)}


@given(st.integers(1, 120), st.integers(1, 150))
def test_validation_samples_are_distinct_ordered_and_spread(size: int, wanted: int) -> None:
    samples = ValidationSamples(PackedCorpus(np.arange(size + 1, dtype=np.uint16), 1, 1), wanted)
    places = [int(samples[i][0]) for i in range(len(samples))]
    assert len(places) == min(wanted, size)
    gaps = np.diff([*places, size])
    assert places[0] == 0 and gaps.min() >= 1 and gaps.max() - gaps.min() <= 1
    for index in (-1, len(samples)):
        with pytest.raises(IndexError):
            samples[index]


def test_a_run_gets_samples_and_figures_of_its_validation(tmp_path: Path) -> None:
    train, validation = write(tmp_path / "t.txt", "abc" * 50), write(tmp_path / "v.txt", "ab" * 20)
    datasets = load_datasets(config([train], [validation], validation_samples=3))
    assert datasets.train.read(19, 1).shape == (1, 10)
    assert datasets.train_names == ("0",) and datasets.epochs(36) == {"0": 2.0}, "of 18 samples"
    (found,) = datasets.validation
    assert (found.name, len(found.samples)) == (None, 3)
    assert found.bytes_per_token == 40 / 41
    assert found.unigram_entropy == pytest.approx(math.log(2)), "of the samples, which hold no end of a document"


def test_validation_sets_have_names_and_figures_of_their_own(tmp_path: Path) -> None:
    sources = [write(tmp_path / "a.txt", "a" * 15), write(tmp_path / "b.txt", "bc" * 15)]
    named = [source | {"name": name} for source, name in zip(sources, ("one", "two"), strict=True)]
    one, two = load_datasets(config(sources, named)).validation
    assert (one.name, two.name) == ("one", "two")
    assert (one.bytes_per_token, two.bytes_per_token) == (15 / 16, 30 / 31)
    assert one.unigram_entropy == 0 and two.unigram_entropy == pytest.approx(math.log(2), rel=0.01)
    for names in (["x", "x"], ["1", "x"]):
        wrong = [source | {"name": name} for source, name in zip(sources, names, strict=True)]
        with pytest.raises(UserError, match=r"^data\.train has sources with the names "):
            config(wrong, [])
    for names in ([None, None], ["x", "x"], ["x", None]):
        wrong = [source | {"name": name} for source, name in zip(sources, names, strict=True)]
        with pytest.raises(UserError, match=r"^data\.validation has 2 sets with the names .* give each a `name`"):
            config(sources, wrong)


def test_weights_reach_the_blend(tmp_path: Path) -> None:
    sources = [write(tmp_path / "a.txt", "a" * 30), write(tmp_path / "b.txt", "b" * 30) | {"weight": 3.0}]
    train = load_datasets(config(sources, [])).train
    assert sum(ord("b") in sample for sample in train.read(0, 20)) == 15


def test_no_validation_source_means_no_validation(tmp_path: Path) -> None:
    assert load_datasets(config([write(tmp_path / "t.txt", "x" * 99)], [])).validation == ()


def test_a_source_named_twice_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mtp_dist.data import run_sources as opened

    named: list[list[str]] = []
    really_open = opened.open_inputs

    def counting(names: list[str], options: InputOptions) -> list[Input]:
        named.append(names)
        return really_open(names, options)

    monkeypatch.setattr(opened, "open_inputs", counting)
    source = write(tmp_path / "t.txt", "x" * 99)
    load_datasets(config([source, source | {"weight": 2.0}], [source | {"name": "same"}]))
    assert named == [[source["path"]]]


def prepared(folder: Path, documents: list[bytes], tokenizer: str = "bytes") -> Path:
    lines = "".join(json.dumps({"text": document.decode()}) + "\n" for document in documents)
    (folder / "documents.jsonl").write_text(lines)
    request = Request((str(folder / "documents.jsonl"),), folder / "corpus", tokenizer)
    prepare(request, PreparationProgress(Console(quiet=True)))
    return folder / "corpus"


def test_a_prepared_corpus_is_the_same_as_its_documents(tmp_path: Path) -> None:
    documents = [b"abc" * 20, b"defg" * 15, b"h" * 33]
    prefix = prepared(tmp_path, documents)
    sources = [{"path": str(prefix)}, {"path": f"{prefix}.bin"}, {"path": str(tmp_path / "documents.jsonl")}]
    from_corpus, from_bin, from_text = (load_datasets(config([source], [source])) for source in sources)
    for other in (from_bin, from_text):
        assert np.array_equal(from_corpus.train.read(0, 20), other.train.read(0, 20))
        assert from_corpus.validation[0].bytes_per_token == other.validation[0].bytes_per_token == 153 / 156
    assert isinstance(from_corpus.train, BlendedSamples)
    assert isinstance(from_corpus.train.corpora[0].tokens, np.memmap), "it stays on disk"


def test_a_corpus_of_megatrons_own_builder_is_read_unchanged(tmp_path: Path) -> None:
    """Without our JSON; int32 tokens; documents of several sequences."""
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=np.int32)
    documents = [np.array([*b"abcdef" * 9, 256]), np.array([*b"xyz" * 20, 256])]
    for document in documents:
        builder.add_document(torch.from_numpy(document), [10, len(document) - 10])
    builder.finalize(str(tmp_path / "theirs.idx"))
    source = {"path": str(tmp_path / "theirs")}
    datasets = load_datasets(config([source], [source], validation_samples=99))
    stream = np.concatenate(documents)
    (validation,) = datasets.validation
    for index in range(len(validation.samples)):
        assert np.array_equal(validation.samples[index], stream[index * 8 : index * 8 + 10])
    assert 0.97 < validation.bytes_per_token < 1, "decoded, because nobody has counted them"


def test_a_corpus_of_another_tokenizer_is_refused(tmp_path: Path) -> None:
    prefix = prepared(tmp_path, [b"abc" * 50])
    description = json.loads(prefix.with_suffix(".json").read_text())
    description["tokenizer"] |= {"name": "other", "sha256": "0" * 64}
    prefix.with_suffix(".json").write_text(json.dumps(description))
    with pytest.raises(UserError, match=r"^data\.train\.0\.path = .*corpus' was prepared with the tokenizer 'other'"):
        load_datasets(config([{"path": str(prefix)}], []))


def test_ids_beyond_the_vocabulary_are_refused_when_they_are_read(tmp_path: Path) -> None:
    """Not at the start, when every rank would read the corpus whole."""
    prefix = prepared(tmp_path, [b"abc" * 50])
    prefix.with_suffix(".json").unlink()
    tokens = np.memmap(prefix.with_suffix(".bin"), mode="r+", dtype=np.uint16)
    tokens[77] = 300
    tokens.flush()
    path = {"path": str(prefix)}
    train = load_datasets(config([path], [])).train
    with pytest.raises(UserError, match=r"token 77 of .*corpus\.bin has the id 300, the vocabulary has 257"):
        train.read(0, 18)
    with pytest.raises(UserError, match=r"^data\.validation\.0\.path = .*token 77 of .*corpus\.bin has the id 300"):
        load_datasets(config([write(tmp_path / "t.txt", "x" * 99)], [path]))
    good = [index for index in range(18) if _is_readable(train, index)]
    assert 16 <= len(good) < 18, "only the samples with it"
    with tokens.filename.open("r+b") as file:
        file.truncate(100)
    with pytest.raises(UserError, match=r"corpus\.bin has 100 bytes, it had 302"):
        train.read(good[0], 1)


def _is_readable(train: TrainingSamples, index: int) -> bool:
    try:
        train.read(index, 1)
    except UserError:
        return False
    return True


def test_other_data_is_refused_on_resume_unless_it_may_change(tmp_path: Path) -> None:
    first, second = (write(tmp_path / name, name * 99) for name in ("a.txt", "bb.txt"))
    for stream in (False, True):
        before, after = (load_datasets(config([source | {"stream": stream}], [])) for source in (first, second))
        before.train.read(0, 4)
        state = json.loads(json.dumps(before.state(4, before.train.state())))
        assert load_datasets(config([first | {"stream": stream}], [])).restore(state, may_change=False) == 4
        with pytest.raises(UserError, match=r"^data\.train\.0 has other data than the run was trained on so far"):
            after.restore(state, may_change=False)
        assert after.restore(state, may_change=True) == 4
        assert after.train.read(4, 1).shape == (1, 10)
    more = load_datasets(config([first | {"stream": True}, second | {"stream": True}], []))
    with pytest.raises(UserError, match=r"^data\.train\.1 has other data"):
        more.restore(state, may_change=False)


@pytest.mark.parametrize(("option", "value"), [("split", "train"), ("subset", "en"), ("stream", True)])
def test_what_is_prepared_cannot_be_chosen_from(tmp_path: Path, option: str, value: object) -> None:
    prefix = prepared(tmp_path, [b"abc" * 50])
    with pytest.raises(UserError, match=rf"^data\.validation\.0\.{option} chooses what is read of a source"):
        load_datasets(config([{"path": str(prefix)}], [{"path": str(prefix), option: value}]))


def test_streams_train_and_validate(tmp_path: Path) -> None:
    prepared(tmp_path, [b"abc" * 20, b"defg" * 15, b"h" * 33])
    source = {"path": str(tmp_path / "documents.jsonl"), "stream": True}
    datasets = load_datasets(config([source], [source], validation_samples=2))
    assert isinstance(datasets.train, StreamedSamples)
    assert bytes(datasets.train.read(0, 1)[0].tolist()) == b"abcabcabca"
    assert len(datasets.validation[0].samples) == 2
    with pytest.raises(UserError, match=r"^data\.train has sources with and without `stream`"):
        config([source, source | {"stream": False}], [])


def test_a_source_that_is_too_small_is_named(tmp_path: Path) -> None:
    good, small = write(tmp_path / "t.txt", "x" * 99), write(tmp_path / "v.txt", "x" * 8)
    with pytest.raises(UserError, match=r"data\.validation\.0\.path = .*v\.txt.* too small: 9 tokens .* 8 \+ 2 = 10"):
        load_datasets(config([good], [small]))


def test_a_start_builds_the_tokenizer_once_and_opens_each_source_once(
    tmp_path: Path, trained_tokenizers: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the command line to the opening of the process group."""
    tokenizer = trained_tokenizers / "tokenizer.json"
    prefix = prepared(tmp_path, [b"abc" * 99], str(tokenizer))
    (tmp_path / "folder").mkdir()
    write(tmp_path / "folder" / "v.txt", "abc" * 99)
    Dataset.from_dict({"text": ["abc" * 99]}).save_to_disk(tmp_path / "saved")
    written = config([{"path": str(prefix)}, {"path": f"{prefix}.bin"}], []).model_dump(mode="json")
    written["data"]["validation"] = [{"path": str(tmp_path / name), "name": name} for name in ("folder", "saved")]
    written["data"]["validation"][0]["glob"] = "*.txt"
    written["data"]["tokenizer"], written["model"]["vocab_size"] = str(tokenizer), None
    written["run"] |= {"output_dir": str(tmp_path / "out"), "device": "cpu"}
    (tmp_path / "config.yaml").write_text(json.dumps(written))
    calls: Counter[str] = Counter()

    def count(owner: object, name: str) -> None:
        original = getattr(owner, name)

        def counting(*args: Any, **options: Any) -> Any:
            calls[getattr(owner, "__name__", "") + "." + name] += 1
            return original(*args, **options)

        monkeypatch.setattr(owner, name, counting)

    for owner, name in (
        (text_tokenizers.HuggingFaceTokenizer, "__init__"),
        (corpus, "read_index"),
        (inputs.FilesInput, "__init__"),
        (inputs.DatasetInput, "__init__"),
    ):
        count(owner, name)

    class StartedError(BaseException):
        pass

    def start(*_: object) -> None:
        raise StartedError

    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    monkeypatch.setattr(torch.cuda, "current_device", torch.cuda.current_device)
    monkeypatch.setattr("mtp_dist.distributed.topology.initialize_topology", start)
    with pytest.raises(StartedError):
        main(["--config", str(tmp_path / "config.yaml")])
    assert calls == {
        "HuggingFaceTokenizer.__init__": 1,
        "mtp_dist.data.corpus.read_index": 1,
        "FilesInput.__init__": 1,
        "DatasetInput.__init__": 1,
    }
