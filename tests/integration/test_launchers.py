"""The real program under every launcher: the same training, and everything a run leaves behind."""

import json
import math
import re
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2

from tests.integration import jobs

STEPS = 5
HEADS = 4
VALIDATED = [2, 4, 5]
COMMANDS = {
    "deepspeed, pipeline 2": (jobs.deepspeed, ["parallel.pipeline=2"]),
    "torchrun, tensor 2": (jobs.torchrun, ["parallel.tensor=2", "parallel.sequence=true"]),
    "one process": (jobs.plain, []),
}
REPEATED = "torchrun, tensor 2"
"""Whose second run must be the first's to the last bit: it has the most collectives."""


@dataclass(frozen=True)
class Run:
    result: jobs.Result
    folder: Path

    def lines(self, kind: str) -> list[dict[str, Any]]:
        """Of `metrics.jsonl`: those of steps, or those of validations."""
        return [line for line in jobs.metrics(self.folder) if any(name.startswith(f"{kind}/") for name in line)]

    @property
    def checkpoint(self) -> Path:
        return self.folder / "checkpoints" / f"step_{STEPS:08d}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("launchers")


@pytest.fixture(scope="module")
def config(folder: Path) -> Path:
    return jobs.write_config(folder, train={"steps": STEPS}, heads={"count": HEADS})


def train(config: Path, name: str, output_dir: Path) -> Run:
    launch, overrides = COMMANDS[name]
    command = launch(jobs.PRETRAIN, "--config", str(config), *overrides, f"run.output_dir={output_dir}")
    return Run(jobs.run(command), output_dir)


@pytest.fixture(scope="module")
def runs(config: Path, folder: Path) -> dict[str, Run]:
    return {name: train(config, name, folder / name) for name in COMMANDS}


@pytest.fixture(params=COMMANDS)
def run(request: pytest.FixtureRequest, runs: dict[str, Run]) -> Run:
    return runs[request.param]


def of_heads(kind: str) -> set[str]:
    return {f"{kind}/head_{k}" for k in range(1, HEADS + 1)}


STEP_SCALARS = {
    *of_heads("loss"),
    *of_heads("accuracy"),
    "loss/total",
    "train/grad_norm",
    "train/grad_norm/trunk",
    "train/grad_norm/shared",
    *of_heads("train/grad_norm"),
    "train/learning_rate",
    "throughput/tokens_per_second",
    "throughput/model_flops_per_second",
    "throughput/mfu",
    "throughput/data_wait_share",
    "memory/peak_bytes",
    "data/epochs/0",
}
OF_A_PIPELINE = {"throughput/pipeline_bubble", "memory/peak_bytes/stage_0", "memory/peak_bytes/stage_1"}
VALIDATION_SCALARS = {
    *of_heads("validation/loss"),
    *of_heads("validation/accuracy"),
    *of_heads("validation/bits_per_byte"),
    "validation/loss/total",
}
DETERMINISTIC = {name for name in STEP_SCALARS | VALIDATION_SCALARS if not name.startswith(jobs.MEASURED)}


def test_ends_well_and_says_little(run: Run) -> None:
    assert run.result.status == 0, run.result.output
    for unwanted in ("Traceback", "Warning", "warning"):
        assert unwanted not in run.result.output, run.result.output
    # One rank speaks.
    assert run.result.stdout.count(f"step {STEPS}/{STEPS} ") == 1
    assert str(run.checkpoint) in run.result.stdout


def test_scalars(run: Run, request: pytest.FixtureRequest) -> None:
    steps, validations = run.lines("train"), run.lines("validation")
    of_layout = OF_A_PIPELINE if "pipeline" in request.node.callspec.id else set()
    assert [line["step"] for line in steps] == list(range(1, STEPS + 1))
    assert [line["step"] for line in validations] == VALIDATED
    assert all(line.keys() == STEP_SCALARS | of_layout | {"step"} for line in steps)
    assert all(line.keys() == VALIDATION_SCALARS | {"step"} for line in validations)
    for line in steps:
        assert line["loss/total"] == pytest.approx(sum(line[name] for name in of_heads("loss")))
        assert line["throughput/tokens_per_second"] > 0 and line["throughput/model_flops_per_second"] > 0
        assert line["memory/peak_bytes"] > 1e7
        assert all(0 < line[name] < 1 for name in of_layout if name.endswith("bubble"))
        parts = (value for name, value in line.items() if name.startswith("train/grad_norm/"))
        assert line["train/grad_norm"] == pytest.approx(math.hypot(*parts), rel=1e-5)
        assert all(0 <= line[name] <= 1 for name in of_heads("accuracy"))


def test_learns(run: Run) -> None:
    first, last = run.lines("train")[0], run.lines("train")[-1]
    assert all(last[name] < first[name] - 0.05 for name in of_heads("loss"))


