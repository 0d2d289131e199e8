"""Self-speculative decoding: the heads draft, the trunk with head 1 verifies all drafts in one forward pass.

Stern et al. 2018 (blockwise parallel decoding, arXiv:1811.03115); Gloeckle et al. 2024 (arXiv:2404.19737, section 3.2).
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList

from mtp_dist.errors import ConfigError
from mtp_dist.inference.adaptive import AdaptiveLength
from mtp_dist.inference.cache import PositionCache
from mtp_dist.inference.drafting import DraftInput, DraftState, draft, draft_after_each
from mtp_dist.inference.request import describe_dynamic_limit
from mtp_dist.inference.sampling import Drafts, Sampler, Texts
from mtp_dist.inference.spans import causal_span, tree_span
from mtp_dist.inference.speculation import Speculation
from mtp_dist.inference.text import StoppingRules, TextBatch
from mtp_dist.inference.tree import DraftTree

if TYPE_CHECKING:
    from mtp_dist.inference.model import MTPForCausalLM


def decode(
    model: MTPForCausalLM,
    input_ids: Tensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    speculation: Speculation,
    streamer: Any = None,
    **model_inputs: Any,
) -> Tensor:
    """Return the prompts `[B, P]` with the tokens generated after them, as a `custom_generate` of transformers."""
    start = time.perf_counter()
    sampler = Sampler(logits_processor, generation_config.do_sample)
    prompts, mask = input_ids.to(model.device), model_inputs.get("attention_mask")
    with torch.inference_mode():
        rules = StoppingRules.from_criteria(stopping_criteria)
        _check_rotary(model, rules.max_length + (max(speculation.tree.depths) - 1 if speculation.tree else 0))
        text = TextBatch(prompts, mask, rules)
        decoder = Decoder(model, text, sampler, speculation, generation_config.cache_implementation == "static")
        appended = decoder.read_prompts(input_ids.shape[1])
        while True:
            if streamer is not None and appended[0]:
                streamer.put(torch.tensor(appended[0]))
            if not text.rows:
                break
            appended = decoder.step()
    if streamer is not None:
        streamer.end()
    speculation.statistics.seconds += time.perf_counter() - start
    pad = generation_config._pad_token_tensor
    return text.padded(input_ids, 0 if pad is None else int(pad))


def _check_rotary(model: MTPForCausalLM, positions: int) -> None:
    """Raise ConfigError if a forward pass up to that position would change the base of the rotary embedding.

    With `dynamic` scaling each position beyond the original length raises it, that of a draft too, while cached keys
    keep the earlier one.
    """
    rotary: Any = model.model.rotary_emb
    if rotary.rope_type == "dynamic" and positions > rotary.original_max_seq_len:
        raise ConfigError(
            f"{describe_dynamic_limit(rotary.original_max_seq_len)}, but {positions} positions are asked for: shorten "
            "the prompt or max_new_tokens"
        )


class Decoder:
    """The state of the generation after one batch of prompts."""

    policy: AdaptiveLength | None = None
    """The choice of the number of tokens to draft; None if it is fixed."""

    def __init__(
        self, model: MTPForCausalLM, text: TextBatch, sampler: Sampler, speculation: Speculation, static_cache: bool
    ) -> None:
        self.model, self.text, self.sampler, self.speculation = model, text, sampler, speculation
        distances, tree = model.heads.distances, speculation.tree
        self.longest = max(tree.depths) + 1 if tree else distances[(speculation.heads or len(distances)) - 1]
        text.reserve(len(tree.parents) if tree else self.longest)
        self.cache = PositionCache(model.num_cache_layers, text.token_ids.shape[1] if static_cache else None)
        self.draft_input = DraftInput(model, self.cache, self.longest)

    def read_prompts(self, columns: int) -> list[list[int]]:
        """Run the prompts and append their first new tokens. Return the appended tokens of each row."""
        text, start = self.text, time.perf_counter()
        rows = len(text.host_lengths)
        positions = torch.arange(columns, device=text.token_ids.device).expand(rows, -1)
        hidden, features = self.model.run_trunk(text.token_ids[:, :columns], causal_span(positions, [0]), self.cache)
        self.draft_input.append(features, positions, text.lengths, text.host_lengths)
        last = hidden[torch.arange(rows, device=hidden.device), text.lengths.to(hidden.device) - 1]
        appended, _, ended = self._append(*self._accept(last[:, None], Drafts(text.token_ids[:, :0], None)), 1)
        self._prompts_read = rows * columns, time.perf_counter() - start
        if self.speculation.heads is None and not self.speculation.tree and self.longest > 1:
            self._set_policy()
        self._remove(ended)
        return appended

    def _set_policy(self) -> None:
        policy = self.model.adaptive_length(len(self.text.rows))
        if policy is not self.policy:
            self.policy = policy
            policy.begin(len(self.text.rows), *self._prompts_read)

    def step(self) -> list[list[int]]:
        """Draft tokens and verify them in one forward pass. Return the appended tokens of each row."""
        if self.speculation.tree:
            return self._step_tree(self.speculation.tree)
        if self.policy is None:
            return self._step_chain(min(self.longest, self.text.remaining))[0]
        policy, start = self.policy, time.perf_counter()
        length = min(policy.choose(), self.text.remaining)
        if not policy.drafting:
            self.draft_input.stop()
        up_to_date = not self.draft_input.is_behind(length)
        appended, accepted = self._step_chain(length)
        policy.record(length, time.perf_counter() - start, accepted, up_to_date)
        return appended

    def _step_chain(self, length: int) -> tuple[list[list[int]], list[int]]:
        """Draft and verify one token at each distance up to `length`.

        Return the appended tokens, and the number of accepted drafts of each text.
        """
        text = self.text
        drafts = self._draft_chain(length)
        positions = (text.lengths - 1)[:, None] + torch.arange(length, device=text.token_ids.device)
        tokens = text.token_ids.gather(1, positions)
        span = causal_span(positions, [known - 1 for known in text.host_lengths])
        hidden, features = self.model.run_trunk(tokens, span, self.cache)
        appended, accepted, ended = self._append(*self._accept(hidden, drafts), length)
        self._gain(features, positions, appended, ended)
        return appended, accepted

    def _draft_chain(self, length: int) -> Drafts:
        """Write drafts at distances 2..length into the text and return them."""
        text = self.text
        if length == 1:
            return Drafts(text.token_ids[:, :0], None)
        state, token = self._draft_state(length)
        tokens, distributions = [], []
        for distance in range(2, length + 1):
            token, distribution = self.sampler.choose_draft(draft(self.model, distance, state, token))
            tokens.append(token)
            distributions.append(distribution)
        drafts = torch.stack(tokens, 1)
        places = text.lengths[:, None] + torch.arange(length - 1, device=drafts.device)
        text.token_ids.scatter_(1, places, drafts)
        drawn = [distribution for distribution in distributions if distribution is not None]
        return Drafts(drafts, torch.stack(drawn, 1) if drawn else None)

    def _draft_state(self, longest: int) -> tuple[DraftState, Tensor]:
        """Return what the heads need to draft up to a distance, and the last known token of each row."""
        text = self.text
        state = self.draft_input.state(text.token_ids, longest, max(text.host_lengths) - 2)
        return state, text.token_ids.gather(1, text.lengths[:, None] - 1).squeeze(1)

    def _accept(self, hidden: Tensor, drafts: Drafts) -> tuple[Tensor, Tensor]:
        """Return what `Sampler.accept` does, for head 1's hidden states `[B, m + 1, D]`."""
        text = self.text

        def before(index: int, column: int) -> Tensor:
            return text.prefix(index, text.host_lengths[index] + column)

        return self.sampler.accept(self._logits(hidden), drafts, Texts(text.rows, len(text.prompts), before))

    def _logits(self, hidden: Tensor) -> Tensor:
        return self.model.first_head_logits(hidden).to(self.text.token_ids.device)

    def _step_tree(self, tree: DraftTree) -> list[list[int]]:
        """Draft a tree of candidates and verify it in one forward pass. Return the appended tokens of each row."""
        text = self.text
        tokens = self._draft_tree(tree)
        starts = text.lengths - 1
        span = tree_span(starts, [known - 1 for known in text.host_lengths], tree)
        hidden, features = self.model.run_trunk(tokens, span, self.cache)

        def before(index: int, node: int) -> Tensor:
            known = text.prefix(index, text.host_lengths[index])
            return torch.cat([known, tokens[index, tree.ancestors[node]][1:]])

        chosen = self.sampler.choose(self._logits(hidden), Texts(text.rows, len(text.prompts), before))
        path, accepted = tree.accepted_path(tokens, chosen)
        appended, host_accepted, ended = self._append(chosen.gather(1, path), accepted, path.shape[1])
        steps = torch.arange(path.shape[1], device=path.device)
        if max(host_accepted):
            self.cache.move(starts[:, None] + path, starts[:, None] + steps, self.model.config.num_hidden_layers)
        kept = features.gather(1, path[..., None].expand(-1, -1, features.shape[2]))
        self._gain(kept, starts[:, None] + steps, appended, ended)
        return appended

    def _draft_tree(self, tree: DraftTree) -> Tensor:
        """Return the tokens of a tree's nodes `[B, N]`."""
        state, token = self._draft_state(max(tree.depths) + 1)
        if self.model.draft_condition:
            return self._draft_conditioned_tree(tree, state, token)
        candidates = [token[:, None]]
        for distance in range(2, max(tree.depths) + 2):
            logits = draft(self.model, distance, state, candidates[-1][:, 0])
            candidates.append(logits.topk(max(tree.ranks) + 1, -1).indices)
        nodes = zip(tree.depths, tree.ranks, strict=True)
        return torch.stack([candidates[depth][:, rank] for depth, rank in nodes], 1)

    def _draft_conditioned_tree(self, tree: DraftTree, state: DraftState, token: Tensor) -> Tensor:
        """Return the tokens of a tree's nodes `[B, N]`, each a candidate for what follows its parent's token."""
        tokens = token[:, None].repeat(1, len(tree.parents))
        for depth in range(1, max(tree.depths) + 1):
            nodes = [node for node, own in enumerate(tree.depths) if own == depth]
            parents = sorted({tree.parents[node] for node in nodes})
            logits = draft_after_each(self.model, depth + 1, state, tokens[:, parents])
            candidates = logits.topk(max(tree.ranks) + 1, -1).indices
            for node in nodes:
                tokens[:, node] = candidates[:, parents.index(tree.parents[node]), tree.ranks[node]]
        return tokens

    def _append(self, tokens: Tensor, accepted: Tensor, longest: int) -> tuple[list[list[int]], list[int], list[bool]]:
        """Append the accepted drafts and the token after them, with which tokens `[b, q]` begin, to each text.

        longest: largest distance of a draft. Return the appended tokens of each text, its number of accepted drafts,
        those after its end included, and whether it has ended.
        """
        text = self.text
        *columns, host_accepted = torch.cat([tokens.T, accepted[None]]).tolist()
        new = [row[: count + 1] for *row, count in zip(*columns, host_accepted, strict=True)]
        appended, ended = text.extend(tokens, new)
        for row, added, count in zip(text.rows, appended, host_accepted, strict=True):
            self.speculation.statistics.count(longest, count, len(added))
            if self.speculation.on_tokens:
                self.speculation.on_tokens(row, added, min(count, len(added)))
        return appended, host_accepted, ended

    def _gain(self, features: Tensor, positions: Tensor, appended: list[list[int]], ended: list[bool]) -> None:
        """Let the heads read the positions that each text has gained, and remove the texts that have ended."""
        gained = [len(tokens) for tokens in appended]
        self.draft_input.append(features, positions, torch.tensor(gained, device=positions.device), gained)
        self._remove(ended)

    def _remove(self, ended: list[bool]) -> None:
        """Remove the texts that have ended from the batch."""
        if not any(ended):
            return
        indices = [index for index, is_ended in enumerate(ended) if not is_ended]
        self.text.keep(indices)
        if not indices:
            return
        if self.policy and self.policy.drafting:
            self._set_policy()  # for fewer texts
        kept = torch.tensor(indices, dtype=torch.long, device=self.text.lengths.device)
        self.cache.keep(kept)
        self.draft_input.keep(kept)
