"""Loss and gradient by what the loss terms are about, compared with sums term by term."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from mtp_dist.analysis.choice_points import measure_choice_points
from mtp_dist.analysis.marked_text import Mark, MarkedText
from mtp_dist.errors import DataError
from mtp_dist.model.reference import attention_mask

HEADS, LENGTH, WINDOWS = 4, 16, 7
POSITIONS = LENGTH * WINDOWS
PHRASE = [Mark.CHOICE, *[Mark.DETERMINED] * 5, Mark.INCONSEQUENTIAL, Mark.DETERMINED]


def marked_text():
    marks = np.array((PHRASE * 20)[: POSITIONS + HEADS], dtype=np.uint8)
    marks[[40, 90]] = Mark.OTHER
    tokens = np.random.default_rng(5).integers(0, 256, len(marks))
    return MarkedText(tokens, marks)


def brute_force(model, text):
    """Return, for each n, sums over the terms of heads 1..n: their number, nats and gradient by what they are about."""
    network, total = model.network, {}
    choice = np.maximum.accumulate(np.where(text.marks == Mark.CHOICE, np.arange(len(text.marks)), -1))
    of_choice = np.isin(text.marks, [Mark.CHOICE, Mark.DETERMINED])

    def counted(first, last):
        return HEADS <= first <= last <= POSITIONS and Mark.OTHER not in text.marks[first - HEADS : last + 1]

    def part(position, k):
        target = position + k
        if of_choice[target]:
            owner = choice[target]
            name = "choice" if position < owner else "known"
            return name if counted(owner, owner + HEADS - 1) else None
        return "inconsequential" if counted(target, target) else None

    for window in range(WINDOWS):
        first = window * LENGTH
        samples = torch.as_tensor(text.tokens[None, first : first + LENGTH + HEADS])
        mask = attention_mask(samples[:, :LENGTH])
        z = network.trunk(samples[:, :LENGTH], mask).detach().requires_grad_()
        hidden = network.pre_norm_hidden(z, samples, mask)
        sums = {}
        for k in range(1, HEADS + 1):
            losses = F.cross_entropy(network.head_logits(k, hidden[k])[0], samples[0, k : k + LENGTH], reduction="none")
            for offset in range(LENGTH):
                name = part(first + offset, k)
                if name:
                    terms, nats = sums.get(name, (0, 0))
                    sums[name] = terms + 1, nats + losses[offset]
            for name, (terms, nats) in sums.items():
                [gradient] = torch.autograd.grad(nats, z, retain_graph=True)
                found = total.setdefault((k, name), np.zeros(3))
                found += terms, float(nats.detach()), float(gradient.norm(dim=-1).sum())
    return total


def test_terms_nats_and_gradients_are_those_of_each_term(model):
    text = marked_text()
    result = measure_choice_points(model, text, POSITIONS, lambda done, total: None)
    expected = brute_force(model, text)
    numbers = {"choice": result["choices"], "inconsequential": result["inconsequential"]}
    for row in result["rows"]:
        n = row["heads"]
        for name, number in numbers.items():
            terms, nats, gradient = expected[n, name] / number
            assert row[name]["terms"] == pytest.approx(terms)
            assert row[name]["nats"] == pytest.approx(nats, rel=1e-4)
            assert row[name]["gradient"] == pytest.approx(gradient, rel=1e-4)
        assert (row["choice"]["terms"], row["inconsequential"]["terms"]) == (n * (n + 1) / 2, n)
        nats = {name: expected[n, name][1] for name in ("choice", "known", "inconsequential") if (n, name) in expected}
        assert row["loss_share"] == pytest.approx(
            {name: nats.get(name, 0) / sum(nats.values()) for name in row["loss_share"]}, rel=1e-4
        )
        assert sum(row["gradient_share"].values()) == pytest.approx(1)
        assert all(0 < alignment <= 1 + 1e-6 for alignment in row["alignment"].values())
    assert list(result["rows"][0]["alignment"].values()) == pytest.approx([1, 1, 1])


def test_text_without_a_complete_choice_is_rejected(model):
    marks = np.full(40, Mark.INCONSEQUENTIAL, dtype=np.uint8)
    with pytest.raises(DataError, match="raise --tokens"):
        measure_choice_points(model, MarkedText(np.zeros(40, dtype=int), marks), 16, lambda done, total: None)
