"""Which checkpoint a run resumes from, and which changes of the configuration it refuses."""

from pathlib import Path
from typing import Any

import pytest

from mtp_dist.checkpoint import find
from mtp_dist.checkpoint.writer import create_staging_dir
from mtp_dist.config import build_config
from mtp_dist.errors import CheckpointError, ConfigError
from tests.tiny import tiny_config
from tests.unit.checkpoint.folders import config_in, flip, write_checkpoint


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    directory = tmp_path / "run"
    for step in (9, 10, 100):
        write_checkpoint(directory, step)
    (directory / "latest").unlink()
    for name in ("step_00000200.unfinished", "step_00000030.deleted", "step_00000010.replaced", "step_of_mine"):
        (directory / name).mkdir()
    (directory / "step_00000300").touch()
    return directory


def steps(paths: list[Path]) -> list[int]:
    return [int(path.name[5:13]) for path in paths]


def test_checkpoint_that_latest_names_comes_first(directory: Path, caplog: pytest.LogCaptureFixture) -> None:
    latest = directory / "latest"
    assert steps(find.candidates(directory)) == [100, 10, 9]
    latest.write_text("step_00000100\n")
    assert steps(find.candidates(directory)) == [100, 10, 9]
    assert caplog.messages == []
    latest.write_text("step_00000010\n")
    assert steps(find.candidates(directory)) == [10, 9]
    assert caplog.messages == [f"{latest} names step_00000010: step_00000100 and all later checkpoints are not used"]
    for content in (b"", b"step_00000", b"step_00000011\n", b"step_00000300\n", b"\xff\xfe", None):
        latest.write_bytes(content) if content is not None else (latest.unlink(), latest.mkdir())
        caplog.clear()
        assert steps(find.candidates(directory)) == [100, 10, 9]
        [message] = caplog.messages
        assert message.startswith(f"{latest} names ") and "does not exist" in message


def test_latest_without_a_checkpoint_is_not_a_new_start(tmp_path: Path) -> None:
    assert find.candidates(tmp_path) == find.candidates(tmp_path / "missing") == []
    (tmp_path / "latest").write_text("step_00000010\n")
    with pytest.raises(CheckpointError, match=r"names 'step_00000010', but .* contains no checkpoint: .*resume=none$"):
        find.candidates(tmp_path)


def test_replaced_checkpoint_counts_until_the_new_one_is_published(directory: Path) -> None:
    (directory / "step_00000010").rename(directory / "moved")
    assert find.finished_checkpoints(directory)[10].name == "step_00000010.replaced"
    (directory / "latest").write_text("step_00000010\n")
    assert steps(find.candidates(directory)) == [10, 9]
    create_staging_dir(directory / "step_00000010.unfinished")
    assert (directory / "step_00000010").is_dir(), "it has its name again"
    left = {path.name for path in directory.iterdir() if path.suffix in (".deleted", ".replaced", ".unfinished")}
    assert left == {"step_00000010.unfinished"}


def test_selection_by_resume(directory: Path, tmp_path: Path) -> None:
    one, oldest = directory / "step_00000010", directory / "step_00000009"
    saved = build_config(config_in(directory).model_dump(mode="json"))
    newest = find.ResumePoint(directory / "step_00000100", 100, saved, older=(one, oldest))
    empty = tmp_path / "empty"
    assert find.find_resume_point(config_in(directory)) == newest
    assert find.find_resume_point(config_in(directory, "none")) is None
    assert find.find_resume_point(config_in(empty)) is None
    assert find.find_resume_point(config_in(empty, str(directory))) == newest
    assert find.find_resume_point(config_in(directory, str(one))) == find.ResumePoint(one, 10, saved)
    with pytest.raises(CheckpointError, match=r"^checkpoint.resume = '.*' has no checkpoint: "):
        find.find_resume_point(config_in(directory, str(empty)))
    (tmp_path / "moved").mkdir()
    directory.rename(tmp_path / "moved" / "checkpoints")
    found = find.find_resume_point(config_in(empty, str(tmp_path / "moved")))
    assert found and found.folder == tmp_path / "moved" / "checkpoints" / "step_00000100", "the run's folder will do"


def test_corrupt_checkpoint_is_passed_over_and_reported(directory: Path, caplog: pytest.LogCaptureFixture) -> None:
    newest, older, oldest = (directory / f"step_{step:08d}" for step in (100, 10, 9))
    flip(newest / "config.json", 50)
    point = find.find_resume_point(config_in(directory))
    assert point and (point.folder, point.step, point.older) == (older, 10, (oldest,))
    [message] = caplog.messages
    assert message.startswith(f"{newest} is not a valid mtp_dist checkpoint (corrupt or incomplete): config.json has ")
    assert message.endswith(f": trying {older}")
    assert find.find_valid_checkpoint(directory) == older and "config.json" in caplog.messages[1]
    with pytest.raises(CheckpointError, match=r"config\.json has the SHA-256 .*; no older checkpoint is left: restore"):
        find.find_resume_point(config_in(directory, str(newest)))
    caplog.clear()
    assert find.older_resume_point(point, "its tensors are wrong", config_in(directory)).folder == oldest
    assert caplog.messages == [f"its tensors are wrong: trying {oldest}"]
    (older / "config.json").unlink()
    (oldest / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match=r"manifest\.json cannot be read .*; no older checkpoint is left"):
        find.find_resume_point(config_in(directory))
    assert len(caplog.messages) == 3
    with pytest.raises(CheckpointError, match=r"step_00000010 is .* config\.json is missing"):
        find.find_resume_point(config_in(directory, str(older)))


