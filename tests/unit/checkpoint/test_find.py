"""Which checkpoint a run resumes from, and which changes of the configuration it refuses."""

from pathlib import Path
from typing import Any

import pytest

from mtp_dist.checkpoint.find import (
    ResumePoint,
    candidates,
    find_resume_point,
    find_valid_checkpoint,
    finished_checkpoints,
    older_resume_point,
)
from mtp_dist.checkpoint.format import CheckpointMetadata
from mtp_dist.checkpoint.manifest import record_of, write_manifest
from mtp_dist.checkpoint.writer import create_staging_dir
from mtp_dist.config import Config
from mtp_dist.errors import CheckpointError, ConfigError
from tests.tiny import tiny_config
from tests.unit.checkpoint.folders import as_saved, flip

SAVED = as_saved(tiny_config())


def save_metadata(directory: Path, step: int, **sections: Any) -> Path:
    """Write a checkpoint without tensors."""
    folder = directory / f"step_{step:08d}"
    folder.mkdir(parents=True)
    CheckpointMetadata(step, step, tiny_config(**sections)).write(folder)
    for kind in ("model", "optimizer"):
        (folder / f"{kind}.safetensors.index.json").write_text('{"weight_map": {}}')
    write_manifest(folder, {path.name: record_of(path) for path in folder.iterdir()})
    return folder


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    directory = tmp_path / "run"
    for step in (9, 10, 100):
        save_metadata(directory, step)
    for suffix in ("200.unfinished", "030.deleted", "010.replaced"):
        (directory / f"step_00000{suffix}").mkdir()
    for name in ("step_of_mine", "previous-1"):
        (directory / name).mkdir()
    (directory / "step_00000300").touch()
    return directory


def config_in(directory: Path, resume: str = "auto", allow_changes: list[str] | None = None, **sections: Any) -> Config:
    checkpoint = {"directory": str(directory), "resume": resume, "allow_changes": allow_changes or []}
    return tiny_config(checkpoint=checkpoint, **sections)


def steps(paths: list[Path]) -> list[int]:
    return [int(path.name[5:13]) for path in paths]


