"""Memory and FLOPs of a stage, compared with what real engines allocate and compute."""

import json
from pathlib import Path

import pytest

from mtp_dist.bench.plan import case_config, measure_case, row_of
from mtp_dist.bench.plan_cases import BASE, CASES, merge_sections
from mtp_dist.cli.bench_plan_tables import bench_plan_tables
from mtp_dist.config import build_config, resolve
from mtp_dist.distributed.device import select_device
from mtp_dist.planner.fit import fit
from mtp_dist.planner.memory import rank_memory
from mtp_dist.planner.stage_cost import stage_cost
from mtp_dist.planner.weights import Weight, stage_weights
from tests.tiny import tiny_config

DATA = Path(__file__).parents[3] / "docs/data"
COMMITTED = json.loads((DATA / "plan/memory.json").read_text(encoding="utf-8"))["memory"]
MEASURED = {
    1: [
        "chunks of 64 tokens",
        "sequential",
        "blocks of Qwen2, fp32",
        "blocks of GPT-NeoX",
        "window of 32 positions, fp32",
    ],
    2: [
        "tensor 2, sequence",
        "pipeline 2, tied, fp32",
        "data 2, ZeRO 1, fp32",
        "pipeline 2, DualPipeV, fp32",
        "blocks of Qwen3, tensor 2, sequence",
    ],
}
"""Cases that are measured here, by number of ranks."""


def assert_predicted(row):
    where = row["case"], row["rank"], row["predicted"], row["measured"]
    assert row["error"] < 0.1, where
    for exact in ("parameters", "gradients", "accumulators", "optimizer", "communication"):
        # Buffers of a few bytes, and the steps of Adam, are not in the prediction.
        assert row["predicted"][exact] == pytest.approx(row["measured"][exact], rel=0.005, abs=100), (exact, where)
    assert row["predicted_flops"] == pytest.approx(row["measured_flops"], rel=0.001), where


@pytest.mark.parametrize("row", COMMITTED, ids=lambda row: f"{row['case']}, {row['rank']}")
def test_predictions_equal_committed_measurements(row):
    """Those of `mtp-dist bench plan`, which takes minutes."""
    config, measured = (
        case_config(row["case"]),
        {component: row["measured"][component] for component in row["measured"]},
    )
    assert_predicted(row_of(row["case"], config, row["rank"], measured, row["measured_flops"], row["resident"]))


def test_all_cases_are_committed():
    assert {row["case"] for row in COMMITTED} == set(CASES) and len(CASES) >= 20
    assert [table.row_count for table in bench_plan_tables({"memory": COMMITTED})] == [len(COMMITTED)]


def measure(names):
    """Return the rows of some cases, on a rank."""
    from mtp_dist.distributed.topology import close_axes, initialize_topology

    rows = []
    for name in names:
        config = case_config(name)
        rows += measure_case(name, config, initialize_topology(config, select_device(config)))
        close_axes()
    return rows


@pytest.mark.parametrize("world_size", MEASURED)
def test_predictions_equal_measurements(ranks, world_size):
    for row in ranks.run(world_size, measure, MEASURED[world_size])[0]:
        assert_predicted(row)


@pytest.mark.parametrize("run", sorted(DATA.glob("gpu/*.json")), ids=lambda run: run.stem)
def test_peaks_of_trainings_on_gpus(run):
    config = build_config(json.loads(run.read_text(encoding="utf-8"))["config"])
    steps = map(json.loads, run.with_suffix(".jsonl").read_text(encoding="utf-8").splitlines())
    measured = max(step.get("memory/peak_bytes", 0) for step in steps)
    assert fit(resolve(config, config.vocab_size, 1)).binding.memory.total == pytest.approx(measured, rel=0.01)


def test_zero_1_reduces_fp32_gradients_in_buckets(monkeypatch):
    config = tiny_config(4, parallel={"zero_stage": 1}, model={"vocab_size": 128})
    one = rank_memory(config, 0, 4, 1)
    assert one.communication == one.gradients and one.update == 2 * one.gradients
    monkeypatch.setattr("mtp_dist.planner.memory.LARGEST_REDUCE_BUCKET", 10_000)
    several = rank_memory(config, 0, 4, 1)
    assert several.communication == 40_000
    # A quarter of the gradients is copied, and the rest of the matrices at both ends of the partition.
    largest = 4 * max(weight.elements for weight in stage_weights(config, 0, 4))
    assert 0 < several.update - 2 * 40_000 - one.gradients / 4 < 2 * largest


