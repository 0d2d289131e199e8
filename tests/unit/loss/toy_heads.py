"""Small heads with every kind of parameter, the fp64 truth about their loss, and what ranks compute with them."""

from collections import Counter
from dataclasses import dataclass, field
from typing import Any, Literal

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.tensor_parallel import mappings
from torch import Tensor

from mtp_dist.loss.naive import naive_heads_loss
from mtp_dist.loss.objective import HeadSums, Objective, Vocabulary
from mtp_dist.loss.sequential import sequential_heads_loss
from mtp_dist.model.targets import IGNORE_INDEX
from tests.unit.loss.harness import ALONE, Collectives, naive_logits, shard_rows, true_sums

UPSTREAM = 0.25
MICRO_BATCHES = 2


@dataclass(frozen=True)
class ToyCase:
    heads: int = 3
    separate: bool = False
    z_loss: float = 0.0
    chunk_tokens: int | None = 13
    """Two chunks of 12 positions each: more would cost time at every layout."""
    frozen: tuple[str, ...] = ()
    """Names of parameters without a gradient; `z` is the trunk's output."""
    batch_first: bool = False
    """Whether hidden states are computed as `[B, S, D]` and transposed, so that they are not contiguous."""
    dtype: torch.dtype = torch.float32
    chain: Literal["none", "causal", "anticausal"] = "none"
    """Input of each head: the trunk, the head before, the head after."""
    detached: tuple[int, ...] = ()
    active: int | None = None
    """Number of active heads; all if None."""
    length: int = 8
    batch: int = 3
    width: int = 16
    vocab_size: int = 131

    @property
    def active_heads(self) -> int:
        return self.heads if self.active is None else self.active

    @property
    def scales(self) -> Tensor:
        return F.pad(torch.linspace(1.0, 0.3, self.heads) / 16, (0, 1))

    def is_frozen(self, name: str) -> bool:
        return name.split(".")[0] in self.frozen


@dataclass
class ToyAnswer:
    sums: Tensor
    """HeadSums of all micro-batches, `[n + 1, columns]`."""
    losses: list[Tensor] = field(default_factory=list)
    """One per micro-batch."""
    gradients: dict[str, Tensor | None] = field(default_factory=dict)
    """By name, over all micro-batches; z has one per micro-batch."""
    hooks: Counter[str] = field(default_factory=Counter)
    """Number of calls of each parameter's post-accumulation hook."""
    collectives: list[Counter[str]] = field(default_factory=list)
    """In the last micro-batch's forward and backward pass."""
    calls: Counter[tuple[str, int]] = field(default_factory=Counter)
    """Calls of the heads' methods, by name and head."""


class ToyHeads:
    """Meets `mtp_dist.loss.objective.Heads`.

    Per head a matrix and a norm; for all heads a norm, two biases that autograd gives one tensor, and an unused one.
    """

    token_order_weight = None

    def __init__(self, case: ToyCase, group: dist.ProcessGroup = ALONE, sequence: bool = False) -> None:
        self.case, self.group, self.sequence, self.detached = case, group, sequence, case.detached
        numbers = list(range(1, case.heads + 1))
        self.chains = {"none": [[k] for k in numbers], "causal": [numbers], "anticausal": [numbers[::-1]]}[case.chain]
        self.calls: Counter[tuple[str, int]] = Counter()
        generator, width = torch.Generator().manual_seed(2), case.width

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator)

        full = {"a": normal(width), "b": normal(width), "final_norm": 1 + 0.2 * normal(width), "unused": normal(width)}
        full |= {f"matrix.{k}": normal(width, width) * width**-0.5 for k in numbers}
        full |= {f"norm.{k}": 1 + 0.2 * normal(width) for k in numbers}
        for k in numbers if case.separate else [0]:
            full[f"unembedding.{k}"] = shard_rows(0.5 * normal(case.vocab_size, width), group)
        self.params = {n: p.to(case.dtype).requires_grad_(not case.is_frozen(n)) for n, p in full.items()}

    def _norm(self, name: str, hidden: Tensor) -> Tensor:
        weight = self.params[name]
        return F.rms_norm(hidden, weight.shape, weight, eps=1e-5)  # PyTorch's own eps depends on the precision

    def pre_norm_hidden(self, head: int, inputs: Tensor, context: Any = None) -> Tensor:
        self.calls["pre_norm_hidden", head] += 1
        hidden = inputs + (self.params["a"] + self.params["b"])
        return hidden + torch.tanh(F.linear(self._norm(f"norm.{head}", hidden), self.params[f"matrix.{head}"]))

    def normalize(self, head: int, hidden: Tensor, context: Any = None) -> Tensor:
        self.calls["normalize", head] += 1
        if self.case.batch_first:
            return self._norm("final_norm", hidden.transpose(0, 1).contiguous()).transpose(0, 1)
        return self._norm("final_norm", hidden)

    def logits(self, head: int, normalized: Tensor, context: Any = None) -> Tensor:
        copy, gather = mappings.copy_to_tensor_model_parallel_region, mappings.gather_from_sequence_parallel_region
        hidden = (gather if self.sequence else copy)(normalized)
        return naive_logits(hidden, self.unembedding_weights()[head], self.group, self.case.vocab_size)

    def trained_parameters(self, context: Any = None) -> list[Tensor]:
        return [p for name, p in self.params.items() if not name.startswith("unembedding") and p.requires_grad]

    def unembedding_weights(self, context: Any = None) -> dict[int, Tensor]:
        numbers = range(1, self.case.heads + 1)
        return {k: self.params[f"unembedding.{k if self.case.separate else 0}"] for k in numbers}

    def gradients(self) -> dict[str, Tensor | None]:
        return {name: param.grad for name, param in self.params.items()}


