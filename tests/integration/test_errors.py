"""A mistake of the user ends with status 2 and one sentence that names the key, before anything is written."""

from collections.abc import Callable
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest
import torch
import yaml

from mtp_dist.monitoring.writers import wandb
from mtp_dist.pretrain import main
from tests.integration import jobs


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    # What select_device sets, so that it is undone.
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    monkeypatch.setattr(torch.cuda, "current_device", torch.cuda.current_device)
    return jobs.write_config(tmp_path)


def error_of(capsys: pytest.CaptureFixture[str], config: Path, *overrides: str) -> str:
    """The one line that the program ends with."""
    with pytest.raises(SystemExit) as end:
        main(["--config", str(config), *overrides])
    output, errors = capsys.readouterr()
    assert end.value.code == 2
    assert output == ""
    assert errors.startswith("error: ") and errors.count("\n") == 1, errors
    assert not (config.parent / "out").exists()
    return errors


MISTAKES: dict[str, tuple[list[str], list[str]]] = {
    "misspelt key": (["train.step=7"], ["train.step is not a known key", "train.steps"]),
    "key of another section": (["model.sequence_length=7"], ["model.sequence_length", "train.sequence_length"]),
    "misspelt section": (["trian.steps=7"], ["trian is not a known key", "train"]),
    "wrong type": (["train.steps=many"], ["train.steps = 'many'", "integer"]),
    "number out of range": (["train.global_batch_size=0"], ["train.global_batch_size = 0", "greater than 0"]),
    "no value": (["train.steps="], ["train.steps = None", "integer"]),
    "override without a value": (["train.steps"], ["'train.steps'", "section.key=value"]),
    "override without a section": (["steps=3"], ["'steps=3'", "section.key=value"]),
    "fp16": (["train.precision=fp16"], ["train.precision = 'fp16'", "'bf16' or 'fp32'"]),
    "zero 2": (["parallel.zero_stage=2"], ["parallel.zero_stage = 2", "0 or 1"]),
    "more stages than layers": (
        ["parallel.pipeline=4"],
        ["parallel.pipeline = 4", "model.trunk_layers = 3"],
    ),
    "fewer ranks than the layout": (
        ["parallel.pipeline=2"],
        ["parallel.pipeline", "world size 1", "multiple of 2 processes"],
    ),
    "global batch": (
        ["train.global_batch_size=7"],
        ["train.global_batch_size = 7", "train.micro_batch_size", "not divisible"],
    ),
    "sequence parallelism of one rank": (["parallel.sequence=true"], ["parallel.sequence = true", "parallel.tensor"]),
    "sequence length under sequence parallelism": (
        ["parallel.tensor=2", "parallel.sequence=true", "train.sequence_length=33"],
        ["train.sequence_length = 33", "parallel.tensor = 2"],
    ),
    "loss weights": (["heads.loss_weights=[1, 1]"], ["heads.loss_weights", "heads.count"]),
    "derived DeepSpeed key": (["deepspeed.fp16.enabled=true"], ["deepspeed.fp16", "remove it"]),
    "missing data path": (["data.train=[{path: /no/such}]"], ["data.train.0.path = '/no/such'", "does not exist"]),
    "memory of a CPU": (["--memory-snapshot"], ["--memory-snapshot", "this run is on a CPU"]),
    "profile of a rank that is not there": (["log.profile_ranks=[1]"], ["log.profile_ranks = [1]", "no rank 1"]),
    "profile beyond the end": (["log.profile_steps=[5, 7]"], ["log.profile_steps = [5, 7]", "train.steps = 5"]),
    "small vocabulary": (["model.vocab_size=100"], ["model.vocab_size = 100", "257"]),
}

FAULTS = {
    "7.A11": {
        "DeepSpeed key that nobody reads": (
            ["deepspeed.wall_clok=true"],
            ["deepspeed.wall_clok", "not a key that DeepSpeed reads"],
        ),
        "nested DeepSpeed key that nobody reads": (
            ["deepspeed.flops_profiler={enabled: false, modul: 1}"],
            ["deepspeed.flops_profiler.modul"],
        ),
        "DeepSpeed value that it refuses": (
            ["deepspeed.comms_logger={enabled: maybe}"],
            ["deepspeed.comms_logger.enabled", "boolean"],
        ),
    },
    "7.D3": {
        "home of an unknown user": (["run.output_dir=~nouser/x"], ["run.output_dir = '~nouser/x'", "unknown user"]),
        "more parameters than memory": (
            ["model.hidden_size=134217728"],
            ["parameters", "GB of memory", "parallel.tensor", "parallel.pipeline"],
        ),
        "more samples per step than memory": (
            ["train.global_batch_size=2147483640", "train.micro_batch_size=1"],
            ["train.global_batch_size = 2147483640", "GB of memory"],
        ),
        "timeout that overflows": (["run.step_timeout=1e300"], ["run.step_timeout = 1e+300", "less than"]),
    },
    "7.D4": {
        "home in a path of data": (["data.train=[{path: ~/nowhere}]"], ["data.train.0.path = '/", "does not exist"]),
    },
}
"""Mistakes that once went unnoticed or ended in a traceback, by the marker of their regression test."""


@pytest.mark.parametrize(
    "mistake",
    [
        *MISTAKES,
        *(pytest.param(name) for line, names in FAULTS.items() for name in names),
    ],
)
def test_mistake_in_the_configuration(capsys: pytest.CaptureFixture[str], config: Path, mistake: str) -> None:
    known = {name: case for cases in (MISTAKES, *FAULTS.values()) for name, case in cases.items()}
    overrides, named = known[mistake]
    message = error_of(capsys, config, *overrides)
    assert all(part in message for part in named), message


