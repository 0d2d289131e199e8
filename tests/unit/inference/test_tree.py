"""Which trees are chosen, and which path through one is accepted."""

from itertools import product

import pytest
import torch

from mtp_dist.inference.acceptance import candidate_acceptance
from mtp_dist.inference.drafting import draft_sources
from mtp_dist.inference.spans import tree_span
from mtp_dist.inference.speculation import Speculation
from mtp_dist.inference.tree import DraftTree, choose_tree
from tests.unit.inference.models import VOCAB_SIZE, padded_prompts, tiny_model

ACCEPTANCE = [[0.6, 0.25, 0.1], [0.5, 0.3, 0.1], [0.4, 0.2]]


def test_chosen_tree_has_the_most_expected_drafts() -> None:
    paths = {}
    for depth in range(1, len(ACCEPTANCE) + 1):
        for ranks in product(*(range(len(rates)) for rates in ACCEPTANCE[:depth])):
            paths[ranks] = float(torch.tensor([ACCEPTANCE[level][rank] for level, rank in enumerate(ranks)]).prod())
    for nodes in (1, 2, 5, 12, 1000):
        tree = choose_tree(ACCEPTANCE, nodes)
        ranks: list[tuple[int, ...]] = [()]
        for parent, rank in zip(tree.parents[1:], tree.ranks[1:], strict=True):
            ranks.append((*ranks[parent], rank))
        assert len(set(ranks)) == len(ranks) == min(nodes, len(paths) + 1)
        assert sum(paths[path] for path in ranks[1:]) == pytest.approx(sum(sorted(paths.values())[::-1][: nodes - 1]))
        assert tree.depths == tuple(map(len, ranks))


def test_accepted_path_follows_the_choices_of_head_1() -> None:
    #      0
    #     1 2
    #    3  4 5
    tree = DraftTree((-1, 0, 0, 1, 2, 2), (0, 0, 1, 0, 0, 1))
    tokens = torch.tensor([[9, 5, 6, 7, 7, 8]]).expand(4, -1)
    chosen = torch.tensor([[6, 0, 8, 1, 2, 3], [5, 8, 0, 0, 0, 0], [7, 0, 0, 0, 0, 0], [5, 7, 0, 4, 0, 0]])
    path, accepted = tree.accepted_path(tokens, chosen)
    assert accepted.tolist() == [2, 1, 0, 2]
    assert [row[: count + 1].tolist() for row, count in zip(path, accepted, strict=True)] == [
        [0, 2, 5],
        [0, 1],
        [0],
        [0, 1, 3],
    ]


def test_window_counts_positions_of_a_tree_not_its_slots() -> None:
    tree = DraftTree((-1, 0, 0, 2, 3), (0, 0, 1, 0, 0))  # depths 0, 1, 1, 2, 3 in slots 5 to 9
    mask = tree_span(torch.tensor([5]), [5], tree).mask_within(2)
    assert mask is not None
    attended = [row.nonzero().flatten().tolist() for row in mask[0, 0]]
    assert attended == [[4, 5], [5, 6], [5, 7], [7, 8], [8, 9]]


@pytest.mark.parametrize("variant", ["parallel", "mlp", "separate", "sequential", "leap", "conditioned_leap"])
def test_measured_acceptance_counts_the_candidates(variant: str) -> None:
    tiny = tiny_model(variant)
    prompts, _ = padded_prompts([4, 4])
    text = tiny.model.generate(
        prompts, max_new_tokens=40, do_sample=False, speculation=Speculation(heads=1), attention_mask=prompts >= 0
    )
    longest = tiny.config.heads.distances[-1]
    length = text.shape[1] - longest + 1
    with torch.no_grad():
        padded = torch.nn.functional.pad(text, (0, longest))
        logits = tiny.reference(padded, text.shape[1])
    chosen = logits[1].argmax(-1)
    measured = candidate_acceptance(tiny.model, text, 3)
    reached = torch.ones(2, length, dtype=torch.bool)
    for distance, (head, offset) in draft_sources(tiny.config.heads).items():
        right = torch.zeros(2, length, 3, dtype=torch.bool)
        for row, position in product(range(2), range(length)):
            if position < offset:
                reached[row, position] = False
                continue
            candidates = logits[head][row, position - offset].topk(3).indices
            right[row, position] = candidates == chosen[row, position + distance - 1]
        right &= reached[..., None]
        expected = right.sum((0, 1)) / reached.sum().clamp(min=1)
        assert measured[distance - 2] == pytest.approx(expected.tolist())
        reached = right.any(-1)
    assert VOCAB_SIZE > 3 and any(sum(rates) for rates in measured), "some candidate is right"
