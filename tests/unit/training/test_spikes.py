"""What counts as a jump of the loss."""

import random

from mtp_dist.training.spikes import WINDOW, SpikeDetector


def test_a_jump_is_told_with_its_size_and_is_not_compared_with_later() -> None:
    detector = SpikeDetector(6.0)
    losses = [2.0 + 0.1 * (-1) ** index for index in range(WINDOW)]
    assert not any(map(detector.spike, losses))
    for _ in range(2):
        assert detector.spike(2.7) == f"head 1's loss is 2.7000, that of the {WINDOW} steps before 2.0000 +- 0.1000"
    assert detector.spike(2.5) is None
    assert SpikeDetector(None).spike(1e9) is None


def test_a_falling_loss_with_noise_has_none() -> None:
    numbers = random.Random(0)
    detector = SpikeDetector(6.0)
    assert not any(detector.spike(5 / (1 + step / 100) + numbers.gauss(0, 0.05)) for step in range(2000))


def test_nothing_is_a_spike_before_the_window_is_full() -> None:
    detector = SpikeDetector(6.0)
    assert not any(detector.spike(float(step % 2)) for step in range(WINDOW - 1))
    assert detector.spike(100.0) is None
    assert detector.spike(200.0)
