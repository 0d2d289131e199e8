"""Acceptance of the heads' candidates, measured on a text: a tree of drafts is chosen from it."""

import torch
import torch.nn.functional as F
from torch import Tensor

from mtp_dist.inference.cache import PositionCache
from mtp_dist.inference.drafting import DraftState, draft_sources, head_hidden
from mtp_dist.inference.model import MTPForCausalLM
from mtp_dist.inference.spans import causal_span

CHUNK = 256
"""Positions whose logits are in memory at once."""


@torch.no_grad()
def candidate_acceptance(model: MTPForCausalLM, token_ids: Tensor, candidates: int) -> list[list[float]]:
    """Return the frequency with which each candidate is what head 1 would choose, by distance from 2 on and by rank.

    token_ids: `[B, S]`, texts as the model will write. Only positions count after whose candidates for all smaller
    distances one was right. Heads that read drafts read the text here instead, so theirs is an upper estimate.
    """
    length, longest = token_ids.shape[1], model.heads.distances[-1]
    positions = torch.arange(length, device=token_ids.device).expand(len(token_ids), -1)
    cache, span = PositionCache(model.num_cache_layers), causal_span(positions, [0])
    hidden, features = model.run_trunk(token_ids, span, cache)
    chosen = torch.cat([model.first_head_logits(part).argmax(-1) for part in hidden.split(CHUNK, 1)], 1)
    state = DraftState(F.pad(token_ids, (0, longest)), positions[:, -1], features, span, cache, longest)
    reached = torch.ones_like(positions[:, : length - longest + 1], dtype=torch.bool)
    acceptance = []
    for distance, (head, offset) in draft_sources(model.heads).items():
        states = head_hidden(model, head, state).roll(offset, 1)[:, : reached.shape[1]]
        target = chosen[:, distance - 1 : distance - 1 + reached.shape[1]]
        previous = token_ids[:, distance - 1 : distance - 1 + reached.shape[1]]
        right = _right_candidates(model, head, states, previous, target, candidates) & reached[..., None]
        right[:, :offset] = reached[:, :offset] = False
        acceptance.append((right.sum((0, 1)) / reached.sum().clamp(min=1)).tolist())
        reached = right.any(-1)
    return acceptance


def _right_candidates(
    model: MTPForCausalLM, head: int, states: Tensor, previous: Tensor, target: Tensor, candidates: int
) -> Tensor:
    """Return `[B, S, candidates]`, True if a head's candidate of that rank is the target `[B, S]`.

    previous: `[B, S]`, the tokens before the targets.
    """
    parts = []
    for part, before, wanted in zip(*(tensor.split(CHUNK, 1) for tensor in (states, previous, target)), strict=True):
        logits = model.draft_logits([head], part.flatten(0, 1)[:, None])[:, 0].view(*part.shape[:2], -1)
        if model.draft_condition:
            logits = logits + model.condition_logits(head, before)
        parts.append(logits.topk(candidates, -1).indices == wanted[..., None])
    return torch.cat(parts, 1)
