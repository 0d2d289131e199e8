"""The real program under every launcher: the same training, and the files of a run."""

import json
import math
import re
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from mtp_dist.checkpoint.reader import load_weights
from tests.integration import jobs
from tests.unit.monitoring.test_writers import read_tensorboard

STEPS = 5
HEADS = 4
TENSOR, PIPELINE = ["parallel.tensor=2", "parallel.sequence=true"], ["parallel.pipeline=2"]
COMMANDS = {
    "deepspeed, pipeline 2": (jobs.deepspeed, PIPELINE),
    "torchrun, tensor 2": (jobs.torchrun, TENSOR),
    "no launcher, tensor 2, pipeline 2, data 2": (partial(jobs.forked, processes=8), TENSOR + PIPELINE),
    "one process": (jobs.plain, []),
}
REPEATED = "torchrun, tensor 2"
"""The run that is repeated bitwise: it has the most collectives."""


@dataclass(frozen=True)
class Run:
    result: jobs.Result
    folder: Path

    def lines(self, kind):
        """Return the lines of `metrics.jsonl` of steps (kind `train`) or of validations."""
        return [line for line in jobs.metrics(self.folder) if any(name.startswith(f"{kind}/") for name in line)]

    @property
    def checkpoint(self):
        return self.folder / "checkpoints" / f"step_{STEPS:08d}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("launchers")


@pytest.fixture(scope="module")
def config(folder):
    return jobs.write_config(folder, train={"steps": STEPS}, heads={"count": HEADS})


@pytest.fixture(scope="module")
def runs(config, folder):
    started = {}
    for name, (launch, overrides) in COMMANDS.items():
        out = folder / name
        command = launch(jobs.PRETRAIN, "--config", str(config), *overrides, f"run.output_dir={out}")
        started[name] = Run(jobs.run(command, status=0), out)
    return started


@pytest.fixture(params=COMMANDS)
def run(request, runs):
    return runs[request.param]


def by_head(*kinds):
    return {f"{kind}/head_{k}" for kind in kinds for k in range(1, HEADS + 1)}


STEP_SCALARS = {"step", "loss/total", "train/grad_norm", "train/grad_norm/trunk", "train/grad_norm/shared"}
STEP_SCALARS |= {"train/learning_rate", "memory/peak_bytes", "data/epochs/0", "throughput/data_wait_share"}
STEP_SCALARS |= {f"throughput/{name}" for name in ("tokens_per_second", "model_flops_per_second", "mfu")}
STEP_SCALARS |= by_head("loss", "accuracy", "train/grad_norm")
PIPELINE_SCALARS = {"throughput/pipeline_bubble", "memory/peak_bytes/stage_0", "memory/peak_bytes/stage_1"}
VALIDATION_SCALARS = {"step", "validation/loss/total"}
VALIDATION_SCALARS |= by_head("validation/loss", "validation/accuracy", "validation/bits_per_byte")
VALIDATION_SCALARS |= {f"validation/draft_acceptance_rate_pos_{distance}" for distance in range(2, HEADS + 1)}
VALIDATION_SCALARS.add("validation/expected_tokens_per_forward")


def test_output_summary_and_checkpoint(run):
    output = [line for line in run.result.output.splitlines() if "OMP_NUM_THREADS" not in line]
    assert not [line for line in output if re.search("Traceback|[Ww]arning", line)], run.result.output
    assert run.result.stdout.count(f"step {STEPS}/{STEPS} ") == 1, "only rank 0 prints"
    assert str(run.checkpoint) in run.result.stdout
    summary = json.loads((run.folder / "summary.json").read_text())
    last = run.lines("validation")[-1]
    assert (summary["name"], summary["steps"]) == ("tiny", STEPS) and summary["tokens_per_second"] > 0
    assert summary["checkpoint"] == str(run.checkpoint)
    assert summary["tensorboard_dir"] == str(run.folder / "tensorboard")
    [validation] = summary["validation"]
    assert validation["total"] == last["validation/loss/total"]
    for k, head in enumerate(validation["heads"], 1):
        scalars = {name: last[f"validation/{name}/head_{k}"] for name in ("loss", "accuracy", "bits_per_byte")}
        assert head == {"head": k} | scalars
    assert sorted(path.name for path in (run.folder / "checkpoints").iterdir()) == ["latest", run.checkpoint.name]


