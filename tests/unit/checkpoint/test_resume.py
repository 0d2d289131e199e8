"""Which checkpoint a run goes on from, and which changes of the configuration it refuses."""

from pathlib import Path
from typing import Any

import pytest

from mtp_dist.checkpoint.find import ResumePoint, find_resume_point, find_valid_checkpoint, older_resume_point
from mtp_dist.checkpoint.format import CheckpointMetadata
from mtp_dist.checkpoint.manifest import record_of, write_manifest
from mtp_dist.config import Config
from mtp_dist.errors import ConfigError
from tests.tiny import tiny_config
from tests.unit.checkpoint.folders import as_saved, flip


def save_description(directory: Path, config: Config, step: int) -> Path:
    folder = directory / f"step_{step:08d}"
    folder.mkdir(parents=True)
    CheckpointMetadata(step, step, config).write(folder)
    for kind in ("model", "optimizer"):
        (folder / f"{kind}.safetensors.index.json").write_text('{"weight_map": {}}')
    write_manifest(folder, {path.name: record_of(path) for path in folder.iterdir()})
    return folder


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    for step in (9, 10, 100):
        save_description(tmp_path / "run", tiny_config(), step)
    (tmp_path / "run" / "step_00000200.unfinished").mkdir()
    (tmp_path / "run" / "step_of_mine").mkdir()
    (tmp_path / "run" / "earlier-1").mkdir()
    return tmp_path / "run"


def config_in(directory: Path, resume: str = "auto", allow_changes: list[str] | None = None, **sections: Any) -> Config:
    checkpoint = {"directory": str(directory), "resume": resume, "allow_changes": allow_changes or []}
    return tiny_config(checkpoint=checkpoint, **sections)


def test_where_to_go_on(directory: Path, tmp_path: Path) -> None:
    older = (directory / "step_00000010", directory / "step_00000009")
    newest = ResumePoint(directory / "step_00000100", 100, as_saved(tiny_config()), older=older)
    assert find_resume_point(config_in(directory)) == newest
    assert find_resume_point(config_in(directory, "none")) is None
    assert find_resume_point(config_in(tmp_path / "empty")) is None
    assert find_resume_point(config_in(tmp_path / "empty", str(directory))) == newest
    one = directory / "step_00000010"
    assert find_resume_point(config_in(directory, str(one))) == ResumePoint(one, 10, as_saved(tiny_config()))
    with pytest.raises(ConfigError, match=r"^checkpoint.resume = '.*' has no checkpoint: "):
        find_resume_point(config_in(directory, str(tmp_path / "empty")))


