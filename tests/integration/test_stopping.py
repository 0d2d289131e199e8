"""The real program under a launcher, asked to stop."""

import re
import signal
from pathlib import Path

from mtp_dist.training.stopping import REQUEUE
from tests.integration import jobs

STEPS = 60


def test_a_signal_to_one_rank_stops_all_with_a_checkpoint(tmp_path: Path) -> None:
    config = jobs.write_config(tmp_path, train={"steps": STEPS}, log={"every": 1, "tensorboard": False})
    out = tmp_path / "out"
    with jobs.started(jobs.deepspeed(jobs.PRETRAIN, "--config", str(config), "parallel.pipeline=2"), tmp_path) as job:
        job.wait_until(lambda: len(jobs.metrics(out)) >= 3)
        job.rank(1).send_signal(signal.SIGTERM)
        assert job.wait() == REQUEUE, job.output
        assert job.processes() == []
    [said] = re.findall(r"SIGTERM: stops after step (\d+) of 60 with a checkpoint", job.output)
    assert "Traceback" not in job.output
    assert sorted(path.name for path in (out / "checkpoints").iterdir()) == ["latest", f"step_{int(said):08d}"]
    assert jobs.learned(out)[-1]["step"] == int(said) < STEPS
    assert not (out / "summary.json").exists()
