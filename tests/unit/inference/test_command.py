"""`mtp-dist generate`: what it writes where."""

import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from mtp_dist.cli.generate import generate
from mtp_dist.cli.progress import progress_bar, updates
from mtp_dist.inference.generator import Generator
from mtp_dist.inference.model import MTPForCausalLM
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


def test_interrupted_stream_ends_its_line(
    folder: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*arguments: Any) -> None:
        arguments[-1].on_tokens(0, [*b"abc"], 2)
        raise KeyboardInterrupt

    monkeypatch.setattr(Generator, "generate", interrupted)
    for stream, written in ((True, "abc\n"), (False, "")):
        with pytest.raises(KeyboardInterrupt):
            generate(model=folder, prompt="x", stream=stream)
        assert capsys.readouterr().out == written


@pytest.mark.parametrize("options", [{}, {"stream": True}, {"as_json": True}], ids=str)
def test_output_that_cannot_be_written(
    folder: str, options: dict[str, Any], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A full disk is one message; a reader that has gone ends the command silently."""
    monkeypatch.setattr(sys, "stdout", os.fdopen(os.open("/dev/full", os.O_WRONLY), "w"))
    with pytest.raises(SystemExit, match="2"):
        generate(model=folder, prompt=PROMPT, max_new_tokens=3, **options)
    assert sys.stdout.name == os.devnull, "nothing is left to write at the exit"
    message = "error: standard output cannot be written (No space left on device): "
    errors = capsys.readouterr().err
    assert errors.startswith(message) and errors.count("\n") == 1
    reader, writer = os.pipe()
    os.close(reader)
    monkeypatch.setattr(sys, "stdout", os.fdopen(writer, "w"))
    with pytest.raises(BrokenPipeError):
        generate(model=folder, prompt=PROMPT, max_new_tokens=3, **options)
    assert capsys.readouterr().err == ""


def test_progress_names_what_is_done() -> None:
    """An export is not verified: its bar has no task."""
    bar = progress_bar()
    update = updates(bar, "verifying")
    assert not bar.tasks
    update(1, 4)
    update(2, 4)
    [task] = bar.tasks
    assert (task.description, task.completed, task.total) == ("verifying", 2, 4)


NUMBERS = (
    ({"speculative": 0}, "--speculative = 0 is below 1: use 1 for plain decoding, or a number of heads\n"),
    ({"max_new_tokens": 0}, "--max-new-tokens = 0 is below 1: use at least 1\n"),
    ({"temperature": math.nan}, "--temperature = nan: use 0 for the most probable tokens, or a number from 0.001 on"),
)
"""Options that are wrong for every model, also for one that does not exist."""


def test_user_error(
    folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every option is checked before the weights are read."""
    write_model(tmp_path / "c", heads={"count": 1})
    monkeypatch.setattr(MTPForCausalLM, "from_folder", lambda *rest, **options: pytest.fail("weights are read"))
    monkeypatch.setattr(sys, "stdin", None)
    for options, message in (
        ({"speculative": 5}, "--speculative = 5, but the model has 4 heads: use 1 for plain decoding, or up to 4\n"),
        (
            {"speculative": 2, "model": str(tmp_path / "c")},
            "--speculative = 2, but the model has one head, which drafts nothing: use 1\n",
        ),
        ({"prompt": "x" * 64}, "--prompt has 65 tokens, but the model was trained on texts of 64: shorten it\n"),
        ({"prompt": "-"}, "--prompt = - reads standard input, which is closed: "),
        ({"model": f"{folder}/no"}, f"--model = '{folder}/no' does not exist: "),
        ({"model": ""}, "--model is empty: give the folder of "),
        *((options | {"model": f"{folder}/no"}, message) for options, message in NUMBERS),
    ):
        with pytest.raises(SystemExit, match="2"):
            generate(**{"model": folder, "prompt": PROMPT, **options})
        output, errors = capsys.readouterr()
        assert output == "" and errors.startswith(f"error: {message}") and errors.count("\n") == 1


def test_numbers_are_checked_without_torch() -> None:
    program = "from mtp_dist.cli import app; app()"
    arguments = ["generate", "--model", "nowhere", "--prompt", "x", "--temperature", "-1"]
    result = subprocess.run(
        [sys.executable, "-X", "importtime", "-c", program, *arguments], capture_output=True, text=True, check=False
    )
    assert result.returncode == 2 and "error: --temperature = -1.0: " in result.stderr
    assert not re.search(r"\| +(torch|transformers)$", result.stderr, re.MULTILINE)
