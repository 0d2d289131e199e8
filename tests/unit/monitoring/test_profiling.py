"""Steps and ranks that are traced, and moments at which memory is recorded."""

import gzip
import json
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from mtp_dist.distributed.topology import Topology
from mtp_dist.errors import UserError
from mtp_dist.metrics import StepMetrics
from mtp_dist.monitoring import profiling
from mtp_dist.monitoring.callback import Callback, StopReason
from mtp_dist.monitoring.profiling import check_profile, profiling_callbacks
from tests.integration import jobs
from tests.ranks import Ranks
from tests.tiny import tiny_config
from tests.unit.monitoring.profiling_on_ranks import profiling_changes_nothing

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


def build(folder: Path, rank: int, memory: bool = False, **log: Any) -> list[Callback]:
    topology = Topology(tp_size=1, pp_size=1, dp_size=4, tp_rank=0, pp_rank=0, dp_rank=rank, device=CPU)
    return profiling_callbacks(tiny_config(run={"output_dir": str(folder)}, log=log), topology, memory)


def run_steps(callbacks: list[Callback], first: int, last: int) -> None:
    """Run these steps, each with a matmul of as many rows as its number."""
    for step in range(first, last + 1):
        with torch.profiler.record_function(f"this is step {step}"):
            torch.ones(step, 2) @ torch.ones(2, 2)
        for callback in callbacks:
            callback.on_step(cast(StepMetrics, SimpleNamespace(step=step)))


def run(callbacks: list[Callback], first: int, last: int, rolled_back_to: int | None = None) -> None:
    """Train; rolled_back_to: completed steps after a rollback at the last step, which is then trained up to again."""
    for callback in callbacks:
        callback.on_start(first - 1)
    run_steps(callbacks, first, last)
    if rolled_back_to is not None:
        for callback in callbacks:
            callback.on_rollback(rolled_back_to)
        run_steps(callbacks, rolled_back_to + 1, last)
    for callback in callbacks:
        callback.on_end(StopReason.LAST_STEP)


def traced(file: Path) -> list[int]:
    """Return the steps in a trace."""
    with gzip.open(file, "rt") as stream:
        events = json.load(stream)["traceEvents"]
    return sorted(int(event["name"].split()[-1]) for event in events if event["name"].startswith("this is step"))


@pytest.mark.parametrize(
    ("completed_steps", "last", "rolled_back_to", "expected"),
    [
        (0, 9, None, [[5, 6, 7]]),
        (4, 9, None, [[5, 6, 7]]),
        (5, 9, None, [[6, 7]]),  # resumed between them
        (0, 6, None, [[5, 6]]),  # stopped between them
        (7, 9, None, []),
        (0, 4, None, []),  # the profiler has started, and there is nothing to write
        (0, 6, 3, [[5, 6], [5, 6]]),
        (0, 6, 5, [[5, 6], [6]]),
    ],
)
def test_configured_steps_are_traced(
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    completed_steps: int,
    last: int,
    rolled_back_to: int | None,
    expected: list[list[int]],
) -> None:
    callbacks = build(tmp_path, 2, profile_steps=[5, 7], profile_ranks=[2])
    run(callbacks, completed_steps + 1, last, rolled_back_to)
    files = [tmp_path / f"profile/rank_00002_steps_{steps[0]}-{steps[-1]}.json.gz" for steps in expected]
    assert sorted(tmp_path.glob("profile/*")) == sorted(set(files))
    assert [traced(file) for file in files] == expected
    assert caplog.messages == [
        f"profile of rank 2, steps {steps[0]}-{steps[-1]}: {file}" for steps, file in zip(expected, files, strict=True)
    ]


