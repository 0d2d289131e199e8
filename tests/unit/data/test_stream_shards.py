"""A stream in logical shards: one order of the samples at every layout, and no rank tokenizes more than it must."""

import json
from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import Any

import datasets as datasets_library
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from mtp_dist.config import Config
from mtp_dist.data.datasets import Datasets, load_datasets
from mtp_dist.data.sources import text_sources as inputs
from mtp_dist.data.sources.text_sources import open_inputs
from mtp_dist.data.tokenizer import ByteTokenizer
from mtp_dist.errors import UserError
from tests.tiny import tiny_config

BATCH, LENGTH = 12, 5
UNIT_BYTES = 300


def write_jsonl(path: Path, letter: str, count: int = 200) -> dict[str, Any]:
    random = Random(letter)
    texts = [f"{letter}{number}" * random.randrange(0, 4) for number in range(count)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return {"path": str(path), "stream": True}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return write_jsonl(tmp_path_factory.mktemp("shards") / "documents.jsonl", "a")


@pytest.fixture(autouse=True, scope="module")
def small_units() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inputs, "UNIT_BYTES", UNIT_BYTES)
        yield


def config_of(shards: int, *sources: dict[str, Any], world_size: int = 1) -> Config:
    return tiny_config(
        world_size,
        data={"train": list(sources), "stream_shards": shards},
        train={"global_batch_size": BATCH, "micro_batch_size": 1, "sequence_length": LENGTH},
        heads={"count": 2},
    )


