"""`mtp-dist generate`: what it writes where."""

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch

from mtp_dist.cli.generate import generate
from mtp_dist.inference.generator import Generator
from mtp_dist.inference.speculation import Speculation
from tests.unit.convert.folders import write_model

PROMPT = "def f(x):\n"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("model") / "c"
    write_model(folder, train={"sequence_length": 64})
    return str(folder)


Command = Callable[..., tuple[str, str]]


@pytest.fixture
def command(folder: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Command:
    """Run the command. Return what it writes to standard output and standard error."""
    for name in ("FORCE_COLOR", "TTY_COMPATIBLE"):
        monkeypatch.delenv(name, raising=False)

    def run(**options: Any) -> tuple[str, str]:
        generate(**{"model": folder, "prompt": PROMPT, "max_new_tokens": 30, **options})
        captured = capsys.readouterr()
        return captured.out, captured.err

    return run


def test_json_and_text_agree(command: Command) -> None:
    output, errors = command(as_json=True, stream=True, speculative=4, compare_plain=True)
    result = json.loads(output)
    assert errors == "" and output.count("\n") == 1
    assert result["new_tokens"] == len(result["token_ids"]) == 30 and result["prompt_tokens"] == 11
    assert result["tokens_per_forward"] == 30 / result["forward_passes"] >= 1
    assert result["text"] == bytes(result["token_ids"]).decode(errors="replace")
    assert set(result["acceptance"]) <= {"2", "3", "4"} and result["tokens_per_second"] > 0
    plain = result["plain"]
    assert plain["same_text"] and plain["tokens_per_forward"] == 1 and plain["acceptance"] == {}

    for options in ({}, {"stream": True}, {"speculative": 1}, {"stream": True, "speculative": 3}):
        output, errors = command(**options)
        assert output == result["text"] + "\n", options
        assert errors.startswith("Decoding: 30 tokens in ") and ("Accepted:" in errors) == (
            options != {"speculative": 1}
        )


def test_default_length(command: Command) -> None:
    """As many tokens as there is room for, without a warning."""
    result = json.loads(command(as_json=True, max_new_tokens=None)[0])
    assert result["new_tokens"] == 64 - 11


def test_seed(command: Command) -> None:
    def text(**options: Any) -> str:
        return command(temperature=1.0, **options)[0]

    assert text(seed=3) == text(seed=3, stream=True) == text(seed=3, speculative=4) != text(seed=4)
    torch.manual_seed(0)
    first = text(speculative=4)
    torch.manual_seed(0)  # as in a new process
    assert text(speculative=4) != first


class FakeDecoding:
    """A generation of given tokens, which records what is on standard output after each forward pass."""

    def __init__(self, capsys: pytest.CaptureFixture[str], passes: list[tuple[bytes, int]]) -> None:
        self.capsys, self.passes = capsys, passes
        self.written: list[str] = []

    def __call__(
        self, prompts: list[list[int]], tokens: int, temperature: float, speculation: Speculation
    ) -> list[list[int]]:
        assert speculation.on_tokens
        for content, accepted in self.passes:
            speculation.on_tokens(0, [*content], accepted)
            speculation.statistics.count(4, accepted, len(content))
            self.written.append(self.capsys.readouterr().out)
        speculation.statistics.seconds = 1.0
        return [[byte for content, _ in self.passes for byte in content]]


def test_stream_highlights_accepted_drafts(
    folder: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each pass is written at once, up to its last whole character. Control characters do not reach the terminal."""
    decoding = FakeDecoding(capsys, [(b"a", 0), (b"bc\xc3", 2), (b"\xa9", 0), (b"\x1b", 1), (b"\xe2\x82", 1)])
    monkeypatch.setattr(Generator, "generate", decoding)
    for name, value in {"FORCE_COLOR": "1", "TERM": "xterm-256color"}.items():
        monkeypatch.setenv(name, value)
    green, end = "\x1b[30;42m", "\x1b[0m"
    generate(model=folder, prompt="x", stream=True)
    assert decoding.written[0].endswith(f"\x1b[1mx{end}a"), "the prompt in bold"
    assert decoding.written[1:] == [f"{green}bc{end}", "é", f"{green}\u241b{end}", ""]
    output, errors = capsys.readouterr()
    assert output == "\ufffd\n" and "5 forward passes" in errors
    generate(model=folder, prompt="x")
    assert decoding.written[5:] == [""] * 5, "without --stream nothing is written before the end"
    assert capsys.readouterr().out.endswith(f"\x1b[1mx{end}a{green}bc{end}é{green}\u241b{end}\ufffd\n")


def test_user_error(folder: str, capsys: pytest.CaptureFixture[str]) -> None:
    for options, message in (
        (
            {"speculative": 5},
            "error: --speculative = 5, but the model has 4 heads: use 1 for plain decoding, or up to 4\n",
        ),
        ({"prompt": "x" * 64}, "error: --prompt has 65 tokens, but the model was trained on texts of 64: shorten it\n"),
        (
            {"model": f"{folder}/no"},
            f"error: --model = '{folder}/no' is neither a checkpoint nor an export of mtp-dist: ",
        ),
    ):
        with pytest.raises(SystemExit, match="2"):
            generate(**{"model": folder, "prompt": PROMPT, **options})
        output, errors = capsys.readouterr()
        assert output == "" and errors.startswith(message) and errors.count("\n") == 1
