"""The ways to decode that are compared, and the forward passes that each of them makes."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from mtp_dist.bench.decode.settings import Settings
from mtp_dist.bench.decode.subject import Subject
from mtp_dist.inference.acceptance import candidate_acceptance
from mtp_dist.inference.model import MTPForCausalLM
from mtp_dist.inference.speculation import DecodingStatistics, Speculation
from mtp_dist.inference.tree import DraftTree, choose_tree
from mtp_dist.planner.decoding import DecodingCosts, Device

PLAIN, ADAPTIVE, TREE = "plain", "adaptive", "tree"
TRANSFORMERS, PROMPT_LOOKUP, EXPORTED = "transformers", "transformers, prompt lookup", "transformers, exported heads"
LOOKUP_TOKENS = 10
"""Number of tokens that prompt lookup drafts, that of transformers' documentation."""
TREE_NODES = 16
CANDIDATES = 4
"""Candidates per head that a tree may contain."""
MEASURED_TEXTS = 8
"""Texts that the acceptance of the candidates is measured on."""


@dataclass
class PassLog(DecodingStatistics):
    """The counts of one generation, and the length of each of its forward passes."""

    lengths: list[int] = field(default_factory=list)
    """Largest distance drafted in each forward pass of the batch, 1 without drafts; the first one reads the prompts."""
    _longest: int = 1
    _row: int | None = None

    def count(self, longest: int, accepted: int, tokens: int) -> None:
        super().count(longest, accepted, tokens)
        self._longest = longest

    def on_tokens(self, row: int, tokens: Sequence[int], accepted: int) -> None:
        """Note a new forward pass if its rows begin again."""
        if self._row is None or row <= self._row:
            self.lengths.append(self._longest)
        self._row = row


def modelled_seconds(
    log: PassLog, costs: DecodingCosts, device: Device, settings: Settings, nodes: int | None
) -> float:
    """Return the time that the forward passes need at least. nodes: number of nodes of a tree."""
    context = settings.prompt_tokens + settings.new_tokens / 2
    steps, unread = log.lengths[1:], settings.prompt_tokens + 1.0
    seconds = costs.prompt(settings.prompt_tokens).seconds(device)
    for length in steps:
        gained = unread if length > 1 else 0.0
        seconds += costs.step(length, context, gained, nodes).seconds(device)
        unread = unread - gained + settings.new_tokens / len(steps)
    return seconds


@dataclass
class Variant:
    """One way to decode."""

    name: str
    run: Callable[[], Tensor]
    """Function that decodes and returns the texts `[B, P + N]`."""
    tree: DraftTree | None = None
    logs: list[PassLog] = field(default_factory=list)
    """One per call since they were cleared; none for other programs."""

    @property
    def log(self) -> PassLog:
        """Counts over all calls."""
        total = PassLog()
        for log in self.logs:
            total.tokens += log.tokens
            total.forward_passes += log.forward_passes
            for counts, more in ((total.drafted, log.drafted), (total.accepted, log.accepted)):
                counts.update({distance: counts.get(distance, 0) + n for distance, n in more.items()})
        return total


def own_variant(
    name: str, model: MTPForCausalLM, prompts: Tensor, new_tokens: int, heads: int | None, tree: DraftTree | None = None
) -> Variant:
    def run() -> Tensor:
        log = PassLog()
        variant.logs.append(log)
        result: Tensor = model.generate(
            prompts,
            attention_mask=torch.ones_like(prompts),
            max_new_tokens=new_tokens,
            do_sample=False,
            speculation=Speculation(heads, tree, log.on_tokens, log),
        )
        return result

    variant = Variant(name, run, tree)
    return variant


def own_variants(subject: Subject, prompts: Tensor, texts: Tensor, settings: Settings) -> list[Variant]:
    """Return the ways with heads. texts: the prompts with their continuation."""
    heads = subject.config.heads
    new = settings.new_tokens
    chains = [own_variant(f"k = {k}", subject.model, prompts, new, k) for k in range(2, heads.count + 1)]
    acceptance = candidate_acceptance(subject.model, texts[:MEASURED_TEXTS], CANDIDATES)
    tree = own_variant(TREE, subject.model, prompts, new, None, choose_tree(acceptance, TREE_NODES))
    return [*chains, own_variant(ADAPTIVE, subject.model, prompts, new, None), tree]


def transformers_variants(subject: Subject, prompts: Tensor, new_tokens: int) -> list[Variant]:
    """Return transformers' own decoding of the same weights, and its ways to draft, which take one text at a time."""
    options = {"attention_mask": torch.ones_like(prompts), "max_new_tokens": new_tokens, "do_sample": False}
    llama, exported, one = subject.llama, subject.exported, len(prompts) == 1
    runs: dict[str, Callable[[], Any]] = {}
    if llama:
        runs[TRANSFORMERS] = lambda: llama.generate(prompts, **options)
    if llama and one:
        runs[PROMPT_LOOKUP] = lambda: llama.generate(prompts, **options, prompt_lookup_num_tokens=LOOKUP_TOKENS)
    if exported and one:
        runs[EXPORTED] = lambda: exported.generate(prompts, **options)
    return [Variant(name, run) for name, run in runs.items()]
