"""Takes images/generate.png: `python docs/record_generate.py MODEL PROMPT`, with Chromium or Chrome on the PATH."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from io import StringIO
from pathlib import Path

from playwright.sync_api import sync_playwright
from rich.console import Console
from rich.terminal_theme import MONOKAI
from rich.text import Text

IMAGE = Path(__file__).parent / "images/generate.png"
WIDTH = 100


def record(model: str, prompt: str) -> str:
    """Return the command and its output in a terminal, as SVG."""
    command = ["generate", "--model", model, "--prompt", prompt, "--speculative", "8", "--stream"]
    environment = os.environ | {"FORCE_COLOR": "1", "TERM": "xterm-256color"}
    program = [sys.executable, "-m", "mtp_dist.cli", *command]
    result = subprocess.run(program, env=environment, check=True, capture_output=True, text=True)
    figures = re.sub(r".*\x1b\[2K", "", result.stderr, flags=re.DOTALL)  # what follows the progress bar
    console = Console(record=True, width=WIDTH, file=StringIO())
    console.print(Text(f"$ mtp-dist {shlex.join(command)}\n", "dim"))
    console.print(Text.from_ansi(result.stdout), Text.from_ansi(figures), sep="\n")
    fonts = re.compile(r"@font-face \{.*?\}", re.DOTALL)  # from another host
    return fonts.sub("", console.export_svg(title="mtp-dist", theme=MONOKAI)).replace("Fira Code", "DejaVu Sans Mono")


def main() -> None:
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if len(sys.argv) != 3 or not chromium:
        sys.exit(__doc__)
    svg = record(*sys.argv[1:])
    with sync_playwright() as playwright, playwright.chromium.launch(executable_path=chromium) as browser:
        page = browser.new_page(viewport={"width": 1280, "height": 1200})
        page.set_content(svg)
        page.locator("svg").first.screenshot(path=IMAGE)


if __name__ == "__main__":
    main()
