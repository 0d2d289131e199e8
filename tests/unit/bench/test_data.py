from pathlib import Path

from mtp_dist.bench.data.loading import SEQUENCE_LENGTHS, measure_loader
from mtp_dist.bench.data.preparation import TRAINED, measure_preparation
from mtp_dist.bench.data.report import tables


def test_prepare_is_measured_beside_its_tokenizer(tmp_path: Path) -> None:
    for number in range(30):
        (tmp_path / f"{number}.py").write_text(f"def f{number}(x):\n    return x + {number}\n" * 20)
    rows = measure_preparation(str(tmp_path), "*.py", ["bytes", TRAINED], workers=1, rounds=2, unit_bytes=5000)
    size = sum(file.stat().st_size for file in tmp_path.iterdir())
    assert [row["tokenizer"] for row in rows] == ["bytes", TRAINED]
    assert all(row["megabytes"] == size / 1e6 for row in rows)
    assert rows[0]["tokens"] == size + 30 > 2 * rows[1]["tokens"]
    for row in rows:
        assert min(row["prepare_megabytes_per_second"], row["bare_megabytes_per_second"]) > 0
        assert all(len(seconds) == 2 for seconds in row["seconds_by_round"].values())
    assert [len(row["shares_by_round"]) for row in rows] == [0, 2]
    assert all(0 < share < 1 for share in rows[1]["shares_by_round"])
    loader = measure_loader(rounds=1, corpus_tokens=50_000, seconds=0.05)
    assert [row["sequence_length"] for row in loader] == list(SEQUENCE_LENGTHS)
    assert all(row["samples_tokens_per_second"] > 0 < row["with_targets_tokens_per_second"] for row in loader)
    result = {"machine": {"processor": "x", "cores": 2}, "workers": 1, "preparation": rows, "loader": loader}
    assert [table.row_count for table in tables(result)] == [2, 3]
