"""Which steps of which ranks are traced, and when memory is looked at."""

import gzip
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from mtp_dist.distributed.topology import Topology
from mtp_dist.errors import ConfigError
from mtp_dist.metrics import StepMetrics
from mtp_dist.monitoring import profiling
from mtp_dist.monitoring.callback import Callback, StopReason
from mtp_dist.monitoring.profiling import check_profile, profiling_callbacks
from tests.integration import jobs
from tests.ranks import Ranks
from tests.tiny import tiny_config
from tests.unit.monitoring.profiling_on_ranks import train_with_and_without

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


def topology_of(rank: int) -> Topology:
    return Topology(tp_size=1, pp_size=1, dp_size=4, tp_rank=0, pp_rank=0, dp_rank=rank, device=CPU)


def callbacks_of(folder: Path, rank: int, said: list[str], memory: bool = False, **log: Any) -> Any:
    config = tiny_config(run={"output_dir": str(folder)}, log=log)
    return profiling_callbacks(config, topology_of(rank), memory, said.append)


def run(callbacks: list[Callback], first: int, last: int, reason: StopReason = StopReason.LAST_STEP) -> None:
    """A training of these steps, each a matmul that is as many rows high as its number."""
    for callback in callbacks:
        callback.on_start(first - 1)
    for step in range(first, last + 1):
        with torch.profiler.record_function(f"this is step {step}"):
            torch.ones(step, 2) @ torch.ones(2, 2)
        for callback in callbacks:
            callback.on_step(cast(StepMetrics, SimpleNamespace(step=step)))
    for callback in callbacks:
        callback.on_end(reason)


def traced(file: Path) -> list[int]:
    """The steps in a trace."""
    with gzip.open(file, "rt") as stream:
        events = json.load(stream)["traceEvents"]
    return sorted(int(event["name"].split()[-1]) for event in events if event["name"].startswith("this is step"))


@pytest.mark.parametrize(
    ("made", "ends_after", "expected"),
    [
        (0, 9, [5, 6, 7]),
        (4, 9, [5, 6, 7]),
        (5, 9, [6, 7]),  # resumed between them
        (0, 6, [5, 6]),  # stopped between them
        (7, 9, []),
        (0, 4, []),  # the profiler has begun, and there is nothing to write
    ],
)
def test_the_steps_that_are_asked_for(tmp_path: Path, made: int, ends_after: int, expected: list[int]) -> None:
    said: list[str] = []
    run(callbacks_of(tmp_path, 2, said, profile_steps=[5, 7], profile_ranks=[2]), made + 1, ends_after)
    files = list(tmp_path.glob("profile/*"))
    assert [file.name for file in files] == (
        [f"rank_00002_steps_{expected[0]}-{expected[-1]}.json.gz"] if expected else []
    )
    assert [traced(file) for file in files] == [expected] * len(files)
    assert said == [f"profile of rank 2, steps {expected[0]}-{expected[-1]}: {file}" for file in files]


def test_after_going_back_the_steps_are_those_that_are_made_again(tmp_path: Path) -> None:
    said: list[str] = []
    callbacks = callbacks_of(tmp_path, 2, said, profile_steps=[5, 7], profile_ranks=[2])
    run(callbacks, 1, 6, StopReason.SPIKE)
    run(callbacks, 4, 9)
    files = sorted(tmp_path.glob("profile/*"))
    assert [file.name.partition("steps_")[2] for file in files] == ["5-6.json.gz", "5-7.json.gz"]
    assert [traced(file) for file in files] == [[5, 6], [5, 6, 7]]


def test_rank_0_says_what_others_trace_and_others_do_nothing(tmp_path: Path) -> None:
    said: list[str] = []
    run(callbacks_of(tmp_path, 0, said, profile_steps=[1, 2], profile_ranks=[1, 3]), 1, 3)
    assert said == [f"profile: traces of steps 1-2 on ranks [1, 3] will be in {tmp_path / 'profile'}"]
    assert not (tmp_path / "profile").exists()
    assert callbacks_of(tmp_path, 2, said, profile_steps=[1, 2], profile_ranks=[1, 3]) == []
    assert callbacks_of(tmp_path, 0, said) == [], "nothing is traced unless it is asked for"


def test_a_trace_that_cannot_be_written_ends_no_training(tmp_path: Path) -> None:
    said: list[str] = []
    (tmp_path / "profile").write_text("a file where the folder should be")
    run(callbacks_of(tmp_path, 0, said, profile_steps=[1, 1]), 1, 3)
    assert "profile of rank 0 is NOT written" in said[1]