def test_metrics(run, request):
    steps, validations = run.lines("train"), run.lines("validation")
    pipeline = PIPELINE_SCALARS if "pipeline" in request.node.callspec.id else set()
    assert [line["step"] for line in steps] == list(range(1, STEPS + 1))
    assert [line["step"] for line in validations] == [2, 4, 5]
    assert all(line.keys() == STEP_SCALARS | pipeline for line in steps)
    assert all(line.keys() == VALIDATION_SCALARS for line in validations)
    for line in steps:
        assert line["loss/total"] == pytest.approx(sum(line[name] for name in by_head("loss")))
        assert min(line["throughput/tokens_per_second"], line["throughput/model_flops_per_second"]) > 0
        assert line["memory/peak_bytes"] > 1e7
        assert all(0 < line[name] < 1 for name in pipeline if name.endswith("bubble"))
        modules = (value for name, value in line.items() if name.startswith("train/grad_norm/"))
        assert line["train/grad_norm"] == pytest.approx(math.hypot(*modules), rel=1e-5)
        assert all(0 <= line[name] <= 1 for name in by_head("accuracy"))
    assert all(steps[-1][name] < steps[0][name] - 0.05 for name in by_head("loss")), "it learns"


def test_launchers_agree(runs):
    expected = jobs.learned(runs["one process"].folder)
    first, weights = load_weights(runs["one process"].checkpoint)
    for name, run in runs.items():
        for line, truth in zip(jobs.learned(run.folder), expected, strict=True):
            assert line.keys() == truth.keys()
            for scalar, value in truth.items():
                # One of 8 * 32 training or 7 * 32 validation targets may tip over.
                tolerance = 1 / 200 if "accuracy" in scalar else 1e-5 if "loss/head_" in scalar else 1e-4
                assert abs(line[scalar] - value) <= tolerance * max(1.0, value), (name, scalar)
        saved, found = load_weights(run.checkpoint)
        assert (saved.heads.count, saved.vocab_size, found.keys()) == (HEADS, first.vocab_size, weights.keys())
        for weight, expected_weight in weights.items():
            assert (found[weight] - expected_weight).norm() <= 1e-3 * expected_weight.norm(), (name, weight)


def test_tensorboard_files(run):
    """Read back: the numbers of `metrics.jsonl`, and the configuration as text."""
    events, lines = read_tensorboard(run.folder / "tensorboard"), jobs.metrics(run.folder)
    assert set(events.Tags()["scalars"]) == {name for line in lines for name in line} - {"step"}
    for name in events.Tags()["scalars"]:
        expected = [(line["step"], np.float32(line[name])) for line in lines if name in line]
        assert [(event.step, np.float32(event.value)) for event in events.Scalars(name)] == expected, name
    description = json.loads((run.folder / "run.json").read_text())
    commit = f"commit: {description['measured']['commit'] or 'null'}"
    parts = ("configuration", "trunk_layers: 3"), ("run", f"torch: {description['versions']['torch']}"), ("run", commit)
    for tag, part in parts:
        [event] = events.Tensors(f"{tag}/text_summary")
        text = event.tensor_proto.string_val[0].decode()
        assert text.startswith("```yaml\n") and text.endswith("\n```") and part in text


def test_repeated_run_with_a_profiler_is_bitwise_identical(runs, config, folder):
    """Without a launcher, as most other tests start their ranks."""
    arguments = [*COMMANDS[REPEATED][1], f"run.output_dir={folder / 'again'}"]
    profile = ["log.profile_steps=[2,3]", "log.profile_ranks=[1]"]
    jobs.run(jobs.forked(jobs.PRETRAIN, "--config", str(config), *arguments, *profile, processes=2), status=0)
    assert jobs.learned(folder / "again") == jobs.learned(runs[REPEATED].folder)
    assert [path.name for path in (folder / "again/profile").iterdir()] == ["rank_00001_steps_2-3.json.gz"]


def test_torchrun_on_two_nodes_from_a_folder_with_a_space(config, folder, runs):
    """Both nodes are this machine."""
    checkout, out = folder / "a checkout", folder / "two nodes"
    checkout.mkdir()
    (checkout / "launchers").symlink_to(jobs.ROOT / "launchers")
    variables = ["env", "NODES=2", "RANKS_PER_NODE=1", "MASTER_ADDR=127.0.0.1", f"MASTER_PORT={jobs.free_port()}"]
    script = [str(checkout / "launchers" / "torchrun.sh"), "--config", str(config), f"run.output_dir={out}"]
    first, second = ([*variables, f"NODE_RANK={rank}", *script, *COMMANDS[REPEATED][1]] for rank in (0, 1))
    with jobs.started(first, folder) as node_0, jobs.started(second, folder) as node_1:
        assert (node_0.wait(), node_1.wait()) == (0, 0), node_0.output + node_1.output
    assert jobs.learned(out) == jobs.learned(runs[REPEATED].folder)
