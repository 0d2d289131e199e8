"""The docs show what the code and the committed data say."""

import re
import runpy
from pathlib import Path

import pytest

PROJECT = Path(__file__).resolve().parents[2]
PAGES = [PROJECT / "README.md", PROJECT / "CONTRIBUTING.md", *sorted((PROJECT / "docs").glob("*.md"))]


def test_generated_pages_are_up_to_date():
    pages = runpy.run_path(str(PROJECT / "docs/generate.py"))["pages"]()
    for path, text in pages.items():
        assert path.read_text() == text, f"{path.name}: run python docs/generate.py"


def test_measured_tables_name_machine_time_and_commit():
    """Results of experiments have their own line, below all of their tables; `balance` and `layouts` are computed."""
    sections = runpy.run_path(str(PROJECT / "docs/generate.py"))["tables"]()
    for name in sections.keys() - {
        "balance",
        "plan",
        "plan-advice",
        "experiments",
        "why-scaling",
        "experiment-results",
        "layouts",
    }:
        _, *rests = re.split(r"(?m)^\|.*\n(?!\|)", sections[name])
        assert rests or name == "kills", name
        for rest in rests or [sections[name].partition("\n")[2]]:
            origin = r"\n\S.*; (\d{4}-\d\d-\d\d.*[,;] commit|committed \d{4}-\d\d-\d\d as) [0-9a-f]{7,}"
            assert re.match(origin, rest), f"{name}: {rest[:200]}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)", page.read_text()):
        assert target.startswith("https://") or (page.parent / target).exists(), target


def test_names_of_the_architecture_page_exist():
    sources = [path.read_text() for path in (PROJECT / "mtp_dist").rglob("*.py")]
    for name in re.findall(r"`([A-Za-z_][\w.]*)`", (PROJECT / "docs/architecture.md").read_text()):
        words = [rf"\b{word}\b" for word in name.removesuffix(".py").split(".")]
        assert any(all(re.search(word, source) for word in words) for source in sources), name


def test_readme_stays_under_two_screens():
    assert len((PROJECT / "README.md").read_text().splitlines()) <= 60


TYPES = {
    "Checkpoint.allow_changes": "list of text",
    "Log.profile_steps": "[integer > 0, integer > 0]",
    "Parallel.partition": "`balanced` / `measured` / `uniform` / list of integer >= 0",
    "Heads.auxiliary_weight": "number >= 0 / list of [integer > 0, number >= 0]",
    "Optimizer.min_lr_ratio": "number >= 0, <= 1",
    "Parallel.zero_stage": "`0` / `1`",
}


def test_types_of_keys_are_those_of_the_schema():
    configuration = runpy.run_path(str(PROJECT / "docs/generate.py"))["configuration"]
    for name, value in TYPES.items():
        section, key = name.split(".")
        rows = configuration.field_rows(configuration.CLASSES[f"{section}Config"])
        assert {row[0]: row[1] for row in rows}[f"`{key}`"] == value
