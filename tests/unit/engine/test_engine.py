"""The sharded model has the same initial weights at every layout, and a head without targets does no harm."""

import pytest
import torch
from torch import Tensor

from mtp_dist.config import Config
from mtp_dist.engine.tensor_shards import full_tensors, master_weight
from mtp_dist.loss.schedule import head_schedule
from mtp_dist.metrics import HeadMetrics
from mtp_dist.model.parameters import initial_weight, named_weights, parameter_shapes
from mtp_dist.model.targets import IGNORE_INDEX
from mtp_dist.verify.reference_training import local_batch, random_batch
from tests.engines import open_engine, take_step
from tests.parity.comparison import parse_case
from tests.ranks import Ranks

SILENT_HEAD = 2
"""Head without a valid target."""


def initial_weights(config: Config) -> dict[str, Tensor]:
    """On each rank: return the optimizer's weights of the stage; the model's must be the same in its precision."""
    engine = open_engine(config)
    for name, weight in named_weights(engine.stage):  # a tied replica too
        assert torch.equal(weight, master_weight(weight).to(weight.dtype)), name
    return dict(full_tensors(engine.stage, parameter_shapes(config), engine.topology, master_weight))


@pytest.mark.parametrize(
    "case",
    [
        *(
            f"{layout} model.tie_embeddings={tied}"
            for layout in ("tp1-pp1-dp1", "tp4-pp1-dp1-sp", "tp2-pp2-dp1-sp", "tp1-pp4-dp1", "tp1-pp2-dp2")
            for tied in ("false", "true")
        ),
        "tp1-pp2-dp2 model.tie_embeddings=true parallel.zero_stage=1",
        "tp1-pp1-dp1 train.precision=bf16",
        *(
            f"{layout} model.tie_embeddings=true train.precision=bf16"
            for layout in ("tp2-pp2-dp1-sp", "tp1-pp1-dp4 micro_batches=1", "tp1-pp2-dp2")
        ),
    ],
)
def test_initial_weights_are_the_same_in_every_precision(ranks: Ranks, case: str) -> None:
    layout, config = parse_case(f"{case} model.num_query_groups=4")
    by_rank = ranks.run(layout.world_size, initial_weights, config)
    shapes = parameter_shapes(config)
    expected = {name: initial_weight(config, name, shape) for name, shape in shapes.items()}
    replicas = layout.tensor * layout.data
    stages = [by_rank[first : first + replicas] for first in range(0, len(by_rank), replicas)]
    assert sorted(name for stage in stages for name in stage[0]) == sorted(shapes), "each weight on exactly one stage"
    for stage in stages:
        for weights in stage:
            assert weights.keys() == stage[0].keys()
            for name, weight in weights.items():
                assert torch.equal(weight, expected[name]), name


def train_with_silent_head(config: Config) -> tuple[list[HeadMetrics], list[float], dict[str, Tensor]]:
    """On each rank: return metrics of three steps and an evaluation, the gradient norms and the stage's weights."""
    engine, schedule = open_engine(config), head_schedule(config, 1)
    tokens, targets = random_batch(config)
    targets[SILENT_HEAD - 1] = IGNORE_INDEX
    # One micro-batch of head 1 is empty too, although the head is not.
    targets[0, : config.train.micro_batch_size] = IGNORE_INDEX
    batch = local_batch(config, engine.topology, tokens, targets)
    results = [engine.train_step(batch, step, 1e-3, schedule) for step in (1, 2, 3)]
    assert torch.as_tensor(engine.pipeline.agg_train_loss).isfinite(), "DeepSpeed's loss"
    metrics = [*(result.heads for result in results), engine.evaluate(batch, schedule)]
    full = full_tensors(engine.stage, parameter_shapes(config), engine.topology, master_weight)
    weights = {name: weight.clone() for name, weight in full}
    return metrics, [result.grad_norm for result in results], weights


@pytest.mark.parametrize("case", ["tp1-pp1-dp1", "tp2-pp2-dp1", "tp1-pp2-dp2 micro_batches=2 train.precision=bf16"])
def test_head_without_a_valid_target(ranks: Ranks, case: str) -> None:
    layout, config = parse_case(f"{case} heads.count=3")
    for metrics, norms, weights in ranks.run(layout.world_size, train_with_silent_head, config):
        for heads in metrics:
            assert heads.losses[SILENT_HEAD - 1] is heads.accuracies[SILENT_HEAD - 1] is None
            assert heads.distillation == () and heads.token_order is None, "not configured"
            assert all(0 < heads.losses[head] < 10 for head in (0, 2))
        assert all(0 < norm < float("inf") for norm in norms)
        totals = [heads.total for heads in metrics]
        assert totals == sorted(totals, reverse=True), "the others learn"
        assert all(weight.isfinite().all() for weight in weights.values())
        for name, weight in weights.items():
            if name.startswith(f"heads.{SILENT_HEAD}."):
                start = initial_weight(config, name, weight.shape)
                # Without a gradient AdamW only decays.
                decay = 1.0 if weight.ndim == 1 else (1 - 1e-3 * config.optimizer.weight_decay) ** 3
                rtol = 1e-5 if config.train.precision == "fp32" else 1e-2
                torch.testing.assert_close(weight, start * decay, rtol=rtol, atol=1e-7)


def stop_signals(config: Config, signals: list[int]) -> int:
    """On each rank: return the signal after a step in which each rank has received its own."""
    engine = open_engine(config)
    batch = local_batch(config, engine.topology, *random_batch(config))
    result = engine.train_step(batch, 1, 1e-3, head_schedule(config, 1), lambda: signals[engine.topology.rank])
    assert take_step(engine).stop_signal == 0
    return result.stop_signal


@pytest.mark.parametrize(("signals", "expected"), [([0, 0], 0), ([0, 15], 15), ([15, 2], 2), ([10, 10], 10)])
def test_one_stop_signal_reaches_all_ranks(ranks: Ranks, signals: list[int], expected: int) -> None:
    _, config = parse_case("tp1-pp2-dp1")
    assert ranks.run(2, stop_signals, config, signals) == [expected] * 2


def timers_after_steps(config: Config) -> list[int]:
    """On each rank: return the measurements that DeepSpeed's timers hold after each of four steps."""
    engine, held = open_engine(config), []
    for _ in range(4):
        take_step(engine)
        held.append(sum(len(timer.event_timers) for timer in engine.pipeline.timers.get_timers().values()))
    return held


def test_measurements_of_deepspeed_do_not_accumulate(ranks: Ranks) -> None:
    """On a GPU each one keeps two CUDA events."""
    assert ranks.run(1, timers_after_steps, parse_case("tp1-pp1-dp1")[1]) == [[0] * 4]
