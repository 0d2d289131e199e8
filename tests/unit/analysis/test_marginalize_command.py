"""`mtp-dist analyze marginalize`: results, tables, continuation and errors."""

import json

import pytest
from transformers import BertConfig, BertModel
from typer.testing import CliRunner

from mtp_dist.cli import app
from mtp_dist.convert.saved_heads import HEADS_CONFIG
from mtp_dist.convert.to_huggingface import export_checkpoint
from tests.unit.convert.folders import change_weights, write_llama, write_model

OPTIONS = ("--distance", "2..3", "--top-k", "5,1", "--tokens", 6)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A checkpoint with its export and the Llama in it, models of others, and texts."""
    root = tmp_path_factory.mktemp("marginalize")
    write_model(root / "ours", train={"sequence_length": 40})
    write_model(root / "short", train={"sequence_length": 8})
    for name in ("export", "headless"):
        export_checkpoint(root / "ours", root / name, "fp32")
    (root / "headless" / HEADS_CONFIG).unlink()
    write_llama(root / "llama")
    write_llama(root / "incomplete")
    change_weights(lambda weights: weights.pop("model.norm.weight"))(root / "incomplete")
    write_llama(root / "small", vocab_size=200)
    write_llama(root / "encoder")
    BertModel(BertConfig(vocab_size=257, hidden_size=8, num_hidden_layers=1, num_attention_heads=1)).save_pretrained(
        root / "encoder"
    )
    config = json.loads((root / "encoder/config.json").read_text()) | {"model_type": "unheard-of"}
    (root / "encoder/config.json").write_text(json.dumps(config))
    (root / "text.txt").write_text("one two three four five six\n" * 20)
    (root / "other.txt").write_text("seven eight nine ten eleven\n" * 20)
    (root / "tiny.txt").write_text("one")
    (root / "notes.txt").write_text('{"window": 0}\n')
    return root


def run(folders, model, *arguments, data="text.txt"):
    options = ("--model", folders / model, "--data", folders / data, *OPTIONS, *arguments)
    return CliRunner().invoke(app, ["analyze", "marginalize", *map(str, options)])


def read(folders, model, *arguments):
    result = run(folders, model, *arguments, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def test_result_and_table(folders):
    found = read(folders, "llama")
    assert set(found["measured"]) == {"processor", "cores", "gpus", "torch", "time", "commit"}
    # Windows of 64 tokens with positions 8, 24, 40 and 56: 6 positions are rounded up to two windows.
    assert (found["positions"], found["windows"], found["window_length"], found["beam"]) == (8, 2, 64, 5)
    assert [(row["distance"], row["prediction"], row["k"]) for row in found["rows"]] == [
        (1, "next token", None),
        *(
            (distance, *prediction)
            for distance in (2, 3)
            for prediction in (("true prefix", None), ("greedy rollout", 1), ("marginal", 1), ("marginal", 5))
        ),
    ]
    rollout, single, several = found["rows"][2:5]
    assert rollout["cross_entropy"] == pytest.approx(single["cross_entropy"])
    assert single["lower"] < several["lower"] < several["cross_entropy"] < several["upper"] < single["upper"]
    assert single["kept_mass"] < several["kept_mass"] < 1 and several["cross_entropy_interval"] > 0
    shorter = read(folders, "llama", "--sequence-length", "40")  # three windows of two positions
    assert (shorter["positions"], shorter["windows"], shorter["window_length"]) == (6, 3, 40)
    table = run(folders, "llama").stdout
    assert "sum over 5" in table and "greedy rollout" in table


def test_our_models_are_read_from_checkpoints_exports_and_plain_llamas(folders):
    checkpoint, export, headless = (read(folders, name) for name in ("ours", "export", "headless"))
    without_heads = [row for row in checkpoint["rows"] if row["prediction"] != "head"]
    assert len(checkpoint["rows"]) == len(without_heads) + 2, "of distance 2 and 3"
    for other, rows in ((export, checkpoint["rows"]), (headless, without_heads)):
        for row, expected in zip(other["rows"], rows, strict=True):
            numbers, wanted = ([v for v in found.values() if isinstance(v, float)] for found in (row, expected))
            assert numbers == pytest.approx(wanted, rel=1e-4, abs=1e-6)
    assert checkpoint["window_length"] == 40 and checkpoint["rows"][0]["positions"] == 6


def test_continuation(folders, tmp_path, monkeypatch):
    file = tmp_path / "results" / "windows.jsonl"
    complete = read(folders, "llama", "--output", file)
    first, second = file.read_text().splitlines(keepends=True)
    file.write_text(first + second[:30])  # killed within the second window
    repeated = read(folders, "llama", "--output", file)
    assert repeated["rows"] == complete["rows"]
    lines = file.read_text().splitlines(keepends=True)
    assert lines[0] == first and json.loads(lines[1])["rows"] == json.loads(second)["rows"]
    monkeypatch.setattr("mtp_dist.analysis.marginal_windows.WindowMeter.measure", None)
    assert read(folders, "llama", "--output", file)["rows"] == complete["rows"], "nothing is measured again"
    for model, arguments, message in (
        ("llama", ("--top-k", "1"), "has results with top_k = [1, 5], not [1]"),
        ("ours", (), "has results with model = "),
        ("llama", ("--data", folders / "other.txt"), "has results of another text"),
    ):
        result = run(folders, model, "--output", file, *arguments)
        assert result.exit_code == 2 and message in result.stderr and result.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("model", "arguments", "message"),
    [
        ("llama", "--distance 1..3", "--distance = '1..3' is not a distance from 2 on"),
        ("llama", "--distance 4..2", "--distance = '4..2' is not"),
        ("llama", "--top-k 5,0", "--top-k = '5,0' is not a list of positive integers"),
        ("llama", "--data tiny.txt", "--data has 4 tokens, one window needs 65"),
        ("llama", "--sequence-length 65", "--sequence-length = 65 exceeds the 64 tokens that '"),
        ("short", "--distance 2..4", "reads windows of 8 tokens, too short for --distance = 4"),
        ("incomplete", "", "lacks the weight model.norm.weight"),
        ("small", "", "has embeddings for 200 tokens, its tokenizer 257"),
        ("encoder", "", "is not a causal language model that transformers can open"),
        ("missing", "", "--model = '"),
        ("llama", "--output notes.txt", "line 1 is not a result of mtp-dist analyze marginalize"),
        ("llama", "--output text.txt/file", "cannot write"),
    ],
)
def test_mistakes_are_explained(folders, monkeypatch, model, arguments, message):
    monkeypatch.chdir(folders)
    result = run(folders, model, *arguments.split())
    assert result.exit_code == 2, result.output
    assert message in result.stderr and result.stderr.count("\n") == 1
