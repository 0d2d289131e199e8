"""A training that resumes from a checkpoint, at the layout that saved it or at another.

`python -m tests.parity.resuming > docs/data/resume-matrix.json` resumes from the checkpoints of every layout at every
layout.
"""

import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from mtp_dist.config import Config
from mtp_dist.provenance import provenance
from tests.errors import largest_error, norm_error
from tests.parity.comparison import Layout, layout_config
from tests.ranks import Ranks
from tests.unit.checkpoint.on_ranks import Part, train_part

MIDDLE, END = 3, 6
"""Step of the checkpoint, and the last one."""
ONE, TENSOR, PIPELINE = Layout(1, 1, 1), Layout(2, 1, 1, True), Layout(1, 2, 1)
BOTH, DATA, ALL, DUALPIPEV = Layout(2, 2, 1), Layout(1, 1, 2), Layout(2, 1, 2), Layout(1, 2, 1, dualpipev=True)
LAYOUTS = [ONE, TENSOR, PIPELINE, DUALPIPEV, BOTH, DATA, ALL]


def at(layout: Layout, directory: Path, zero_stage: int = 0, **sections: Any) -> Config:
    return layout_config(
        layout, 4 if layout.dualpipev else 2, zero_stage, checkpoint={"directory": str(directory)}, **sections
    )


def run(ranks: Ranks, config: Config, layout: Layout, *arguments: Any) -> Part:
    """Train a part (see `train_part`) and merge the results of all stages."""
    parts = ranks.run(layout.world_size, train_part, config, *arguments)
    weights = {name: weight for part in parts for name, weight in part.weights.items()}
    return Part(parts[0].losses, weights, {name: moment for part in parts for name, moment in part.moments.items()})


def assert_resume_is_bitwise(train: Callable[..., Part], directory: Path) -> None:
    """Compare two parts with the uninterrupted training; arguments of `train` are those of `train_part`."""
    whole = train(0, END, None, False)
    train(0, MIDDLE)
    rest = train(MIDDLE, END, directory / f"step_{MIDDLE:08d}")
    assert torch.equal(torch.stack(rest.losses), torch.stack(whole.losses[MIDDLE:]))
    after, expected = rest.weights | rest.moments, whole.weights | whole.moments
    assert after.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in after.items())


def save_in_the_middle(ranks: Ranks, before: Layout, directory: Path, zero_stage: int, **sections: Any) -> Part:
    """Save a checkpoint at this layout. Return the uninterrupted training."""
    config = at(before, directory, zero_stage, **sections)
    run(ranks, config, before, 0, MIDDLE)
    return run(ranks, config, before, 0, END, None, False)


def resume_errors(
    ranks: Ranks, after: Layout, directory: Path, zero_stage: int, whole: Part, **sections: Any
) -> dict[str, float]:
    """Return the largest relative errors of the training that resumes at another layout."""
    config = at(after, directory, zero_stage, **sections)
    rest = run(ranks, config, after, MIDDLE, END, directory / f"step_{MIDDLE:08d}", False)
    losses, expected = (torch.stack(part.losses[-END + MIDDLE :])[:, 0] for part in (rest, whole))
    return {
        "losses": largest_error(losses, expected),
        "weights": max(norm_error(weight, whole.weights[name]) for name, weight in rest.weights.items()),
    }


def measure_all_pairs() -> list[dict[str, Any]]:
    """Return a row per pair of layouts, with ZeRO before and without it after, or vice versa."""
    ranks, rows = Ranks(4), []
    for before in LAYOUTS:
        for zero_stage in (0, 1):
            with tempfile.TemporaryDirectory() as folder:
                whole = save_in_the_middle(ranks, before, Path(folder), zero_stage)
                for after in LAYOUTS:
                    errors = resume_errors(ranks, after, Path(folder), 1 - zero_stage, whole)
                    rows.append({"before": str(before), "after": str(after), "zero_stage_before": zero_stage} | errors)
                    print(rows[-1], file=sys.stderr)
    ranks.close()
    return rows


if __name__ == "__main__":
    print(json.dumps({"rows": measure_all_pairs(), "measured": provenance()}))
