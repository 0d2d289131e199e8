"""A training that goes on from a checkpoint, at the layout that saved it or at another.

`python -m tests.parity.resuming > docs/data/resume-matrix.json` opens the checkpoints of every layout at every layout.
"""

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from mtp_dist.config import Config
from tests.errors import largest_error, norm_error
from tests.parity.comparison import Layout, layout_config, name_of
from tests.ranks import Ranks
from tests.unit.checkpoint.on_ranks import Part, train_part

MIDDLE, END = 3, 6
"""Updates before the checkpoint, and in all."""
ONE, TENSOR, PIPELINE = (1, 1, 1, False), (2, 1, 1, True), (1, 2, 1, False)
BOTH, DATA, ALL = (2, 2, 1, False), (1, 1, 2, False), (2, 1, 2, False)
LAYOUTS: list[Layout] = [ONE, TENSOR, PIPELINE, BOTH, DATA, ALL]


def at(layout: Layout, directory: Path, **sections: Any) -> Config:
    zero_stage = sections.pop("zero_stage", 0)
    return layout_config(layout, 2, zero_stage, checkpoint={"directory": str(directory)}, **sections)


def run(ranks: Ranks, config: Config, layout: Layout, *arguments: Any) -> Part:
    """What all stages have together."""
    tensor, pipeline, data, _ = layout
    parts = ranks.run(tensor * pipeline * data, train_part, config, *arguments)
    weights = {name: weight for part in parts for name, weight in part.weights.items()}
    return Part(parts[0].losses, weights, {name: moment for part in parts for name, moment in part.moments.items()})


def save_in_the_middle(ranks: Ranks, before: Layout, directory: Path, zero_stage: int) -> Part:
    """Leave a checkpoint at this layout. Returns the training without a stop."""
    config = at(before, directory, zero_stage=zero_stage)
    run(ranks, config, before, 0, MIDDLE)
    return run(ranks, config, before, 0, END, None, False)


def errors_elsewhere(ranks: Ranks, after: Layout, directory: Path, zero_stage: int, whole: Part) -> dict[str, float]:
    """Largest relative errors of the training that goes on at another layout."""
    config = at(after, directory, zero_stage=zero_stage)
    rest = run(ranks, config, after, MIDDLE, END, directory / f"step_{MIDDLE:08d}", False)
    # The first row only: these heads do not have the other losses.
    losses, expected = (torch.stack(part.losses[-END + MIDDLE :])[:, 0] for part in (rest, whole))
    return {
        "losses": largest_error(losses, expected),
        "weights": max(norm_error(weight, whole.weights[name]) for name, weight in rest.weights.items()),
    }


def measure_all_pairs() -> list[dict[str, Any]]:
    """A row for each pair of layouts, with ZeRO before and without it after, or the other way round."""
    ranks, rows = Ranks(4), []
    for before in LAYOUTS:
        for zero_stage in (0, 1):
            with tempfile.TemporaryDirectory() as folder:
                whole = save_in_the_middle(ranks, before, Path(folder), zero_stage)
                for after in LAYOUTS:
                    errors = errors_elsewhere(ranks, after, Path(folder), 1 - zero_stage, whole)
                    pair = {"before": name_of(before), "after": name_of(after), "zero_stage_before": zero_stage}
                    rows.append(pair | errors)
                    print(rows[-1], file=sys.stderr)
    ranks.close()
    return rows


if __name__ == "__main__":
    print(json.dumps(measure_all_pairs()))
