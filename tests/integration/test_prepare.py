"""`mtp-dist prepare` as a command: kills, mistakes, and what it prints."""

import json
import sys
from pathlib import Path

from mtp_dist.data.corpus import open_corpus
from mtp_dist.data.prepare.corpus_writer import JOURNAL
from tests.integration import jobs

PREPARE = [sys.executable, "-m", "mtp_dist.cli", "prepare"]


def test_a_killed_command_goes_on_when_it_is_given_again(tmp_path: Path) -> None:
    lines = [json.dumps({"code": f"x = {i}\n" * 2000}) for i in range(2000)]
    (tmp_path / "a.jsonl").write_text("\n".join([*lines, '{"code": ""}']))
    prefix = tmp_path / "corpus"
    command = [*PREPARE, str(tmp_path / "a.jsonl"), "--to", str(prefix), "--tokenizer", "bytes", "--field", "code"]
    with jobs.started([*command, "--workers", "2"], tmp_path) as job:
        journal = tmp_path / "corpus.unfinished" / JOURNAL
        job.wait_until(lambda: journal.exists() and journal.stat().st_size > 0)
        job.kill()
    assert not prefix.with_suffix(".json").exists()

    result = jobs.run([*command, "--json"])
    assert result.status == 0, result.output
    said = json.loads(result.stdout)
    assert said["documents"] == 2000 and said["empty_documents"] == 1
    assert said["first_empty"] == f"{tmp_path / 'a.jsonl'}, line 2001"
    corpus = open_corpus(prefix, "here")
    corpus.verify()
    text = "".join(json.loads(line)["code"] for line in lines)
    assert corpus.tokens[corpus.tokens != 256].astype("uint8").tobytes() == text.encode()
    assert sorted(path.name for path in tmp_path.glob("corpus*")) == ["corpus.bin", "corpus.idx", "corpus.json"]

    again = jobs.run(command)
    assert again.status == 2 and again.stdout == ""
    assert again.stderr == f"error: {prefix}.bin exists: delete it, or choose another --to\n"


def test_a_mistake_ends_with_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text")
    result = jobs.run([*PREPARE, str(tmp_path / "a.txt"), "--to", str(tmp_path / "c"), "--tokenizer", str(tmp_path)])
    assert result.status == 2 and result.stderr.count("\n") == 1
    assert result.stderr.startswith(f"error: --tokenizer = '{tmp_path}' is a folder without tokenizer.json")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.txt"]
