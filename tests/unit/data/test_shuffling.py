"""A random order without memory is an order, and a random one."""

import itertools
from collections import Counter

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from mtp_dist.data.samples import ROUNDS, Shuffle

keys = st.lists(st.integers(0, 2**64 - 1), min_size=ROUNDS, max_size=ROUNDS)


def shuffle(size: int, seed: int) -> Shuffle:
    return Shuffle(size, np.random.PCG64(seed).random_raw(ROUNDS).tolist())


@given(st.integers(1, 300), keys)
def test_each_number_stands_somewhere_once(size: int, round_keys: list[int]) -> None:
    order = Shuffle(size, round_keys)
    assert sorted(order[position] for position in range(size)) == list(range(size))


@given(st.integers(1, 2**40), keys, st.data())
def test_any_size(size: int, round_keys: list[int], data: st.DataObject) -> None:
    position, other = (data.draw(st.integers(0, size - 1)) for _ in range(2))
    order = Shuffle(size, round_keys)
    assert 0 <= order[position] < size
    assert (order[position] == order[other]) == (position == other)


def test_every_order_of_four_is_about_as_likely() -> None:
    seeds = 24 * 400
    counts = Counter(tuple(order[i] for i in range(4)) for order in (shuffle(4, seed) for seed in range(seeds)))
    assert counts.keys() == set(itertools.permutations(range(4)))
    chi_squared = sum((count - 400) ** 2 / 400 for count in counts.values())
    assert chi_squared < 49.7, "exceeded once in a thousand by 23 degrees of freedom"


def test_neighbours_are_torn_apart() -> None:
    size = 100_000
    order = shuffle(size, 3)
    places = np.array([order[position] for position in range(size)])
    assert abs(np.corrcoef(places[:-1], places[1:])[0, 1]) < 0.015
    assert abs(np.corrcoef(np.arange(size), places)[0, 1]) < 0.015
    assert abs(np.diff(places)).mean() / size - 1 / 3 < 0.01


def test_the_order_stays_that_of_runs_that_are_under_way() -> None:
    order = Shuffle(1000, range(ROUNDS))
    assert [order[position] for position in range(8)] == [937, 549, 257, 193, 537, 338, 356, 914]
