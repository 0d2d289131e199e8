"""Experiment files: mistakes, presets, and the grid of runs."""

from statistics import fmean

import pytest

from mtp_dist.config import build_config
from mtp_dist.config.loader import synthetic_options
from mtp_dist.data.synthetic.task import TaskCorpus
from mtp_dist.data.synthetic.tasks import build_task, task_kind
from mtp_dist.errors import ConfigError
from mtp_dist.experiments.grid import cell_label, expand
from mtp_dist.experiments.schema import FOLDER, available, find_experiment, load_experiment, presets

MISTAKES = [
    ("compar", {"axis": "heads"}, "compar is not a known key: did you mean compare?"),
    ("compare/axsi", "heads", "compare.axsi is not a known key: did you mean compare.axis?"),
    ("compare/axis", "layers", "compare.axis = 'layers' is not an axis of the grid: give one of 'size', 'heads'"),
    ("compare/baseline", "n=4", "compare.baseline = 'n=4' is not an arm of heads: give one of 'n=1', 'n=2'"),
    ("plot/x", "n", "plot.x = 'n' is not an axis of the grid: give one of 'size', 'heads'"),
    ("plot", None, "plot is missing: give it a value"),
    ("seeds", [], "seeds = [] is invalid: it is too short"),
    ("seeds", [1, 1], "seeds = [1, 1] has a seed twice"),
    ("seeds", ["x"], "seeds.0 = 'x' is invalid: it should be a valid integer"),
    (
        "grid/heads/big",
        {"heads.count": 2},
        "grid: the arm 'big' is in two axes: names must differ, since they stand for",
    ),
    (
        "grid/heads/n=2",
        {"heads.cuont": 2},
        "heads.cuont is not a known key: did you mean heads.count? (in the cell little, n=2)",
    ),
    ("grid/heads/n=2", {"count": 2}, "grid: count is not of the form section.key, such as heads.count (in the cell"),
    (
        "grid/heads/n=2",
        {"heads.count": 5},
        "total_layers = 5 leaves the trunk no layer: the heads have all of them (in",
    ),
    ("base/model/trunk_layers", 3, "model.trunk_layers follows from total_layers: remove one of them (in the cell"),
    ("base/train/steps", "x", "train.steps = 'x' is invalid: it should be a valid integer (in the cell little, n=1)"),
    (
        "evaluation",
        {"function": "validaton"},
        "evaluation.function = 'validaton' is not an evaluation: did you mean 'validation'?",
    ),
    ("evaluation", {"options": {"heads": 3}}, "evaluation.options.heads is not a known key"),
    ("evaluation", {"function": "synthetic"}, "evaluation.options.task is missing: give it a value"),
    (
        "evaluation",
        {"function": "synthetic", "options": {"task": "inducton"}},
        "evaluation.options.task = 'inducton' is not a synthetic task: use one of induction, ",
    ),
    (
        "evaluation",
        {"function": "synthetic", "options": {"task": "star-graph", "options": {"names": 3}}},
        "evaluation.options.options.names is not a parameter of 'synthetic/star-graph': it has degree, ",
    ),
    (
        "evaluation",
        {"function": "synthetic", "options": {"task": "induction", "options": {"names": 99}}},
        "evaluation.options.options.names = 99 is invalid: it should be less than or equal to 8",
    ),
    (
        "evaluation",
        {"function": "code", "options": {"benchmark": "humanevl"}},
        "evaluation.options.benchmark = 'humanevl' is invalid: it should be 'humaneval', 'mbpp' or 'apps'",
    ),
    (
        "compare/effect",
        {"n=2, big": 1.0},
        "compare.effect has 'n=2, big', which is not an arm or a cell of the grid: na",
    ),
    (
        "compare/effect",
        "x",
        "compare.effect = 'x' is invalid: it should be a valid number, or it should have keys of its own",
    ),
    (
        "grid/heads/n=2",
        {"total_layers": "x"},
        "total_layers = 'x' is invalid: it should be a valid integer (in the cell",
    ),
    (
        "grid/heads/n=2",
        {"pretraining.heads.count": 4},
        "pretraining.heads.count has no effect without `pretraining`: add `pretraining: {}` (in the cell little, n=2)",
    ),
    ("compare/effect_source", "", "compare.effect needs compare.effect_source: name its table, or why"),
    (
        "compare/metric",
        "los",
        "compare.metric = 'los' is not a metric of the evaluation 'validation': give one of loss, ",
    ),
    ("metrics", ["accuracy/*"], "metrics.0 = 'accuracy/*' is not a metric of the evaluation 'validation': give one of"),
    ("base/heads", 4, "heads should have keys of its own (in the cell little, n=1)"),
    ("presets/small/seedz", [3], "presets.small.seedz is not a known key: did you mean seeds?"),
    ("presets/small/seeds", ["x"], "presets.small.seeds.0 = 'x' is invalid: it should be a valid integer"),
    ("presets/tiny", {}, "presets should have keys of its own: small, gpu, paper, or some of them"),
    ("presets", None, "presets should have keys of its own: small, gpu, paper, or some of them"),
]


