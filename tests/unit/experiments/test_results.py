"""The result of finished runs: statistics by cell, the paper's figures, tables and plot."""

import json
import subprocess

import pytest
import typer

from mtp_dist.cli import app
from mtp_dist.distributed.processes import end_with_parent
from mtp_dist.errors import ConfigError
from mtp_dist.evaluation import synthetic as evaluation
from mtp_dist.experiments import results
from mtp_dist.experiments.evaluations import adaptation, code, decoding, synthetic, validation
from mtp_dist.experiments.grid import cell_label, expand
from mtp_dist.experiments.plot import draw
from mtp_dist.experiments.results import build_result, entry, write_origin
from mtp_dist.experiments.tables import comparison_rows, markdown, metric_rows
from mtp_dist.experiments.tasks import EVALUATION

ACCURACIES = {
    "little, n=1": [0.50, 0.60, 0.70],
    "little, n=2": [0.80, 0.91, 0.99],
    "big, n=1": [0.90, 0.92, 0.94],
    "big, n=2": [0.90, 0.93, None],
}


@pytest.fixture
def result_of(write, load, tmp_path):
    """Return a function that evaluates all runs with given accuracies and builds the result."""

    def build(**changes):
        path, experiment = write(**changes), load(**changes)
        (tmp_path / "out").mkdir(exist_ok=True)
        runs = expand(path, experiment)
        for run in runs:
            accuracy = ACCURACIES[cell_label(run.cell)][run.seed - 1]
            run.training.folder.mkdir(parents=True, exist_ok=True)
            record = {
                "function": "validation",
                "options": {},
                "metrics": {"accuracy": accuracy, "accuracy/head_1": 1.0},
            }
            if accuracy is not None:
                (run.training.folder / EVALUATION).write_text(json.dumps(record))
        write_origin(tmp_path / "out", continues=False)
        return build_result(path, "small", experiment, runs)

    return build


def test_result_has_statistics_of_all_cells(result_of):
    result = result_of()
    little, big = result["comparisons"]
    assert (little["cell"], little["verdict"]) == ({"size": "little", "heads": "n=2"}, "as in the paper")
    assert little["difference"] == pytest.approx({"mean": 0.3, "half_width": 0.02484, "count": 3}, abs=1e-4)
    assert (big["difference"]["count"], big["verdict"]) == (2, "not as in the paper")
    assert result["cells"][3]["metrics"]["accuracy"]["count"] == 2
    assert [cell["paper"] for cell in result["cells"]] == [None, "up", None, 7.5]
    assert result["missing_runs"] == ["big, n=2, seed 3"]
    assert result["machine"]["cores"] and result["versions"]["torch"] and "commit" in result
    json.dumps(result)


def test_origin_names_the_commits_of_all_starts(tmp_path, monkeypatch):
    def commit_after(commit, continues):
        monkeypatch.setattr(results, "checkout_commit", lambda: commit)
        write_origin(tmp_path, continues)
        return json.loads((tmp_path / results.ORIGIN).read_text())["commit"]

    assert commit_after(None, True) is None
    assert [commit_after(commit, True) for commit in "abb"] == ["a", "a, b", "a, b"]
    assert commit_after("c", False) == "c"


def test_task_that_no_baseline_learns_is_not_tested(result_of):
    assert [row["verdict"] for row in result_of(**{"compare/learned_at": 0.93})["comparisons"]] == ["not tested"] * 2
    assert result_of(**{"compare/learned_at": 0.91})["comparisons"][0]["verdict"] == "as in the paper"


def test_cell_whose_baseline_is_at_the_ceiling_is_not_tested(result_of):
    little, big = result_of(**{"compare/ceiling": 1.0})["comparisons"]
    assert (little["verdict"], big["verdict"]) == ("as in the paper", "not tested")


def test_effect_may_differ_by_cell(result_of):
    result = result_of(**{"compare/effect": {"big, n=2": 0.5, "little": -0.2}})
    assert [row["effect"] for row in result["comparisons"]] == [-0.2, 0.5]
    assert [row["verdict"] for row in result["comparisons"]] == ["not as in the paper", "not as in the paper"]


def test_unknown_metric_is_an_error(result_of):
    """One that the evaluation may have, so that it is found in its results only."""
    for key, value in [
        ("metrics", ["accuracy/head_9"]),
        ("plot/metric", "loss/head_*"),
        ("compare/metric", "loss"),
        ("compare/metric", "accuracy/head_*"),
    ]:
        with pytest.raises(
            ConfigError, match="is not a metric of the evaluation 'validation': give one of accuracy, acc"
        ):
            result_of(**{key: value})


