"""A few of the kills of `kills.py`; all hundred take ten minutes."""

from tests.integration.kills import count_kills


def test_killed_runs_end_like_one_without_kills(tmp_path):
    counts = count_kills(tmp_path, kills=4, seed=1)
    assert counts.kills == 4 and counts.during_a_save >= 1 and counts.finished_runs >= 1
