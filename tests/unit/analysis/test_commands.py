"""`mtp-dist analyze`: results, tables and errors."""

import json
import random

import pytest
from typer.testing import CliRunner

from mtp_dist.analysis.information import token_losses
from mtp_dist.analysis.text import read_tokens
from mtp_dist.analysis.trained_model import TrainedModel
from mtp_dist.cli import app
from mtp_dist.convert.to_huggingface import export_checkpoint
from tests.unit.convert.folders import change_config, write_llama, write_model

CHOICES = "synthetic/choices"


@pytest.fixture(scope="module")
def folders(tmp_path_factory, checkpoint):
    """Models with other heads, other tokens or without their heads, and a text."""
    root = tmp_path_factory.mktemp("models")
    write_model(root / "one", heads={"count": 1})
    write_model(root / "long", train={"sequence_length": 64})
    write_model(root / "short", train={"sequence_length": 2})
    write_model(root / "sequential", heads={"kind": "sequential"})
    write_model(root / "conditioned", heads={"condition": "previous_token"})
    source = {"path": CHOICES, "options": {"length": 4, "branches": 2}}
    data = {"tokenizer": CHOICES, "train": [source]}
    write_model(root / "choices", vocab_size=273, data=data, train={"sequence_length": 32})
    longer = {"tokenizer": CHOICES, "train": [source | {"options": {"length": 6}}]}
    write_model(root / "longer", vocab_size=273, heads={"count": 1}, data=longer, train={"sequence_length": 32})
    export_checkpoint(checkpoint, root / "export", "fp32")
    export_checkpoint(checkpoint, root / "headless", "fp32")
    (root / "headless/mtp_heads.safetensors").unlink()
    write_llama(root / "llama")
    write_llama(root / "encoder")
    change_config(model_type="unheard-of")(root / "encoder")
    (root / "tiny.txt").write_text("one")
    (root / "text.txt").write_text("one two three four five six\n" * 30)
    (root / "eight-windows.txt").write_text("x" * (8 * 16 + 1))
    return root


def run(*arguments):
    return CliRunner().invoke(app, ["analyze", *map(str, arguments)])


