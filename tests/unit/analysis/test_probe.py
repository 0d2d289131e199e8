"""Linear probes of states whose best classifier is known."""

import pytest
import torch

from mtp_dist.analysis.probe import HeldOut, probe_states

CLASSES, WIDTH, COUNT, BLOCK = 5, 12, 6000, 100


def test_probe_finds_the_classifier_and_shuffled_states_find_the_frequencies():
    generator = torch.Generator().manual_seed(1)
    states = torch.randn(COUNT, WIDTH, generator=generator) * 3 + 50  # neither centred nor of unit size
    matrix = torch.randn(WIDTH, CLASSES, generator=generator)
    log_probabilities = ((states - 50) @ matrix / 3 + torch.tensor([2.0, 0, 0, 0, -9])).log_softmax(-1)
    targets = torch.multinomial(log_probabilities.exp(), 1, generator=generator)[:, 0]
    scores, losses = probe_states(states, targets, CLASSES, BLOCK)
    assert losses.mean() == pytest.approx(scores["probe"]["cross_entropy"])
    held_out, wanted = HeldOut.split(log_probabilities, BLOCK).held_out, HeldOut.split(targets, BLOCK).held_out
    assert len(wanted) == COUNT // 4
    best = float(torch.nn.functional.nll_loss(held_out, wanted))
    assert scores["probe"]["cross_entropy"] == pytest.approx(best, abs=0.02)
    assert scores["probe"]["accuracy"] == pytest.approx(
        float((held_out.argmax(-1) == wanted).double().mean()), abs=0.02
    )
    assert 0 < scores["probe"]["accuracy_interval"] < 0.04
    frequencies = torch.bincount(targets, minlength=CLASSES) / COUNT
    assert scores["unigram"]["accuracy"] == pytest.approx(float(frequencies.max()), abs=0.03)
    assert scores["shuffled"]["cross_entropy"] == pytest.approx(scores["unigram"]["cross_entropy"], abs=0.03)
    assert scores["unigram"]["cross_entropy"] > best + 0.3


def test_scores_are_those_of_held_out_tokens():
    """A probe fits random targets of a few wide states; a token that it has not seen is a guess."""
    generator = torch.Generator().manual_seed(2)
    states, targets = torch.randn(400, 200, generator=generator), torch.randint(0, 4, (400,), generator=generator)
    assert probe_states(states, targets, 4, 10)[0]["probe"]["accuracy"] < 0.4
