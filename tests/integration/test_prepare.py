"""`mtp-dist prepare` as a command is resumed after a kill, and reports errors in one line."""

import json
import sys

from mtp_dist.data.corpus import open_corpus
from mtp_dist.data.prepare.corpus_writer import JOURNAL
from tests.integration import jobs

PREPARE = [sys.executable, "-m", "mtp_dist.cli", "prepare"]


def test_killed_command_resumes(tmp_path):
    codes = [f"x = {i}\n" * 2000 for i in range(2000)]
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"code": code}) for code in [*codes, ""]))
    prefix = tmp_path / "corpus"
    command = [*PREPARE, str(tmp_path / "a.jsonl"), "--to", str(prefix), "--tokenizer", "bytes", "--field", "code"]
    with jobs.started([*command, "--workers", "2"], tmp_path) as job:
        journal = tmp_path / "corpus.unfinished" / JOURNAL
        job.wait_until(lambda: journal.exists() and journal.stat().st_size > 0)
        job.kill()
    assert not prefix.with_suffix(".json").exists()

    result = jobs.run([*command, "--json"])
    assert result.status == 0, result.output
    counts = json.loads(result.stdout)
    assert counts["documents"] == 2000 and counts["empty_documents"] == 1
    assert counts["first_empty"] == f"{tmp_path / 'a.jsonl'}, line 2001"
    corpus = open_corpus(prefix, "here")
    corpus.verify()
    assert corpus.tokens[corpus.tokens != 256].astype("uint8").tobytes() == "".join(codes).encode()
    assert sorted(path.name for path in tmp_path.glob("corpus*")) == ["corpus.bin", "corpus.idx", "corpus.json"]


def test_error_is_one_line(tmp_path):
    (tmp_path / "a.txt").write_text("text")
    result = jobs.run([*PREPARE, str(tmp_path / "a.txt"), "--to", str(tmp_path / "c"), "--tokenizer", str(tmp_path)])
    assert result.status == 2 and result.stderr.count("\n") == 1
    assert result.stderr.startswith(f"error: --tokenizer = '{tmp_path}' is a folder without tokenizer.json")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.txt"]
