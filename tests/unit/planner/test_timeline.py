"""Pictures of pipeline schedules."""

import re

from mtp_dist.cli.timeline import draw_timelines
from mtp_dist.planner.parts import Passes
from mtp_dist.planner.schedule import simulate


def test_every_pass_is_drawn(tmp_path):
    timelines = {
        "Slow heads": simulate("1f1b", [Passes(1, 2), Passes(9, 0)], 3),
        "Two stages per rank": simulate("dualpipev", [Passes(1, 2)] * 4, 4),
    }
    draw_timelines(timelines, tmp_path / "timeline.svg", unit="ms")
    drawn = (tmp_path / "timeline.svg").read_text()
    # Text is drawn as glyphs, with its characters in a comment.
    comments = re.findall(r"<!-- (.*?) -->", drawn)
    seconds = f"{timelines['Slow heads'].seconds:.3g}"
    assert f"Slow heads: {seconds} ms, ranks work {1 - timelines['Slow heads'].bubble:.0%} of the time" in comments
    assert {"forward", "backward", "forward, second stage of the rank", "backward, second stage of the rank"} <= set(
        comments
    )
    # Axes have the ticks of two ranks each; every pass but the backward ones without a duration has a number.
    assert sum(comment in {"1", "2", "3", "4"} for comment in comments) >= 3 * 3 + 4 * 8
