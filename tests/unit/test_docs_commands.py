"""Every command that README and docs show is valid: it parses, with the keys, flags and files that it names."""

import re
import shlex

import pytest
import typer

from mtp_dist.cli import app
from mtp_dist.config import load_config
from tests.unit.test_docs import PAGES, PROJECT

PLACEHOLDERS = {
    "X",
    "CONFIG",
    "configs/mine.yaml",
    "mine.yaml",
    "imported/run.yaml",
    "configs/sweep/%a.yaml",
    "runs/demo-imported/run.yaml",
    "runs/demo-medusa/run.yaml",
    "runs/qwen-imported/run.yaml",
    "runs/qwen-tiny-imported/run.yaml",
}
"""Configurations that a reader of the docs has and this repository does not."""
PROGRAMS = ("launchers/pretrain.py", "launchers/slurm/pretrain.sbatch", "launchers/torchrun.sh")


def commands():
    """Yield each page's name and the words of each command in its indented blocks."""
    for page in PAGES:
        text = re.sub(r"\\\n\s*", "", page.read_text())
        for line in re.findall(r"^    (\S.*)$", text, re.MULTILINE):
            if not re.match(r"([A-Z_]+=\S+ )*(mtp-dist|torchrun|deepspeed|sbatch|python|make|launchers/)", line):
                continue
            if " [--" in line or "..." in line.replace("sbatch ...", "").replace("torchrun ...", ""):
                continue  # a synopsis, whose options have rows of their own
            words = shlex.split(line.split("  #")[0].split(" && ")[0].split(" > ")[0], comments=True)
            yield page.name, words


def check_training(arguments):
    """Load the configuration with the overrides."""
    overrides = [word.replace("%a", "4").replace("$kind", "mlp") for word in arguments if "=" in word]
    config = arguments[arguments.index("--config") + 1] if "--config" in arguments else "X"
    load_config(PROJECT / ("configs/demo.yaml" if config in PLACEHOLDERS else config), overrides)


def check_subcommand(words):
    """Parse an `mtp-dist` command, and the configuration if it takes one."""
    command = typer.main.get_command(app)
    while words and hasattr(command, "commands"):
        command, words = command.commands[words[0]], words[1:]
    command.make_context(command.name or "", list(words), resilient_parsing=False)
    if any(re.match(r"\w+\.\w+=", word) for word in words):
        check_training(words)


COMMANDS = [pytest.param(words, id=f"{page}: {shlex.join(words)[:80]}") for page, words in commands()]


@pytest.mark.parametrize("words", COMMANDS)
def test_command_is_valid(words, monkeypatch):
    monkeypatch.chdir(PROJECT)
    programs = [word for word in words if word in PROGRAMS]
    if words[0] == "make":
        targets = re.findall(r"^([a-z-]+):", (PROJECT / "Makefile").read_text(), re.MULTILINE)
        assert all(word in targets for word in words[1:] if "=" not in word)
    elif programs:
        check_training(words[words.index(programs[0]) + 1 :])
    elif "mtp_dist.cli" in words:
        check_subcommand(words[words.index("mtp_dist.cli") + 1 :])
    elif words[0] == "mtp-dist":
        check_subcommand(words[1:])
    elif words[0] == "python":
        script = words[2].replace(".", "/") if words[1] == "-m" else words[1]
        assert script == "pytest" or any((PROJECT / f"{script}{end}").exists() for end in ("", ".py", "/__main__.py"))
    else:
        pytest.fail(f"no check for {words[0]}")


def test_commands_are_found():
    assert len(COMMANDS) > 40
