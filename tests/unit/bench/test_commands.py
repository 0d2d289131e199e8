"""A small measurement by `bench balance`, `data` and `monitoring` has all results that their tables show."""

import json
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner

from mtp_dist.bench.balance import measure_balance
from mtp_dist.bench.data import SEQUENCE_LENGTHS, TRAINED, measure_loader, measure_preparation
from mtp_dist.bench.monitoring import measure_monitoring
from mtp_dist.cli import app
from mtp_dist.cli.tables import bench_balance_table, bench_data_tables, monitoring_table
from mtp_dist.data.run_sources import RunSources
from mtp_dist.distributed.device import select_device
from mtp_dist.distributed.topology import initialize_topology
from tests.integration import jobs
from tests.tiny import load_resolved, tiny_config


def test_prepare_is_compared_with_its_tokenizer(tmp_path):
    for number in range(30):
        (tmp_path / f"{number}.py").write_text(f"def f{number}(x):\n    return x + {number}\n" * 20)
    rows = measure_preparation(str(tmp_path), "*.py", ["bytes", TRAINED], workers=1, rounds=2, unit_bytes=5000)
    size = sum(file.stat().st_size for file in tmp_path.iterdir())
    assert [(row["tokenizer"], row["megabytes"]) for row in rows] == [(name, size / 1e6) for name in ("bytes", TRAINED)]
    assert rows[0]["tokens"] == size + 30 > 2 * rows[1]["tokens"]
    for row in rows:
        assert min(row["prepare_megabytes_per_second"], row["bare_megabytes_per_second"]) > 0
        assert all(len(seconds) == 2 for seconds in row["seconds_by_round"].values())
    loader = measure_loader(rounds=1, corpus_tokens=50_000, seconds=0.05)
    assert [row["sequence_length"] for row in loader] == list(SEQUENCE_LENGTHS)
    assert all(row["samples_tokens_per_second"] > 0 < row["with_targets_tokens_per_second"] for row in loader)
    result = {"machine": {"processor": "x", "cores": 2}, "workers": 1, "preparation": rows, "loader": loader}
    assert [table.row_count for table in bench_data_tables(result)] == [2, 3]


def balanced(config, sleep_ms):
    """On each rank: return the result of one round."""
    return measure_balance(config, initialize_topology(config, select_device(config)), rounds=1, sleep_ms=sleep_ms)


@pytest.mark.parametrize("sleep_ms", [None, 2.0])
def test_balanced_stages_are_compared_with_uniform_ones(ranks, sleep_ms):
    config = tiny_config(parallel={"pipeline": 2})
    for result in ranks.run(2, balanced, config, sleep_ms):
        rows = {row["partition"]: row for row in result["rows"]}
        assert {name: row["trunk_layers"] for name, row in rows.items()} == {"uniform": [2, 2], "balanced": [4, 0]}
        assert all(row["seconds"] > 0 < row["predicted_seconds"] for row in rows.values())
        # Heads of 7.0 layers on two stages: (9.0 m + 2) / (7.0 m + 4) for m = 4 micro-batches.
        assert result["predicted_speedup"]["by FLOPs"] == pytest.approx(1.19, abs=0.01) and result["speedup"] > 0
        if sleep_ms:
            assert result["predicted_speedup"]["by times"] == pytest.approx(result["predicted_speedup"]["by FLOPs"])
            assert rows["balanced"]["seconds"] >= rows["balanced"]["predicted_seconds"], "layers sleep at least so long"
        assert bench_balance_table(result).row_count == 2


@pytest.mark.parametrize(
    ("parallel", "text"),
    [
        ({"pipeline": 2, "schedule": "dualpipev"}, "set parallel.schedule=1f1b"),
        ({"pipeline": 6}, "model.trunk_layers is 4, a uniform partition over parallel.pipeline = 6 stages needs 5"),
    ],
)
def test_pipelines_that_cannot_be_compared(monkeypatch, tmp_path, parallel, text):
    job = SimpleNamespace(config=tiny_config(parallel=parallel))
    monkeypatch.setattr("mtp_dist.verify.startup.check_startup", lambda *_, **__: job)
    result = CliRunner().invoke(app, ["bench", "balance", "--config", str(jobs.write_config(tmp_path))])
    assert result.exit_code == 2 and text in " ".join(result.stderr.split()), result.output


def monitored(path):
    """On each rank: return the result of one round."""
    config = load_resolved(path)
    topology = initialize_topology(config, select_device(config))
    return measure_monitoring(config, RunSources(config), topology, rounds=1)


def test_steps_are_measured_with_and_without_monitoring(ranks, tmp_path):
    config = jobs.write_config(tmp_path, log={"every": 2}, parallel={"pipeline": 2}, train={"validate_every": None})
    for result in ranks.run(2, monitored, config):
        assert result["ratios"] == [result["ratio"]] and result["ratio"] > 0
        assert result["step_seconds"]["with"] > 0 < result["step_seconds"]["without"]
        assert monitoring_table(result).row_count == 1
    assert not (tmp_path / "out").exists(), "it writes into a folder of its own"


def test_standard_output_is_the_result(tmp_path):
    config = jobs.write_config(tmp_path, log={"every": 2})
    for command in (["checkpoint", "--to", str(tmp_path / "new")], ["monitoring"]):
        arguments = [*command, "--config", str(config), "--rounds", "1", "--json"]
        result = jobs.run(jobs.plain("-m", "mtp_dist.cli", "bench", *arguments), status=0)
        measured = json.loads(result.stdout)
        assert measured["machine"]["cores"] > 0 and {"processor", "time", "commit"} <= measured["measured"].keys()
