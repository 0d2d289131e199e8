import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mtp_dist.config import Config, ConfigError, SourceConfig, build_config
from mtp_dist.data import loading
from mtp_dist.data.loading import ValidationSamples, load_datasets
from mtp_dist.data.packing import PackedCorpus
from mtp_dist.data.sources import read_documents


def config(train: list[dict[str, Any]], validation: list[dict[str, Any]], **train_keys: int) -> Config:
    return build_config(
        {
            "model": {"hidden_size": 8, "trunk_layers": 1, "num_attention_heads": 1},
            "heads": {"count": 2},
            "data": {"train": train, "validation": validation},
            "train": {"steps": 5, "global_batch_size": 4, "micro_batch_size": 1, "sequence_length": 8, **train_keys},
        }
    )


def write(path: Path, text: str) -> dict[str, Any]:
    path.write_text(text)
    return {"path": str(path)}


@given(st.lists(st.integers(1, 30), min_size=1, max_size=4), st.integers(1, 150))
def test_validation_samples_are_distinct_ordered_and_spread(sizes: list[int], wanted: int) -> None:
    starts = np.cumsum([0, *sizes])
    corpora = [
        PackedCorpus(np.arange(start, start + size + 1, dtype=np.uint16), 1, 1)
        for start, size in zip(starts, sizes, strict=False)
    ]
    samples = ValidationSamples(corpora, wanted)
    places = [int(samples[i][0]) for i in range(len(samples))]
    assert len(places) == min(wanted, sum(sizes))
    gaps = np.diff([*places, sum(sizes)])
    assert places[0] == 0 and gaps.min() >= 1 and gaps.max() - gaps.min() <= 1
    for index in (-1, len(samples)):
        with pytest.raises(IndexError):
            samples[index]


def test_a_run_gets_samples_for_all_its_steps_and_figures_of_its_validation(tmp_path: Path) -> None:
    train, validation = write(tmp_path / "t.txt", "abc" * 50), write(tmp_path / "v.txt", "ab" * 20)
    datasets = load_datasets(config([train], [validation], validation_samples=3))
    assert len(datasets.train) == 20
    assert datasets.train[19].shape == (10,)
    assert datasets.validation is not None
    assert len(datasets.validation.samples) == 3
    assert datasets.validation.bytes_per_token == 40 / 41
    shares = np.array([20, 20, 1]) / 41
    assert datasets.validation.unigram_entropy == pytest.approx(-(shares * np.log(shares)).sum())


def test_figures_cover_every_validation_source(tmp_path: Path) -> None:
    sources = [write(tmp_path / "a.txt", "a" * 15), write(tmp_path / "b.txt", "b" * 15)]
    validation = load_datasets(config(sources, sources)).validation
    assert validation is not None
    assert validation.bytes_per_token == 30 / 32
    assert math.log(2) < validation.unigram_entropy < math.log(3)
    assert {int(validation.samples[i][0]) for i in range(len(validation.samples))} == {ord("a"), ord("b")}


def test_weights_reach_the_blend(tmp_path: Path) -> None:
    sources = [write(tmp_path / "a.txt", "a" * 30), write(tmp_path / "b.txt", "b" * 30) | {"weight": 3.0}]
    train = load_datasets(config(sources, [])).train
    assert sum(ord("b") in train[i] for i in range(20)) == 15


def test_no_validation_source_means_no_validation(tmp_path: Path) -> None:
    assert load_datasets(config([write(tmp_path / "t.txt", "x" * 99)], [])).validation is None


def test_a_source_named_twice_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []

    def counting(source: SourceConfig, key: str) -> list[bytes]:
        read.append(key)
        return read_documents(source, key)

    monkeypatch.setattr(loading, "read_documents", counting)
    source = write(tmp_path / "t.txt", "x" * 99)
    load_datasets(config([source, source], [source]))
    assert read == ["data.train.0"]


def test_a_source_that_is_too_small_is_named(tmp_path: Path) -> None:
    good, small = write(tmp_path / "t.txt", "x" * 99), write(tmp_path / "v.txt", "x" * 8)
    with pytest.raises(ConfigError, match=r"data\.validation\.0\.path = .*v\.txt.* too small: 9 tokens .* 8 \+ 2 = 10"):
        load_datasets(config([good], [small]))
