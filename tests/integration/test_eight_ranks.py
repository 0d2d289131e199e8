"""All three axes of parallelism together."""

from pathlib import Path

import pytest

from tests.integration import jobs


def head_losses(folder: Path, processes: int, *overrides: str) -> list[list[float]]:
    """Train and return the head losses of each step and validation."""
    folder.mkdir()
    config = jobs.write_config(folder, model={"trunk_layers": 4}, train={"steps": 3})
    result = jobs.run(jobs.forked(jobs.PRETRAIN, "--config", str(config), *overrides, processes=processes))
    assert result.status == 0, result.output
    lines = jobs.metrics(folder / "out")
    return [[value for name, value in line.items() if "loss/head_" in name] for line in lines]


def test_tensor_pipeline_and_data_2_equal_one_process(tmp_path: Path) -> None:
    sharded = head_losses(tmp_path / "eight", 8, "parallel.tensor=2", "parallel.pipeline=2", "parallel.sequence=true")
    alone = head_losses(tmp_path / "one", 1)
    assert len(alone) == 3 + 2 and all(len(losses) == 4 for losses in alone)
    for found, expected in zip(sharded, alone, strict=True):
        assert found == pytest.approx(expected, rel=1e-5)
