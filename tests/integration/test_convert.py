"""`mtp-dist export` and `import` as commands, with trainings before and after them."""

import json
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from transformers import LlamaForCausalLM

from mtp_dist.config import load_config
from mtp_dist.data.datasets import load_datasets
from tests.integration import jobs
from tests.unit.convert.folders import check_weights, open_model

COMMAND = ("-m", "mtp_dist.cli")


def mtp_dist(*arguments: str | Path) -> jobs.Result:
    return jobs.run(jobs.forked(*COMMAND, *map(str, arguments)), status=0)


def test_run_is_exported_imported_and_trained(tmp_path: Path) -> None:
    config = jobs.write_config(tmp_path, train={"steps": 2})
    jobs.run(jobs.forked(jobs.PRETRAIN, "--config", str(config)), status=0)
    checkpoints, imported = tmp_path / "out" / "checkpoints", tmp_path / "c"
    exported = json.loads(mtp_dist("export", "--checkpoint", checkpoints, "--to", tmp_path / "hf", "--json").stdout)
    assert exported["step"] == 2 and exported["dtype"] == "fp32" and exported["layers"] == 4
    assert set(load_file(tmp_path / "hf" / "mtp_heads.safetensors")) == set(exported["head_weights"])
    assert "| head |" in (tmp_path / "hf" / "README.md").read_text(), "the losses of its validation"
    output = mtp_dist("import", "--from", tmp_path / "hf", "--to", imported).stdout
    assert output.startswith(f"{imported}: 3 trunk layers, 4 parallel heads, at step 0\n")
    check_weights(open_model(checkpoints / "step_00000002"), open_model(imported))

    overrides = [f"checkpoint.resume={imported}", f"run.output_dir={tmp_path / 'new'}", "log.every=1"]
    overrides += ["train.steps=3", "parallel.tensor=2", "parallel.zero_stage=1"]
    job = jobs.forked(jobs.PRETRAIN, "--config", str(imported / "run.yaml"), *overrides, processes=2)
    result = jobs.run(job, status=0)
    assert f"Resuming from step 0 ({imported})" in result.output
    lines = jobs.metrics(tmp_path / "new")
    assert [line["step"] for line in lines if "loss/head_1" in line] == [1, 2, 3]
    new = load_config(imported / "run.yaml", overrides)
    length = new.train.sequence_length
    tokens = torch.tensor(load_datasets(new).train.read(0, new.train.global_batch_size))
    with torch.no_grad():
        logits = LlamaForCausalLM.from_pretrained(tmp_path / "hf")(tokens[:, :length]).logits
    expected = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1 : length + 1].flatten())
    torch.testing.assert_close(torch.tensor(lines[0]["loss/head_1"]), expected, rtol=1e-5, atol=0)


def test_user_error_prints_one_message(tmp_path: Path) -> None:
    """In a process of its own: the imports print nothing either."""
    source = f"--from = '{tmp_path / 'missing'}' is not a folder: "
    target = (
        f"--checkpoint = '{tmp_path}' has no checkpoint: give a run's folder, or a checkpoint such as step_00000010\n"
    )
    for arguments, message in (
        (("import", "--from", tmp_path / "missing", "--to", tmp_path / "c"), source),
        (("export", "--checkpoint", tmp_path, "--to", tmp_path / "c"), target),
    ):
        result = jobs.run([sys.executable, *COMMAND, *map(str, arguments)])
        assert result.status == 2 and result.stdout == ""
        assert result.stderr.startswith(f"error: {message}") and result.stderr.count("\n") == 1
    assert not (tmp_path / "c").exists()
