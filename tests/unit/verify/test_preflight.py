"""Who is named as slow, and that every rank measures."""

import io
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from mtp_dist.verify.preflight import (
    KINDS,
    ROWS_SHOWN,
    SLOW,
    RankReport,
    find_slow,
    print_reports,
    write_reports,
)
from tests.ranks import Ranks
from tests.tiny import tiny_config
from tests.unit.verify.preflight_on_ranks import SLOWED, preflight

ALL_REDUCE = "all-reduce, data"
LINK = "to the next stage"


def report(rank: int, matmul: float = 100.0, host: str = "node-0", **others: tuple[list[int], float]) -> RankReport:
    """others: by kind, with its commas and spaces as underscores, who takes part and the value."""
    kinds = {"all_reduce_data": ALL_REDUCE, "link": LINK}
    values = {"matmul": matmul} | {kinds[name]: value for name, (_, value) in others.items()}
    groups = {"matmul": [rank]} | {kinds[name]: ranks for name, (ranks, _) in others.items()}
    return RankReport(rank, host, "GPU", values, groups)


@given(st.lists(st.floats(0.81, 1.0), min_size=1, max_size=40), st.data())
def test_a_slow_rank_is_named_and_no_other(rates: list[float], data: st.DataObject) -> None:
    reports = [report(rank, rate) for rank, rate in enumerate(rates)]
    assert find_slow(reports) == [], "the median of these is at most 1, and all are above 0.8"
    slow = data.draw(st.integers(0, len(rates) - 1))
    if len(rates) >= 3:  # of two ranks the median is their mean
        reports[slow] = report(slow, 0.5, "node-7")
        [found] = find_slow(reports)
        assert (found.kind, found.ranks, found.hosts, found.value) == ("matmul", [slow], ["node-7"], 0.5)
        assert found.value < SLOW * found.median
        assert f"rank {slow} (node-7): matmul 0.5 TFLOP/s" in str(found)


def test_a_slow_group_is_named_once_with_its_ranks() -> None:
    """By its slowest member."""
    groups = [[0, 2], [1, 3], [4, 6], [5, 7]]
    rates = {(1, 3): 20.0}
    reports = [
        report(
            rank, host=f"node-{rank // 4}", all_reduce_data=(group, rates.get(tuple(group), 50.0) + 40 * (rank == 1))
        )
        for group in groups
        for rank in group
    ]
    [found] = find_slow(reports)
    assert (found.kind, found.ranks, found.hosts, found.value) == (ALL_REDUCE, [1, 3], ["node-0"], 20.0)
    assert str(found) == "preflight: ranks 1, 3 (node-0): all-reduce, data 20 GB/s, 40% of the median 50"


def test_links_between_machines_are_compared_with_each_other() -> None:
    """Pipeline 4 on two machines: the one link between them has no like, of three in a machine none is slow."""
    hosts = ["node-0", "node-0", "node-1", "node-1"]
    rates = [200.0, 20.0, 190.0]
    reports = [report(rank, host=hosts[rank], link=([rank, rank + 1], rates[rank])) for rank in range(3)]
    assert find_slow([*reports, report(3, host="node-1")]) == []
    reports = [report(rank, host=f"node-{rank}", link=([rank, rank + 1], rates[rank])) for rank in range(3)]
    [found] = find_slow([*reports, report(3, host="node-3")])
    assert (found.ranks, found.hosts) == ([1, 2], ["node-1", "node-2"])


@pytest.mark.parametrize("number", [ROWS_SHOWN, ROWS_SHOWN + 1])
def test_many_ranks_get_a_summary_and_the_slow_ones(number: int, tmp_path: Path) -> None:
    reports = [report(rank, 50.0 if rank == 7 else 100.0) for rank in range(number)]
    console = Console(file=io.StringIO(), width=120)
    print_reports(reports, find_slow(reports), console)
    rows = [line for line in console.file.getvalue().splitlines() if "│" in line]  # type: ignore[attr-defined]
    first_cells = [row.split("│")[1].strip() for row in rows]
    everybody = [str(rank) for rank in range(number)]
    assert first_cells == (everybody if number == ROWS_SHOWN else ["smallest", "median", "largest", "7"])
    write_reports(tmp_path / "preflight.json", reports, find_slow(reports))
    written = json.loads((tmp_path / "preflight.json").read_text())
    assert len(written["ranks"]) == number and [found["ranks"] for found in written["slow"]] == [[7]]


@pytest.mark.parametrize("slowed", [False, True])
def test_all_ranks_measure_and_the_slow_one_is_noted(ranks: Ranks, tmp_path: Path, slowed: bool) -> None:
    config = tiny_config(
        parallel={"tensor": 2, "pipeline": 2},
        train={"precision": "bf16"},
        run={"device": "cpu", "output_dir": str(tmp_path)},
    )
    notes = ranks.run(4, preflight, config, slowed)
    assert notes[1:] == [[]] * 3, "rank 0 speaks"
    of_matmuls = [note for note in notes[0] if "matmul" in note]
    assert len(of_matmuls) == slowed and all(f"preflight: rank {SLOWED} (" in note for note in of_matmuls)
    assert notes[0], "that nothing is slow is said too"
    written = json.loads((tmp_path / "preflight.json").read_text())
    kinds = [list(of_rank["values"]) for of_rank in written["ranks"]]
    assert kinds == [["matmul", "all-reduce, tensor", LINK]] * 2 + [["matmul", "all-reduce, tensor"]] * 2
    assert [of_rank["groups"].get(LINK) for of_rank in written["ranks"]] == [[0, 2], [1, 3], None, None]
    assert [of_rank["groups"]["all-reduce, tensor"] for of_rank in written["ranks"]] == [[0, 1]] * 2 + [[2, 3]] * 2
    assert set(KINDS) >= {kind for of_rank in kinds for kind in of_rank}
    assert all(value > 0 for of_rank in written["ranks"] for value in of_rank["values"].values())
