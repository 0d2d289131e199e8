"""Trees of drafts: several candidates per position, all verified in one forward pass.

Miao et al. 2023 (SpecInfer, arXiv:2305.09781); the tree is chosen as in Cai et al. 2024 (Medusa, arXiv:2401.10774).
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True)
class DraftTree:
    """Drafts by node: node 0 is the last known token, node i > 0 one of the candidates for the token after its parent.

    All nodes of one depth choose from the candidates of one head: the same ones, or with `heads.condition` those that
    follow their parent's token.
    """

    parents: tuple[int, ...]
    """Parent of each node; a node's is before it, and -1 for node 0."""
    ranks: tuple[int, ...]
    """Rank of each node's token among the candidates, 0 for the most probable one."""

    @cached_property
    def depths(self) -> tuple[int, ...]:
        """Distance of each node from node 0."""
        depths = [0]
        for parent in self.parents[1:]:
            depths.append(depths[parent] + 1)
        return tuple(depths)

    @cached_property
    def ancestors(self) -> Tensor:
        """`[N, N]`, True if the second node is the first one or one of its ancestors."""
        rows = torch.eye(len(self.parents), dtype=torch.bool)
        for node, parent in enumerate(self.parents[1:], 1):
            rows[node] |= rows[parent]
        return rows

    def accepted_path(self, token_ids: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor]:
        """Return the nodes of the longest path of right drafts `[B, depth + 1]`, and the number of drafts on it `[B]`.

        token_ids: `[B, N]`, those of the nodes. chosen: `[B, N]`, head 1's choice after each node. Nodes after the
        path's end are arbitrary.
        """
        parents = torch.tensor(self.parents, device=token_ids.device)
        node = token_ids.new_zeros(len(token_ids))
        path, on_path = [node], torch.ones_like(node, dtype=torch.bool)
        accepted = torch.zeros_like(node)
        for _ in range(max(self.depths)):
            wanted = chosen.gather(1, node[:, None])
            matches = (parents == node[:, None]) & (token_ids == wanted)
            on_path = on_path & matches.any(1)
            accepted = accepted + on_path
            node = matches.long().argmax(1)
            path.append(node)
        return torch.stack(path, 1), accepted


def choose_tree(acceptance: Sequence[Sequence[float]], nodes: int) -> DraftTree:
    """Return the tree of that many nodes, node 0 included, whose expected number of accepted drafts is largest.

    acceptance: by depth from 1 on, probability that the candidate of each rank is right, assumed to be independent of
    the other depths.
    """
    parents, ranks, depths, probabilities = [-1], [0], [0], [1.0]
    candidates: list[tuple[float, int, int]] = []

    def offer(parent: int, rank: int) -> None:
        depth = depths[parent]
        if depth < len(acceptance) and rank < len(acceptance[depth]):
            heapq.heappush(candidates, (-probabilities[parent] * acceptance[depth][rank], parent, rank))

    offer(0, 0)
    while candidates and len(parents) < nodes:
        probability, parent, rank = heapq.heappop(candidates)
        parents.append(parent)
        ranks.append(rank)
        depths.append(depths[parent] + 1)
        probabilities.append(-probability)
        offer(parent, rank + 1)
        offer(len(parents) - 1, 0)
    return DraftTree(tuple(parents), tuple(ranks))