def test_rank_0_logs_what_other_ranks_trace(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run(build(tmp_path, 0, profile_steps=[1, 2], profile_ranks=[1, 3]), 1, 3)
    assert caplog.messages == [f"profile: traces of steps 1-2 on ranks [1, 3] will be in {tmp_path / 'profile'}"]
    assert not (tmp_path / "profile").exists()
    assert build(tmp_path, 2, profile_steps=[1, 2], profile_ranks=[1, 3]) == []
    assert build(tmp_path, 0) == [], "nothing is traced by default"


def test_training_survives_a_trace_that_cannot_be_written(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "profile").write_text("a file in place of the folder")
    run(build(tmp_path, 0, profile_steps=[1, 1]), 1, 3)
    assert "profile of rank 0 is NOT written" in caplog.messages[1]


def test_profiling_does_not_change_training(tmp_path: Path, ranks: Ranks) -> None:
    config = jobs.write_config(
        tmp_path,
        parallel={"pipeline": 2},
        train={"steps": 3, "validate_every": 2},
        log={"profile_steps": [2, 3], "profile_ranks": [1]},
    )
    (same, phases), (other_same, _) = ranks.run(2, profiling_changes_nothing, config)
    assert same and other_same
    assert [path.name for path in (tmp_path / "out/profile").iterdir()] == ["rank_00001_steps_2-3.json.gz"]
    assert phases[:4] == ["the start", "step 1", "the log of step 1", "step 2"]
    assert phases[4:6] == ["the log of step 2", "the validation after step 2"]


@pytest.mark.parametrize(
    ("log", "named"),
    [
        ({"profile_steps": [7, 5]}, "log.profile_steps = [7, 5] must be [first, last] with first <= last"),
        ({"profile_steps": [5, 10]}, "log.profile_steps = [5, 10] goes beyond train.steps = 9"),
        ({"profile_steps": [0, 2]}, "log.profile_steps"),
        ({"profile_steps": [2]}, "log.profile_steps"),
        ({"profile_ranks": []}, "log.profile_ranks"),
        ({"profile_ranks": [0, 4]}, "log.profile_ranks = [0, 4]: there is no rank 4, the 4 ranks of this run are 0 to"),
    ],
)
def test_invalid_steps_and_ranks(log: dict[str, Any], named: str) -> None:
    with pytest.raises(UserError) as error:
        check_profile(tiny_config(log=log, train={"steps": 9}), 4, False, CPU)
    assert named in str(error.value)


def test_memory_snapshot_needs_a_gpu_and_two_steps() -> None:
    check_profile(tiny_config(log={"profile_ranks": [0, 4]}), 5, True, CUDA)
    with pytest.raises(UserError, match=r"--memory-snapshot .* on a CPU"):
        check_profile(tiny_config(), 5, True, CPU)
    with pytest.raises(UserError, match=r"--memory-snapshot is taken after step 2, but train.steps = 1"):
        check_profile(tiny_config(train={"steps": 1}), 1, True, CUDA)


@pytest.fixture
def allocator(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Calls of a stand-in for CUDA's allocator."""
    calls: list[str] = []
    memory = torch.cuda.memory
    monkeypatch.setattr(
        memory, "_record_memory_history", lambda enabled="all", **options: calls.append(f"history {enabled}")
    )
    monkeypatch.setattr(memory, "_dump_snapshot", lambda file: calls.append(Path(file).name))
    return calls


@pytest.mark.parametrize(("log", "after"), [({}, 2), ({"profile_steps": [3, 4]}, 4)])
def test_memory_is_recorded_once(
    tmp_path: Path, allocator: list[str], caplog: pytest.LogCaptureFixture, log: dict[str, Any], after: int
) -> None:
    config = tiny_config(run={"output_dir": str(tmp_path)}, log=log)
    profiling.begin_memory_history(config, 1)
    assert allocator == [] and build(tmp_path, 1, memory=True, **log) == [], "rank 1 is not configured"
    profiling.begin_memory_history(config, 0)
    run(build(tmp_path, 0, memory=True, **log), 1, after - 1, rolled_back_to=0)
    assert allocator == ["history all", "history None"], "a rollback does not end the history"
    run(build(tmp_path, 0, memory=True, **log), after, 5)
    assert allocator[2:] == ["memory_rank_00000.pickle", "history None"]
    assert f"memory snapshot of rank 0, after step {after}: {tmp_path}/profile/memory_rank_00000.pickle" in caplog.text


@pytest.mark.parametrize(("error", "snapshots"), [(torch.OutOfMemoryError, 1), (RuntimeError, 0)])
def test_memory_is_recorded_when_it_runs_out(
    tmp_path: Path, allocator: list[str], caplog: pytest.LogCaptureFixture, error: type[Exception], snapshots: int
) -> None:
    """As at the end of training: inside an ExitStack that the exception passes through."""
    [callback] = build(tmp_path, 0, memory=True)
    with pytest.raises(error), ExitStack() as ends:
        ends.callback(callback.on_end, None)
        raise error("no memory")
    assert allocator == ["memory_rank_00000.pickle"] * snapshots + ["history None"]
    assert len(caplog.messages) == snapshots and all("out of memory" in text for text in caplog.messages)
