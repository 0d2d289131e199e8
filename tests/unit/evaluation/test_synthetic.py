"""`mtp-dist evaluate synthetic`: counts of right answers."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from typer.testing import CliRunner

from mtp_dist.cli import app
from mtp_dist.config.synthetic import SYNTHETIC_PREFIX
from mtp_dist.convert.tokenizer_files import write_tokenizer
from mtp_dist.data.build_tokenizer import build_tokenizer
from mtp_dist.data.synthetic.task import Answer, Document
from mtp_dist.data.synthetic.tasks import TASKS
from mtp_dist.errors import ConfigError
from mtp_dist.evaluation.synthetic import evaluate_synthetic, score_documents
from mtp_dist.inference.generator import Generator
from tests.tiny import tiny_config
from tests.unit.convert.folders import write_model

TOKENIZER = build_tokenizer("synthetic/arithmetic")


class Oracle:
    """A model that predicts the next token, except tokens of one value."""

    device = "cpu"

    def __init__(self, wrong):
        self.wrong = TOKENIZER.encode(wrong)[0]

    def __call__(self, input_ids):
        following = F.pad(input_ids[:, 1:], (0, 1))
        predicted = torch.where(following == self.wrong, following - 1, following)
        return SimpleNamespace(logits=F.one_hot(predicted, TOKENIZER.vocab_size).float())


@pytest.mark.parametrize("across", [True, False])
def test_counts_of_an_oracle(across):
    config = tiny_config(data={"attention_across_documents": across})
    generator = SimpleNamespace(tokenizer=TOKENIZER, config=config, positions=16, model=Oracle("3"))
    documents = [
        Document(("1", "2", "3", "4"), (Answer("all", 0, 2, 0.5), Answer("some", 1, 3, 0.25))),
        Document(("4", "3"), (Answer("all", 1, 2, 0.1), Answer("one", 0, 1, 0.2), Answer("all", 0, 2, 0.3))),
        Document(("3", "5", "6"), (Answer("some", 1, 3, 0.75),)),
    ]
    scores = {}
    score_documents(generator, documents, scores)
    score_documents(generator, documents[2:], scores)
    counts = {group: (score.correct, score.total) for group, score in scores.items()}
    # Without the end of another document before it, nothing predicts the first word.
    assert counts == ({"all": (1, 3), "some": (2, 3), "one": (1, 1)} if across else {"all": (0, 1), "some": (2, 3)})
    assert scores["some"].as_json() == {"correct": 2, "total": 3, "accuracy": 2 / 3, "chance": (0.25 + 2 * 0.75) / 3}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """An untrained model of star graphs."""
    folder = tmp_path_factory.mktemp("model") / "c"
    tokenizer = build_tokenizer("synthetic/star-graph")
    source = {"path": "synthetic/star-graph", "options": {"degree": 2, "length": 3, "nodes": 9, "documents": 3}}
    data = {"tokenizer": "synthetic/star-graph", "train": [source]}
    write_model(folder, tokenizer.vocab_size, data=data, train={"sequence_length": 20})
    return folder


def test_answers_are_those_of_greedy_decoding(folder):
    """An untrained model gives answers to arbitrary documents: those that it generates itself."""
    generator = Generator.open(folder)
    documents = []
    for first in ("1", "2", "3"):
        prompt = [generator.tokenizer.end_of_document, *generator.tokenizer.encode(f"{first} 5 / {first} 5 =").tolist()]
        (new,) = generator.generate([prompt], 4)
        words = tuple(generator.tokenizer.decode([*prompt, *new]).split())
        assert len(words) == 10, "no end of a document among them"
        changed = (*words[:8], "|" if words[8] != "|" else "/", words[9])
        documents += [Document(text, (Answer("a", 6, 10, 0), Answer("b", 6, 8, 0))) for text in (words, changed)]
    scores = {}
    score_documents(generator, documents, scores)
    assert (scores["a"].correct, scores["a"].total) == (3, 6) and scores["b"].correct == scores["b"].total == 6


def test_command(folder):
    arguments = ["evaluate", "synthetic", "--model", str(folder), "--task", "star-graph"]
    result = json.loads(CliRunner().invoke(app, [*arguments, "documents=70", "seed=4", "--json"]).stdout)
    assert result["options"] == {"degree": 2, "length": 3, "nodes": 9}, "those of the training"
    assert result == evaluate_synthetic(folder, "synthetic/star-graph", {"documents": 70, "seed": 4})
    assert {group: (score["total"], score["chance"]) for group, score in result["groups"].items()} == {
        "first-step": (70, 0.5),
        "path": (70, 0.5),
    }
    assert result["documents"] == 70 and result["split"] == "validation"
    table = CliRunner().invoke(app, [*arguments, "documents=5", "nodes=20"]).stdout
    assert " ".join(table.split()).startswith("star-graph (degree 2, length 3, nodes 20), 5 documents of the split")
    assert "first-step" in table and "50.0%" in table


@pytest.mark.parametrize(
    ("task", "options", "message"),
    [
        ("star", {}, "--task = 'star' is not a synthetic task: use one of induction, arithmetic, "),
        ("choices", {}, "--model = '{folder}' was not trained with data.tokenizer = 'synthetic/choices': evaluate the"),
        ("star-graph", {"degree": 5}, "nodes = 9 is below"),
        (
            "star-graph",
            {"length": 4, "nodes": 10},
            "a document has 26 tokens, but the model was trained on texts of 20:",
        ),
        ("star-graph", {"people": 3}, "people is not a parameter of 'synthetic/star-graph': it has degree, "),
        ("star-graph", {"document": 3}, "document is not a known key"),
        ("star-graph", {"documents": "x"}, "documents = 'x' is invalid: it should be a valid integer"),
    ],
)
def test_errors(folder, task, options, message):
    with pytest.raises(ConfigError) as raised:
        evaluate_synthetic(folder, task, options)
    assert str(raised.value).startswith(message.format(folder=folder))


def test_command_follows_a_run(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "checkpoints/step_00000007")
    (tmp_path / "run.json").write_text(json.dumps({"config": {"train": {"steps": 9}}}))
    arguments = ["evaluate", "synthetic", "--task", "star-graph", "documents=70", "--json"]
    result = json.loads(CliRunner().invoke(app, [*arguments, "--model", str(folder)]).stdout)
    watched = json.loads(CliRunner().invoke(app, [*arguments, "--watch", str(tmp_path), "--once"]).stdout)
    accuracies = {f"star-graph/{group}": score["accuracy"] for group, score in result["groups"].items()}
    assert watched == {"step": 7, "metrics": accuracies}
    (line,) = (tmp_path / "evaluations.jsonl").read_text().splitlines()
    assert json.loads(line)["evaluation"] == "synthetic --task star-graph documents=70"


def test_command_reports_errors(folder):
    for model, message in ((folder, "'documents' is not of the form key=value\n"), ("", "--model is empty: ")):
        options = ["documents"] * bool(model)
        arguments = ["evaluate", "synthetic", "--model", str(model), "--task", "star-graph", *options]
        result = CliRunner().invoke(app, arguments)
        assert result.exit_code == 2 and result.stderr.startswith(f"error: {message}")


@pytest.mark.parametrize("task", TASKS)
def test_exports_have_the_same_tokens(tmp_path, task):
    name = SYNTHETIC_PREFIX + task
    write_tokenizer(name, tmp_path)
    trained, exported = build_tokenizer(name), build_tokenizer(str(tmp_path))
    text = " ".join(trained.words)
    assert exported.encode(text).tolist() == trained.encode(text).tolist()
    assert (exported.vocab_size, exported.end_of_document) == (trained.vocab_size, trained.end_of_document)
    assert Path(tmp_path / "tokenizer.json").exists()
