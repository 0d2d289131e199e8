"""Accelerators by the names that users and drivers have for them, and rates from a preflight."""

import json

import pytest

from mtp_dist.errors import LaunchError
from mtp_dist.planner.calibration import measured_rates
from mtp_dist.planner.devices import (
    Rates,
    accelerators,
    assumed_rates,
    find_accelerator,
    nominal_memory,
    peak_flops,
)

PEAKS = {"A100-SXM4-80GB": 312e12, "A100 80GB PCIe": 312e12, "H100 80GB HBM3": 989e12, "H100 PCIe": 756e12}
PEAKS |= {"H200": 989e12, "B200": 2250e12, "L40S": 362e12, "GeForce RTX 4090": 165e12, "A100-PCIE-40GB": 312e12}
PEAKS |= dict.fromkeys(["GeForce RTX 4090 Laptop GPU", "A100-SXM4-40GB MIG 1g.5gb", "H100 NVL", "GH200 480GB", "cpu"])


def test_peaks():
    for name, peak in PEAKS.items():
        assert peak_flops(f"NVIDIA {name}", "bf16") == peak, name
        assert peak_flops(f"NVIDIA {name}", "fp32") is None
    assert peak_flops("AMD Instinct MI300X", "bf16") == 1307e12


def test_plans_and_runs_have_the_same_memory():
    for name, reported, expected in (
        ("NVIDIA H100 80GB HBM3", 85_024_112_640, 80e9),
        ("NVIDIA H100 80GB HBM3", 79_000_000_000, 79e9),
        ("NVIDIA H100 MIG", 85_024_112_640, 85_024_112_640),
        ("NVIDIA H100 96GB HBM3", 101_000_000_000, 101e9),
    ):
        assert nominal_memory(name, reported) == expected, name


def test_accelerators_have_plausible_figures_and_sources():
    assert {"a100", "a100-40gb", "h100", "h200", "b200", "mi300x", "cpu"} <= accelerators().keys()
    for name, each in accelerators().items():
        assert "data sheet" in each.source or "white paper" in each.source, name
        assert each.bf16_flops >= each.fp32_flops > 0 and each.memory_bandwidth > each.link_bandwidth, name
        assert each.link_bandwidth > each.network_bandwidth > 0 and each.memory_bytes >= 4e9, name
        rates = assumed_rates(each, "bf16")
        assert 0.5 * each.bf16_flops < rates.matmul < each.bf16_flops, name
        assert 0.5 * each.network_bandwidth < rates.network < each.network_bandwidth, name
    assert find_accelerator("H100").label == "NVIDIA H100 SXM 80 GB"
    with pytest.raises(LaunchError, match=r"--gpu = 'h1000' .* choose one of a100, .*h100"):
        find_accelerator("h1000")


def rank(number, host, **values):
    kinds = {"tensor": "all-reduce, tensor", "data": "all-reduce, data", "stage": "to the next stage"}
    groups = {kinds[name]: ranks for name, (ranks, _) in values.items()} | {"matmul": [number]}
    rates = {kinds[name]: rate for name, (_, rate) in values.items()} | {"matmul": 500 + number}
    return {"rank": number, "host": host, "values": rates, "groups": groups}


def test_preflight_replaces_the_rates_that_it_measured(tmp_path):
    """An all-reduce over two hosts with two ranks each has the network of two accelerators."""
    rates, path = Rates(matmul=1.0, memory=2.0, link=3.0, network=4.0), tmp_path / "preflight.json"
    alone = [rank(0, "a"), rank(1, "a"), rank(2, "b")]
    path.write_text(json.dumps({"ranks": alone}))
    assert measured_rates(rates, path) == Rates(501e12, 2.0, 3.0, 4.0)
    path.write_text(
        json.dumps(
            {
                "ranks": [
                    rank(0, "a", tensor=([0, 1], 300), data=([0, 1, 2, 3], 80), stage=([0, 2], 45)),
                    rank(1, "a", tensor=([0, 1], 310), data=([0, 1, 2, 3], 80)),
                    rank(2, "b", tensor=([2, 3], 305), data=([0, 1, 2, 3], 80)),
                    rank(3, "b", tensor=([2, 3], 305), data=([0, 1, 2, 3], 80)),
                ]
            }
        )
    )
    assert measured_rates(rates, path) == Rates(501.5e12, 2.0, 305e9, 40e9)


INVALID = [
    [rank(0, "a", tensor=([0, 1], 300))],
    [rank(0, "a", tensor=([0], 0))],
    [rank(0, "a") | {"groups": {}, "values": {"matmul": 500, "to the next stage": 45}}],
]
"""Ranks of a group that are not in the file, a rate of 0, a rate without its group."""


@pytest.mark.parametrize(
    "text",
    [
        *["{", "[]", '{"ranks": []}', '{"ranks": [{"rank": 0}]}'],
        *(json.dumps({"ranks": ranks}) for ranks in INVALID),
    ],
)
def test_other_files_are_no_preflights(tmp_path, text):
    (tmp_path / "other.json").write_text(text)
    with pytest.raises(LaunchError, match=r"other.json' is not a valid preflight.json .*: give the file"):
        measured_rates(Rates(1, 1, 1, 1), tmp_path / "other.json")
    with pytest.raises(LaunchError, match=r"missing' cannot be read"):
        measured_rates(Rates(1, 1, 1, 1), tmp_path / "missing")
