"""lm-eval on our models: the same figures as with transformers on the export, and the command."""

import json
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

pytest.importorskip("lm_eval", reason="lm-eval is not installed")

import lm_eval as lm_eval_package
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.evaluator import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from mtp_dist.cli.evaluate_lm import lm_eval
from mtp_dist.convert.to_huggingface import export_checkpoint
from mtp_dist.data.build_tokenizer import build_tokenizer
from mtp_dist.errors import UserError
from mtp_dist.evaluation import lm_eval_tasks
from mtp_dist.evaluation.lm_eval_model import MTPModel
from mtp_dist.evaluation.lm_eval_tasks import load_tasks
from tests.unit.convert.folders import TEXT, byte_pairs, write_model

POSITIONS = 192
TASKS = ("python_docs_choice", "python_docs_summary")


class Models(NamedTuple):
    checkpoint: Path
    export: Path
    reference: LM
    """lm-eval's own model class on the export."""
    model: MTPModel


@pytest.fixture(scope="module", params=["parallel heads, bytes", "sequential heads, byte pairs"])
def models(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Models:
    folder, (kind, _, tokenizer) = tmp_path_factory.mktemp("model"), request.param.partition(" heads, ")
    name = tokenizer if tokenizer == "bytes" else str(byte_pairs(folder))
    sections = {"heads": {"kind": kind}, "data": {"tokenizer": name}, "train": {"sequence_length": POSITIONS}}
    write_model(folder / "c", build_tokenizer(name).vocab_size, **sections)
    export_checkpoint(folder / "c", folder / "hf", "fp32")
    reference = HFLM(pretrained=str(folder / "hf"), device="cpu", batch_size=4, dtype="float32")
    return Models(folder / "c", folder / "hf", reference, MTPModel(str(folder / "c"), batch_size=4))


def requests(kind: str, *arguments: tuple[Any, ...]) -> list[Instance]:
    return [Instance(kind, {}, each, number) for number, each in enumerate(arguments)]


def test_log_likelihoods_equal_those_of_transformers(models: Models, caplog: pytest.LogCaptureFixture) -> None:
    """For prompts of several lengths in a batch, none, one too long, and answers that differ in their last token."""
    pairs = [("", "def f(x):"), ("def f(x):", " return x"), ("x = ", "1"), ("a", TEXT), (TEXT * 20, " the end")]
    pairs += [("Is it A or B?\n", letter) for letter in "AB"]
    expected = models.reference.loglikelihood(requests("loglikelihood", *pairs), disable_tqdm=True)
    found = models.model.loglikelihood(requests("loglikelihood", *pairs))
    assert [score for score, _ in found] == pytest.approx([score for score, _ in expected], abs=1e-4, rel=0)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
    assert "1 of 7 contexts lose their beginning: with the continuation they exceed the texts of 192" in caplog.text

    texts = [("x",), (TEXT,), (TEXT * 20,)]
    expected = models.reference.loglikelihood_rolling(requests("loglikelihood_rolling", *texts), disable_tqdm=True)
    assert models.model.loglikelihood_rolling(requests("loglikelihood_rolling", *texts)) == pytest.approx(
        expected, abs=1e-3, rel=0
    ), "sums over up to 1200 tokens"


def test_most_probable_continuations_are_marked(models: Models) -> None:
    tokens = models.model.generator.generate([models.model.tok_encode("x = ")], 2)[0]
    request = (None, models.model.tok_encode("x = "), tokens)
    other = (None, request[1], [tokens[0], (tokens[1] + 1) % 200])
    assert [greedy for _, greedy in models.model._loglikelihood_tokens([request, other])] == [True, False]


def test_generated_texts_equal_those_of_transformers(models: Models) -> None:
    """Greedily, up to a stop string, which need not end with a token, after prompts that are cut on the left."""
    contexts = ["def f(x):", "x", TEXT * 20]

    def texts(model: LM, **settings: Any) -> list[str]:
        each = requests("generate_until", *((context, {"do_sample": False, **settings}) for context in contexts))
        return model.generate_until(each, disable_tqdm=True)

    whole = texts(models.reference, until=[], max_gen_toks=40)
    start = models.model.statistics.tokens
    assert texts(models.model, until=[], max_gen_toks=40) == whole
    middle, longest = models.model.statistics.tokens, max(whole, key=len)
    stop = longest[12:15]
    cut = texts(models.model, until=[stop, "x"], max_gen_toks=40)
    assert cut == texts(models.reference, until=[stop, "x"], max_gen_toks=40) and longest.partition(stop)[0] in cut
    assert models.model.statistics.tokens - middle < middle - start - 10, "the text ends at the stop string"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a run, with a checkpoint of step 7."""
    folder = tmp_path_factory.mktemp("run")
    write_model(folder / "checkpoints/step_00000007", train={"sequence_length": POSITIONS})
    (folder / "run.json").write_text(json.dumps({"config": {"train": {"steps": 7}}}))
    return folder


@pytest.fixture(scope="module")
def model(folder: Path) -> MTPModel:
    return MTPModel(str(folder))


def test_sampled_texts_are_repeatable(model: MTPModel) -> None:
    """However many heads are fastest: drafts take random numbers."""
    settings = {"do_sample": True, "temperature": 1.0, "until": [], "max_gen_toks": 20}
    texts = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        texts += model.generate_until(requests("generate_until", ("x", settings)))
    assert texts[0] == texts[1] != texts[2]


def test_limits_of_the_model(model: MTPModel) -> None:
    with pytest.raises(UserError, match=f"a task generates up to max_gen_toks = {POSITIONS} tokens, but the model was"):
        model.generate_until(requests("generate_until", ("x", {"max_gen_toks": POSITIONS})))
    assert len(model.generate_until(requests("generate_until", ("x", {"until": []})))) == 1, "the default fits"
    for continuation in ("", "x" * 999):
        with pytest.raises(UserError, match=r"a continuation that a task scores has \d+ tokens, but the model was tr"):
            model.loglikelihood(requests("loglikelihood", ("def", continuation)))


Command = Callable[..., tuple[str, str]]


@pytest.fixture
def command(folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Command:
    """Run the command. Return what it writes to standard output and standard error."""

    monkeypatch.setattr("lm_eval.api.task.tqdm", lambda items, **options: items)  # in a process of its own it is silent

    def run(**options: Any) -> tuple[str, str]:
        lm_eval(**{"tasks": ",".join(TASKS), "model": str(folder), "limit": 3, **options})
        captured = capsys.readouterr()
        return captured.out, captured.err

    return run


def test_command_prints_and_writes_results(command: Command, tmp_path: Path) -> None:
    output, errors = command(as_json=True, output=str(tmp_path / "r.json"), num_fewshot=1)
    result = json.loads(output)
    assert errors == "" and result["examples"] == dict.fromkeys(TASKS, 3) and set(result["num_fewshot"].values()) == {1}
    names = {name.rpartition("/")[2] for name in result["metrics"]}
    assert names == {"acc", "exact_match", "rouge1", "rouge2", "rougeL"}
    assert result["decoding"]["tokens"] > 0
    complete = json.loads((tmp_path / "r.json").read_text())
    value = result["metrics"]["python_docs_choice/acc"]["value"]
    assert complete["results"]["python_docs_choice"]["acc,none"] == value
    table = command(tasks="python_docs_choice")[0]
    assert all(word in table for word in ("python_docs_choice", "acc", "standard error"))


def test_results_that_cannot_be_written_are_printed(command: Command, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        command(tasks="python_docs_choice", output="/nowhere/r.json", as_json=True)
    output, errors = capsys.readouterr()
    assert json.loads(output)["metrics"] and errors.startswith("error: cannot write /nowhere/r.json (No such file")


LOCAL_COPY = """
include: {tasks}/{file}
task: {name}
dataset_path: json
dataset_name: null
dataset_kwargs: {{data_files: {{train: {data}, test: {data}}}}}
"""
GSM8K = {"question": "How many legs do 3 cats have?", "answer": "3 * 4 = 12\n#### 12"}
CNN = {"article": "The cat sat on the mat. It slept.", "highlights": "A cat sat and slept."}


def test_tasks_of_lm_eval(command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """GSM8K with its filters of the answer, and a summarization with ROUGE, whose code prints a warning."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    files = {"gsm8k": ("gsm8k/gsm8k.yaml", GSM8K), "cnn": ("cnn_dailymail/cnn_dailymail.yaml", CNN)}
    for name, (file, example) in files.items():
        data = tmp_path / f"{name}.jsonl"
        data.write_text(f"{json.dumps(example)}\n" * 2)
        text = LOCAL_COPY.format(tasks=Path(lm_eval_package.__file__).parent / "tasks", file=file, name=name, data=data)
        (tmp_path / f"{name}.yaml").write_text(text)
    output, errors = command(tasks="gsm8k,cnn", include_path=str(tmp_path), num_fewshot=1, as_json=True)
    result = json.loads(output)
    assert result["examples"] == {"gsm8k": 2, "cnn": 2} and "bert_score not installed" in errors
    assert {"gsm8k/exact_match/strict-match", "gsm8k/exact_match/flexible-extract"} < set(result["metrics"])
    assert 0 <= result["metrics"]["cnn/rougeL"]["value"] <= 1


def test_command_follows_a_run(command: Command, folder: Path) -> None:
    """A second watch with the same settings has nothing to do."""
    for again, expected in ((False, [7]), (True, [])):
        output, errors = command(model=None, watch=str(folder), once=True, as_json=True)
        assert [json.loads(line)["step"] for line in output.splitlines()] == expected and errors == "", again
    (line,) = (folder / "evaluations.jsonl").read_text().splitlines()
    record = json.loads(line)
    assert record["evaluation"] == f"lm-eval --tasks {','.join(TASKS)} --limit 3"
    assert set(record["metrics"]) >= {"python_docs_choice/acc", "python_docs_summary/rougeL"}
    assert command(model=None, watch=str(folder), once=True, limit=2)[0].startswith("step 7: python_docs_choice/acc ")


def test_results_equal_by_registered_name(folder: Path, command: Command) -> None:
    """`mtp-dist` is a model of lm-eval in every program that imports the module."""
    options = {"tasks": load_tasks(["python_docs_*"]), "limit": 3, "batch_size": 2, "bootstrap_iters": 0}
    options["task_manager"] = TaskManager(include_defaults=False)
    results = simple_evaluate(model="mtp-dist", model_args={"model": str(folder), "speculative": 2}, **options)
    expected = json.loads(command(as_json=True)[0])["metrics"]
    assert set(results["results"]) == set(TASKS)
    assert results["results"]["python_docs_summary"]["rougeL,none"] == expected["python_docs_summary/rougeL"]["value"]


FAR_TASK = """
task: far_away
dataset_path: json
dataset_kwargs: {data_files: /nowhere/questions.jsonl}
test_split: train
output_type: multiple_choice
doc_to_text: question
doc_to_choice: choices
doc_to_target: label
"""


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"tasks": "python_docs_choise"},
            "--tasks = 'python_docs_choise' is not a task of lm-eval: the nearest ones are ",
        ),
        ({"tasks": ","}, "--tasks names no task: give one, such as python_docs_choice"),
        (
            {"tasks": "python_docs_choice,both"},
            "--tasks names a task twice (Duplicate task 'python_docs_choice'",
        ),
        ({"tasks": "far_away"}, "--tasks = 'far_away' cannot be loaded ("),
        (
            {"include_path": "/nowhere"},
            "--include-path = '/nowhere' is not a folder: give one with YAML files of tasks",
        ),
        ({"model": "/nowhere"}, "--model = '/nowhere' does not exist: "),
        ({"model": None}, "give either --model, to evaluate one model, or --watch, to follow a run"),
        ({"watch": "runs/demo"}, "give either --model, to evaluate one model, or --watch, to follow a run"),
        ({"model": None, "watch": "/nowhere"}, "--watch = '/nowhere' has no run.json: "),
        ({"model": None, "watch": "/nowhere", "output": "r.json"}, "--output is for --model: "),
        ({"speculative": 5, "tasks": "python_docs_choice"}, "--speculative = 5, but the model has 4 heads: "),
    ],
)
def test_user_errors(
    command: Command,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    options: dict[str, Any],
    message: str,
) -> None:
    def local_tasks(**arguments: Any) -> TaskManager:  # reading all of lm-eval's takes 15 seconds
        return TaskManager(**arguments | {"include_defaults": False})

    monkeypatch.setattr(lm_eval_tasks, "TaskManager", local_tasks)
    (tmp_path / "far.yaml").write_text(FAR_TASK)
    (tmp_path / "both.yaml").write_text("group: both\ntask: [python_docs_choice, python_docs_summary]")
    with pytest.raises(SystemExit, match="2"):
        command(**{"include_path": str(tmp_path)} | options)
    output, errors = capsys.readouterr()
    assert output == "" and errors.startswith(f"error: {message}") and errors.count("\n") == 1


def test_package_is_missing(
    command: Command, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def version(package: str) -> str:
        raise PackageNotFoundError(package)

    monkeypatch.setattr("mtp_dist.cli.evaluate_lm.version", version)
    with pytest.raises(SystemExit, match="2"):
        command()
    assert capsys.readouterr().err == (
        "error: mtp-dist evaluate lm-eval needs the package lm-eval, which is not installed: pip install lm-eval\n"
    )
