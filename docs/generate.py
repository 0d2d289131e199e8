"""Generate parts of the docs from code and committed data: `python docs/generate.py` writes, `--check` compares.

configuration.md is generated from the configuration's JSON schema, the tables between `<!-- begin NAME -->` and
`<!-- end NAME -->` of any page from data/ and ../configs/models/. Pictures are drawn without --check only, because
pixels depend on fonts.
To add a table or a picture, write a module in generators/ and add it to TABLES or PICTURES.
"""

import argparse
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))  # absent when runpy runs this file, as in tests

from generators import (
    adaptation,
    benchmarks,
    configuration,
    decoding,
    demo,
    evaluation,
    experiments,
    frozen_trunk,
    head_loss,
    head_runs,
    layouts,
    planning,
    probe,
    why_it_works,
)
from generators.common import DOCS

TABLES = (
    adaptation,
    benchmarks,
    decoding,
    evaluation,
    experiments,
    frozen_trunk,
    head_loss,
    head_runs,
    layouts,
    planning,
    probe,
    why_it_works,
)
PICTURES = (adaptation, decoding, demo, experiments, head_loss, head_runs, planning, probe, why_it_works)
TABLE = re.compile(r"(<!-- begin {name} -->\n).*?(<!-- end {name} -->)".replace("{name}", "([a-z-]+)"), re.DOTALL)


def tables() -> dict[str, str]:
    """Return the text of every generated section by its name."""
    return {name: text for module in TABLES for name, text in module.tables().items()}


def pages() -> dict[Path, str]:
    """Return the text of every generated page."""
    sections = tables()
    filled = {
        path: TABLE.sub(lambda match: f"{match[1]}\n{sections[match[2]]}\n{match[3]}", page)
        for path in sorted(DOCS.glob("*.md"))
        if TABLE.search(page := path.read_text())
    }
    return {DOCS / "configuration.md": configuration.page(), **filled}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="fail if a page differs from what is generated")
    check = parser.parse_args().check
    stale = [path.name for path, text in pages().items() if not path.exists() or path.read_text() != text]
    if check and stale:
        sys.exit(f"{', '.join(stale)}: run python docs/generate.py")
    if not check:
        for path, text in pages().items():
            path.write_text(text)
        for module in PICTURES:
            module.draw()


if __name__ == "__main__":
    main()
