"""Some of the kills of `kills.py`, which the whole hundred takes ten minutes."""

from pathlib import Path

from tests.integration.kills import count_kills


def test_killed_runs_end_as_if_nothing_had_happened(tmp_path: Path) -> None:
    counts = count_kills(tmp_path, kills=4, seed=1)
    assert counts.kills == 4 and counts.during_a_save >= 1 and counts.finished_runs >= 1
