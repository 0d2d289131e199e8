"""Search of the fastest layouts, and proposals for pipelines that cannot be balanced."""

import itertools
import re
import shlex
from unittest.mock import patch

import pytest

from mtp_dist.config import build_config, resolve, with_device_memory
from mtp_dist.errors import ConfigError
from mtp_dist.planner import search as search_module
from mtp_dist.planner.advice import balance_advice
from mtp_dist.planner.estimate import estimate
from mtp_dist.planner.fit import fit
from mtp_dist.planner.layouts import SCHEDULES, layout, overrides, stays_within_nodes, with_layout
from mtp_dist.planner.search import search
from mtp_dist.planner.stage_times import axis_rates
from tests.unit.planner.models import SHAPE_7B, SHAPE_70B, cluster, on_ranks, unresolved


def all_steps(config, world_size, hardware):
    """Yield every layout in powers of two that fits, with its full time."""
    powers = (1, 2, 4, 8)
    for tensor, pipeline, schedule, sequence, checkpointing, micro_batch in itertools.product(
        powers, powers, SCHEDULES, (False, True), ("none", "selective", "full"), powers
    ):
        changes = {"parallel.tensor": tensor, "parallel.pipeline": pipeline, "parallel.schedule": schedule}
        changes |= {"parallel.sequence": sequence, "train.activation_checkpointing": checkpointing}
        candidate = with_layout(config, changes | {"train.micro_batch_size": micro_batch}, world_size)
        if candidate is None:
            continue
        needed = fit(with_device_memory(candidate, hardware.memory))
        if needed.binding.memory.total <= hardware.usable_bytes:
            yield estimate(needed, hardware)


@pytest.mark.parametrize("batch", [16, 64])
def test_fastest_of_all_layouts_is_found(batch):
    config, hardware = unresolved(batch=batch), cluster("a100-40gb")
    found = search(config, hardware, 8)
    times = sorted(step.seconds for step in all_steps(config, 8, hardware))
    assert found.fastest[0].seconds == pytest.approx(times[0], rel=1e-9)
    seconds = [step.seconds for step in found.fastest]
    assert seconds == sorted(seconds) and 1 < len(seconds) <= 5


def test_search_over_1024_gpus_counts_few_layouts_and_its_layouts_are_valid():
    config, hardware = unresolved(SHAPE_70B, vocab_size=128_256, batch=2048), cluster()
    with (
        patch.object(search_module, "fit", wraps=fit) as fits,
        patch.object(search_module, "estimate", wraps=estimate) as estimates,
    ):
        found = search(config, hardware, 1024)
    assert fits.call_count <= 700 and estimates.call_count <= 500, "each takes milliseconds"
    degrees = [(step.fit.config.parallel.tensor, step.fit.config.parallel.pipeline) for step in found.fastest]
    assert len(degrees) == 5 and found.fitting > 100
    for step in found.fastest:
        values = config.model_dump(mode="json")
        for key, value in layout(step.fit.config).items():
            section, name = key.split(".")
            values[section][name] = value
        pasted = with_device_memory(resolve(build_config(values), config.vocab_size, 1024), hardware.memory)
        assert fit(pasted).binding.memory.total == step.fit.binding.memory.total <= 72e9
        assert pasted.parallel.tensor <= 8, "within a node"


def test_search_splits_heads_that_one_stage_cannot_balance():
    """By layouts of one pipeline degree: with a vocabulary of 256k tokens the heads cost more than a stage."""
    config, hardware = unresolved(vocab_size=262_144, batch=256, heads={"loss_mode": "recompute"}), cluster()
    found = {
        (parallel.tensor, parallel.pipeline): step
        for step in reversed(search(config, hardware, 64, count=100).fastest)
        if (parallel := step.fit.config.parallel).schedule == "1f1b"
    }
    split = {degrees: step for degrees, step in found.items() if step.fit.config.heads.stages > 1}
    assert split and all(degrees[1] >= 4 for degrees in split)
    for step in split.values():
        together = with_layout(step.fit.config, {"heads.stages": 1})
        assert estimate(fit(together), hardware).seconds > step.seconds
        assert step.fit.binding.memory.total <= hardware.usable_bytes and step.fit.config.heads.stages <= 4
    given = on_ranks(config, 64, pipeline=4)
    given = given.model_copy(update={"heads": given.heads.model_copy(update={"stages": 2})})
    fastest = [search(each, hardware, 64).fastest[0].seconds for each in (config, given)]
    assert fastest[0] == fastest[1], "the search is not bound to the configuration's number"


def test_search_in_fp32_can_shard_the_optimizer():
    found = search(unresolved(precision="fp32", batch=16), cluster(precision="fp32"), 16, count=100)
    assert {step.fit.config.parallel.zero_stage for step in found.fastest} == {0, 1}


def test_search_without_a_result_names_the_reason():
    with pytest.raises(ConfigError, match=r"no layout divides --gpus = 37: .*global_batch_size = 1024"):
        search(unresolved(), cluster(), 37)
    with pytest.raises(ConfigError, match=r"no layout of --gpus = 1 fits 90% of 80 GB .* GB are .*: use more GPUs"):
        search(unresolved(SHAPE_70B), cluster(), 1)


def test_tensor_parallel_groups_stay_in_nodes(monkeypatch):
    monkeypatch.setattr("mtp_dist.planner.search.SIMULATED", 100)
    model = SHAPE_7B | {"num_attention_heads": 24, "hidden_size": 4032, "ffn_hidden_size": 12288}
    config, nodes = unresolved(model, vocab_size=32_256, batch=96), cluster()
    found = search(config, nodes, 24, count=100)
    assert {step.fit.config.parallel.tensor for step in found.fastest} <= {1, 2, 4, 8}
    rates = [axis_rates(on_ranks(config, ranks, tensor=3), nodes).tensor for ranks in (6, 24)]
    assert rates == [nodes.rates.link, nodes.rates.network]
    assert stays_within_nodes(3, 6, 8) and not stays_within_nodes(3, 9, 8)


def test_overrides_are_words_of_a_shell():
    changes = {"parallel.partition": (7, 9, 9, 3), "parallel.sequence": True, "parallel.schedule": "1f1b"}
    words = shlex.split(overrides(changes))
    assert words == ["parallel.partition=[7,9,9,3]", "parallel.sequence=true", "parallel.schedule=1f1b"]
    assert overrides(changes).startswith("'parallel.partition=[7,9,9,3]' ")


def test_advice_for_pipelines_that_heads_unbalance():
    hardware = cluster()

    def advice(**layout):
        return balance_advice(estimate(fit(on_ranks(unresolved(vocab_size=128_256), 64, **layout)), hardware))

    assert advice(pipeline=2) is None
    text = advice(pipeline=16)
    assert "no split of 28 layers and 4 heads" in text
    assert "parallel.pipeline=2" in text and "parallel.tensor=8" in text
    assert re.match(r"the 16 pipeline ranks can work at most \d+% of the time, rank 15 has the most work, and no", text)
    for partition in ("uniform", [6, 8, 8, 6]):
        text = advice(pipeline=4, partition=partition)
        assert "parallel.partition=balanced (" in text and "parallel.pipeline=2 parallel.partition" not in text
        assert "parallel.partition=balanced parallel.pipeline=2 " in text and "schedule=1f1b" not in text