def test_tables_show_the_paper_next_to_ours(result_of):
    result = result_of()
    assert metric_rows(result)[0] == ["size", "heads", "accuracy", "seeds", "paper: points"]
    assert metric_rows(result)[2] == ["little", "n=2", "0.900 ± 0.237", "3", "up"]
    assert comparison_rows(result)[1][:4] == ["little, n=2", "+0.300 ± 0.025", "+0.2", "as in the paper"]
    result["cells"][0]["metrics"]["accuracy/head_1"] = result["cells"][0]["metrics"]["accuracy"]
    result["cells"][0]["metrics"]["chance/head_1"] = {"mean": 0.25, "half_width": 0.0, "count": 3}
    with_chance = metric_rows(result | {"metrics": ["accuracy/head_1"]})
    assert with_chance[1][2] == "0.600 ± 0.248 (chance 0.25)" and with_chance[2][2] == "1.000 ± 0.000"
    page = markdown(result, "picture.png")
    assert "| little | n=2 | 0.900 ± 0.237 | 3 | up |" in page and "![Tiny](picture.png)" in page
    assert "Without result: big, n=2, seed 3." in page and result["machine"]["processor"] in page


@pytest.mark.parametrize(("metric", "lines"), [("accuracy", ["n=1", "n=2"]), ("accuracy/head_*", list(ACCURACIES))])
def test_plot_has_a_line_per_arm_or_cell(result_of, tmp_path, monkeypatch, metric, lines):
    from matplotlib.axes import Axes

    drawn, runs = [], []
    errorbar, plot = Axes.errorbar, Axes.plot
    monkeypatch.setattr(
        Axes,
        "errorbar",
        lambda self, *args, **options: drawn.append(options["label"]) or errorbar(self, *args, **options),
    )
    monkeypatch.setattr(
        Axes,
        "plot",
        lambda self, x, y, *args, **options: runs.append(len(y)) or plot(self, x, y, *args, **options),
    )
    draw(result_of(**{"plot/metric": metric}), tmp_path / "plot.png")
    assert runs.count(3) == 3 and runs.count(2) == 1, "one point per finished run"
    assert drawn == lines and (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_entry_prefers_the_cell_to_its_arms():
    cell = {"size": "big", "kind": "a", "heads": "n=2"}
    assert entry({"n=2": 1, "big, n=2": 2, "big, a, n=2": 3}, cell) == 3
    assert entry({"n=2": 1, "big, n=2": 2}, cell) == 2
    assert entry({"n=2": 1}, cell) == 1 and entry({"n=1": 1}, cell) is None


def test_validation_reads_every_head(tmp_path):
    heads = [{"head": k, "loss": k / 2, "accuracy": 1 / k, "bits_per_byte": k / 3} for k in (1, 2)]
    summary = {"tokens_per_second": 9.0, "validation": [{"heads": heads, "expected_tokens_per_forward": 1.5}]}
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    metrics = validation(tmp_path)
    assert (metrics["loss"], metrics["accuracy"], metrics["loss/head_2"]) == (0.5, 1.0, 1.0)
    assert (metrics["expected_tokens_per_forward"], metrics["tokens_per_second"]) == (1.5, 9.0)


def test_code_is_evaluated_by_the_command(tmp_path, monkeypatch):
    oracle = {"1": {"value": 0.25, "temperature": 0.2}, "10": {"value": 0.5, "temperature": 0.8}}
    commands = []

    def run(command, preexec_fn, **_):
        assert preexec_fn is end_with_parent, "a stopped evaluation would leave its command running"
        commands.append(command)
        return subprocess.CompletedProcess(command, 2 * ("apps" in command), json.dumps({"oracle": oracle}).encode())

    monkeypatch.setattr(subprocess, "run", run)
    assert code(tmp_path, "mbpp", samples=10, temperatures=[0.2, 0.8]) == {"pass@1": 25.0, "pass@10": 50.0}
    assert commands[0][1:5] == ["-m", "mtp_dist.cli", "evaluate", "mbpp"]
    command = typer.main.get_command(app).commands["evaluate"].commands["mbpp"]
    given = command.make_context("mbpp", commands[0][5:]).params
    assert (given["model"], given["samples"]) == (str(tmp_path), str(tmp_path / "mbpp-samples.jsonl"))
    assert (given["samples_per_problem"], given["temperatures"], given["max_new_tokens"]) == (10, "0.2,0.8", 512)
    with pytest.raises(SystemExit, match="2"):
        code(tmp_path, "apps")


def test_decoding_is_measured_by_the_command(tmp_path, monkeypatch):
    rows = [
        {"variant": "plain", "tokens_per_forward": 1.0, "acceptance": {}},
        {"variant": "k = 2", "tokens_per_forward": 1.5, "acceptance": {"2": 0.5}},
        {"variant": "k = 3", "tokens_per_forward": 1.75, "acceptance": {"2": 0.5, "3": 0.5}},
        {"variant": "transformers"},
    ]
    commands = []

    def run(command, **_):
        commands.append(command)
        return subprocess.CompletedProcess(command, 0, json.dumps({"model": {"heads": 3}, "rows": rows}).encode())

    monkeypatch.setattr(subprocess, "run", run)
    heads = [{"head": 1, "loss": 2.0, "accuracy": 0.5, "bits_per_byte": 3.0}]
    (tmp_path / "summary.json").write_text(json.dumps({"tokens_per_second": 9.0, "validation": [{"heads": heads}]}))
    metrics = decoding(tmp_path, prompts=8)
    assert {name: metrics[name] for name in ("loss", "tokens_per_forward", "acceptance/2", "acceptance/3")} == {
        "loss": 2.0,
        "tokens_per_forward": 1.75,
        "acceptance/2": 0.5,
        "acceptance/3": 0.5,
    }
    assert commands[0][1:5] == ["-m", "mtp_dist.cli", "bench", "decode"]
    given = typer.main.get_command(app).commands["bench"].commands["decode"].make_context("decode", commands[0][5:])
    assert (given.params["model"], given.params["batch"], given.params["rounds"]) == (str(tmp_path), "8", 1)


@pytest.mark.parametrize(("heads", "second"), [(4, 0.6), (4, None), (1, 0.7)])
def test_adaptation_is_measured_by_two_commands(tmp_path, monkeypatch, heads, second):
    """The second token is the head's, or else that of the marginalized model, which has nothing to decode with."""
    (tmp_path / "summary.json").write_text(json.dumps({"validation": [{"heads": [{}] * heads}]}))
    predictions = {"next token": 0.9, "true prefix": 0.8, "marginal": 0.7} | ({"head": 0.6} if second == 0.6 else {})
    marginals = [
        {"prediction": name, "top1": 0, "top5": top5, "cross_entropy": 2} for name, top5 in predictions.items()
    ]
    decoded = [
        {"batch": 1, "variant": "transformers", "speed_up": 9.0},
        {"batch": 1, "variant": "k = 2", "speed_up": 1.5, "tokens_per_forward": 1.8, "acceptance": {"2": 0.8}},
        {"batch": 1, "variant": "k = 4", "speed_up": 1.2, "tokens_per_forward": 2.5, "acceptance": {"2": 0.8}},
        {"batch": 8, "variant": "k = 4", "speed_up": 7.0, "tokens_per_forward": 2.4, "acceptance": {"2": 0.7}},
    ]
    commands = []

    def run(command, **_):
        commands.append(command)
        rows = marginals if "marginalize" in command else decoded
        return subprocess.CompletedProcess(command, 0, json.dumps({"model": {"heads": 4}, "rows": rows}).encode())

    monkeypatch.setattr(subprocess, "run", run)
    metrics = adaptation(tmp_path, top_k=7)
    assert (metrics["top5/next"], metrics["top5/second"], metrics["top5/marginal"]) == (0.9, second, 0.7)
    assert metrics["loss/marginal"] == 2
    decoding = (metrics["speed_up"], metrics["tokens_per_forward"], metrics.get("acceptance/2"))
    assert decoding == ((1.5, 2.4, 0.7) if heads > 1 else (1.0, 1.0, None)) and len(commands) == 1 + (heads > 1)
    for command in commands:
        group, name = command[3:5]
        known = typer.main.get_command(app).commands[group].commands[name]
        assert known.make_context(name, command[5:]).params["model"] == str(tmp_path)


def test_pools_of_answers_are_weighted_by_their_number(tmp_path, monkeypatch):
    groups = {"a": (1, 10, 0.5), "b": (20, 30, 0.1)}
    groups = {
        name: {"correct": correct, "total": total, "accuracy": correct / total, "chance": chance}
        for name, (correct, total, chance) in groups.items()
    }
    monkeypatch.setattr(evaluation, "evaluate_synthetic", lambda run, task, options: {"groups": groups})
    metrics = synthetic(tmp_path, "arithmetic", pools={"both": ["a", "b"]})
    assert metrics["accuracy/both"] == 21 / 40 and metrics["chance/both"] == pytest.approx(0.2)
    assert metrics["accuracy/a"] == 0.1 and len(metrics) == 6
    with pytest.raises(
        ConfigError, match=r"pools\.both: 'c' is not a group of answers of 'arithmetic': give some of a"
    ):
        synthetic(tmp_path, "arithmetic", pools={"both": ["a", "c"]})