def test_same_training_under_every_launcher(runs: dict[str, Run]) -> None:
    expected = jobs.metrics(runs["one process"].folder)
    for name, run in runs.items():
        for line, truth in zip(jobs.metrics(run.folder), expected, strict=True):
            for scalar in truth.keys() & DETERMINISTIC:
                # Of 8 * 32 training and 7 * 32 validation targets one may tip over.
                tolerance = 1 / 200 if "accuracy" in scalar else 1e-4
                assert abs(line[scalar] - truth[scalar]) <= tolerance * max(1.0, truth[scalar]), (name, scalar)


def test_tensorboard_shows_the_same_numbers(run: Run) -> None:
    events = EventAccumulator(str(run.folder / "tensorboard"))
    events.Reload()
    expected: dict[str, list[tuple[int, np.float32]]] = {}
    for line in jobs.metrics(run.folder):
        for name in line.keys() - {"step"}:
            expected.setdefault(name, []).append((line["step"], np.float32(line[name])))
    assert set(events.Tags()["scalars"]) == expected.keys()
    for name, values in expected.items():
        assert [(event.step, np.float32(event.value)) for event in events.Scalars(name)] == values, name


def test_tensorboard_shows_all_heads_in_one_chart(run: Run) -> None:
    events = EventAccumulator(str(run.folder / "tensorboard"))
    events.Reload()
    [event] = events.Tensors("custom_scalars__config__")
    layout = layout_pb2.Layout.FromString(event.tensor_proto.string_val[0])
    charts = {chart.title: chart.multiline.tag for category in layout.category for chart in category.chart}
    names = events.Tags()["scalars"]
    for kind in ("loss", "accuracy", "validation/loss"):
        [pattern] = charts[f"{kind} of all heads"]
        assert {name for name in names if re.match(pattern, name)} == of_heads(kind)


def test_summary(run: Run) -> None:
    summary = json.loads((run.folder / "summary.json").read_text())
    last = run.lines("validation")[-1]
    assert (summary["name"], summary["steps"]) == ("tiny", STEPS)
    assert summary["tokens_per_second"] > 0
    assert summary["checkpoint"] == str(run.checkpoint)
    assert summary["tensorboard_dir"] == str(run.folder / "tensorboard")
    [validation] = summary["validation"]
    assert validation["total"] == last["validation/loss/total"]
    for k, head in enumerate(validation["heads"], 1):
        assert head["head"] == k
        for name in ("loss", "accuracy", "bits_per_byte"):
            assert head[name] == last[f"validation/{name}/head_{k}"]


def test_checkpoints_agree(runs: dict[str, Run]) -> None:
    from mtp_dist.checkpoint.reader import load_weights

    opened = {name: load_weights(run.checkpoint) for name, run in runs.items()}
    first, expected = opened["one process"]
    for name, (config, weights) in opened.items():
        assert (config.heads.count, config.vocab_size) == (HEADS, first.vocab_size)
        assert weights.keys() == expected.keys()
        for weight, truth in expected.items():
            assert (weights[weight] - truth).norm() <= 1e-3 * truth.norm(), (name, weight)


def test_nothing_but_the_checkpoint_is_left(run: Run) -> None:
    assert sorted(path.name for path in (run.folder / "checkpoints").iterdir()) == ["latest", run.checkpoint.name]


def test_a_repeated_run_is_the_same_to_the_last_bit(runs: dict[str, Run], config: Path, folder: Path) -> None:
    """The second time without a launcher: so it also holds that most other tests do without."""
    again = [*COMMANDS[REPEATED][1], f"run.output_dir={folder / 'again'}"]
    assert jobs.run(jobs.forked(jobs.PRETRAIN, "--config", str(config), *again, processes=2)).status == 0
    lines, expected = jobs.metrics(folder / "again"), jobs.metrics(runs[REPEATED].folder)
    assert [{name: line[name] for name in line.keys() & DETERMINISTIC} for line in lines] == [
        {name: line[name] for name in line.keys() & DETERMINISTIC} for line in expected
    ]
    assert all("train/grad_norm" in line or "validation/loss/head_1" in line for line in lines)


def test_torchrun_on_two_nodes_and_in_a_folder_with_a_space(config: Path, folder: Path, runs: dict[str, Run]) -> None:
    """Both nodes are this machine."""
    checkout = folder / "a checkout"
    checkout.mkdir()
    (checkout / "launchers").symlink_to(jobs.ROOT / "launchers")
    out = folder / "two nodes"
    variables = ["env", "NODES=2", "RANKS_PER_NODE=1", "MASTER_ADDR=127.0.0.1", f"MASTER_PORT={jobs.free_port()}"]
    script = [str(checkout / "launchers" / "torchrun.sh"), "--config", str(config), f"run.output_dir={out}"]
    with ExitStack() as ends:
        nodes = [
            ends.enter_context(jobs.started([*variables, f"NODE_RANK={rank}", *script, *COMMANDS[REPEATED][1]], folder))
            for rank in range(2)
        ]
        assert [node.wait() for node in nodes] == [0, 0], [node.output for node in nodes]
    lines, expected = jobs.metrics(out), jobs.metrics(runs[REPEATED].folder)
    assert [{name: line[name] for name in line.keys() & DETERMINISTIC} for line in lines] == [
        {name: line[name] for name in line.keys() & DETERMINISTIC} for line in expected
    ]
