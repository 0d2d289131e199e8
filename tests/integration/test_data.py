"""The real programs from text to a trained model: prepared corpora, several validation sets, streams, kills."""

import json

from tests.integration import jobs
from tests.unit.data.conftest import train_byte_pairs
from tests.unit.data.preparing import write_jsonl

MTP_DIST = ("-m", "mtp_dist.cli")


def test_text_becomes_a_trained_model(tmp_path):
    """Two prepared corpora blended, two validation sets, attention and losses within documents."""
    tokenizer = tmp_path / "tokenizer.json"
    train_byte_pairs().save(str(tokenizer))
    for name, functions in (("one", 60), ("two", 200)):
        folder = jobs.write_corpus(tmp_path / name, functions=functions)
        options = ["--to", f"{folder}_corpus", "--tokenizer", str(tokenizer), "--workers", "1", "--json"]
        prepare = jobs.forked(*MTP_DIST, "prepare", str(folder), "--glob", "*.py", *options)
        counts = json.loads(jobs.run(prepare, status=0).stdout)
        assert counts["bytes"] == sum(file.stat().st_size for file in folder.glob("*.py"))
        assert counts["tokens"] < counts["bytes"] / 1.5
    again = jobs.run(prepare, status=2)
    assert again.stdout == ""
    assert again.stderr == f"error: {tmp_path / 'two_corpus.bin'} exists: delete it, or choose another --to\n"
    assert sorted(file.suffix for file in tmp_path.glob("two_corpus*")) == [".bin", ".idx", ".json"]

    inspect = jobs.forked(*MTP_DIST, "inspect", str(tmp_path / "one_corpus"), "--json", "--heads", "2")
    report = json.loads(jobs.run(inspect).stdout)
    sample = report["samples"][0]
    assert report["documents"] == 3 and sample["tokens"][2:] == sample["targets"][1][:-2]

    data = {
        "tokenizer": str(tokenizer),
        "train": [{"path": str(tmp_path / f"{name}_corpus"), "name": name, "weight": 3.0} for name in ("one", "two")],
        "validation": [{"path": str(tmp_path / f"{name}_corpus"), "name": name} for name in ("one", "two")],
        "loss_across_documents": False,
        "attention_across_documents": False,
    }
    config = jobs.write_config(tmp_path, data=data)
    result = jobs.run(jobs.forked(jobs.PRETRAIN, "--config", str(config), "parallel.pipeline=2", processes=2), status=0)
    assert "Validation on one" in result.stdout and "Validation on two" in result.stdout
    last = {name: value for line in jobs.metrics(tmp_path / "out") for name, value in line.items()}
    for name in ("one", "two"):
        nats, bits = (last[f"validation/{name}/{kind}/head_1"] for kind in ("loss", "bits_per_byte"))
        assert 1 < nats / bits < 6, "several bytes per token"
        assert last[f"data/epochs/{name}"] > 0
    assert last["data/epochs/one"] > last["data/epochs/two"], "the smaller corpus is read more often"
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert [validation["name"] for validation in summary["validation"]] == ["one", "two"]


def learned(folder):
    lines = [line for line in jobs.metrics(folder) if "train/grad_norm" in line]
    return [[line["train/grad_norm"], *(line[f"loss/head_{k}"] for k in range(1, 5))] for line in lines]


def test_killed_stream_resumes_at_another_degree(tmp_path):
    """With four shards, of which each of two ranks reads two."""
    documents = [f"def f{i}(x):\n    return {'x + ' * (i % 9)}{i}\n" * (i % 5) for i in range(200)]
    (tmp_path / "documents").mkdir()
    for part in range(4):
        write_jsonl(tmp_path / "documents" / f"{part}.jsonl", documents[part::4])
    source = {"path": str(tmp_path / "documents"), "glob": "*.jsonl", "stream": True}
    data = {"train": [source], "validation": [], "stream_shards": 4}
    train = {"steps": 10, "validate_every": None}
    config = jobs.write_config(tmp_path, data=data, checkpoint={"every": 2}, train=train)
    command = [jobs.PRETRAIN, "--config", str(config)]
    jobs.run(jobs.forked(*command, f"run.output_dir={tmp_path / 'whole'}"), status=0)
    with jobs.started(jobs.forked(*command, processes=2), tmp_path) as job:  # data-parallel
        job.wait_until((tmp_path / "out" / "checkpoints" / "step_00000002").exists)
        job.rank(1).kill()
        assert job.wait() != 0
    assert "Resuming from step" in jobs.run(jobs.forked(*command), status=0).output
    whole, killed = learned(tmp_path / "whole"), learned(tmp_path / "out")
    assert len(whole) == len(killed) == 10
    for expected, found in zip(whole, killed, strict=True):
        assert all(abs(a - b) <= 1e-4 * a for a, b in zip(expected, found, strict=True))
    assert max(losses[1] for losses in whole) - min(losses[1] for losses in whole) > 0.05, "batches tell steps apart"
