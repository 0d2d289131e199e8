"""Small heads with every kind of parameter, the fp64 truth about their loss, and what ranks compute with them."""

from collections import Counter
from dataclasses import dataclass, field
from typing import Any, Literal
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

from mtp_dist.config import Config
from mtp_dist.model.targets import IGNORE_INDEX
from tests.unit.loss.harness import Collectives, initialize, shard_rows

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
    losses: list[Tensor]
    """One per micro-batch."""
    sums: Tensor
    """HeadSums of all micro-batches, `[n + 1, columns]`."""
    gradients: dict[str, Tensor | None]
    """By name, over all micro-batches; z has one per micro-batch."""
    hooks: Counter[str] = field(default_factory=Counter)
    """Number of calls of each parameter's post-accumulation hook."""
    collectives: list[Counter[str]] = field(default_factory=list)
    """In the last micro-batch's forward and backward pass."""
    calls: Counter[tuple[str, int]] = field(default_factory=Counter)
    """Calls of the heads' methods, by name and head."""
    second_backward: str = ""
    """Error of a second backward pass through the last micro-batch's loss."""
    evaluation: tuple[Tensor, ...] = ()
    """Loss and sums of the last micro-batch under no_grad."""


class ToyHeads:
    """Meets `mtp_dist.loss.objective.Heads`.

    Per head a matrix and a norm; for all heads a norm, two biases that autograd gives one tensor, and an unused one.
    """

    token_order_weight = None

    def __init__(self, case: ToyCase, rank: int = 0, ranks: int = 1, sequence: bool = False) -> None:
        self.case, self.rank, self.sequence = case, rank, sequence
        self.detached = case.detached
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
            full[f"unembedding.{k}"] = shard_rows(0.5 * normal(case.vocab_size, width), rank, ranks)
        self.params = {n: p.to(case.dtype).requires_grad_(not case.is_frozen(n)) for n, p in full.items()}

    def _norm(self, name: str, hidden: Tensor) -> Tensor:
        weight = self.params[name]
        return F.rms_norm(hidden, weight.shape, weight, eps=1e-5)  # PyTorch's own eps depends on the precision

    def pre_norm_hidden(self, head: int, inputs: Tensor, context: Any = None) -> Tensor:
        self.calls["pre_norm_hidden", head] += 1
        hidden = inputs + (self.params["a"] + self.params["b"])
        return hidden + torch.tanh(F.linear(self._norm(f"norm.{head}", hidden), self.params[f"matrix.{head}"]))

    def normalize(self, head: int, hidden: Tensor) -> Tensor:
        self.calls["normalize", head] += 1
        if self.case.batch_first:
            return self._norm("final_norm", hidden.transpose(0, 1).contiguous()).transpose(0, 1)
        return self._norm("final_norm", hidden)

    def logits(self, head: int, normalized: Tensor, context: Any = None) -> Tensor:
        from megatron.core.tensor_parallel import mappings

        to_all = (
            mappings.gather_from_sequence_parallel_region
            if self.sequence
            else mappings.copy_to_tensor_model_parallel_region
        )
        rows = self.unembedding_weights()[head - 1]
        token_ids = self.rank * len(rows) + torch.arange(len(rows))
        return F.linear(to_all(normalized), rows).masked_fill(token_ids >= self.case.vocab_size, float("-inf"))

    def trained_parameters(self, context: Any = None) -> list[Tensor]:
        return [p for name, p in self.params.items() if not name.startswith("unembedding") and p.requires_grad]

    def unembedding_weights(self, context: Any = None) -> list[Tensor]:
        return [self.params[f"unembedding.{k if self.case.separate else 0}"] for k in range(1, self.case.heads + 1)]

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
    answer = ToyAnswer([], torch.zeros(case.heads + 1, 5, dtype=torch.float64), {})
    for index in range(MICRO_BATCHES):
        z, targets = micro_batch(case, index)
        z = z.detach().double().requires_grad_(z.requires_grad)
        loss, states = z.new_zeros(()), dict[int, Tensor]()
        for k in sorted(range(1, case.active_heads + 1), reverse=case.chain == "anticausal"):
            inputs = states.get({"none": 0, "causal": k - 1, "anticausal": k + 1}[case.chain], z)
            states[k] = heads.pre_norm_hidden(k, inputs.detach() if k in case.detached else inputs)
            valid = targets[k - 1] != IGNORE_INDEX
            normalized = heads.normalize(k, states[k]).transpose(0, 1)[valid]
            logits, chosen = F.linear(normalized, heads.unembedding_weights()[k - 1]), targets[k - 1][valid]
            losses, squares = F.cross_entropy(logits, chosen, reduction="sum"), logits.logsumexp(1).square().sum()
            loss = loss + case.scales.double()[k - 1] * (losses + case.z_loss * squares)
            others = logits.detach().scatter(1, chosen[:, None], float("-inf")).amax(1)
            correct = (logits.detach().gather(1, chosen[:, None])[:, 0] > others).sum()
            row = torch.stack([losses.detach(), squares.detach(), correct, losses.new_zeros(()), valid.sum()])
            answer.sums[k - 1] += row
        (UPSTREAM * loss).backward()
        answer.losses.append(loss.detach())
        answer.gradients[f"z.{index}"] = z.grad
    answer.gradients |= heads.gradients()
    return answer


