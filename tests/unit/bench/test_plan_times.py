"""The times that `mtp-dist bench plan` predicts are composed from those of the parts, and its results are complete."""

import json
from pathlib import Path

import pytest

from mtp_dist.bench.plan import case_config
from mtp_dist.bench.plan_time_cases import TIME_CASES
from mtp_dist.bench.plan_times import time_rows
from mtp_dist.cli.bench_plan_tables import bench_plan_tables
from mtp_dist.planner.parts import Parts, Passes

COMMITTED = Path(__file__).parents[3] / "docs/data/plan/times.json"


def test_stages_are_predicted_from_their_parts():
    config = case_config("parallel, four stages", "times")
    parts = Parts(Passes(1, 2), Passes(10, 20), Passes(100, 0), Passes(100, 0), config.heads.count)
    first, second, third, last = time_rows("case", config, parts, [Passes(50, 25)] * 4)
    assert [row["trunk_layers"] for row in (first, second, third, last)] == [2, 3, 1, 0]
    assert first["predicted"] == [21, 42] and second["predicted"] == [30, 60] and last["predicted"] == [400, 0]
    assert first["error"] == pytest.approx(63 / 75 - 1) and third["error"] == pytest.approx(30 / 75 - 1)
    # By FLOPs the embedding takes no time and a layer its own.
    assert second["error_by_flops"] == pytest.approx(90 / 75 - 1)
    assert last["error_by_flops"] != pytest.approx(last["error"])


def test_committed_times_are_those_of_all_cases():
    rows = json.loads(COMMITTED.read_text(encoding="utf-8"))["times"]
    assert {row["case"] for row in rows} == set(TIME_CASES)
    assert len(rows) == sum(ranks for ranks, _ in TIME_CASES.values())
    for row in rows:
        assert row["error"] == pytest.approx(sum(row["predicted"]) / sum(row["measured"]) - 1)
    [table] = bench_plan_tables({"times": rows})
    assert table.row_count == len(rows)
