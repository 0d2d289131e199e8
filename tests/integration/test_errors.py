"""A user error ends a start with status 2 and one message that names the key, before anything is written."""

from importlib.metadata import PackageNotFoundError
from unittest.mock import Mock

import pytest
import torch

from mtp_dist.monitoring.writers import wandb
from mtp_dist.pretrain import main
from tests.integration import jobs


@pytest.fixture(autouse=True)
def faulty_sources(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    for file, text in {"notes/a.txt": "no code", "empty/a.py": "", "short/a.py": "x = 1\n"}.items():
        (tmp_path / file).parent.mkdir()
        (tmp_path / file).write_text(text)


def error_of(capsys, config, *overrides):
    with pytest.raises(SystemExit) as end:
        main(["--config", str(config), *overrides])
    output, errors = capsys.readouterr()
    assert end.value.code == 2 and "error" not in output
    assert errors.startswith("error: ") and errors.count("\n") == 1, errors
    assert not (config.parent / "out").exists()
    return errors


# Errors of the configuration alone are in tests/unit/test_config_errors.py. TMP is the folder of the configuration.
ERRORS = """
train.step=7 => train.step is not a known key ... train.steps
parallel.pipeline=2 => parallel.pipeline ... world size 1 ... multiple of 2 processes
deepspeed.fp16.enabled=true => deepspeed.fp16 ... remove it
deepspeed.wall_clok=true => deepspeed.wall_clok ... not a key that DeepSpeed reads
deepspeed.flops_profiler={enabled: false, modul: 1} => deepspeed.flops_profiler.modul
deepspeed.comms_logger={enabled: maybe} => deepspeed.comms_logger.enabled ... boolean
--memory-snapshot => --memory-snapshot ... this run is on a CPU
log.profile_ranks=[1] => log.profile_ranks = [1] ... no rank 1
model.vocab_size=100 => model.vocab_size = 100 ... 257
run.output_dir=~nouser/x => run.output_dir = '~nouser/x' ... unknown user
run.step_timeout=1e300 => run.step_timeout = 1e+300 ... less than
model.hidden_size=134217728 => parallel.tensor ... parallel.pipeline ... GB of memory ... parallel.check_memory=false
train.global_batch_size=2147483640 train.micro_batch_size=1 => train.global_batch_size = 2147483640 ... GB of memory
data.train=[{path: /no/such}] => data.train.0.path = '/no/such' ... does not exist
data.train=[{path: ~/nowhere}] => data.train.0.path = '/ ... does not exist
data.train=[{path: TMP/notes}] => data.train.0.path = 'TMP/notes' ... has no file for
data.validation=[{path: TMP/notes}] => data.validation.0.path = 'TMP/notes' ... has no file for
data.train=[{path: TMP/empty}] => data.train.0.path = 'TMP/empty' ... has no document with text
data.validation=[{path: TMP/empty}] => data.validation.0.path = 'TMP/empty' ... has no document with text
data.train=[{path: TMP/short}] => data.train.0.path = 'TMP/short' ... too small
data.validation=[{path: TMP/short}] => data.validation.0.path = 'TMP/short' ... too small
run.output_dir=TMP/link/below => run.output_dir = 'TMP/link/below' ... TMP/gone
checkpoint.directory=TMP/link/below => checkpoint.directory = 'TMP/link/below' ... TMP/gone
run.output_dir=TMP/file/below => run.output_dir = 'TMP/file/below'
checkpoint.directory=TMP/file/below => checkpoint.directory = 'TMP/file/below'
RANK= => RANK = ''
LOCAL_RANK= => LOCAL_RANK = ''
WORLD_SIZE= => WORLD_SIZE = ''
LOCAL_WORLD_SIZE= => LOCAL_WORLD_SIZE = ''
WORLD_SIZE=3 parallel.tensor=2 => parallel.tensor ... world size 3
SLURM_JOB_ID=7 SLURM_RESTART_COUNT=4 => SLURM has restarted job 7 4 times since its last checkpoint ... --time
"""


@pytest.mark.parametrize("case", ERRORS.strip().split("\n"))
def test_error_names_key_and_remedy(capsys, config, monkeypatch, case):
    settings, expected = case.replace("TMP", str(config.parent)).split(" => ")
    overrides = settings.split(" ") if "{" not in settings else [settings]
    for variable in [override for override in overrides if override.split("=")[0].isupper()]:
        overrides.remove(variable)
        monkeypatch.setenv(*variable.split("="))
    message = error_of(capsys, config, *overrides)
    assert all(fragment in message for fragment in expected.split(" ... ")), message


def test_weights_and_biases_not_installed(capsys, config, monkeypatch):
    monkeypatch.setattr(wandb, "version", Mock(side_effect=PackageNotFoundError("wandb")))
    needed = "error: log.wandb = 'project' needs the package wandb, which is not installed: pip install"
    assert error_of(capsys, config, "log.wandb=project").startswith(needed)


def test_several_errors_are_reported_at_once(capsys, config):
    with pytest.raises(SystemExit):
        main(["--config", str(config), "train.step=7", "model.layers=3"])
    assert [line[:7] for line in capsys.readouterr().err.splitlines()] == ["error: "] * 2


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_missing_gpu(capsys, config):
    assert "run.device = 'cuda'" in error_of(capsys, config, "run.device=cuda")


@pytest.mark.parametrize("arguments", [[], ["train.steps=3"], ["--config"]])
def test_missing_configuration(capsys, arguments):
    with pytest.raises(SystemExit) as end:
        main(arguments)
    assert end.value.code == 2 and "--config" in capsys.readouterr().err


def test_module_is_the_program(config):
    command = jobs.plain("-m", "mtp_dist.pretrain", "--config", str(config), "train.step=7")
    assert jobs.run(command, status=2).stderr.startswith("error: train.step is not a known key")


def test_module_prints_one_error_under_the_deepspeed_launcher(config):
    """As `python -m mtp_dist.pretrain` on each rank."""
    command = jobs.deepspeed("--module", "mtp_dist.pretrain", "--config", str(config), "train.precision=fp16")
    result = jobs.run(command, status=2)
    assert result.output.count("error: ") == result.output.count("train.precision = 'fp16'") == 1, result.output
    assert "Traceback" not in result.output and not (config.parent / "out").exists()
