"""`parallel.partition: measured`."""

import logging

import pytest

from mtp_dist.config import Config
from tests.parity.comparison import parse_case
from tests.ranks import Ranks


def measure(config: Config, fake: bool) -> tuple[list[tuple[float, ...]], tuple[int, ...], list[str]]:
    """Return the measured parts, the trunk layers of each stage and the log. fake: rank r's times are about r + 1."""
    from mtp_dist.distributed.device import select_device
    from mtp_dist.distributed.topology import initialize_topology
    from mtp_dist.engine import measured_partition

    patch, logged = pytest.MonkeyPatch(), []
    handler = logging.Handler()
    handler.emit = lambda record: logged.append(record.getMessage())
    measured_partition.logger.addHandler(handler)
    topology = initialize_topology(config, select_device(config))
    with patch.context() as context:
        context.setattr(measured_partition, "SECONDS", 0.0)
        context.setattr(measured_partition.logger, "level", logging.INFO)
        if fake:
            times = [value * (topology.rank + 1) for value in (0.5, 0.5, 1, 2, 5, 4)]
            context.setattr(measured_partition.PartPasses, "measure", lambda self: times)
        parts = measured_partition.measure_parts(config, topology)
        measured = measured_partition.with_measured_partition(config, topology)
    measured_partition.logger.removeHandler(handler)
    return [tuple(each) for each in (parts.embedding, parts.layer, parts.heads)], measured.parallel.partition, logged


MEASURED = "parallel.partition=measured"


def test_all_ranks_split_by_the_median_of_their_times(ranks: Ranks) -> None:
    layout, config = parse_case(f"tp1-pp3-dp1 model.trunk_layers=8 {MEASURED}")
    for parts, partition, logged in ranks.run(layout.world_size, measure, config, True):
        assert parts == [(1, 1), (2, 4), (10, 8)], "those of rank 1"
        assert partition == (3, 4, 1), "in units of a layer 3.3, 4 and 4; by FLOPs 4, 4 and 0"
        assert logged == [
            "Measured per micro-batch: embedding 2000.0 ms, trunk layer 6000.0 ms, heads 18000.0 ms; "
            "trunk layers per stage [3, 4, 1]"
        ]


@pytest.mark.parametrize(
    "case",
    [
        "tp2-pp2-dp1-sp heads.kind=sequential train.precision=bf16 data.attention_across_documents=false",
        "tp1-pp2-dp1 heads.weighted_hidden_states=true heads.token_order=0.5 train.activation_checkpointing=full",
        "tp1-pp2-dp1 train.freeze=[trunk] model.tie_embeddings=true heads.loss_mode=naive",
    ],
)
def test_all_ranks_measure_passes_of_every_part(ranks: Ranks, case: str) -> None:
    layout, config = parse_case(f"{case} {MEASURED}")
    answers = ranks.run(layout.world_size, measure, config, False)
    assert len({partition for _, partition, _ in answers}) == 1 and sum(answers[0][1]) == 4
    assert all(parts == answers[0][0] and min(map(min, parts)) > 0 for parts, _, _ in answers)