def test_stages_and_ranks_share_the_work():
    """The heads' loss and the layers are divided over the tensor-parallel ranks, and the layers over the stages."""

    def flops(tensor, layers):
        config = tiny_config(parallel={"tensor": tensor, "pipeline": len(layers)}, model={"vocab_size": 128})
        costs = [stage_cost(config, stage, count) for stage, count in enumerate(layers)]
        return sum(cost.forward_flops + cost.backward_flops for cost in costs)

    assert flops(2, [4]) == flops(1, [4]) / 2
    assert flops(1, [3, 1]) == flops(1, [4])


def test_traffic_by_hand():
    """D = 32, 2 x 16 tokens in fp32: hidden states of 4096 bytes."""

    def cost(stage=0, layers=1, world_size=None, **sections):
        config = tiny_config(world_size, model={"vocab_size": 128}, heads={"count": 1}, **sections)
        return config, stage_cost(config, stage, layers)

    _, alone = cost()
    assert alone.forward_tensor_bytes == alone.backward_tensor_bytes == alone.data_bytes == 0
    assert alone.next_stage_bytes == alone.previous_stage_bytes == 0
    for sequence in (False, True):
        parallel = {"tensor": 2, "pipeline": 2, "sequence": sequence, "partition": [3, 1]}
        _, first = cost(0, 3, parallel=parallel)
        # Two all-reduces per layer and one of the embedding, of which a rank of two sends one tensor.
        assert first.forward_tensor_bytes == (3 * 2 + (0.5 if sequence else 1)) * 4096
        assert first.backward_tensor_bytes == (3 * 3 + 0.5 if sequence else 3 * 2) * 4096
        assert (first.next_stage_bytes, first.previous_stage_bytes) == (4096 // (1 + sequence), 0)
        _, last = cost(1, 1, parallel=parallel)
        assert (last.next_stage_bytes, last.previous_stage_bytes) == (0, 4096 // (1 + sequence))
    config, two = cost(0, 4, world_size=2)
    elements = rank_memory(config, 0, 4, 1).parameters / 4
    assert two.data_bytes == 4 * elements
    _, sharded = cost(0, 4, world_size=2, parallel={"zero_stage": 1})
    assert sharded.data_bytes == 6 * elements
    for schedule, exchanged in (("1f1b", 1), ("dualpipev", 0)):
        model = {"vocab_size": 128, "tie_embeddings": True}
        config = tiny_config(model=model, parallel={"pipeline": 2, "schedule": schedule})
        data = sum(stage_cost(config, stage, 1).data_bytes for stage in (0, config.parallel.stages - 1))
        assert data == exchanged * 2 * 4 * 128 * 32, "one rank of dualpipev has the embedding for both"
    _, rounded = cost(0, 4, 2, train={"precision": "bf16"}, parallel={"grad_reduce_dtype": "bf16"})
    assert rounded.data_bytes == 3 * elements


def test_first_stage_without_layers_has_the_weights_of_hidden_states():
    config = tiny_config(heads={"weighted_hidden_states": True}, parallel={"pipeline": 2})
    logits = [Weight((5,), "heads", is_trained=True)]
    for stage, layers in ((0, 0), (0, 1), (1, 4)):
        assert [each for each in stage_weights(config, stage, layers) if each.shape == (5,)] == logits


@pytest.mark.parametrize(("precision", "measured"), [("bf16", [1.13, 5.28]), ("fp32", [2.24, 5.24])])
def test_stages_of_a_frozen_trunk_keep_two_micro_batches(precision, measured):
    """MB that the tracker of `mtp-dist bench plan` counts on two stages of its frozen trunk."""
    sections = merge_sections(BASE, CASES["frozen trunk"][1])
    sections = sections | {"parallel": {"pipeline": 2}, "train": sections["train"] | {"precision": precision}}
    config = build_config(sections)
    totals = [rank.memory.total for rank in fit(resolve(config, config.vocab_size, 2), "cpu").ranks]
    assert [total / 1e6 for total in totals] == pytest.approx(measured, rel=0.03)


def test_micro_batches_in_flight_multiply_the_activations():
    config = tiny_config(parallel={"pipeline": 4}, train={"global_batch_size": 16, "sequence_length": 128})
    one, four = (rank_memory(config, 0, 1, in_flight) for in_flight in (1, 4))
    assert four.activations == 4 * one.activations
    assert four.total - one.total == 3 * one.activations
    assert rank_memory(config, 3, 1, 1).head_loss > 0 == one.head_loss


def test_the_first_backward_pass_makes_the_gradients():
    """With as many micro-batches as are in flight, a micro-batch is gone when the gradients are there."""
    config, longer = (tiny_config(parallel={"pipeline": 4}, train={"global_batch_size": 2 * n}) for n in (4, 5))
    memory = rank_memory(config, 0, 1, 4)
    spared = min(memory.activations // 4, memory.gradients)
    assert rank_memory(longer, 0, 1, 4).total - memory.total == spared