class Ranks:
    """The data-parallel ranks of a run, each with samples of its own."""

    def __init__(self, config: Config, number: int, state: Any = None) -> None:
        self.datasets = [load_datasets(config) for _ in range(number)]
        self.samples_read = 0
        for of_rank in self.datasets if state else ():
            self.samples_read = of_rank.restore(state, may_change=False)

    def read(self, steps: int) -> NDArray[np.int64]:
        """The samples of the next steps, [steps, BATCH, S + n], each step's in a canonical order."""
        batches = []
        for _ in range(steps):
            ranks = len(self.datasets)
            parts = [
                of_rank.train.read(self.samples_read, BATCH, rank, ranks) for rank, of_rank in enumerate(self.datasets)
            ]
            assert {len(part) for part in parts} == {BATCH // ranks}
            batch = np.concatenate(parts)
            batches.append(batch[np.lexsort(batch.T)])
            self.samples_read += BATCH
        return np.stack(batches)

    def state(self) -> Any:
        """The state in a checkpoint."""
        from mtp_dist.data.streaming import merge_states

        merged = merge_states([of_rank.train.state() for of_rank in self.datasets])
        return json.loads(json.dumps(self.datasets[0].state(self.samples_read, merged)))


@settings(max_examples=25, deadline=None)
@given(
    shards=st.sampled_from([1, 2, 4, 6]),
    runs=st.lists(st.tuples(st.sampled_from([1, 2, 3, 4]), st.integers(1, 4)), min_size=1, max_size=4),
)
def test_samples_are_the_same_at_every_layout_and_over_kills(
    source: dict[str, Any], shards: int, runs: list[tuple[int, int]]
) -> None:
    """Each run reads some steps and is killed; its number of ranks need not divide the shards."""
    config = config_of(shards, source)
    expected = Ranks(config, 1).read(sum(steps for _, steps in runs))
    found, state = [], None
    for number, steps in runs:
        ranks = Ranks(config, number, state)
        found.append(ranks.read(steps))
        state = ranks.state()
        ranks.read(1)  # of a step that is lost
    assert np.array_equal(np.concatenate(found), expected)


@pytest.mark.parametrize("shards", [1, 3, 4])
def test_sample_i_comes_from_shard_i_modulo_their_number(source: dict[str, Any], shards: int) -> None:
    """Which has every K-th work unit, packed by itself."""
    samples = load_datasets(config_of(shards, source)).train.read(0, 60)
    for shard, documents in enumerate(documents_of_shards(source, shards)):
        tokens = ByteTokenizer().encode_documents(documents)[0]
        for number, sample in enumerate(samples[shard::shards]):
            assert np.array_equal(sample, tokens[number * LENGTH :][: LENGTH + 2])


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_each_document_is_tokenized_by_one_rank(source: dict[str, Any], ranks: int) -> None:
    run = Ranks(config_of(4, source), ranks)
    tokenized: list[list[bytes]] = []
    for of_rank in run.datasets:
        tokenized.append(_record(of_rank))
    run.read(5)
    documents = [text for texts in tokenized for text in texts]
    assert len(set(documents)) == len(documents) > 40
    amounts = [sum(map(len, texts)) for texts in tokenized]
    assert max(amounts) < 1.5 * sum(amounts) / ranks


def _record(datasets: Datasets) -> list[bytes]:
    """The documents with text that a rank tokenizes from now on."""
    tokenizer, texts = datasets.tokenizer, list[bytes]()
    encode = tokenizer.encode_documents

    def recording(documents: Sequence[bytes]) -> Any:
        texts.extend(filter(None, documents))
        return encode(documents)

    tokenizer.encode_documents = recording  # type: ignore[method-assign]
    return texts


def test_a_blend_has_its_proportions_in_every_batch_and_in_every_shard(tmp_path: Path) -> None:
    sources = []
    for letter, weight in (("a", 3.0), ("b", 1.0)):
        lines = [json.dumps({"text": letter * 99}) + "\n" for _ in range(40)]
        (tmp_path / letter).write_text("".join(lines))
        (tmp_path / letter).rename(tmp_path / f"{letter}.jsonl")
        sources.append({"path": str(tmp_path / f"{letter}.jsonl"), "stream": True, "weight": weight})
    samples = load_datasets(config_of(4, *sources)).train.read(0, 8 * BATCH)
    from_second = (samples == ord("b")).any(axis=1)
    assert from_second.reshape(-1, BATCH).sum(axis=1).tolist() == [3] * 8
    assert from_second.reshape(-1, 4).sum(axis=0).tolist() == [6] * 4


@pytest.mark.parametrize("saved", [True, False])
def test_datasets_are_sharded_too(tmp_path: Path, saved: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [f"text {number:02}" * 3 for number in range(90)]
    dataset = datasets_library.Dataset.from_dict({"text": texts})
    dataset.save_to_disk(tmp_path / "saved")
    if not saved:  # as one of the hub in 9 files
        monkeypatch.setattr(inputs, "load_dataset", lambda *_: dataset.to_iterable_dataset(num_shards=9))
    path = {"path": str(tmp_path / "saved"), "stream": True}
    config, run = config_of(3, path), Ranks(config_of(3, path), 3)
    tokenized = [_record(of_rank) for of_rank in run.datasets]
    first = run.read(4)
    resumed = Ranks(config, 1, run.state())
    assert np.array_equal(np.concatenate([first, resumed.read(4)]), Ranks(config, 1).read(8))
    documents = [text for of_rank in tokenized for text in of_rank]
    assert len(set(documents)) == len(documents) and all(tokenized)
    too_many = load_datasets(config_of(100 if saved else 10, path)).train
    with pytest.raises(UserError, match=r"saved' has only (90 documents|9 files): .*data\.stream_shards .* at most"):
        too_many.read(0, BATCH)


def test_what_cannot_be_split_or_changed_is_refused(tmp_path: Path, source: dict[str, Any]) -> None:
    small = write_jsonl(tmp_path / "small.jsonl", "a", count=10)
    with pytest.raises(UserError, match=r"small\.jsonl' has no document with text in shard 1 of 4: .*stream_shards"):
        load_datasets(config_of(4, small)).train.read(0, BATCH)
    with pytest.raises(UserError, match=r"^data\.stream_shards = 4 splits streams: .*`stream: true`"):
        config_of(4, source | {"stream": False})
    run = Ranks(config_of(4, source), 1)
    run.read(1)
    with pytest.raises(UserError, match=r"^data\.stream_shards is 2, the checkpoint's streams are in 4 shards: set it"):
        Ranks(config_of(2, source), 1, run.state())


def test_a_resume_with_other_streams_keeps_the_place_of_each(tmp_path: Path, source: dict[str, Any]) -> None:
    """In each shard, also when weights and the sequence length change."""
    other = write_jsonl(tmp_path / "other.jsonl", "b")
    before = load_datasets(config_of(2, source))
    earlier = before.train.read(0, BATCH)
    state = json.loads(json.dumps(before.state(BATCH, before.train.state())))
    longer = config_of(2, other, source | {"weight": 2.0})
    longer = longer.model_copy(update={"train": longer.train.model_copy(update={"sequence_length": 9})})
    after = load_datasets(longer)
    later = after.train.read(after.restore(state, may_change=True), BATCH)
    for shard, documents in enumerate(documents_of_shards(source, 2)):
        continued = [sample[:9] for sample in later[shard::2] if ord("a") in sample]
        assert len(continued) == 4
        tokens = np.concatenate([*(sample[:LENGTH] for sample in earlier[shard::2]), *continued])
        assert np.array_equal(tokens, ByteTokenizer().encode_documents(documents)[0][: len(tokens)])


def documents_of_shards(source: dict[str, Any], shards: int) -> list[list[bytes]]:
    units = list(open_inputs([source["path"]], inputs.InputOptions())[0].units(UNIT_BYTES))
    assert len(units) > 2 * shards
    return [[text for unit in units[shard::shards] for text in unit.documents()] for shard in range(shards)]


@pytest.mark.parametrize(("shards", "parts"), [(1, 1), (4, 2), (6, 6), (12, 6)])
def test_ranks_that_tokenize_more_than_their_part_get_a_line(source: dict[str, Any], shards: int, parts: int) -> None:
    from mtp_dist.config.notices import notices

    config = config_of(shards, source, world_size=6)
    lines = [line for line in notices(config, 257) if line.startswith("data.stream_shards")]
    assert lines == [
        f"data.stream_shards = {shards} is not a multiple of the data-parallel degree 6: each rank tokenizes "
        f"1/{parts} of the stream instead of 1/6"
    ] * (parts < 6)
