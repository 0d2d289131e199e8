"""Steps and ranks that are traced, and moments at which memory is recorded."""

import gzip
import json
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from mtp_dist.distributed.topology import Topology
from mtp_dist.errors import UserError
from mtp_dist.monitoring import profiling
from mtp_dist.monitoring.callback import StopReason
from mtp_dist.monitoring.profiling import check_profile, profiling_callbacks
from tests.tiny import tiny_config

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


def build(folder, rank, memory=False, **log):
    topology = Topology(tp_size=1, pp_size=1, dp_size=4, tp_rank=0, pp_rank=0, dp_rank=rank, device=CPU)
    return profiling_callbacks(tiny_config(run={"output_dir": str(folder)}, log=log), topology, memory)


def run(callbacks, first, last, rolled_back_to=None):
    """Train; rolled_back_to: completed steps after a rollback at the last step, which is then trained up to again."""
    calls = [("on_start", first - 1), *(("on_step", step) for step in range(first, last + 1))]
    if rolled_back_to is not None:
        calls += [("on_rollback", rolled_back_to), *(("on_step", step) for step in range(rolled_back_to + 1, last + 1))]
    for name, value in [*calls, ("on_end", StopReason.LAST_STEP)]:
        if name == "on_step":
            with torch.profiler.record_function(f"this is step {value}"):
                torch.ones(value, 2) @ torch.ones(2, 2)
            value = SimpleNamespace(step=value)
        for callback in callbacks:
            getattr(callback, name)(value)


def traced(file):
    """Return the steps in a trace."""
    with gzip.open(file, "rt") as stream:
        events = json.load(stream)["traceEvents"]
    return sorted(int(event["name"].split()[-1]) for event in events if event["name"].startswith("this is step"))


@pytest.mark.parametrize(
    ("first", "last", "rolled_back_to", "expected"),
    [
        *((first, 9, None, [[5, 6, 7]]) for first in (1, 5)),
        (6, 9, None, [[6, 7]]),  # resumed between them
        (1, 6, None, [[5, 6]]),  # stopped between them
        (8, 9, None, []),
        (1, 4, None, []),  # the profiler has started, and there is nothing to write
        (1, 6, 3, [[5, 6], [5, 6]]),
        (1, 6, 5, [[5, 6], [6]]),
    ],
)
def test_configured_steps_are_traced(tmp_path, caplog, first, last, rolled_back_to, expected):
    run(build(tmp_path, 2, profile_steps=[5, 7], profile_ranks=[2]), first, last, rolled_back_to)
    names = [f"steps_{steps[0]}-{steps[-1]}" for steps in expected]
    files = [tmp_path / f"profile/rank_00002_{name}.json.gz" for name in names]
    assert sorted(tmp_path.glob("profile/*")) == sorted(set(files))
    assert [traced(file) for file in files] == expected
    messages = [f"profile of rank 2, {name.replace('_', ' ')}: {file}" for name, file in zip(names, files, strict=True)]
    assert caplog.messages == messages


def test_rank_0_logs_what_other_ranks_trace(tmp_path, caplog):
    run(build(tmp_path, 0, profile_steps=[1, 2], profile_ranks=[1, 3]), 1, 3)
    assert caplog.messages == [f"profile: traces of steps 1-2 on ranks [1, 3] will be in {tmp_path / 'profile'}"]
    assert not (tmp_path / "profile").exists()
    assert build(tmp_path, 2, profile_steps=[1, 2], profile_ranks=[1, 3]) == []
    assert build(tmp_path, 0) == [], "nothing is traced by default"


def test_training_survives_a_trace_that_cannot_be_written(tmp_path, caplog):
    (tmp_path / "profile").write_text("a file in place of the folder")
    run(build(tmp_path, 0, profile_steps=[1, 1]), 1, 3)
    assert "profile of rank 0 is NOT written" in caplog.messages[1]


@pytest.mark.parametrize("log", [{"profile_steps": [0, 2]}, {"profile_steps": [2]}, {"profile_ranks": []}])
def test_invalid_steps_and_ranks(log):
    with pytest.raises(UserError, match=f"log.{next(iter(log))}"):
        tiny_config(log=log)


@pytest.mark.parametrize(
    ("ranks", "device", "message"),
    [
        (4, CUDA, r"log.profile_ranks = \[0, 4\]: there is no rank 4, the 4 ranks of this run are 0 to 3"),
        (5, CPU, r"--memory-snapshot .* on a CPU"),
        (5, CUDA, r"--memory-snapshot is taken after step 2, but train.steps = 1"),
    ],
)
def test_memory_snapshot_needs_its_ranks_a_gpu_and_two_steps(ranks, device, message):
    log = {"profile_ranks": [0, 4]}
    check_profile(tiny_config(log=log), 5, True, CUDA)
    with pytest.raises(UserError, match=message):
        check_profile(tiny_config(log=log, train={"steps": 1}), ranks, True, device)


@pytest.fixture
def allocator(monkeypatch):
    """Calls of a stand-in for CUDA's allocator."""
    calls, memory = [], torch.cuda.memory
    monkeypatch.setattr(memory, "_record_memory_history", lambda enabled="all", **_: calls.append(f"history {enabled}"))
    monkeypatch.setattr(memory, "_dump_snapshot", lambda file: calls.append(Path(file).name))
    return calls


@pytest.mark.parametrize(("log", "after"), [({}, 2), ({"profile_steps": [3, 4]}, 4)])
def test_memory_is_recorded_once(tmp_path, allocator, caplog, log, after):
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
def test_memory_is_recorded_when_it_runs_out(tmp_path, allocator, caplog, error, snapshots):
    """As at the end of training: inside an ExitStack that the exception passes through."""
    [callback] = build(tmp_path, 0, memory=True)
    with pytest.raises(error), ExitStack() as ends:
        ends.callback(callback.on_end, None)
        raise error("no memory")
    assert allocator == ["memory_rank_00000.pickle"] * snapshots + ["history None"]
    assert len(caplog.messages) == snapshots and all("out of memory" in text for text in caplog.messages)