def toy_loss(mode: str, heads: ToyHeads, z: Tensor, targets: Tensor, scales: Tensor | None = None) -> Any:
    """Return the loss and the sums."""
    from mtp_dist.distributed.topology import tp_group
    from mtp_dist.loss.naive import naive_heads_loss
    from mtp_dist.loss.objective import Objective, Vocabulary
    from mtp_dist.loss.sequential import sequential_heads_loss

    case = heads.case
    objective = Objective(
        targets=targets,
        active_heads=case.active_heads,
        scales=case.scales if scales is None else scales,
        vocabulary=Vocabulary(case.vocab_size, IGNORE_INDEX, tp_group()),
        z_loss=case.z_loss,
        chunk_tokens=case.chunk_tokens,
        sequence_parallel=heads.sequence,
    )
    sums = objective.zero_sums(z.dtype)
    if mode == "naive":
        return naive_heads_loss(heads, z, None, objective, sums), sums
    return sequential_heads_loss(mode, heads, z, None, objective, sums), sums  # type: ignore[arg-type]


def toy_answers(config: Config, cases: list[ToyCase], modes: list[str]) -> list[dict[str, ToyAnswer]]:
    """Return each case's answer in each mode."""
    topology = initialize(config)
    return [{mode: _answer(config, topology, case, mode) for mode in modes} for case in cases]


def _answer(config: Config, topology: Any, case: ToyCase, mode: str) -> ToyAnswer:
    from mtp_dist.loss.objective import HeadSums

    rank, ranks, sequence = topology.tp_rank, topology.tp_size, config.parallel.sequence
    heads = ToyHeads(case, rank, ranks, sequence)
    answer = ToyAnswer([], torch.zeros(case.heads + 1, len(HeadSums.COLUMNS), dtype=torch.float64), {})
    for name, param in heads.params.items():
        if param.requires_grad:
            param.register_post_accumulate_grad_hook(lambda _, name=name: answer.hooks.update([name]))
    for index in range(MICRO_BATCHES):
        z, targets = micro_batch(case, index, *((rank, ranks) if sequence else (0, 1)))
        trunk_output = z * 1.0 if z.requires_grad else z  # not a leaf, like the trunk's output
        with Collectives() as forward:
            loss, sums = toy_loss(mode, heads, trunk_output, targets)
        with Collectives() as backward:
            (UPSTREAM * loss).backward(retain_graph=True)
        answer.losses.append(loss.detach())
        answer.gradients[f"z.{index}"] = None if z.grad is None else z.grad.clone()
        answer.sums += sums.tensor
        answer.collectives = [forward.counts, backward.counts]
    answer.gradients |= {name: None if grad is None else grad.clone() for name, grad in heads.gradients().items()}
    calls = Counter(heads.calls)
    with torch.no_grad():
        evaluated, sums = toy_loss(mode, heads, trunk_output, targets)
    answer.evaluation, answer.calls = (evaluated, sums.tensor), calls
    try:
        loss.backward()
    except (RuntimeError, TypeError, AssertionError) as error:
        answer.second_backward = f"{type(error).__name__}: {error}"
        assert z.grad is None or torch.equal(z.grad, answer.gradients[f"z.{index}"]), "a refused pass adds nothing"
    return answer


def peaks(config: Config, cases: list[tuple[ToyCase, str]], micro_batches: int) -> list[list[int]]:
    """Return the peak memory of every micro-batch's forward and backward pass, for each case and mode.

    The first micro-batch's does not count the gradients, which it allocates and which stay.
    """
    from mtp_dist.bench.measure import peak_bytes

    initialize(config)
    answers = []
    for case, mode in cases:
        heads, found = ToyHeads(case), []
        for index in range(micro_batches):
            z, targets = micro_batch(case, index)

            def step(mode: str = mode, heads: ToyHeads = heads, z: Tensor = z, targets: Tensor = targets) -> None:
                toy_loss(mode, heads, z, targets)[0].backward()

            found.append(peak_bytes(step, z.device))
        found[0] -= sum(gradient.nbytes for gradient in heads.gradients().values() if gradient is not None)
        answers.append(found)
    return answers


def gradient_dtypes(config: Config, case: ToyCase) -> list[tuple[int, torch.dtype]]:
    """Return, by head, the number of the tensor to which its unembedding's gradient is added, and its precision."""
    from mtp_dist.loss import sequential

    initialize(config)
    with mock.patch.object(sequential, "linear_cross_entropy", wraps=sequential.linear_cross_entropy) as kernel:
        toy_loss("eager", ToyHeads(case), *micro_batch(case, 0))
    buffers = [call.args[6].weight for call in kernel.call_args_list]
    return [([id(other) for other in buffers].index(id(buffer)), buffer.dtype) for buffer in buffers]


def gradients_by_head(config: Config, case: ToyCase) -> list[dict[str, Tensor]]:
    """Return the gradients of z and of what the heads share: of the whole loss, then of each head's loss alone."""
    initialize(config)
    answers = []
    for scales in [case.scales, *case.scales.diag()[:-1]]:
        heads = ToyHeads(case)
        z, targets = micro_batch(case, 0)
        toy_loss("eager", heads, z, targets, scales)[0].backward()
        found = {"z": z.grad, **{name: heads.params[name].grad for name in ("a", "final_norm")}}
        answers.append({name: gradient for name, gradient in found.items() if gradient is not None})
    return answers