def test_checkpoint_that_latest_names_comes_first(directory: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert steps(candidates(directory)) == [100, 10, 9]
    (directory / "latest").write_text("step_00000100\n")
    assert steps(candidates(directory)) == [100, 10, 9]
    assert caplog.messages == []
    (directory / "latest").write_text("step_00000010\n")
    assert steps(candidates(directory)) == [10, 9]
    assert caplog.messages == [
        f"{directory / 'latest'} names step_00000010: step_00000100 and all later checkpoints are not used"
    ]


def test_corrupt_latest_is_reported(directory: Path, caplog: pytest.LogCaptureFixture) -> None:
    latest = directory / "latest"
    for content in (b"", b"step_00000", b"step_00000011\n", b"step_00000300\n", b"\xff\xfe", None):
        latest.write_bytes(content) if content is not None else (latest.unlink(), latest.mkdir())
        caplog.clear()
        assert steps(candidates(directory)) == [100, 10, 9]
        [message] = caplog.messages
        assert message.startswith(f"{latest} names ") and "does not exist" in message


def test_latest_without_a_checkpoint_is_not_a_new_start(tmp_path: Path) -> None:
    assert candidates(tmp_path) == candidates(tmp_path / "missing") == []
    (tmp_path / "latest").write_text("step_00000010\n")
    with pytest.raises(CheckpointError, match=r"names 'step_00000010', but .* contains no checkpoint: .*resume=none$"):
        candidates(tmp_path)


def test_replaced_checkpoint_counts_until_the_new_one_is_published(directory: Path) -> None:
    (directory / "step_00000010").rename(directory / "moved")
    assert finished_checkpoints(directory)[10].name == "step_00000010.replaced"
    (directory / "latest").write_text("step_00000010\n")
    assert steps(candidates(directory)) == [10, 9]
    create_staging_dir(directory / "step_00000010.unfinished")
    assert (directory / "step_00000010").is_dir(), "it has its name again"
    left = {path.name for path in directory.iterdir() if path.suffix in (".deleted", ".replaced", ".unfinished")}
    assert left == {"step_00000010.unfinished"}


def test_selection_by_resume(directory: Path, tmp_path: Path) -> None:
    older = (directory / "step_00000010", directory / "step_00000009")
    newest = ResumePoint(directory / "step_00000100", 100, SAVED, older=older)
    empty = tmp_path / "empty"
    assert find_resume_point(config_in(directory)) == newest
    assert find_resume_point(config_in(directory, "none")) is None
    assert find_resume_point(config_in(empty)) is None
    assert find_resume_point(config_in(empty, str(directory))) == newest
    one = directory / "step_00000010"
    assert find_resume_point(config_in(directory, str(one))) == ResumePoint(one, 10, SAVED)
    with pytest.raises(CheckpointError, match=r"^checkpoint.resume = '.*' has no checkpoint: "):
        find_resume_point(config_in(directory, str(empty)))
    (tmp_path / "moved").mkdir()
    directory.rename(tmp_path / "moved" / "checkpoints")
    found = find_resume_point(config_in(empty, str(tmp_path / "moved")))
    assert found and found.folder == tmp_path / "moved" / "checkpoints" / "step_00000100", "the run's folder will do"


def test_corrupt_checkpoint_is_passed_over_and_reported(directory: Path, caplog: pytest.LogCaptureFixture) -> None:
    newest, older, oldest = (directory / f"step_{step:08d}" for step in (100, 10, 9))
    flip(newest / "config.json", 50)
    point = find_resume_point(config_in(directory))
    assert point == ResumePoint(older, 10, SAVED, older=(oldest,))
    [message] = caplog.messages
    assert message.startswith(f"{newest} is not a valid mtp_dist checkpoint (corrupt or incomplete): config.json has ")
    assert message.endswith(f": trying {older}")
    assert find_valid_checkpoint(directory) == older and "config.json" in caplog.messages[1]
    with pytest.raises(CheckpointError, match=r"config\.json has the SHA-256 .*; no older checkpoint is left: restore"):
        find_resume_point(config_in(directory, str(newest)))
    caplog.clear()
    assert older_resume_point(point, "its tensors are wrong", config_in(directory)).folder == oldest
    assert caplog.messages == [f"its tensors are wrong: trying {oldest}"]
    (older / "config.json").unlink()
    (oldest / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match=r"manifest\.json cannot be read .*; no older checkpoint is left"):
        find_resume_point(config_in(directory))
    assert len(caplog.messages) == 3
    with pytest.raises(CheckpointError, match=r"step_00000010 is .* config\.json is missing"):
        find_resume_point(config_in(directory, str(older)))


REFUSED: dict[str, tuple[str, Any]] = {
    "heads.kind": ("heads", "causal"),
    "heads.count": ("heads", 2),
    "heads.schedule": ("heads", "forward"),
    "heads.prediction_distances": ("heads", [1, 2, 3, 5]),
    "heads.loss_weights": ("heads", [1, 0.5, 0.5, 0.5]),
    "heads.detach": ("heads", True),
    "optimizer.lr": ("optimizer", 2e-3),
    "train.steps": ("train", 40),
    "train.global_batch_size": ("train", 16),
    "train.sequence_length": ("train", 32),
    "train.precision": ("train", "bf16"),
    "run.seed": ("run", 7),
    "data.train": ("data", [{"path": "elsewhere"}]),
}


@pytest.mark.parametrize("key", REFUSED)
def test_another_training_is_refused_unless_allowed(directory: Path, key: str) -> None:
    section, value = REFUSED[key]
    changed = {section: {key.partition(".")[2]: value}}
    with pytest.raises(ConfigError) as error:
        find_resume_point(config_in(directory, **changed))
    [message] = str(error.value).splitlines()
    assert message.startswith(f"{key} is ") and f"{directory / 'step_00000100'} was trained with" in message
    assert message.endswith(f"checkpoint.allow_changes=[{key}]")
    assert find_resume_point(config_in(directory, "none", **changed)) is None
    assert find_resume_point(config_in(directory, allow_changes=[key], **changed))


def test_every_difference_is_named_with_both_values(directory: Path) -> None:
    [source] = tiny_config().model_dump(mode="json")["data"]["train"]
    more = f"data.train is {{1: {{path: {source['path']}}}}}"
    for sections, differences in (
        ({"heads": {"kind": "causal", "count": 2}}, {"heads.count is 2": "4", "heads.kind is 'causal'": "'parallel'"}),
        ({"data": {"train": [source | {"weight": 2.0}]}}, {"data.train is {0: {weight: 2.0}}": "{0: {weight: 1.0}}"}),
        ({"data": {"train": [source, source]}}, {more: "{1: null}"}),
    ):
        with pytest.raises(ConfigError) as error:
            find_resume_point(config_in(directory, **sections))
        assert sorted(line.rpartition(": ")[0] for line in str(error.value).splitlines()) == [
            f"{now}, {directory / 'step_00000100'} was trained with {before}" for now, before in differences.items()
        ]


def test_longer_samples_than_those_of_an_import_are_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    save_metadata(tmp_path, 0)
    length = tiny_config().train.sequence_length
    assert find_resume_point(config_in(tmp_path, train={"sequence_length": length}))
    assert caplog.messages == []
    assert find_resume_point(config_in(tmp_path, train={"sequence_length": 2 * length}))
    assert caplog.messages[0].startswith(f"train.sequence_length = {2 * length} exceeds the {length} positions of ")


def test_model_must_stay(directory: Path) -> None:
    changed = {"model": {"ffn_hidden_size": 64}}
    with pytest.raises(ConfigError, match=r"model\.ffn_hidden_size is 64, "):
        find_resume_point(config_in(directory, **changed))
    for key in ("model.ffn_hidden_size", "heads.kinds"):
        with pytest.raises(ConfigError, match=rf"checkpoint\.allow_changes names {key}, which is not a key"):
            find_resume_point(config_in(directory, allow_changes=[key], **changed))
    with pytest.raises(ConfigError, match="vocabulary of 131 tokens, this run one of 257"):
        find_resume_point(config_in(directory, model={"vocab_size": 257}))


def test_layout_and_reports_may_change(directory: Path) -> None:
    config = config_in(
        directory,
        run={"name": "other", "output_dir": "elsewhere"},
        parallel={"tensor": 2, "pipeline": 2, "sequence": True, "zero_stage": 1},
        heads={"loss_mode": "recompute", "chunk_tokens": 3},
        train={"micro_batch_size": 1, "activation_checkpointing": "full", "validate_every": 3},
        log={"every": 1},
    )
    assert find_resume_point(config)
