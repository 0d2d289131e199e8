import random

from mtp_dist.training.spikes import WINDOW, SpikeDetector

NUMBERS = random.Random(0)


def noisy(mean):
    return mean + NUMBERS.gauss(0, 0.03)


def test_spike_is_described_and_does_not_mask_the_next_one():
    detector = SpikeDetector(6.0)
    losses = [2.0 + 0.1 * (-1) ** index for index in range(WINDOW)]
    assert not any(map(detector.update, losses)) and detector.update(2.59) is None
    detector.restore(losses)
    expected = f"head 1's loss is {1e9:.4f}, the mean of the {WINDOW} steps before is 2.0000 +- 0.1000"
    assert detector.update(1e9) == expected
    assert detector.update(2.5) is None
    assert detector.update(2.8) is not None
    assert SpikeDetector(None).update(1e9) is None


def test_lasting_rise_is_a_spike_for_some_steps():
    detector = SpikeDetector(6.0)
    spikes = [detector.update(noisy(2.0 if step < 1000 else 2.5)) is not None for step in range(2000)]
    assert spikes[1000] and sum(spikes) < 20 and not any(spikes[1020:])


def test_restored_detector_compares_with_earlier_losses():
    """A loss that falls has no spike, in spite of its noise."""

    def losses(first, last):
        return [noisy(2 + 3 / (1 + step / 500)) for step in range(first, last)]

    detector, other = SpikeDetector(6.0), SpikeDetector(6.0)
    assert not any(map(detector.update, losses(0, 1000)))
    saved = detector.losses
    assert not any(map(detector.update, losses(1000, 2000))) and detector.update(4.5)
    assert detector.update(losses(1000, 1001)[0]), "without restoring, a repeated step is a spike"
    for restored in (detector, other):
        restored.restore(saved)
        assert restored.losses == saved and not any(map(restored.update, losses(1000, 2000)))


def test_no_loss_is_a_spike_until_the_window_is_full():
    detector = SpikeDetector(6.0)
    assert not any(detector.update(float(step % 2)) for step in range(WINDOW - 1))
    assert detector.update(1.0) is None and detector.update(200.0)