def test_a_damaged_one_is_passed_over_and_told(directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    newest, older, oldest = (directory / f"step_{step:08d}" for step in (100, 10, 9))
    flip(newest / "config.json", 50)
    point = find_resume_point(config_in(directory))
    assert point == ResumePoint(older, 10, as_saved(tiny_config()), older=(oldest,))
    [warning] = capsys.readouterr().err.splitlines()
    assert warning.startswith(f"warning: {newest} is not a checkpoint of ours, or a damaged one: config.json has the ")
    assert warning.endswith(f": trying {older}")
    assert find_valid_checkpoint(directory) == older and "config.json" in capsys.readouterr().err
    with pytest.raises(ConfigError, match=r"config\.json has the SHA-256 .*; there is no older one to use instead"):
        find_resume_point(config_in(directory, str(newest)))

    assert older_resume_point(point, "its tensors are wrong", config_in(directory)).folder == oldest
    assert capsys.readouterr().err == f"warning: its tensors are wrong: trying {oldest}\n"
    (older / "config.json").unlink()
    (oldest / "manifest.json").unlink()
    with pytest.raises(ConfigError, match=r"manifest\.json cannot be read .*; there is no older one"):
        find_resume_point(config_in(directory))
    assert len(capsys.readouterr().err.splitlines()) == 2
    with pytest.raises(ConfigError, match=r"step_00000010 is .* config\.json is missing"):
        find_resume_point(config_in(directory, str(older)))


def test_another_training_is_no_damage(directory: Path) -> None:
    with pytest.raises(ConfigError, match=r"^heads\.kind is 'causal', .*step_00000100 was trained with"):
        find_resume_point(config_in(directory, heads={"kind": "causal"}))


REFUSED: dict[str, dict[str, Any]] = {
    "heads.kind": {"heads": {"kind": "causal"}},
    "heads.count": {"heads": {"count": 2}},
    "heads.schedule": {"heads": {"schedule": "forward"}},
    "heads.prediction_distances": {"heads": {"prediction_distances": [1, 2, 3, 5]}},
    "heads.loss_weights": {"heads": {"loss_weights": [1, 0.5, 0.5, 0.5]}},
    "heads.detach": {"heads": {"detach": True}},
    "optimizer.lr": {"optimizer": {"lr": 2e-3}},
    "train.steps": {"train": {"steps": 40}},
    "train.global_batch_size": {"train": {"global_batch_size": 16}},
    "train.sequence_length": {"train": {"sequence_length": 32}},
    "train.precision": {"train": {"precision": "bf16"}},
    "run.seed": {"run": {"seed": 7}},
    "data.train": {"data": {"train": [{"path": "elsewhere"}]}},
}


@pytest.mark.parametrize("key", REFUSED)
def test_another_training_is_refused_unless_allowed(directory: Path, key: str) -> None:
    with pytest.raises(ConfigError) as error:
        find_resume_point(config_in(directory, **REFUSED[key]))
    [sentence] = str(error.value).splitlines()
    assert sentence.startswith(f"{key} is ") and f"{directory / 'step_00000100'} was trained with" in sentence
    assert sentence.endswith(f"checkpoint.allow_changes=[{key}]")
    assert find_resume_point(config_in(directory, "none", **REFUSED[key])) is None
    assert find_resume_point(config_in(directory, allow_changes=[key], **REFUSED[key]))


def test_a_run_folder_leads_to_its_checkpoints(directory: Path, tmp_path: Path) -> None:
    (tmp_path / "whole").mkdir()
    directory.rename(tmp_path / "whole" / "checkpoints")
    newest = tmp_path / "whole" / "checkpoints" / "step_00000100"
    found = find_resume_point(config_in(tmp_path / "empty", str(tmp_path / "whole")))
    assert found and found.folder == newest


def test_changed_sources_are_shown_by_what_differs(directory: Path) -> None:
    [source] = tiny_config().model_dump(mode="json")["data"]["train"]
    for changed, now, before in (
        ([source | {"weight": 2.0}], "{0: {weight: 2.0}}", "{0: {weight: 1.0}}"),
        ([source, source], f"{{1: {{path: {source['path']}}}}}", "{1: null}"),
    ):
        with pytest.raises(ConfigError) as error:
            find_resume_point(config_in(directory, data={"train": changed}))
        assert f"data.train is {now}, {directory / 'step_00000100'} was trained with {before}: " in str(error.value)


def test_longer_samples_than_an_import_was_trained_with_get_a_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_description(tmp_path, tiny_config(), 0)
    length = tiny_config().train.sequence_length
    assert find_resume_point(config_in(tmp_path, train={"sequence_length": length}))
    assert capsys.readouterr().err == ""
    assert find_resume_point(config_in(tmp_path, train={"sequence_length": 2 * length}))
    assert capsys.readouterr().err.startswith(f"warning: train.sequence_length = {2 * length} exceeds the {length} ")


def test_every_difference_is_named_with_both_values(directory: Path) -> None:
    with pytest.raises(ConfigError) as error:
        find_resume_point(config_in(directory, heads={"kind": "causal", "count": 2}))
    assert sorted(line.split(":")[0] for line in str(error.value).splitlines()) == [
        f"heads.count is 2, {directory / 'step_00000100'} was trained with 4",
        f"heads.kind is 'causal', {directory / 'step_00000100'} was trained with 'parallel'",
    ]


@pytest.mark.parametrize("allowed", [[], ["model.ffn_hidden_size"]])
def test_another_trunk_is_refused_in_any_case(directory: Path, allowed: list[str]) -> None:
    with pytest.raises(ConfigError, match=r"model\.ffn_hidden_size is 64, "):
        find_resume_point(config_in(directory, model={"ffn_hidden_size": 64}))
    with pytest.raises(ConfigError, match="vocabulary of 131 tokens, this run one of 257"):
        find_resume_point(config_in(directory, model={"vocab_size": 257}))


def test_keys_that_may_change_are_known(directory: Path) -> None:
    with pytest.raises(ConfigError, match=r"checkpoint\.allow_changes names heads\.kinds, which is not a key"):
        find_resume_point(config_in(directory, allow_changes=["heads.kinds"]))


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
