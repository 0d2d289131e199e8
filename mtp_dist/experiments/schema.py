"""The keys of an experiment's YAML file, and the reader that applies a preset to them."""

import difflib
import itertools
from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import pydantic
from pydantic import Field

from mtp_dist.config import read_values
from mtp_dist.config.base import NonNegativeInt, PathText, PositiveInt, Section
from mtp_dist.config.messages import describe_errors
from mtp_dist.errors import ConfigError
from mtp_dist.experiments.evaluations import EVALUATIONS, METRICS, option_errors

PresetName = Literal["small", "gpu", "paper"]
PRESETS: tuple[PresetName, ...] = get_args(PresetName)
FOLDER = Path(__file__).parents[2] / "experiments"
"""The experiments of this checkout."""

Name = Annotated[str, Field(pattern=r"^[\w=+-][\w.=+ -]*$", max_length=60)]
Arms = Annotated[dict[Name, dict[str, Any]], Field(min_length=1)]
"""The arms of an axis by name. An arm has keys of a configuration, such as `heads.count: 4`, and `total_layers`."""


class Evaluation(Section):
    """A function of `mtp_dist/experiments/evaluations.py` that measures each finished run."""

    function: str = "validation"
    """Name of the function."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Keyword arguments of the function."""


class Comparison(Section):
    """The comparison of an axis' arms with one of them, paired by seed, in each cell of the other axes."""

    axis: str
    """Axis whose arms are compared."""
    baseline: str
    """Arm that the others are compared with."""
    metric: str
    """Compared metric. Every difference is arm - baseline, in the metric's unit."""
    effect: float | dict[str, float] | None = None
    """Difference that the paper finds, by arm or by cell such as `1M, n=2`. The verdict is "not tested" if the interval
    is wider than half of it, or if it is absent."""
    effect_source: str = ""
    """Source of the effect, or the reason for this number if the paper does not print one."""
    learned_at: float | None = None
    """Mean that the baseline must reach in one cell at least, such as chance + 0.2: a task that it learns nowhere tests
    nothing."""
    ceiling: float | None = None
    """Best possible value of the metric, such as 1 for an accuracy. The verdict is "not tested" in a cell in which
    the baseline is closer to it than half of the effect."""


class Plot(Section):
    """The picture of a metric's means with their intervals."""

    metric: str
    """Metric on the vertical axis. A `*`, as in `loss/head_*`, draws one point per metric that matches."""
    x: str | None = None
    """Axis of the grid on the horizontal axis, unless the metric has a `*`."""
    label: str = ""
    """Label of the vertical axis; by default the metric's name."""
    x_label: str = ""
    """Label of the horizontal axis; by default the axis' name."""


class Paper(Section):
    """The paper's result, shown next to ours."""

    source: str
    """Figure or table of Gloeckle et al. 2024."""
    column: str = ""
    """Title of the column with the paper's figures."""
    figures: dict[str, float | str] = Field(default_factory=dict)
    """The paper's figures, by arm or by cell such as `1M, n=2`."""


class Experiment(Section):
    """An experiment with one of its presets applied."""

    title: str
    """Title of the experiment in tables and plots."""
    question: str
    """Question that the experiment answers, in one or two sentences."""
    paper: Paper
    base: dict[str, Any]
    """Sections of a run's configuration that all runs share."""
    total_layers: PositiveInt | None = None
    """Transformer layers of trunk and heads together: a run's trunk gets those that its heads leave, so that models of
    different numbers of heads have as many parameters. By default `model.trunk_layers` is given."""
    grid: Annotated[dict[Name, Arms], Field(min_length=1)]
    """Axes of the grid by name, each with its arms."""
    seeds: Annotated[tuple[NonNegativeInt, ...], Field(strict=False, min_length=1)]
    """Seeds of the runs of each cell."""
    pretraining: dict[str, Any] | None = None
    """Sections merged into those of `base` for a training before each run, whose checkpoint the run starts from. Arms
    set its keys with the prefix `pretraining.`; equal trainings run once. By default there is none."""
    evaluation: Evaluation = Evaluation()
    metrics: Annotated[tuple[str, ...], Field(strict=False, min_length=1)]
    """Metrics of the evaluation that the table shows."""
    compare: Comparison
    plot: Plot
    output_dir: PathText
    """Folder of the runs and results; by default `runs/NAME-PRESET`."""
    ranks: PositiveInt = 1
    """Processes of each run, one per GPU if there are GPUs."""
    runs_per_gpu: PositiveInt = 1
    """Runs of one process that share a GPU."""
    slurm: dict[str, str | int] = Field(default_factory=dict)
    """Options of sbatch for `--slurm`, such as `nodes: 1`."""

    @property
    def metric_names(self) -> dict[str, str]:
        """The metrics that the file names, by key; that of the plot may have a `*`."""
        named = {"compare.metric": self.compare.metric, "plot.metric": self.plot.metric}
        return named | {f"metrics.{number}": name for number, name in enumerate(self.metrics)}


def available() -> dict[str, Path]:
    """Return the files of this checkout's experiments by name."""
    return {path.stem: path for path in sorted(FOLDER.glob("*.yaml"))}


def find_experiment(name: str) -> Path:
    """Return the file of an experiment by its name or path. Raise ConfigError if there is none."""
    if name.endswith((".yaml", ".yml")):
        return Path(name).expanduser()
    known = available()
    if name not in known:
        raise ConfigError(
            f"'{name}' is not an experiment: give one of {', '.join(known)}, or the path of a YAML file "
            "(docs/experiments.md)"
        )
    return known[name]


