import json
import re

import pytest
from matplotlib.figure import Figure
from matplotlib.legend import Legend

from mtp_dist.errors import UserError
from mtp_dist.monitoring.report.page import write_report
from mtp_dist.monitoring.report.run_files import read_run

RATES = {"train/learning_rate": 1e-3, "throughput/tokens_per_second": 1000, "memory/peak_bytes": 2e9}


def write_run(folder, heads=2, missing=None, **description):
    """Write the files of a run that is writing step 6. missing: head without losses."""

    def losses(prefix, base):
        return {f"{prefix}/head_{k}": None if k == missing else base + k for k in range(1, heads + 1)}

    folder.mkdir(parents=True)
    lines = [
        {"step": step, "train/grad_norm": None if step == 3 else 1.5} | RATES | losses("loss", 4 / step)
        for step in range(1, 6)
    ]
    lines.append({"step": 5, "validation/code/loss/total": 7.0} | losses("validation/code/loss", 2.0))
    lines[-1] |= {
        "validation/code/draft_acceptance_rate_pos_2": 0.75,
        "validation/code/expected_tokens_per_forward": 1.75,
    }
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 6, "lo')
    events = [
        {"time": "2030-01-01T00:00:00+00:00", "step": 0, "kind": "start", "text": "Starting from scratch, 2 ranks"},
        {"time": "2030-01-01T00:01:00+00:00", "step": 3, "kind": "skip", "text": "step 3 <changed> no parameter"},
        {"time": "2030-01-01T00:02:00+00:00", "step": 4, "kind": "start", "text": "Resuming from step 4"},
    ]
    (folder / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    (folder / "run.json").write_text(json.dumps(description))
    return folder


def test_page_is_complete_and_self_contained(tmp_path):
    config, versions = {"run": {"name": "first"}, "heads": {"count": 2}}, {"mtp-dist": None, "torch": "2.x"}
    run = write_run(tmp_path / "a", heads=3, missing=2, config=config, versions=versions)
    page = write_report([run], tmp_path / "report").read_text()
    for text in ("<h1>first</h1>", "<td>torch 2.x</td>", "step 3 &lt;changed&gt; no parameter", "count: 2"):
        assert text in page
    facts = {"restarts": 1, "skipped steps": 1, "spikes": 0, "rollbacks": 0}
    facts |= {"last loss": "1.8000 - 3.8000", "last validation code loss": "3.0000 - 5.0000"}
    facts |= {"last validation code tokens per forward pass": "1.75"}
    assert all(f"<td>{fact}</td><td>{value}</td>" in page for fact, value in facts.items())
    assert not re.search(r"(src|href)='?\"?(http|/)|<script|<link", page)
    pictures = {path.stem: path.read_bytes() for path in (tmp_path / "report").glob("*.png")}
    names = (
        "training-loss validation-code-loss validation-code-acceptance throughput memory gradient-norm learning-rate"
    )
    assert set(pictures) == set(names.split())
    assert all(picture.startswith(b"\x89PNG") for picture in pictures.values())
    assert page.count("data:image/png;base64,") == len(pictures)
    contents = read_run(run)
    assert [step for step, _ in contents.curve("train/grad_norm")] == [1, 2, 4, 5], "NaN and Inf are left out"
    assert contents.scalars("loss/head") == [f"loss/head_{k}" for k in (1, 2, 3)] and contents.restarts == [4]


def test_run_without_events_and_description(tmp_path):
    run = write_run(tmp_path / "old")
    (run / "events.jsonl").unlink()
    (run / "run.json").unlink()
    assert "<h1>old</h1>" in write_report([run], tmp_path / "report").read_text()


def test_several_runs_share_a_page_and_their_names_are_not_formulas(tmp_path, monkeypatch):
    legends, savefig = [], Figure.savefig

    def record_legends(figure, *arguments, **options):
        legends.extend([text.get_text().strip() for text in each.get_texts()] for each in figure.findobj(Legend))
        savefig(figure, *arguments, **options)

    monkeypatch.setattr(Figure, "savefig", record_legends)
    a, b = names = [r"a$\frac$b", "_hidden"]
    runs = [write_run(tmp_path / str(i), heads=1 + 2 * i, config={"run": {"name": names[i]}}) for i in (0, 1)]
    page = write_report(runs, tmp_path / "report").read_text()
    assert legends and all(labels == names for labels in legends)
    for text in (f"<h1>{a} and {b}</h1>", f"Events of {a}<", f"Events of {b}<", f"<th>{a}</th><th>{b}</th>"):
        assert text in page


@pytest.mark.parametrize(
    ("file", "text"),
    [
        *(("run.json", f'{{"config": {config}}}') for config in (3, '{"run": []}', '{"run": {"name": 7}}')),
        ("run.json", "[1]"),
        *(("metrics.jsonl", line) for line in ('{"loss/head_1": 1}\n', "[1]\n", '{"step": "one"}\n')),
        ("events.jsonl", '{"step": 1}\n'),
    ],
)
def test_damaged_file_is_named(tmp_path, file, text):
    run = write_run(tmp_path / "a")
    (run / file).write_text(text)
    with pytest.raises(UserError, match=re.escape(str(run / file))):
        write_report([run], tmp_path / "report")


def test_folder_without_a_run(tmp_path):
    for text, message in (
        (None, r"has no metrics\.jsonl: give a run's folder"),
        ("", r"has no step in its metrics\.jsonl yet"),
        ("not JSON\n", r"metrics\.jsonl, line 1 is not JSON"),
    ):
        if text is not None:
            (tmp_path / "metrics.jsonl").write_text(text)
        with pytest.raises(UserError, match=message):
            read_run(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"cannot write --to = .*file.report' \(.*: Not a directory\)"):
        write_report([write_run(tmp_path / "a")], tmp_path / "file" / "report")
