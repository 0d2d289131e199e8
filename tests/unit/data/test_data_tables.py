"""What `mtp-dist prepare` prints."""

import io

from rich.console import Console

from mtp_dist.cli import data_tables
from mtp_dist.cli.data_tables import PreparationProgress, describe
from mtp_dist.data.prepare.tokenize import UnitSummary
from tests.unit.data.preparing import made, request


def test_lines_have_fraction_rates_and_time_left(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(data_tables, "monotonic", lambda: now[0])
    output = io.StringIO()
    with PreparationProgress(Console(file=output)) as shown:
        shown.start(1000)
        shown.advance(500, UnitSummary(tokens=10**9, bytes=10**9), True)
        now[0] += 20
        shown.advance(100, UnitSummary(tokens=4_000_000, bytes=10_000_000), False)
        now[0] += 1
        shown.advance(100, UnitSummary(), False)
    lines = output.getvalue().splitlines()
    assert lines == ["60 % | 4,000,000 tokens | 200,000 tokens/s | 0.5 MB/s | 0:01:20 left"]


def test_result_lists_what_was_left_out(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "four"}\n\n')
    assert describe(tmp_path / "a", made(request(tmp_path / "a.jsonl", tmp_path / "a"))).splitlines() == [
        f"{tmp_path / 'a'}: 1 documents, 5 tokens, 0.0 MB of text, 0.80 bytes per token",
        "1 files: 1 JSON lines",
        f"1 documents left out because they have no tokens, the first: {tmp_path / 'a.jsonl'}, line 2",
    ]
