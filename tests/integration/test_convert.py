"""`mtp-dist export` and `import` as commands, with trainings before and after them."""

import json
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from mtp_dist.checkpoint.reader import load_weights
from mtp_dist.config import load_config
from mtp_dist.data.datasets import load_datasets
from tests.integration import jobs
from tests.tiny import LLAMA3_ROPE
from tests.unit.convert.folders import write_llama

COMMAND = ("-m", "mtp_dist.cli")
TRAIN = ["train.steps=3", "train.global_batch_size=4", "train.micro_batch_size=2", "train.sequence_length=32"]


def mtp_dist(*arguments: str | Path) -> jobs.Result:
    result = jobs.run(jobs.forked(*COMMAND, *map(str, arguments)))
    assert result.status == 0, result.output
    return result


@pytest.mark.parametrize("axis", ["tensor", "pipeline"])
def test_training_starts_from_the_imported_model(tmp_path: Path, axis: str) -> None:
    jobs.write_corpus(tmp_path / "corpus")
    llama = write_llama(tmp_path / "hf", rope_parameters=LLAMA3_ROPE | {"rope_theta": 500.0}).eval()
    output = mtp_dist("import", "--from", tmp_path / "hf", "--to", tmp_path / "c", "--heads", "2").stdout
    assert output.startswith(f"{tmp_path / 'c'}: 2 trunk layers, 2 parallel heads, at step 0\n")

    config = tmp_path / "c" / "run.yaml"
    overrides = [*TRAIN, f"data.train=[{{path: {tmp_path / 'corpus'}}}]"]
    options = ["run.device=cpu", f"run.output_dir={tmp_path / 'out'}", "log.every=1", "train.precision=fp32"]
    options += [f"checkpoint.resume={tmp_path / 'c'}", f"parallel.{axis}=2", "parallel.zero_stage=1"]
    result = jobs.run(jobs.forked(jobs.PRETRAIN, "--config", str(config), *overrides, *options, processes=2))
    assert result.status == 0, result.output
    assert f"Resuming from step 0 ({tmp_path / 'c'})" in result.output
    lines = jobs.metrics(tmp_path / "out")
    assert [line["step"] for line in lines] == [1, 2, 3]

    samples = load_datasets(load_config(config, overrides)).train
    tokens = torch.tensor(samples.read(0, 4))
    with torch.no_grad():
        logits = llama(tokens[:, :32]).logits
    expected = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:33].flatten())
    assert lines[0]["loss/head_1"] == pytest.approx(float(expected), rel=1e-5)


def test_run_is_exported_and_imported(tmp_path: Path) -> None:
    config = jobs.write_config(tmp_path, train={"steps": 2})
    assert jobs.run(jobs.forked(jobs.PRETRAIN, "--config", str(config))).status == 0
    checkpoints = tmp_path / "out" / "checkpoints"
    exported = json.loads(mtp_dist("export", "--checkpoint", checkpoints, "--to", tmp_path / "hf", "--json").stdout)
    assert exported["step"] == 2 and exported["dtype"] == "fp32" and exported["layers"] == 4
    assert set(load_file(tmp_path / "hf" / "mtp_heads.safetensors")) == set(exported["head_weights"])
    assert "| head |" in (tmp_path / "hf" / "README.md").read_text(), "the losses of its validation"
    mtp_dist("import", "--from", tmp_path / "hf", "--to", tmp_path / "c")
    (_, before), (_, after) = load_weights(checkpoints / "step_00000002"), load_weights(tmp_path / "c")
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


def test_user_error_prints_one_message(tmp_path: Path) -> None:
    """In a process of its own: the imports print nothing either."""
    (tmp_path / "there").mkdir()
    source = f"--from = '{tmp_path / 'missing'}' is not a folder: "
    target = f"--checkpoint = '{tmp_path}' has no checkpoint: give a folder such as step_00000010\n"
    for arguments, message in (
        (("import", "--from", tmp_path / "missing", "--to", tmp_path / "c"), source),
        (("export", "--checkpoint", tmp_path, "--to", tmp_path / "there"), target),
    ):
        result = jobs.run([sys.executable, *COMMAND, *map(str, arguments)])
        assert result.status == 2 and result.stdout == ""
        assert result.stderr.startswith(f"error: {message}") and result.stderr.count("\n") == 1
    assert not (tmp_path / "c").exists()
