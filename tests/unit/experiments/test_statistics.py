"""Intervals against SciPy and a worked example, and the verdict on an effect."""

import math

import pytest

from mtp_dist.experiments.statistics import Interval, interval, paired_difference, t_quantile, verdict


@pytest.mark.parametrize(("degrees", "expected"), [(1, 12.7062), (2, 4.3027), (3, 3.1824), (4, 2.7764), (19, 2.0930)])
def test_quantiles_are_those_of_the_tables(degrees, expected):
    assert t_quantile(0.95, degrees) == pytest.approx(expected, abs=5e-5)


def test_quantiles_equal_scipy():
    scipy_stats = pytest.importorskip("scipy.stats")
    for degrees in range(1, 60):
        for confidence in (0.5, 0.95, 0.999):
            expected = scipy_stats.t.ppf((1 + confidence) / 2, degrees)
            assert t_quantile(confidence, degrees) == pytest.approx(expected, rel=1e-9)


def test_interval_of_a_worked_example():
    found = interval([2.0, 4.0, 6.0])
    assert (found.mean, found.count) == (4.0, 3)
    assert found.half_width == pytest.approx(4.302653 * 2.0 / math.sqrt(3), rel=1e-6)
    assert interval([5.0]) == Interval(5.0, None, 1)


def test_difference_is_paired_by_seed():
    baseline = {1: 0.1, 2: 0.5, 3: 0.9, 4: 0.3}
    difference = paired_difference({3: 1.0, 2: 0.6, 1: 0.2, 5: 9.9}, baseline)
    assert difference.mean == pytest.approx(0.1) and difference.count == 3
    assert difference.half_width < 1e-9, "unpaired values would vary from seed to seed"
    assert paired_difference({7: 1.0}, baseline) is None


@pytest.mark.parametrize(
    ("mean", "half_width", "effect", "learned", "expected"),
    [
        (0.30, 0.10, 0.4, True, "as in the paper"),
        (-0.30, 0.10, -0.4, True, "as in the paper"),
        (0.05, 0.10, 0.4, True, "not as in the paper"),
        (-0.30, 0.10, 0.4, True, "not as in the paper"),
        (0.05, 0.21, 0.4, True, "not tested"),
        (0.90, 0.21, 0.4, True, "not tested"),
        (0.05, 0.20, 0.4, True, "not as in the paper"),
        (0.30, None, 0.4, True, "not tested"),
        (0.30, 0.10, 0.4, False, "not tested"),
        (0.30, 0.10, None, True, "not tested"),
    ],
)
def test_verdict(mean, half_width, effect, learned, expected):
    assert verdict(Interval(mean, half_width, 5), effect, learned)[0] == expected


def test_a_baseline_at_the_ceiling_tests_nothing():
    assert verdict(Interval(0.0, 0.01, 5), 0.4, True, room=0.19)[0] == "not tested"
    assert verdict(Interval(0.0, 0.01, 5), -0.4, True, room=0.2)[0] == "not as in the paper"


def test_no_common_seed_is_not_tested():
    assert verdict(None, 0.4, True)[0] == "not tested"