def test_a_profiled_training_learns_the_same(tmp_path: Path, ranks: Ranks) -> None:
    config = jobs.write_config(
        tmp_path,
        parallel={"pipeline": 2},
        train={"steps": 3, "validate_every": 2},
        log={"profile_steps": [2, 3], "profile_ranks": [1]},
    )
    (same, said, parts), (other_same, other_said, _) = ranks.run(2, train_with_and_without, config)
    assert same and other_same
    assert said == [f"profile: traces of steps 2-3 on ranks [1] will be in {tmp_path / 'out' / 'profile'}"]
    assert other_said == [f"profile of rank 1, steps 2-3: {tmp_path / 'out/profile/rank_00001_steps_2-3.json.gz'}"]
    assert parts[:4] == ["the start", "step 1", "the log of step 1", "step 2"]
    assert parts[4:6] == ["the log of step 2", "the validation after step 2"]


@pytest.mark.parametrize(
    ("log", "steps", "named"),
    [
        ({"profile_steps": [7, 5]}, 9, "log.profile_steps = [7, 5] must be [first, last] with first <= last"),
        ({"profile_steps": [5, 10]}, 9, "log.profile_steps = [5, 10] goes beyond train.steps = 9"),
        ({"profile_steps": [0, 2]}, 9, "log.profile_steps"),
        ({"profile_steps": [2]}, 9, "log.profile_steps"),
        ({"profile_ranks": []}, 9, "log.profile_ranks"),
    ],
)
def test_steps_that_are_none(log: dict[str, Any], steps: int, named: str) -> None:
    with pytest.raises(ConfigError) as error:
        tiny_config(log=log, train={"steps": steps})
    assert named in str(error.value)


def test_ranks_and_memory_that_are_not_there() -> None:
    config = tiny_config(log={"profile_ranks": [0, 4]})
    with pytest.raises(ConfigError, match=r"log.profile_ranks = \[0, 4\]: there is no rank 4, the 4 ranks .* 0 to 3"):
        check_profile(config, 4, False, CPU)
    check_profile(config, 5, False, CPU)
    check_profile(config, 5, True, CUDA)
    with pytest.raises(ConfigError, match=r"--memory-snapshot .* on a CPU"):
        check_profile(config, 5, True, CPU)
    with pytest.raises(ConfigError, match=r"--memory-snapshot looks at step 2, train.steps = 1"):
        check_profile(tiny_config(train={"steps": 1}), 1, True, CUDA)


@pytest.fixture
def allocator(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What a stand-in for CUDA's allocator is asked."""
    asked: list[str] = []
    memory = torch.cuda.memory
    monkeypatch.setattr(
        memory, "_record_memory_history", lambda enabled="all", **options: asked.append(f"history {enabled}")
    )
    monkeypatch.setattr(memory, "_dump_snapshot", lambda file: asked.append(Path(file).name))
    return asked


@pytest.mark.parametrize(("log", "after"), [({}, 2), ({"profile_steps": [3, 4]}, 4)])
def test_memory_is_looked_at_once(tmp_path: Path, allocator: list[str], log: dict[str, Any], after: int) -> None:
    said: list[str] = []
    config = tiny_config(run={"output_dir": str(tmp_path)}, log=log)
    profiling.begin_memory_history(config, 1)
    assert allocator == [], "rank 1 is not asked"
    profiling.begin_memory_history(config, 0)
    run(callbacks_of(tmp_path, 0, said, memory=True, **log), 1, after - 1)
    assert allocator == ["history all", "history None"]
    run(callbacks_of(tmp_path, 0, said, memory=True, **log), after, 5)
    assert allocator[2:] == ["memory_rank_00000.pickle", "history None"]
    assert said[-1] == f"memory snapshot of rank 0, after step {after}: {tmp_path}/profile/memory_rank_00000.pickle"
    run(callbacks_of(tmp_path, 0, said, memory=True, **log), 1, after - 1, StopReason.SPIKE)
    assert len(allocator) == 4, "after going back the history goes on"
    assert callbacks_of(tmp_path, 1, said, memory=True, **log) == []


@pytest.mark.parametrize(("error", "snapshots"), [(torch.OutOfMemoryError, 1), (RuntimeError, 0)])
def test_memory_is_looked_at_where_it_is_exhausted(
    tmp_path: Path, allocator: list[str], error: type[Exception], snapshots: int
) -> None:
    """As the loop ends: inside an ExitStack, through which the exception passes."""
    from contextlib import ExitStack

    said: list[str] = []
    [callback] = callbacks_of(tmp_path, 0, said, memory=True)
    with pytest.raises(error), ExitStack() as ends:
        ends.callback(callback.on_end, None)
        raise error("no memory")
    assert allocator == ["memory_rank_00000.pickle"] * snapshots + ["history None"]
    assert len(said) == snapshots and all("out of memory" in text for text in said)
