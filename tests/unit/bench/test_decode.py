"""A small measurement by `bench decode` has all results, and what can be computed is right."""

import json

import pytest
import torch
from typer.testing import CliRunner

from mtp_dist.bench.decode.bounds import bounds
from mtp_dist.bench.decode.measurement import measure_decoding
from mtp_dist.bench.decode.settings import check_memory, read_generated, read_settings
from mtp_dist.bench.decode.subject import generated_subject, trained_subject
from mtp_dist.bench.decode.variants import PassLog, modelled_seconds
from mtp_dist.cli import app
from mtp_dist.cli.tables import bench_decode_tables
from mtp_dist.errors import LaunchError
from mtp_dist.planner.decoding import DecodingCosts, Device
from tests.unit.convert.folders import write_model

SMALL = {"layers": 2, "hidden": 64, "heads": 3, "vocab": 90}
CHAINS = ["plain", "k = 2", "k = 3", "adaptive", "tree", "transformers"]


def settings_of(batch="1", new_tokens=13):
    return read_settings(batch, 8, new_tokens, 1, "cpu", None)


def measured(acceptance, kind="parallel", on_progress=lambda done, total: None, **settings):
    chosen = settings_of(**settings)
    wanted = read_generated({**SMALL, "kind": kind, "acceptance": acceptance})
    result = measure_decoding(generated_subject(wanted, chosen), chosen, on_progress)
    return result, {(row["batch"], row["variant"]): row for row in result["rows"]}


@pytest.mark.parametrize("kind", ["parallel", "sequential"])
def test_generated_model_is_always_right(kind):
    done = []
    result, rows = measured(1.0, kind, lambda *progress: done.append(progress), batch="1,2")
    assert done == sorted(done) and done[-1] == (2.0, 2) and (1.0, 2) in done and len(done) > 20
    prompt_lookup = [(1, "transformers, prompt lookup")]
    assert rows.keys() == {*((batch, name) for batch in (1, 2) for name in CHAINS), *prompt_lookup}
    assert all(row["equal_tokens"] == 1 for row in rows.values()), "transformers writes the same text"
    for batch in (1, 2):
        for k in (2, 3):
            row = rows[batch, f"k = {k}"]
            assert row["acceptance"] == dict.fromkeys(range(2, k + 1), 1.0)
            assert row["passes"] == 1 + 12 / k and row["tokens_per_forward"] == 13 / row["passes"]
            assert row["mean_length"] == k
            (seconds,), (plain_seconds,) = row["seconds_by_round"], rows[batch, "plain"]["seconds_by_round"]
            assert row["speed_up"] == plain_seconds / seconds
            assert row["ratio"] == row["speed_up"] / row["tokens_per_forward"]
            assert row["fraction_of_attainable"] == pytest.approx(row["ratio"] / row["attainable"])
            assert 0 < row["attainable"] < 1
        plain = rows[batch, "plain"]
        assert plain["speed_up"] == plain["tokens_per_forward"] == plain["attainable"] == 1 and plain["passes"] == 13
        assert rows[batch, "tree"]["tokens_per_forward"] >= rows[batch, "k = 3"]["tokens_per_forward"]
    assert result["cache"]["added_share"] == 0.5 == result["cache"]["layer_share"], "2 of 4 layers are draft heads'"
    assert json.loads(json.dumps(result))["machine"]["threads"] == torch.get_num_threads()
    ways, limits = bench_decode_tables(result)
    assert ways.row_count == len(rows) and limits.row_count == len(result["bounds"]) == 6
    numbers = [column.header for column in ways.columns if column.justify == "right"]
    assert numbers == ["batch", "tokens/s", "speed-up", "tokens per pass", "ratio", "attainable"]
    on_a_gpu = bench_decode_tables(result | {"machine": result["machine"] | {"device": "NVIDIA H200"}})
    assert on_a_gpu[0].title.endswith(" on NVIDIA H200"), "threads of the processor would mislead"


def test_generated_model_is_right_as_often_as_wanted():
    _, rows = measured(0.6, new_tokens=80)
    row = rows[1, "k = 3"]
    assert row["equal_tokens"] == 1
    assert all(0.4 < fraction < 0.8 for fraction in row["acceptance"].values())
    _, rows = measured(0.0)
    assert rows[1, "k = 3"]["tokens_per_forward"] == 1 == rows[1, "k = 3"]["equal_tokens"]


def test_passes_of_a_batch():
    """Row 1 ends before the last pass; the log has one length per pass of the batch."""
    log = PassLog()
    for length, rows in ((1, (0, 1)), (3, (0, 1)), (2, (0,)), (2, (0,))):
        for row in rows:
            log.count(length, length - 1, length)
            log.on_tokens(row, [0] * length, length - 1)
    assert log.lengths == [1, 3, 2, 2] and log.forward_passes == 6

    settings, device = settings_of(new_tokens=6), Device(1e6, 1e9)
    costs = DecodingCosts(generated_subject(read_generated(SMALL), settings).config, 2, 4)
    steps = [(3, 8 + 1), (2, 6 / 3), (2, 6 / 3)]  # the first draft of the heads reads the prompt
    expected = costs.prompt(8).seconds(device)
    expected += sum(costs.step(length, 8 + 3, gained).seconds(device) for length, gained in steps)
    assert modelled_seconds(log, costs, device, settings, None) == pytest.approx(expected)
    tree = modelled_seconds(log, costs, device, settings, 16)
    assert tree >= modelled_seconds(log, costs, device, settings, None)