def micro_batch(case: ToyCase, index: int, rank: int = 0, ranks: int = 1) -> tuple[Tensor, Tensor]:
    """Return z `[S, B, D]`, or the rank's part of the sequence, and targets `[n, B, S]` with uneven masks."""
    generator = torch.Generator().manual_seed(index)
    z = torch.randn(case.length, case.batch, case.width, generator=generator)
    shape = (case.heads, case.batch, case.length)
    targets = torch.randint(0, case.vocab_size, shape, generator=generator)
    targets[torch.rand(shape, generator=generator) < torch.linspace(0, 0.8, case.batch)[:, None]] = IGNORE_INDEX
    return z.chunk(ranks)[rank].to(case.dtype).clone().requires_grad_("z" not in case.frozen), targets


def toy_truth(case: ToyCase) -> ToyAnswer:
    """Return fp64's answer, by PyTorch's own loss and autograd, over the whole sequence and vocabulary at once."""
    heads = ToyHeads(case)
    for name, param in heads.params.items():
        rows = param.detach()[: case.vocab_size] if name.startswith("unembedding") else param.detach()
        heads.params[name] = rows.double().requires_grad_(param.requires_grad)
    answer = ToyAnswer(torch.zeros(case.heads + 1, len(HeadSums.COLUMNS), dtype=torch.float64))
    for index in range(MICRO_BATCHES):
        z, targets = micro_batch(case, index)
        z = z.detach().double().requires_grad_(z.requires_grad)
        loss = z.new_zeros(())
        for chain in heads.chains:
            hidden = z
            for head in [head for head in chain if head <= case.active_heads]:
                hidden = heads.pre_norm_hidden(head, hidden.detach() if head in case.detached else hidden)
                normalized = heads.normalize(head, hidden).transpose(0, 1)
                logits = F.linear(normalized, heads.unembedding_weights()[head])
                sums = true_sums(logits.flatten(0, 1), targets[head - 1].flatten())
                loss = loss + case.scales.double()[head - 1] * (sums[0] + case.z_loss * sums[1])
                answer.sums[head - 1] += sums.detach()
        (UPSTREAM * loss).backward()
        answer.losses.append(loss.detach())
        answer.gradients[f"z.{index}"] = z.grad
    answer.gradients |= heads.gradients()
    return answer


def toy_loss(
    mode: str, heads: ToyHeads, z: Tensor, targets: Tensor, scales: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return the loss and the sums."""
    case = heads.case
    objective = Objective(
        targets=targets,
        active_heads=case.active_heads,
        scales=case.scales if scales is None else scales,
        vocabulary=Vocabulary(case.vocab_size, IGNORE_INDEX, heads.group),
        z_loss=case.z_loss,
        chunk_tokens=case.chunk_tokens,
        sequence_parallel=heads.sequence,
    )
    sums = objective.zero_sums(z.dtype)
    if mode == "naive":
        return naive_heads_loss(heads, z, None, objective, sums), sums.tensor
    return sequential_heads_loss(mode, heads, z, None, objective, sums), sums.tensor  # type: ignore[arg-type]


def toy_answers(case: ToyCase, group: dist.ProcessGroup, sequence: bool, modes: list[str]) -> dict[str, ToyAnswer]:
    """On each rank: return the answer in each mode."""
    return {mode: _answer(case, group, sequence, mode) for mode in modes}


def _answer(case: ToyCase, group: dist.ProcessGroup, sequence: bool, mode: str) -> ToyAnswer:
    heads = ToyHeads(case, group, sequence)
    answer = ToyAnswer(torch.zeros(case.heads + 1, len(HeadSums.COLUMNS), dtype=torch.float64))
    for name, param in heads.params.items():
        if param.requires_grad:
            param.register_post_accumulate_grad_hook(lambda _, name=name: answer.hooks.update([name]))
    for index in range(MICRO_BATCHES):
        z, targets = micro_batch(case, index, *((group.rank(), group.size()) if sequence else (0, 1)))
        trunk_output = z * 1.0 if z.requires_grad else z  # not a leaf, like the trunk's output
        with Collectives() as forward:
            loss, sums = toy_loss(mode, heads, trunk_output, targets)
        with Collectives() as backward:
            (UPSTREAM * loss).backward(retain_graph=True)
        if mode != "naive":
            with pytest.raises(RuntimeError, match="a second backward pass through the heads' loss"):
                loss.backward()
        answer.losses.append(loss.detach())
        answer.gradients[f"z.{index}"] = z.grad
        answer.sums += sums
        answer.collectives = [forward.counts, backward.counts]
    answer.gradients |= heads.gradients()
    answer.calls = Counter(heads.calls)
    with torch.no_grad():
        for found, expected in zip(toy_loss(mode, heads, trunk_output, targets), (loss, sums), strict=True):
            same = torch.equal(found, expected) or (mode == "naive" and case.batch_first)  # which sum in another order
            assert same and not found.requires_grad, "an evaluation computes the same"
    return answer