def read(*arguments):
    result = run(*arguments, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def test_choice_points(folders):
    options = ("choice-points", "--model", folders / "choices", "--tokens", 640)
    found = read(*options)
    assert (
        set(found["measured"]) == {"processor", "cores", "gpus", "torch", "time", "commit"} and found["data"] == CHOICES
    )
    [model] = found["models"]
    # The options are those of the training: a phrase has four words and, in its middle, a free one.
    assert [row["choice"]["terms"] for row in model["rows"]] == pytest.approx([1, 3, 5, 8], abs=0.01)
    assert [row["inconsequential"]["terms"] for row in model["rows"]] == [1, 2, 3, 4]
    assert model["nats_by_offset"][0][2] is None  # the free word
    table = run(*options).stdout
    assert "n(n+1)/2" in table and "10" in table


def test_information(folders, checkpoint):
    options = ("--data", folders / "text.txt", "--tokens", 128)
    rows = [
        read("information", "--model", folder, *options)["models"][0]["rows"]
        for folder in (checkpoint, folders / "export")
    ]
    assert [row["distance"] for row in rows[0]] == [1, 2, 3, 4] and rows[0][3]["information_interval"] > 0
    assert [row["loss"] for row in rows[1]] == pytest.approx([row["loss"] for row in rows[0]], rel=1e-5)
    assert "0.673011667009" in run("information").stdout
    assert read("information")["information_after"]["S"] == pytest.approx(0.673011667009)


def test_probe(folders, checkpoint):
    models = ("--model", folders / "one", "--model", checkpoint)
    options = ("--data", folders / "text.txt", "--tokens", 200, "--distance", 2)
    found = read("probe", *models, *options)["models"]
    assert [(model["heads"], len(model["rows"])) for model in found] == [(1, 2), (4, 2)]
    assert found[0]["rows"][1]["unigram"] == found[1]["rows"][1]["unigram"]
    # Twelve windows, of which the last three are held out.
    model = TrainedModel.open(checkpoint)
    text = read_tokens(str(folders / "text.txt"), model, 202)
    losses = token_losses(model, model.windows(text, 200), lambda done, total: None)[:, 9 * 16 :]
    assert [row["head"] for row in found[1]["rows"]] == pytest.approx(losses.mean(1)[:2])
    assert found[0]["rows"][0]["head"] > 0 and found[0]["rows"][1]["head"] is None
    for first, second in zip(found[0]["rows"], found[1]["rows"], strict=True):
        difference = second["probe"]["cross_entropy"] - first["probe"]["cross_entropy"]
        assert second["difference"]["cross_entropy"] == pytest.approx(difference) and "difference" not in first
    for model in found:
        assert model["trunk_layers"] == 4
        for row in model["rows"]:
            *trunk, final = row["layers"]
            assert [score.pop("layer") for score in trunk] == [
                "embedding",
                *(f"layer {index}" for index in range(1, 5)),
            ]
            assert final["layer"] == "final norm" and trunk[4] == row["probe"] != trunk[3]
    table = run("probe", *models, *options).stdout
    assert "accuracy at 2" in table and "chance (unigram)" in table and "final norm" in table


def test_probe_predicts_the_token_at_its_distance(folders, tmp_path):
    """Of every three letters the first two are drawn from eight each, and the third repeats the first as a capital."""
    draw = random.Random(0)
    letters = (draw.choice("abcdefgh") + draw.choice("stuvwxyz") for _ in range(1400))
    (tmp_path / "text.txt").write_text("".join(pair + pair[0].upper() for pair in letters))
    found = read("probe", "--model", folders / "one", "--data", tmp_path / "text.txt", "--distance", 3)
    accuracies = [row["layers"][0]["accuracy"] for row in found["models"][0]["rows"]]
    assert accuracies == pytest.approx([1 / 8, (1 + 1 / 8 + 1 / 8) / 3, 1 / 8], abs=0.05)


def test_probe_of_a_model_of_transformers(folders):
    """It is read in windows of 64 tokens. The trunk's output is what its unembedding reads."""
    options = ("--data", folders / "text.txt", "--tokens", 400, "--distance", 2)
    found, other = (read("probe", "--model", folders / name, *options)["models"][0] for name in ("llama", "long"))
    assert (found["heads"], found["trunk_layers"]) == (1, 3) and found["positions"] == other["positions"] == 384
    for row, expected in zip(found["rows"], other["rows"], strict=True):
        assert [score.pop("layer") for score in row["layers"]] == ["embedding", "layer 1", "layer 2", "final norm"]
        assert row["layers"][-1] == row["probe"] and row["unigram"] == expected["unigram"]
    assert found["rows"][0]["head"] > 0 and found["rows"][1]["head"] is None


@pytest.mark.parametrize(
    ("names", "data", "positions"), [(("one", "four"), "eight-windows.txt", 112), (("longer", "choices"), CHOICES, 256)]
)
def test_compared_models_read_the_same_tokens(folders, checkpoint, names, data, positions):
    """Whatever their numbers of heads are, and the parameters of the task that they were trained on."""
    models = [argument for name in names for argument in ("--model", checkpoint if name == "four" else folders / name)]
    data = data if data == CHOICES else folders / data
    found = read("probe", *models, "--data", data, "--tokens", 256, "--distance", 2)["models"]
    assert [model["positions"] for model in found] == [positions] * 2
    assert [row["unigram"] for row in found[0]["rows"]] == [row["unigram"] for row in found[1]["rows"]]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("choice-points --model one", "has one head"),
        ("information --model one", "has one head"),
        ("information --model sequential", "read the tokens before their target"),
        ("information --model conditioned", "read the tokens before their target"),
        ("information --model short --data text.txt", "too short for its head at distance 4"),
        ("information --model headless", "is not in mtp_heads.safetensors"),
        ("choice-points --model {checkpoint}", "splits the words of 'synthetic/choices'"),
        ("choice-points --model choices --data synthetic/induction", "use 'synthetic/choices'"),
        (
            "choice-points --model choices --data text.txt",
            "'text.txt' has no marked choice points: use 'synthetic/choices'",
        ),
        ("probe --model one --data missing.txt", "--data = 'missing.txt' is not a file"),
        ("probe --model one --data text.txt --tokens 20", "fewer than two windows of 16 tokens"),
        ("probe --model one --model choices", "different tokenizers"),
        ("probe --model one --model long", "different window lengths (train.sequence_length)"),
        ("probe --model llama --data tiny.txt", "--data has 4 tokens, one window needs 65"),
        ("probe --model llama --data text.txt --tokens 100", "fewer than two windows of 64 tokens"),
        ("probe --model encoder", "is not a causal language model that transformers can open"),
        ("probe --model=", "--model is empty: "),
        ("probe --model text.txt", "--model = 'text.txt' is a file: "),
    ],
)
def test_mistakes_are_explained(folders, checkpoint, monkeypatch, arguments, message):
    monkeypatch.chdir(folders)
    result = run(*arguments.format(checkpoint=checkpoint).split())
    assert result.exit_code == 2
    assert message in result.stderr and result.stderr.count("\n") == 1