def test_bounds():
    def row(batch, variant, speed_up, fraction=None):
        return {"batch": batch, "variant": variant, "speed_up": speed_up, "fraction_of_attainable": fraction}

    rows = [row(1, "k = 2", 2.0, 0.5), row(1, "k = 4", 2.0, 0.91), row(1, "adaptive", 2.0, 0.89)]
    rows += [row(1, "transformers", 0.8), row(8, "transformers", 1.25), row(32, "transformers", 1.25)]
    rows += [row(32, "k = 4", 0.7, 0.5), row(32, "adaptive", 0.99, 0.5)]
    found = bounds(rows, {"added_share": 0.2, "layer_share": 0.25}, 4)
    assert [(bound["name"], bound["batch"], bound["value"], bound["holds"]) for bound in found] == [
        ("fraction of attainable, k = 4", 1, 0.91, True),
        ("fraction of attainable, adaptive", 1, 0.89, False),
        ("adaptive / plain", 1, 2.0, True),
        ("plain / transformers", 1, 1.25, True),
        ("plain / transformers", 8, 0.8, False),
        ("adaptive / plain", 32, 0.99, False),
        ("cache added by the heads", None, 0.2, True),
    ]


@pytest.mark.parametrize("kind", ["parallel", "linear", "sequential"])
def test_trained_model(tmp_path, kind, monkeypatch):
    """Prompts are real text; no Llama computes linear heads; transformers drafts with the heads of the export."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    write_model(tmp_path / "step_00000007", heads={"count": 3, "kind": kind}, train={"sequence_length": 64})
    settings = settings_of("1,2", 6)
    subject = trained_subject(tmp_path, settings)
    assert len({tuple(prompt) for prompt in subject.prompts(2).tolist()}) == 2
    rows = measure_decoding(subject, settings)["rows"]
    own = CHAINS[:-1] if kind == "linear" else CHAINS
    assert [row["variant"] for row in rows if row["batch"] == 2] == own
    drafting = [*([] if kind == "linear" else ["transformers, prompt lookup"]), "transformers, exported heads"]
    assert [row["variant"] for row in rows if row["batch"] == 1] == [*own, *drafting]
    assert all(row["equal_tokens"] == 1 for row in rows)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--kind", "mlp"], "--kind mlp: only parallel and sequential models are generated"),
        (["--model", "runs/x", "--heads", "4"], "--heads is for generated models"),
        (["--model", "nowhere"], "--model = 'nowhere' does not exist"),
        (["--model", ""], "--model is empty"),
        (["--new-tokens", "100000000", "--layers", "2"], "a generated model and 32 texts of 100,000,064 tokens need "),
        (["--batch", "1,x"], "--batch 1,x is not a list of numbers"),
        (["--hidden", "100"], "--hidden 100 must be a multiple of 64"),
        (["--acceptance", "1.5"], "--acceptance 1.5 is not between 0 and 1"),
        (["--device", "tpu"], "--device tpu is not known"),
        (["--dtype", "fp8"], "--dtype fp8 is not known"),
    ],
)
def test_wrong_option_is_one_message(options, message):
    result = CliRunner().invoke(app, ["bench", "decode", *options])
    assert result.exit_code == 2 and result.stdout == "" and result.stderr.startswith(f"error: {message}")


@pytest.mark.parametrize(
    ("sizes", "batch", "new_tokens"),
    [({}, "1,1000000000", 8), ({}, "1", 2 * 10**9), ({"layers": 10**4, "hidden": 64000}, "1", 8)],
)
def test_sizes_beyond_the_memory_are_refused(sizes, batch, new_tokens):
    settings = settings_of(batch, new_tokens)
    config = read_generated({**SMALL, "hidden": 640, **sizes}).config(settings.positions)
    with pytest.raises(LaunchError, match="GiB, but the device has "):
        check_memory(config, settings)


def test_texts_longer_than_the_positions_are_refused(tmp_path):
    write_model(tmp_path / "step_00000007", train={"sequence_length": 16})
    options = ["--model", str(tmp_path), "--prompt-tokens", "8", "--new-tokens", "9"]
    result = CliRunner().invoke(app, ["bench", "decode", *options])
    assert result.exit_code == 2 and "exceed the 16 tokens" in result.stderr


def test_standard_output_is_the_result():
    sizes = [f"--{name}={value}" for name, value in SMALL.items()]
    result = CliRunner().invoke(app, ["bench", "decode", *sizes, "--batch=1", "--new-tokens=4", "--rounds=1", "--json"])
    assert json.loads(result.stdout)["model"]["layers"] == 2, result.output
