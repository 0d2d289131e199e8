"""The decomposition of the loss of two heads, digit by digit."""

from itertools import pairwise, product
from math import log

import numpy as np
import pytest

from mtp_dist.analysis.markov import LIKELY, MarkovSource, choice_source, decompose, describe_source

CHOICE_ENTROPY = -LIKELY * log(LIKELY) - (1 - LIKELY) * log(1 - LIKELY)


def random_source(size=4):
    random = np.random.default_rng(3)
    transitions = random.dirichlet([0.4] * size, size)
    transitions[0, 1:] = 0, 0, 1  # impossible transitions too
    transitions[0, 0] = 0
    return MarkovSource("abcd", transitions)


def brute_force(joint):
    """Return entropies by their definitions, summed outcome by outcome."""
    contexts, xs, ys = (range(size) for size in joint.shape)
    outcomes = [(c, x, y) for c, x, y in product(contexts, xs, ys) if joint[c, x, y] > 0]
    c_, cx, cy = joint.sum((1, 2)), joint.sum(2), joint.sum(1)
    return {
        "x": -sum(joint[c, x, y] * log(cx[c, x] / c_[c]) for c, x, y in outcomes),
        "y": -sum(joint[c, x, y] * log(cy[c, y] / c_[c]) for c, x, y in outcomes),
        "x_given_y": -sum(joint[c, x, y] * log(joint[c, x, y] / cy[c, y]) for c, x, y in outcomes),
        "y_given_x": -sum(joint[c, x, y] * log(joint[c, x, y] / cx[c, x]) for c, x, y in outcomes),
        "information": sum(
            joint[c, x, y] * log(joint[c, x, y] * c_[c] / (cx[c, x] * cy[c, y])) for c, x, y in outcomes
        ),
    }


@pytest.mark.parametrize("source", [random_source(), choice_source()], ids=["random", "choices"])
@pytest.mark.parametrize("with_context", [False, True])
def test_losses_of_two_heads_contain_the_information_twice(source, with_context):
    joint = source.joint() if with_context else source.joint().sum(0, keepdims=True)
    result = decompose(joint)
    for name, value in brute_force(joint).items():
        assert getattr(result, name) == pytest.approx(value, abs=1e-13), name
    assert result.two_heads == pytest.approx(result.decomposed, abs=1e-13)
    assert result.x + result.y_given_x == pytest.approx(result.decomposed - result.information, abs=1e-13)
    assert result.information > 0.05


def test_information_by_distance_is_that_of_all_sequences():
    """I(x_{t+1..t+k-1}; x_{t+k} | x_t) from the joint distribution of whole sequences."""
    source = random_source()
    np.testing.assert_allclose(source.stationary @ source.transitions, source.stationary, atol=1e-14)
    size = len(source.transitions)
    for distance in range(1, 5):
        joint = np.zeros((size, size ** (distance - 1), size))
        for tokens in product(range(size), repeat=distance + 1):
            between = sum(token * size**place for place, token in enumerate(tokens[1:-1]))
            steps = [source.transitions[pair] for pair in pairwise(tokens)]
            joint[tokens[0], between, tokens[-1]] += source.stationary[tokens[0]] * np.prod(steps)
        expected = decompose(joint)
        entropy, information = source.distance_information(distance)
        assert entropy == pytest.approx(expected.y, abs=1e-13)
        assert information == pytest.approx(expected.information, abs=1e-13)


def test_information_of_the_choice_source_is_at_its_choice():
    described = describe_source(choice_source())
    after = described["information_after"]
    assert after.pop("S") == pytest.approx(CHOICE_ENTROPY)
    assert list(after.values()) == pytest.approx([0] * len(after), abs=1e-13)
    # In each round of five tokens, head k cannot know F or G, the choice, and what the choice determines k - 1 later.
    losses = [5 * row["entropy"] / CHOICE_ENTROPY for row in described["distances"]]
    assert losses == pytest.approx([1 + min(k, 3) for k in range(1, 9)])
