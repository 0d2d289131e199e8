"""`mtp-dist export` and `import` as commands, with real trainings before and after them."""

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
from mtp_dist.model.reference import ReferenceModel
from tests.integration import jobs
from tests.tiny import LLAMA3_ROPE
from tests.unit.convert.folders import write_llama

COMMAND = ("-m", "mtp_dist.cli")


def mtp_dist(*arguments: str | Path) -> jobs.Result:
    result = jobs.run(jobs.forked(*COMMAND, *map(str, arguments)))
    assert result.status == 0, result.output
    return result


def start_for_real(*arguments: str | Path) -> jobs.Result:
    """With what the imports say, where no other word may be heard."""
    return jobs.run([sys.executable, *COMMAND, *map(str, arguments)])


def first_losses(folder: Path, name: str, *overrides: str, processes: int) -> dict[str, float]:
    """Train three steps from the imported checkpoint; the metrics of the first."""
    out = folder / name
    train = ["train.steps=3", "train.global_batch_size=4", "train.micro_batch_size=2", "train.sequence_length=32"]
    options = [*train, "run.device=cpu", f"run.output_dir={out}", "log.every=1", "train.precision=fp32"]
    options += [f"data.train=[{{path: {folder / 'corpus'}}}]", f"checkpoint.resume={folder / 'c'}", *overrides]
    result = jobs.run(
        jobs.forked(jobs.PRETRAIN, "--config", str(folder / "c" / "run.yaml"), *options, processes=processes)
    )
    assert result.status == 0, result.output
    assert f"Resuming from step 0 ({folder / 'c'})" in result.output
    lines = jobs.metrics(out)
    assert [line["step"] for line in lines] == [1, 2, 3]
    return lines[0]


@pytest.mark.parametrize("axis", ["tensor", "pipeline"])
def test_a_training_starts_where_the_imported_model_is(tmp_path: Path, axis: str) -> None:
    jobs.write_corpus(tmp_path / "corpus")
    llama = write_llama(tmp_path / "hf", rope_parameters=LLAMA3_ROPE | {"rope_theta": 500.0}).eval()
    said = mtp_dist("import", "--from", tmp_path / "hf", "--to", tmp_path / "c", "--heads", "2")
    assert said.stdout.startswith(f"{tmp_path / 'c'}: 2 trunk layers, 2 parallel heads, at step 0\n")
    first = first_losses(tmp_path, axis, f"parallel.{axis}=2", "parallel.zero_stage=1", processes=2)

    train = ["train.global_batch_size=4", "train.sequence_length=32", "train.steps=3"]
    corpus = f"data.train=[{{path: {tmp_path / 'corpus'}}}]"
    samples = load_datasets(load_config(tmp_path / "c" / "run.yaml", [corpus, *train])).train
    tokens = torch.tensor(samples.read(0, 4))
    with torch.no_grad():
        logits = llama(tokens[:, :32]).logits
    expected = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:33].flatten())
    assert first["loss/head_1"] == pytest.approx(float(expected), rel=1e-5)


def test_a_run_is_exported_and_comes_back(tmp_path: Path) -> None:
    config = jobs.write_config(tmp_path, train={"steps": 2})
    assert jobs.run(jobs.forked(jobs.PRETRAIN, "--config", str(config))).status == 0
    checkpoints = tmp_path / "out" / "checkpoints"
    said = mtp_dist("export", "--checkpoint", checkpoints, "--to", tmp_path / "hf", "--json")
    exported = json.loads(said.stdout)
    assert exported["step"] == 2 and exported["dtype"] == "fp32" and exported["layers"] == 4
    assert set(load_file(tmp_path / "hf" / "mtp_heads.safetensors")) == set(exported["head_weights"])
    assert "| head |" in (tmp_path / "hf" / "README.md").read_text(), "the losses of its validation"
    mtp_dist("import", "--from", tmp_path / "hf", "--to", tmp_path / "c")
    _, before = load_weights(checkpoints / "step_00000002")
    back = ReferenceModel(*load_weights(tmp_path / "c")).named_weights()
    assert before.keys() == back.keys() and all(torch.equal(before[name], back[name]) for name in before)

    again = start_for_real("export", "--checkpoint", checkpoints, "--to", tmp_path / "hf")
    assert again.status == 2 and again.stdout == ""
    assert again.stderr == f"error: --to = '{tmp_path / 'hf'}' exists: delete it, or name another folder\n"


def test_a_mistake_ends_with_one_sentence(tmp_path: Path) -> None:
    result = start_for_real("import", "--from", tmp_path / "missing", "--to", tmp_path / "c")
    assert result.status == 2 and result.stdout == ""
    assert result.stderr.startswith(f"error: --from = '{tmp_path / 'missing'}' is not a folder: ")
    assert result.stderr.count("\n") == 1 and not (tmp_path / "c").exists()