def presets(path: Path) -> list[PresetName]:
    """Return the presets of an experiment."""
    return [name for name in PRESETS if name in _preset_values(path, read_values(path))]


def _preset_values(path: Path, values: Mapping[str, Any]) -> Mapping[str, Any]:
    found = values.get("presets")
    if not isinstance(found, dict) or not found or not found.keys() <= {*PRESETS}:
        raise ConfigError(f"{path}: presets should have keys of its own: {', '.join(PRESETS)}, or some of them")
    return found


def load_experiment(path: Path, preset: str) -> Experiment:
    """Read an experiment's file and apply a preset: mappings are merged, axes of the grid and other values replaced.

    Raise ConfigError, with one line per invalid key.
    """
    values = read_values(path)
    known = _preset_values(path, values)
    if preset not in known:
        raise ConfigError(f"{path} has no preset '{preset}': give one of {', '.join(known)}")
    del values["presets"]
    changes = known[preset] or {}
    if not isinstance(changes, dict):
        raise ConfigError(f"{path}: presets.{preset} should have keys of its own")
    output_dir = f"runs/{path.stem}-{preset}"
    try:
        experiment = Experiment.model_validate({"output_dir": output_dir} | _merged(values, changes))
    except pydantic.ValidationError as error:
        messages = [
            f"presets.{preset}.{message}" if _contains(changes, message.split(" ", 1)[0]) else message
            for message in describe_errors(error, Experiment)
        ]
    else:
        messages = list(_inconsistencies(experiment))
    if messages:
        raise ConfigError("\n".join(f"{path}: {message}" for message in messages))
    return experiment


def _merged(values: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values with the changes.

    Mappings are merged, except that an axis of the grid and the options of another evaluation are replaced.
    """
    merged = dict(values)
    for key, change in changes.items():
        old = values.get(key)
        if not isinstance(old, dict) or not isinstance(change, dict) or (key == "evaluation" and "function" in change):
            merged[key] = change
        else:
            merged[key] = old | change if key == "grid" else _merged(old, change)
    return merged


def _contains(values: Any, key: str) -> bool:
    for part in key.split("."):
        if not isinstance(values, dict):
            break  # an item of a list
        if part not in values:
            return False
        values = values[part]
    return True


def _inconsistencies(experiment: Experiment) -> Iterator[str]:
    """Yield one message per name that the grid or the evaluation does not have."""
    grid, compare, plot = experiment.grid, experiment.compare, experiment.plot
    if compare.axis not in grid:
        yield f"compare.axis = '{compare.axis}' is not an axis of the grid: give one of {_names(grid)}"
    elif compare.baseline not in grid[compare.axis]:
        names = _names(grid[compare.axis])
        yield f"compare.baseline = '{compare.baseline}' is not an arm of {compare.axis}: give one of {names}"
    if isinstance(compare.effect, dict):
        for name in compare.effect.keys() - _cell_names(grid):
            yield (
                f"compare.effect has '{name}', which is not an arm or a cell of the grid: name arms in the order of "
                f"the axes {_names(grid)}"
            )
    if "*" not in plot.metric and plot.x not in grid:
        yield f"plot.x = {plot.x!r} is not an axis of the grid: give one of {_names(grid)}"
    arms = [arm for axis in grid.values() for arm in axis]
    for name in sorted({arm for arm in arms if arms.count(arm) > 1}):
        yield f"grid: the arm '{name}' is in two axes: names must differ, since they stand for a cell"
    if compare.effect is not None and not compare.effect_source:
        yield "compare.effect needs compare.effect_source: name its table, or why this number stands for it"
    yield from list(_wrong_evaluation(experiment.evaluation)) or _wrong_metrics(experiment)
    if len(set(experiment.seeds)) < len(experiment.seeds):
        yield f"seeds = {list(experiment.seeds)} has a seed twice"


def _cell_names(grid: Mapping[str, Arms]) -> set[str]:
    """Return the names of all cells, and of their arms under fewer axes."""
    cells = itertools.product(*([None, *arms] for arms in grid.values()))
    return {", ".join(filter(None, cell)) for cell in cells}


def _wrong_evaluation(evaluation: Evaluation) -> Iterator[str]:
    """Yield one message if the function is unknown, or one per invalid option."""
    name = evaluation.function
    if name not in EVALUATIONS:
        near = difflib.get_close_matches(name, EVALUATIONS, 1)
        remedy = f"did you mean '{near[0]}'?" if near else f"give one of {_names(EVALUATIONS)}"
        yield f"evaluation.function = '{name}' is not an evaluation: {remedy}"
        return
    yield from option_errors(name, evaluation.options)


def _wrong_metrics(experiment: Experiment) -> Iterator[str]:
    """Yield one message per name that cannot be a metric of the evaluation."""
    patterns = METRICS[experiment.evaluation.function]
    for key, name in experiment.metric_names.items():
        if not any(fnmatchcase(name, pattern) for pattern in patterns):
            yield (
                f"{key} = '{name}' is not a metric of the evaluation '{experiment.evaluation.function}': give one of "
                f"{', '.join(patterns)}"
            )


def _names(names: Mapping[str, Any] | Sequence[str]) -> str:
    return ", ".join(f"'{name}'" for name in names)
