"""Ranks that the preflight reports as slow, and that every rank measures."""

import io
import json
from unittest.mock import Mock

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from mtp_dist.distributed.device import select_device
from mtp_dist.distributed.topology import initialize_topology, new_gloo_groups
from mtp_dist.verify import preflight
from mtp_dist.verify.preflight import ROWS_SHOWN, SLOW, RankReport, find_slow, print_reports, write_reports
from tests.tiny import tiny_config

ALL_REDUCE = "all-reduce, data"
LINK = "to the next stage"
SLOWED = 2


def report(rank, matmul=100.0, host="node-0", **others):
    """Return a rank's report; others: kind, ranks that take part and value of more measurements."""
    measured = [("matmul", [rank], matmul), *others.values()]
    values, groups = {kind: value for kind, _, value in measured}, {kind: ranks for kind, ranks, _ in measured}
    return RankReport(rank, host, "GPU", values, groups)


@given(st.lists(st.floats(0.81, 1.0), min_size=1, max_size=40), st.data())
def test_slow_rank_is_the_only_one_reported(rates, data):
    reports = [report(rank, rate) for rank, rate in enumerate(rates)]
    assert find_slow(reports) == [], "the median of these is at most 1, and all are above 0.8"
    slow = data.draw(st.integers(0, len(rates) - 1))
    if len(rates) >= 3:  # of two ranks the median is their mean
        reports[slow] = report(slow, 0.5, "node-7")
        [found] = find_slow(reports)
        assert (found.kind, found.ranks, found.hosts, found.value) == ("matmul", [slow], ["node-7"], 0.5)
        assert found.value < SLOW * found.median
        assert f"rank {slow} (node-7): matmul 0.5 TFLOP/s" in str(found)


def test_slow_group_is_reported_once_by_its_slowest_member():
    reports = [
        report(rank, host=f"node-{rank // 4}", one=(ALL_REDUCE, group, {1: 60.0, 3: 20.0}.get(rank, 50.0)))
        for group in ([0, 2], [1, 3], [4, 6], [5, 7])
        for rank in group
    ]
    [found] = find_slow(reports)
    assert (found.kind, found.ranks, found.hosts, found.value) == (ALL_REDUCE, [1, 3], ["node-0"], 20.0)
    assert str(found) == "preflight: ranks 1, 3 (node-0): all-reduce, data 20 GB/s, 40% of the median 50"


@pytest.mark.parametrize(("hosts", "slow"), [("0011", []), ("0123", [([1, 2], ["node-1", "node-2"])])])
def test_links_between_machines_are_compared_with_each_other(hosts, slow):
    """With two machines the only link between them has no peer."""
    names, links = [f"node-{host}" for host in hosts], enumerate((200.0, 20.0, 190.0))
    reports = [report(rank, host=names[rank], one=(LINK, [rank, rank + 1], rate)) for rank, rate in links]
    found = find_slow([*reports, report(3, host=names[3])])
    assert [(each.ranks, each.hosts) for each in found] == slow


@pytest.mark.parametrize("number", [ROWS_SHOWN, ROWS_SHOWN + 1])
def test_table_of_many_ranks_is_a_summary_and_the_slow_ones(number, tmp_path):
    reports = [report(rank, 50.0 if rank == 7 else 100.0) for rank in range(number)]
    output = io.StringIO()
    print_reports(reports, find_slow(reports), Console(file=output, width=120))
    first_cells = [line.split("│")[1].strip() for line in output.getvalue().splitlines() if "│" in line]
    everybody = [str(rank) for rank in range(number)]
    assert first_cells == (everybody if number == ROWS_SHOWN else ["smallest", "median", "largest", "7"])
    write_reports(tmp_path / "preflight.json", reports, find_slow(reports))
    written = json.loads((tmp_path / "preflight.json").read_text())
    assert len(written["ranks"]) == number and [found["ranks"] for found in written["slow"]] == [[7]]


def run_preflight(config):
    """On each rank: return the log messages of a preflight in which SLOWED has a slow matmul.

    The rates of matmuls are made up: on a busy machine any rank may be slow.
    """
    topology = initialize_topology(config, select_device(config))
    logger, measured = Mock(), preflight.matmul_rate

    def matmul_rate(*arguments):
        assert measured(*arguments) > 0
        return 4.0 if topology.rank == SLOWED else 10.0

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(preflight, "matmul_rate", matmul_rate)
        patch.setattr(preflight, "logger", logger)
        preflight.run_preflight(config, topology, new_gloo_groups(topology).all)
    return [template % value for template, value in (call.args for call in logger.info.call_args_list)]


def test_every_rank_measures_and_rank_0_logs_the_slow_one(ranks, tmp_path):
    run, parallel = {"output_dir": str(tmp_path)}, {"tensor": 2, "pipeline": 2}
    config = tiny_config(parallel=parallel, train={"precision": "bf16"}, run=run)
    first, *others = ranks.run(4, run_preflight, config)
    [slow] = [message for message in first if "matmul" in message]
    assert slow.startswith(f"preflight: rank {SLOWED} (") and others == [[]] * 3
    measured = json.loads((tmp_path / "preflight.json").read_text())["ranks"]
    first_stage, last_stage = ["matmul", "all-reduce, tensor", LINK], ["matmul", "all-reduce, tensor"]
    assert [list(rank["values"]) for rank in measured] == [first_stage] * 2 + [last_stage] * 2
    assert [rank["groups"].get(LINK) for rank in measured] == [[0, 2], [1, 3], None, None]
    assert [rank["groups"]["all-reduce, tensor"] for rank in measured] == [[0, 1]] * 2 + [[2, 3]] * 2
    assert all(value > 0 for rank in measured for value in rank["values"].values())
