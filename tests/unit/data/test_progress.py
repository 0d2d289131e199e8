"""What a preparation shows."""

import io
from pathlib import Path

import pytest
from rich.console import Console

from mtp_dist.data.prepare import progress
from mtp_dist.data.prepare.progress import PreparationProgress, describe
from mtp_dist.data.prepare.tokenize import UnitSummary
from tests.unit.data.preparing import made, request


def test_lines_tell_share_rates_and_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(progress, "monotonic", lambda: now[0])
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


def test_the_result_tells_what_was_left_out(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "four"}\n\n')
    said = describe(tmp_path / "a", made(request(tmp_path / "a.jsonl", tmp_path / "a")))
    assert said.splitlines() == [
        f"{tmp_path / 'a'}: 1 documents, 5 tokens, 0.0 MB of text, 0.80 bytes a token",
        "1 files: 1 JSON lines",
        f"1 documents left out because they have no tokens, the first: {tmp_path / 'a.jsonl'}, line 2",
    ]
