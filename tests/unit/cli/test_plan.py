"""`mtp-dist plan`: results, tables, files and errors."""

import json
import shlex

import pytest
import yaml
from typer.testing import CliRunner

from mtp_dist.cli import app
from mtp_dist.cli.plan import read_tokens
from tests.unit.planner.models import unresolved

LAYOUT = ("parallel.tensor=2", "parallel.pipeline=4")


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    path = tmp_path_factory.mktemp("plan") / "7b.yaml"
    path.write_text(yaml.safe_dump(unresolved().model_dump(mode="json")))
    return path


def run(config, *arguments, gpus=64, gpu="h100"):
    command = ["plan", "--config", str(config), "--gpus", str(gpus), "--gpu", gpu, *arguments]
    return CliRunner().invoke(app, command)


def read(*arguments, status=0, **options):
    result = run(*arguments, "--json", **options)
    assert result.exit_code == status, result.output
    return json.loads(result.stdout)


def test_plan_of_a_layout(config):
    found = read(config, *LAYOUT, "--tokens", "200B")
    assert found["memory"]["fits"] and len(found["memory"]["ranks"]) == 4
    assert found["bytes"] == max(rank["total"] for rank in found["memory"]["ranks"])
    assert sum(found["parts"].values()) == pytest.approx(found["step_seconds"])
    assert found["days"] == pytest.approx(200e9 / found["tokens_per_second"] / 86400)
    assert found["gpu_hours"] == pytest.approx(64 * 24 * found["days"])
    assert 0.2 < found["mfu"] < 0.6 and found["longest_sequence"] > 4096
    assert "layouts" not in found and found["preflight"] is None
    default = read(config, *LAYOUT)
    assert default["tokens"] == 1000 * 1024 * 4096
    shown = run(config, *LAYOUT, "--tokens", "200B").stdout
    for text in (
        "tensor 2 x pipeline 4 x data 8",
        "H100 data sheet",
        "optimizer state",
        "pipeline bubble",
        "fits",
    ):
        assert text in shown
    assert f"200B tokens: {found['days']:,.3g} days" in shown


def test_run_that_does_not_fit(config):
    found = read(config, "train.micro_batch_size=64", gpus=16, status=1)
    assert not found["memory"]["fits"] and found["memory"]["remedies"]
    shown = run(config, "train.micro_batch_size=64", gpus=16)
    assert shown.exit_code == 1 and "DOES NOT FIT: use train.micro_batch_size=" in shown.stdout


def test_layouts_of_a_search_can_be_pasted(config, tmp_path):
    shown = run(config, "--search", gpus=16).stdout
    assert "layouts that fit, each the best of its degrees" in shown
    texts = [text.partition("\n") for text in shown[shown.index("# 1: ") :].split("# ")[1:]]
    layouts = {text[0].partition(": ")[2]: yaml.safe_load(text[2]) for text in texts}
    assert 1 < len(layouts) <= 5
    values = yaml.safe_load(config.read_text())
    for line, sections in layouts.items():
        pasted = values | {name: values[name] | section for name, section in sections.items()}
        (tmp_path / "pasted.yaml").write_text(yaml.safe_dump(pasted))
        found = read(tmp_path / "pasted.yaml", gpus=16)
        assert found["layout"]["parallel.tensor"] == sections["parallel"]["tensor"] and found["memory"]["fits"]
        assert f" {found['step_seconds']:.3g} │ {found['mfu']:.1%} │" in shown
        assert read(config, *shlex.split(line), gpus=16)["step_seconds"] == found["step_seconds"]


def test_preflight_and_timeline(config, tmp_path):
    path, picture = tmp_path / "preflight.json", tmp_path / "timeline.svg"
    rank = {"rank": 0, "host": "a", "values": {"matmul": 346.0}, "groups": {"matmul": [0]}}
    path.write_text(json.dumps({"ranks": [rank]}))
    slow = read(config, *LAYOUT, "--preflight", str(path), "--timeline", str(picture))
    assert slow["rates"]["matmul"] == 346e12 and slow["step_seconds"] > 1.5 * read(config, *LAYOUT)["step_seconds"]
    assert "16 of 128 micro-batches" in picture.read_text()
    assert f"measured by {path}" in run(config, *LAYOUT, "--preflight", str(path)).stdout.replace("\n", "")


def test_cpu_and_a_tokenizer(tmp_path):
    values = unresolved(precision="fp32").model_dump(mode="json")
    values["model"] |= {"hidden_size": 256, "trunk_layers": 4, "num_attention_heads": 4, "ffn_hidden_size": 768}
    values["model"]["vocab_size"] = None
    values["train"] |= {"global_batch_size": 4, "sequence_length": 64}
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(values))
    found = read(tmp_path / "small.yaml", gpus=2, gpu="cpu")
    assert found["parameters"] == pytest.approx(8.2e6, rel=0.2) and found["memory"]["fits"]


@pytest.mark.parametrize(
    ("options", "settings", "message"),
    [
        ({"gpu": "h1000"}, (), "--gpu = 'h1000' is not a known accelerator: choose one of a100"),
        ({"gpus": 7}, (*LAYOUT,), "does not divide the world size 7"),
        ({"gpus": 37}, ("--search",), "no layout divides --gpus = 37"),
        ({"gpus": 1}, ("--search", "train.sequence_length=1048576"), "no layout of --gpus = 1 fits"),
        ({}, ("--tokens", "many"), "--tokens = 'many' is not a number of tokens: write it as 200B"),
        ({}, ("--tokens", "0"), "--tokens = '0' is not a number of tokens"),
        ({}, ("--tokens", "1e999"), "--tokens = '1e999' is not a number of tokens"),
        ({"gpus": 10**11}, ("--search",), "Invalid value for '--gpus'"),
        ({}, ("--timeline", "out.pdf"), "--timeline = 'out.pdf' does not end with .svg or .png"),
        ({}, ("--preflight", "missing.json"), "--preflight = 'missing.json' cannot be read"),
        (
            {},
            ("data.tokenizer=nowhere", "model.vocab_size=null"),
            "to plan without it, give its number of tokens, such as model.vocab_size=32000",
        ),
    ],
)
def test_user_errors(config, options, settings, message):
    result = run(config, *settings, **options)
    assert result.exit_code == 2 and message in result.stderr, result.output


def test_numbers_of_tokens():
    for text, number in {"200B": 200e9, "1.5T": 1.5e12, "2e11": 2e11, "500m": 5e8, "12": 12, " 3k ": 3000}.items():
        assert read_tokens(text) == number
