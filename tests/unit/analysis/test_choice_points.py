"""Loss and gradient by what the loss terms are about, compared with sums term by term."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from mtp_dist.analysis.choice_points import NEXT_MARKS, measure_choice_points
from mtp_dist.analysis.marked_text import Mark, MarkedText
from mtp_dist.analysis.trained_model import TrainedModel
from mtp_dist.errors import DataError
from tests.unit.convert.folders import write_model

HEADS, LENGTH, WINDOWS = 4, 16, 7
POSITIONS = LENGTH * WINDOWS
PHRASE = [Mark.CHOICE, *[Mark.DETERMINED] * 5, Mark.INCONSEQUENTIAL, Mark.DETERMINED]


def marked_text():
    marks = np.array((PHRASE * 20)[: POSITIONS + HEADS], dtype=np.uint8)
    marks[[40, 90]] = Mark.OTHER
    tokens = np.random.default_rng(5).integers(0, 256, len(marks))
    return MarkedText(tokens, marks)


def brute_force(model, text):
    """Return sums over the terms of heads 1..n: by n and part, their number, nats and gradient; by n and mark of the
    next token, the norms of the gradient of their sum, and of each head's, at the positions with all terms."""
    network, total, by_mark = model.network, {}, {}
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
        mask = network.attention_mask(samples[:, :LENGTH])
        z = network.trunk(samples[:, :LENGTH], mask).detach().requires_grad_()
        hidden = network.pre_norm_hidden(z, samples, mask)
        has_all = [all(part(first + offset, k) for k in range(1, HEADS + 1)) for offset in range(LENGTH)]
        sums, separate = {}, 0
        for k in range(1, HEADS + 1):
            logits = network.head_logits(k, hidden[k], samples)[0]
            losses = F.cross_entropy(logits, samples[0, k : k + LENGTH], reduction="none")
            before = sum(nats for _, nats in sums.values())
            for offset in range(LENGTH):
                name = part(first + offset, k)
                if name:
                    terms, nats = sums.get(name, (0, 0))
                    sums[name] = terms + 1, nats + losses[offset]
            loss = sum(nats for _, nats in sums.values())
            gradients = (torch.autograd.grad(nats, z, retain_graph=True) for nats in (loss, loss - before))
            together, own = (gradient.norm(dim=-1) for [gradient] in gradients)
            separate = own + separate
            for offset in np.flatnonzero(has_all):
                found = by_mark.setdefault((k, text.marks[first + offset + 1]), np.zeros(2))
                found += float(together[0, offset]), float(separate[0, offset])
            for name, (terms, nats) in sums.items():
                [gradient] = torch.autograd.grad(nats, z, retain_graph=True)
                found = total.setdefault((k, name), np.zeros(3))
                found += terms, float(nats.detach()), float(gradient.norm(dim=-1).sum())
    return total, by_mark


def test_terms_nats_and_gradients_are_those_of_each_term(model):
    text = marked_text()
    result = measure_choice_points(model, text, POSITIONS, lambda done, total: None)
    expected, by_mark = brute_force(model, text)
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
        norms = {mark.name.lower(): by_mark[n, mark] for mark in NEXT_MARKS}
        all_norms = sum(together for together, _ in norms.values())
        for name, (together, separate) in norms.items():
            assert row["gradient_share"][name] == pytest.approx(together / all_norms, rel=1e-4)
            assert row["alignment"][name] == pytest.approx(together / separate, rel=1e-4)


def test_trunk_of_detached_heads_learns_from_head_1(tmp_path):
    write_model(tmp_path / "detached", heads={"detach": True})
    model = TrainedModel.open(tmp_path / "detached")
    first, *others = measure_choice_points(model, marked_text(), POSITIONS, lambda done, total: None)["rows"]
    for row in others:
        assert row["choice"]["gradient"] == pytest.approx(first["choice"]["gradient"])
        assert row["gradient_share"] == pytest.approx(first["gradient_share"])
        assert row["choice"]["nats"] > 2 * first["choice"]["nats"]


def test_text_without_a_complete_choice_is_rejected(model):
    marks = np.full(40, Mark.INCONSEQUENTIAL, dtype=np.uint8)
    with pytest.raises(DataError, match="raise --tokens"):
        measure_choice_points(model, MarkedText(np.zeros(40, dtype=int), marks), 16, lambda done, total: None)
