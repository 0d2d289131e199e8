"""What `mtp-dist bench monitoring` compares."""

from pathlib import Path

import pytest

from mtp_dist.bench.monitoring import table
from tests.integration import jobs
from tests.ranks import Ranks
from tests.unit.bench.on_ranks import monitored


def test_steps_are_measured_with_and_without(ranks: Ranks, tmp_path: Path) -> None:
    config = jobs.write_config(tmp_path, log={"every": 2}, parallel={"pipeline": 2}, train={"validate_every": None})
    for with_progress, unwatched, result in ranks.run(2, monitored, config):
        assert with_progress == 4, "two steps to warm up, and those of one round"
        assert unwatched == 4
        assert result["ratios"] == [result["ratio"]] and result["ratio"] > 0
        assert result["step_seconds"]["with"] > 0 < result["step_seconds"]["without"]
        assert 0 < result["seconds_within"] < result["step_seconds"]["with"]
        assert result["share_within"] == pytest.approx(result["seconds_within"] / result["step_seconds"]["with"])
        assert table(result).row_count == 1
    assert not (tmp_path / "out").exists(), "it has a folder of its own"