@pytest.mark.parametrize(("key", "value", "message"), MISTAKES, ids=[f"{case[0]}={case[1]}" for case in MISTAKES])
def test_mistake_is_named_with_its_file_and_key(write, key, value, message):
    path = write(**{key: value})
    with pytest.raises(ConfigError) as error:
        expand(path, load_experiment(path, "small"))
    assert str(error.value).startswith(f"{path}: {message}")
    assert "\n" not in str(error.value)


def test_unknown_experiment_and_preset(write):
    with pytest.raises(ConfigError, match=r"'smok' is not an experiment: give one of .*smoke, .*or the path of a YAML"):
        find_experiment("smok")
    with pytest.raises(ConfigError, match=r"tiny.yaml has no preset 'paper': give one of small, gpu"):
        load_experiment(write(), "paper")


def test_preset_merges_mappings_and_replaces_axes(load):
    gpu = load("gpu", **{"presets/gpu/grid": {"heads": {"n=1": {"heads.count": 1}, "n=4": {"heads.count": 4}}}})
    assert gpu.seeds == (7,) and gpu.base["train"] == load().base["train"] | {"steps": 20}
    assert list(gpu.grid) == ["size", "heads"] and list(gpu.grid["heads"]) == ["n=1", "n=4"]
    assert gpu.output_dir == "runs/tiny-gpu"


def test_grid_has_one_run_per_cell_and_seed(load, write):
    runs = expand(write(), load())
    assert [(cell_label(run.cell), run.seed) for run in runs[:5]] == [
        *(("little, n=1", 1), ("little, n=2", 1), ("big, n=1", 1), ("big, n=2", 1)),
        ("little, n=1", 2),
    ]
    assert len(runs) == 12 == len({run.training.folder for run in runs})
    config = runs[3].training.config
    assert (config["heads"]["count"], config["model"]["trunk_layers"], config["model"]["hidden_size"]) == (2, 5, 64)
    assert config["run"]["seed"] == 1 and config["run"]["output_dir"] == str(runs[3].training.folder)


def test_equal_pretrainings_run_once(load, write):
    changes = {
        "pretraining": {"train": {"steps": 100}},
        "grid": {
            "path": {
                "1 then 1": {"pretraining.heads.count": 1, "heads.count": 1},
                "4 then 1": {"pretraining.heads.count": 4, "heads.count": 1},
                "4 then 4": {"pretraining.heads.count": 4, "heads.count": 4},
            }
        },
        "base/model/hidden_size": 32,
        "compare": {"axis": "path", "baseline": "1 then 1", "metric": "loss"},
        "plot/x": "path",
    }
    path = write(**changes)
    first, second, third = expand(path, load(**changes))[:3]
    assert first.training.start is not second.training.start is third.training.start
    start, after = second.training.start.config, second.training.config
    assert (start["heads"]["count"], start["train"]["steps"]) == (4, 100)
    assert (after["heads"]["count"], after["train"]["steps"]) == (1, 10)
    assert after["model"] == start["model"] and after["model"]["trunk_layers"] == 1
    assert after["checkpoint"]["initial_weights"] == str(second.training.start.folder)


EXPERIMENTS = [(name, preset) for name, path in available().items() for preset in presets(path)]


@pytest.mark.parametrize(("name", "preset"), EXPERIMENTS)
def test_experiments_of_the_project_are_valid(name, preset):
    path = find_experiment(name)
    experiment = load_experiment(path, preset)
    runs = expand(path, experiment)
    assert len({run.training.folder for run in runs}) == len(runs)
    layers = {}
    for run in runs:
        config = build_config((run.training.start or run.training).config)
        others = tuple(arm for axis, arm in run.cell.items() if axis != experiment.compare.axis)
        adds_heads = "trunk_layers" in experiment.base.get("model", {})  # to the trunk that all of them have
        heads = 0 if adds_heads else config.heads.num_blocks * config.heads.block_layers
        layers.setdefault(others, set()).add(config.model.trunk_layers + heads)
    assert all(len(found) == 1 for found in layers.values()), "the compared models differ in size"


@pytest.mark.parametrize(("name", "preset"), EXPERIMENTS)
def test_a_task_is_learned_20_points_above_chance(name, preset):
    path = find_experiment(name)
    experiment = load_experiment(path, preset)
    compare, options = experiment.compare, experiment.evaluation.options
    if compare.learned_at is None:
        return
    kind = task_kind(options["task"], "task")
    trained = build_config(expand(path, experiment)[0].training.config).data.train[0].options
    parameters = (trained.model_dump(exclude_none=True) if trained else {}) | options.get("options", {})
    task = TaskCorpus(build_task(kind, synthetic_options(parameters), ""), "validation", 0)
    group = compare.metric.removeprefix("accuracy/")
    groups = options.get("pools", {}).get(group, [group])
    answers = [answer for number in range(2000) for answer in task.document(number).answers]
    chance = fmean(answer.chance for answer in answers if answer.group in groups)
    assert compare.learned_at == pytest.approx(chance + 0.2, abs=0.01)


def test_example_of_the_docs_is_valid(tmp_path):
    page = (FOLDER.parent / "docs/experiments.md").read_text()
    path = tmp_path / "mine.yaml"
    path.write_text(page.partition("```yaml\n")[2].partition("```")[0])
    assert [len(expand(path, load_experiment(path, preset))) for preset in presets(path)] == [12, 20]