REFUSED: dict[str, dict[str, Any]] = {
    "heads": {"kind": "causal", "count": 2, "schedule": "forward", "detach": True, "loss_weights": [1, 0.5, 0.5, 0.5]}
    | {"prediction_distances": [1, 2, 3, 5]},
    "optimizer": {"lr": 2e-3},
    "train": {"steps": 40, "global_batch_size": 16, "sequence_length": 32, "precision": "bf16"},
    "run": {"seed": 7},
    "data": {"train": [{"path": "elsewhere"}]},
}


@pytest.mark.parametrize("section", REFUSED)
def test_another_training_is_refused_unless_allowed(directory: Path, section: str) -> None:
    for name, value in REFUSED[section].items():
        key, changed = f"{section}.{name}", {section: {name: value}}
        with pytest.raises(ConfigError) as error:
            find.find_resume_point(config_in(directory, **changed))
        [message] = str(error.value).splitlines()
        assert message.startswith(f"{key} is ") and f"{directory / 'step_00000100'} was trained with" in message
        assert message.endswith(f"checkpoint.allow_changes=[{key}]")
        assert find.find_resume_point(config_in(directory, "none", **changed)) is None
        assert find.find_resume_point(config_in(directory, allow_changes=[key], **changed))


def test_every_difference_is_named_with_both_values(directory: Path) -> None:
    [source] = tiny_config().model_dump(mode="json")["data"]["train"]
    more = f"data.train is {{1: {{path: {source['path']}}}}}"
    for sections, differences in (
        ({"heads": {"kind": "causal", "count": 2}}, {"heads.count is 2": "4", "heads.kind is 'causal'": "'parallel'"}),
        ({"data": {"train": [source | {"weight": 2.0}]}}, {"data.train is {0: {weight: 2.0}}": "{0: {weight: 1.0}}"}),
        ({"data": {"train": [source, source]}}, {more: "{1: null}"}),
    ):
        with pytest.raises(ConfigError) as error:
            find.find_resume_point(config_in(directory, **sections))
        assert sorted(line.rpartition(": ")[0] for line in str(error.value).splitlines()) == [
            f"{now}, {directory / 'step_00000100'} was trained with {before}" for now, before in differences.items()
        ]


def test_longer_samples_than_those_of_an_import_are_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_checkpoint(tmp_path, 0)
    assert find.find_resume_point(config_in(tmp_path))
    assert caplog.messages == []
    assert find.find_resume_point(config_in(tmp_path, train={"sequence_length": 32}))
    assert caplog.messages[0].startswith("train.sequence_length = 32 exceeds the 16 positions of ")


def test_model_must_stay(directory: Path) -> None:
    changed = {"model": {"ffn_hidden_size": 64}}
    with pytest.raises(ConfigError, match=r"model\.ffn_hidden_size is 64, "):
        find.find_resume_point(config_in(directory, **changed))
    for key in ("model.ffn_hidden_size", "heads.kinds"):
        with pytest.raises(ConfigError, match=rf"checkpoint\.allow_changes names {key}, which is not a key"):
            find.find_resume_point(config_in(directory, allow_changes=[key], **changed))
    adapted = {"train": {"low_rank": {"rank": 2}}}
    with pytest.raises(ConfigError, match=r"train\.low_rank is {.*: set it back, or start a new run with .*_weights="):
        find.find_resume_point(config_in(directory, **adapted))
    with pytest.raises(ConfigError, match=r"checkpoint\.allow_changes names train\.low_rank, which is not a key"):
        find.find_resume_point(config_in(directory, allow_changes=["train.low_rank"], **adapted))
    with pytest.raises(ConfigError, match="vocabulary of 131 tokens, this run one of 257"):
        find.find_resume_point(config_in(directory, model={"vocab_size": 257}))


def test_layout_and_reports_may_change(directory: Path) -> None:
    parallel = {"tensor": 2, "pipeline": 2, "sequence": True, "zero_stage": 1}
    train = {"micro_batch_size": 1, "activation_checkpointing": "full", "validate_every": 3}
    heads = {"loss_mode": "recompute", "chunk_tokens": 3, "stages": 2}
    others = {"heads": heads, "run": {"name": "other", "output_dir": "else"}}
    assert find.find_resume_point(config_in(directory, parallel=parallel, train=train, log={"every": 1}, **others))
