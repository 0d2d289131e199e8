"""The real program measures its ranks before the first step, and traces some steps."""

import gzip
import json
import re

from tests.integration import jobs


def test_preflight_and_traces_of_two_ranks(tmp_path):
    config = jobs.write_config(tmp_path, train={"steps": 4, "precision": "bf16"}, log={"profile_ranks": [0, 1]})
    arguments = ["--config", str(config), "--preflight", "parallel.pipeline=2", "log.profile_steps=[2,3]"]
    result = jobs.run(jobs.forked(jobs.PRETRAIN, *arguments, processes=2), status=0)
    out = tmp_path / "out"

    measured = json.loads((out / "preflight.json").read_text())
    first, second = measured["ranks"]
    assert (first["rank"], second["rank"]) == (0, 1) and first["host"] == second["host"]
    assert set(first["values"]) == {"matmul", "to the next stage"} and set(second["values"]) == {"matmul"}
    assert all(value > 0 for rank in (first, second) for value in rank["values"].values())
    assert re.search(r"│ +1 +│", result.stdout) and "matmul TFLOP/s" in re.sub(r"[\s│┃]+", " ", result.stdout)

    files = [out / "profile" / f"rank_0000{rank}_steps_2-3.json.gz" for rank in (0, 1)]
    assert sorted((out / "profile").iterdir()) == files
    for rank, file in enumerate(files):
        with gzip.open(file, "rt") as stream:
            names = [event["name"] for event in json.load(stream)["traceEvents"]]
        assert names.count("training step") == 2
        heads = {name for name in names if name.startswith("head ")}
        labels = {f"head {k}: {pass_}" for k in (1, 2, 3, 4) for pass_ in ("forward, loss", "backward")}
        assert heads == (labels if rank == 1 else set()), "the heads are on the last stage"
        assert str(file) in result.stdout

    events = [json.loads(line) for line in (out / "events.jsonl").read_text().splitlines()]
    notes = [event["text"] for event in events if event["kind"] == "note"]
    assert any(note.startswith("preflight: ") for note in notes) and events[0]["kind"] == "start"
    assert f"profile of rank 0, steps 2-3: {files[0]}" in notes
