"""Linear probes of states whose best classifier is known."""

import pytest
import torch
from torch.nn.functional import nll_loss

from mtp_dist.analysis.linear_probes import TokenClasses, num_steps
from mtp_dist.analysis.probe import fitted_positions, probe_states, standardize

CLASSES, WIDTH, COUNT, BLOCK = 5, 12, 6000, 100


def probe(states, targets, output, vocab_size=CLASSES, block=BLOCK):
    states, boundary = states.clone(), fitted_positions(len(targets), block)
    standardize(states, boundary)
    steps = []
    found = probe_states(states, targets, output, vocab_size, block, lambda: steps.append(1))
    assert len(steps) == num_steps(boundary)
    return found


def test_probes_of_each_layer_find_its_classifier():
    """Layer 0 has the answer, layer 1 the logits that it was drawn from, layer 2 nothing."""
    generator = torch.Generator().manual_seed(1)
    informed, empty = torch.randn(2, COUNT, WIDTH, generator=generator) * 3 + 50  # neither centred nor of unit size
    matrix = torch.randn(WIDTH, CLASSES, generator=generator)
    log_probs = ((informed - 50) @ matrix / 3 + torch.tensor([2.0, 0, 0, 0, -9])).log_softmax(-1)
    targets = torch.multinomial(log_probs.exp(), 1, generator=generator)[:, 0]
    answers = torch.randn(CLASSES, WIDTH, generator=generator)[targets]
    found = probe(torch.stack([answers, informed, empty]), targets, 1)
    held_out, wanted = log_probs[-COUNT // 4 :], targets[-COUNT // 4 :]
    assert len(found.losses) == len(wanted)
    best, best_accuracy = float(nll_loss(held_out, wanted)), float((held_out.argmax(-1) == wanted).double().mean())
    certain, informed_score, uninformed = found.layers
    assert certain.accuracy == 1 and certain.cross_entropy < 0.05
    assert informed_score.cross_entropy == pytest.approx(best, abs=0.02)
    assert informed_score.accuracy == pytest.approx(best_accuracy, abs=0.02)
    assert 0 < informed_score.accuracy_interval < 0.04
    assert found.scores["probe"] == informed_score and found.losses.mean() == pytest.approx(
        informed_score.cross_entropy
    )
    unigram = found.scores["unigram"]
    assert unigram.accuracy == pytest.approx(float((targets == targets.mode().values).double().mean()), abs=0.03)
    for nothing in (found.scores["shuffled"], uninformed):
        assert nothing.cross_entropy == pytest.approx(unigram.cross_entropy, abs=0.03)
    assert unigram.cross_entropy > best + 0.3


def test_scores_are_those_of_held_out_tokens():
    """A probe fits random targets of a few wide states; a token that it has not seen is a guess."""
    generator = torch.Generator().manual_seed(2)
    states, targets = torch.randn(1, 400, 200, generator=generator), torch.randint(0, 4, (400,), generator=generator)
    assert probe(states, targets, 0, 4, 10).layers[0].accuracy < 0.4


def test_layers_do_not_change_each_other():
    generator = torch.Generator().manual_seed(3)
    states, targets = torch.randn(3, 2000, 8, generator=generator), torch.randint(0, 6, (2000,), generator=generator)
    states[0, :, :6] += torch.nn.functional.one_hot(targets)
    together, alone = probe(states, targets, 2, 6), probe(states[:1], targets, 0, 6)
    assert together.layers[0].cross_entropy == pytest.approx(alone.layers[0].cross_entropy, abs=1e-4)
    assert together.layers[0].accuracy > together.layers[1].accuracy + 0.1


def test_rare_tokens_share_a_class():
    """Probabilities of all tokens add up to 1, whatever the number of classes is."""
    targets = torch.tensor([3] * 90 + [0] * 50 + [2] * 30 + [4] * 20 + [1] * 10)  # each counts one more time
    classes = TokenClasses(targets, 6, 3)
    assert classes.tokens.tolist() == [3, 0, 2] and classes.of_token.tolist() == [1, 2, 2, 0, 2, 2]
    log_probs = torch.tensor([[[0.05, 0.05, 0.9], [0.3, 0.1, 0.6], [0.1, 0.6, 0.3]]]).log()
    tokens = torch.stack([classes.token_losses(log_probs, torch.full((3,), token)) for token in range(6)], -1)
    expected = torch.tensor([0.6, 0.3 * 11 / 64, 0.3 * 31 / 64, 0.1, 0.3 * 21 / 64, 0.3 * 1 / 64])
    torch.testing.assert_close((-tokens).exp()[0, 2], expected)
    assert classes.best_tokens(log_probs).tolist() == [(-tokens)[0].argmax(-1).tolist()] == [[2, 3, 0]]
    prior = classes.log_frequencies.expand(1, 1, -1)
    losses = [float(classes.token_losses(prior, torch.tensor([token]))) for token in range(6)]
    assert losses == pytest.approx((-(torch.bincount(targets, minlength=6) + 1).div(206.0).log()).tolist())
    short = TokenClasses(torch.zeros(10, dtype=torch.long), 100)  # unseen tokens have a tenth of its tokens
    assert float(short.log_frequencies[0].exp()) == pytest.approx(10.01 / 11)