def test_weights_and_biases_not_installed(
    capsys: pytest.CaptureFixture[str], config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(package: str) -> str:
        raise PackageNotFoundError(package)

    monkeypatch.setattr(wandb, "version", missing)
    message = error_of(capsys, config, "log.wandb=project")
    assert message.startswith(
        "error: log.wandb = 'project' needs the package wandb, which is not installed: pip install"
    )


def test_degree_that_does_not_divide_the_world(
    capsys: pytest.CaptureFixture[str], config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
    message = error_of(capsys, config, "parallel.tensor=2")
    assert "parallel.tensor" in message and "world size 3" in message


@pytest.mark.parametrize("variable", ["RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"])
def test_empty_variable_of_a_launcher(
    capsys: pytest.CaptureFixture[str], config: Path, monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    monkeypatch.setenv(variable, "")
    assert f"{variable} = ''" in error_of(capsys, config)


@pytest.mark.parametrize("key", ["run.output_dir", "checkpoint.directory"])
def test_link_to_a_folder_that_is_not_there(
    capsys: pytest.CaptureFixture[str], config: Path, tmp_path: Path, key: str
) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    message = error_of(capsys, config, f"{key}={tmp_path}/link/below")
    assert f"{key} = '{tmp_path}/link/below'" in message and f"{tmp_path}/gone" in message


def test_several_mistakes_are_shown_at_once(capsys: pytest.CaptureFixture[str], config: Path) -> None:
    with pytest.raises(SystemExit):
        main(["--config", str(config), "train.step=7", "model.layers=3"])
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2 and all(line.startswith("error: ") for line in lines)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_gpu_that_is_not_there(capsys: pytest.CaptureFixture[str], config: Path) -> None:
    assert "run.device = 'cuda'" in error_of(capsys, config, "run.device=cuda")


def _without_python(folder: Path) -> None:
    (folder / "notes.txt").write_text("not Python")


def _empty_files(folder: Path) -> None:
    (folder / "a.py").touch()
    (folder / "b.py").touch()


def _too_short(folder: Path) -> None:
    (folder / "a.py").write_text("x = 1\n")


@pytest.mark.parametrize(
    ("fill", "reason"),
    [(_without_python, "has no file for"), (_empty_files, "has no document with text"), (_too_short, "too small")],
)
@pytest.mark.parametrize("key", ["train", "validation"])
def test_corpus_without_a_sample(
    capsys: pytest.CaptureFixture[str], config: Path, key: str, fill: Callable[[Path], None], reason: str
) -> None:
    corpus = config.parent / "other"
    corpus.mkdir()
    fill(corpus)
    message = error_of(capsys, config, f"data.{key}=[{{path: {corpus}}}]")
    assert f"data.{key}.0.path = '{corpus}'" in message and reason in message


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("run: {name: a", "not valid YAML"),
        ("run:\n\tname: a\n", "not valid YAML"),
        ("run: {name: a, name: b}", "'name' is given twice"),
        ("- run", "not a mapping"),
        ("", "not a mapping"),
    ],
)
def test_file_that_is_no_configuration(
    capsys: pytest.CaptureFixture[str], config: Path, content: str, reason: str
) -> None:
    config.write_text(content)
    assert reason in error_of(capsys, config)


def test_file_that_cannot_be_read(capsys: pytest.CaptureFixture[str], config: Path) -> None:
    missing = config.with_name("missing.yaml")
    assert f"{missing}: No such file" in error_of(capsys, missing)
    assert "Is a directory" in error_of(capsys, config.parent / "corpus")


def test_missing_section(capsys: pytest.CaptureFixture[str], config: Path) -> None:
    values = yaml.safe_load(config.read_text())
    del values["model"]
    config.write_text(yaml.safe_dump(values))
    assert "model is missing" in error_of(capsys, config)


@pytest.mark.parametrize("arguments", [[], ["train.steps=3"], ["--config"]])
def test_without_a_configuration(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(arguments)
    assert end.value.code == 2
    assert "--config" in capsys.readouterr().err


def test_the_module_is_the_program(config: Path) -> None:
    """`python -m mtp_dist.pretrain`, and `torchrun -m`, which starts the same."""
    result = jobs.run(jobs.plain("-m", "mtp_dist.pretrain", "--config", str(config), "train.step=7"))
    assert result.status == 2, result.output
    assert result.stderr.startswith("error: train.step is not a known key")


def test_under_the_deepspeed_launcher_one_rank_speaks(tmp_path: Path) -> None:
    config = jobs.write_config(tmp_path)
    result = jobs.run(jobs.deepspeed(jobs.PRETRAIN, "--config", str(config), "train.precision=fp16"))
    assert result.status == 2, result.output
    assert result.output.count("error: ") == result.output.count("train.precision = 'fp16'") == 1, result.output
    assert "Traceback" not in result.output
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("key", ["run.output_dir", "checkpoint.directory"])
def test_folder_that_cannot_be_written(
    capsys: pytest.CaptureFixture[str], config: Path, tmp_path: Path, key: str
) -> None:
    (tmp_path / "file").touch()
    assert f"{key} = '{tmp_path}/file/below'" in error_of(capsys, config, f"{key}={tmp_path}/file/below")
