"""Small heads with every kind of weight in them, and what the tests of the sequential loss run with them on ranks."""

import functools
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Literal
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

from mtp_dist.config import Config
from tests.unit.loss.linear_on_ranks import Collectives, shard_of

UPSTREAM = 0.25
LENGTH, BATCH, WIDTH = 8, 3, 16
VOCAB_SIZE = 131
MICRO_BATCHES = 2


@dataclass(frozen=True)
class ToyCase:
    heads: int = 3
    separate: bool = False
    z_loss: float = 0.0
    chunk_tokens: int | None = 13
    """Two chunks, of 12 tokens each: every one more costs time in all layouts."""
    frozen: tuple[str, ...] = ()
    """Names of weights without a gradient; `z` is the trunk's output."""
    batch_first: bool = False
    """Hidden states are found as `[B, S, D]` and transposed: not contiguous."""
    dtype: torch.dtype = torch.float32
    chain: Literal["none", "causal", "anticausal"] = "none"
    """Which head each one reads: the trunk, the one before, the one after."""
    detached: tuple[int, ...] = ()
    active: int | None = None
    """Heads that run, the first ones; all by default."""
    length: int = LENGTH
    batch: int = BATCH
    width: int = WIDTH
    vocab_size: int = VOCAB_SIZE


@dataclass
class ToyAnswer:
    losses: list[Tensor]
    """Of each micro-batch."""
    sums: list[Tensor]
    """Losses, hits and valid targets of all micro-batches, `[3, n]`."""
    gradients: dict[str, Tensor | None]
    """By name, over all micro-batches but for z, which has one each."""
    hooks: Counter[str] = field(default_factory=Counter)
    """How often the hooks of each weight ran that see its gradient accumulated."""
    collectives: list[Counter[str]] = field(default_factory=list)
    """Of the last micro-batch's forward and backward pass."""


def toy_weights(case: ToyCase, rank: int, ranks: int) -> dict[str, Tensor]:
    """Per head a matrix and a norm; for all a norm, two biases that autograd gives one tensor, one unused."""
    generator = torch.Generator().manual_seed(2)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    width, heads = case.width, range(1, case.heads + 1)
    whole = {"a": normal(width), "b": normal(width), "final_norm": 1 + 0.2 * normal(width), "unused": normal(width)}
    whole |= {f"matrix.{k}": normal(width, width) * width**-0.5 for k in heads}
    whole |= {f"norm.{k}": 1 + 0.2 * normal(width) for k in heads}
    for k in heads if case.separate else [0]:
        whole[f"unembedding.{k}"] = shard_of(0.5 * normal(case.vocab_size, width), rank, ranks)
    return {
        name: weight.to(case.dtype).requires_grad_(name.split(".")[0] not in case.frozen)
        for name, weight in whole.items()
    }


def micro_batch(case: ToyCase, index: int, rank: int, ranks: int) -> tuple[Tensor, Tensor]:
    """z `[S, B, D]` (this rank's part of the sequence if it is cut), and targets `[n, B, S]` with uneven masks."""
    from mtp_dist.model.targets import IGNORE_INDEX

    generator = torch.Generator().manual_seed(index)
    z = torch.randn(case.length, case.batch, case.width, generator=generator)
    shape = (case.heads, case.batch, case.length)
    targets = torch.randint(0, case.vocab_size, shape, generator=generator)
    targets[torch.rand(shape, generator=generator) < torch.linspace(0, 0.8, case.batch)[:, None]] = IGNORE_INDEX
    return z.chunk(ranks)[rank].to(case.dtype).clone().requires_grad_("z" not in case.frozen), targets


def unembedding_of(case: ToyCase, distance: int) -> str:
    return f"unembedding.{distance if case.separate else 0}"


def norm(x: Tensor, weight: Tensor) -> Tensor:
    return F.rms_norm(x, weight.shape, weight, eps=1e-5)  # PyTorch's own eps depends on the precision


def toy_state(weights: dict[str, Tensor], head: int, before: Tensor) -> Tensor:
    """Head `head`'s state, in the precision of weights and the state before."""
    x = before + (weights["a"] + weights["b"])
    return x + torch.tanh(F.linear(norm(x, weights[f"norm.{head}"]), weights[f"matrix.{head}"]))


def toy_hidden(case: ToyCase, weights: dict[str, Tensor], _: int, state: Tensor) -> Tensor:
    """Any head's hidden states."""
    x = state.transpose(0, 1).contiguous() if case.batch_first else state
    x = norm(x, weights["final_norm"])
    return x.transpose(0, 1) if case.batch_first else x


def toy_chains(case: ToyCase) -> list[list[int]]:
    numbers = list(range(1, case.heads + 1))
    chains = {"none": [[k] for k in numbers], "causal": [numbers], "anticausal": [numbers[::-1]]}
    return chains[case.chain]


def active_heads(case: ToyCase) -> int:
    return case.heads if case.active is None else case.active


def toy_scales(case: ToyCase) -> Tensor:
    return torch.linspace(1.0, 0.3, case.heads) / 16


def toy_heads(case: ToyCase, weights: dict[str, Tensor], config: Config, rank: int) -> Any:
    from megatron.core.tensor_parallel import mappings

    from mtp_dist.loss.objective import Heads

    unembeddings = [weights[unembedding_of(case, k)] for k in range(1, case.heads + 1)]

    def logits(k: int, x: Tensor) -> Tensor:
        if config.parallel.sequence:
            x = mappings.gather_from_sequence_parallel_region(x)
        else:
            x = mappings.copy_to_tensor_model_parallel_region(x)
        rows = unembeddings[k - 1]
        entries = rank * len(rows) + torch.arange(len(rows))
        return F.linear(x, rows).masked_fill(entries >= case.vocab_size, float("-inf"))

    trained = [w for name, w in weights.items() if not name.startswith("unembedding") and w.requires_grad]
    return Heads(
        chains=toy_chains(case),
        detached=case.detached,
        state=functools.partial(toy_state, weights),
        hidden=functools.partial(toy_hidden, case, weights),
        logits=logits,
        weights=trained,
        unembeddings=unembeddings,
    )


def toy_objective(case: ToyCase, targets: Tensor, config: Config) -> Any:
    from mtp_dist.distributed.topology import tp_group
    from mtp_dist.loss.linear_cross_entropy import Vocabulary
    from mtp_dist.loss.objective import Objective
    from mtp_dist.model.targets import IGNORE_INDEX

    vocabulary = Vocabulary(case.vocab_size, IGNORE_INDEX, tp_group())
    return Objective(
        targets=targets,
        active=active_heads(case),
        scales=toy_scales(case),
        vocabulary=vocabulary,
        z_loss=case.z_loss,
        chunk_tokens=case.chunk_tokens,
        sequence_parallel=config.parallel.sequence,
    )


def _states(case: ToyCase, weights: dict[str, Tensor], z: Tensor) -> dict[int, Tensor]:
    """By active head."""
    states: dict[int, Tensor] = {}
    for k in sorted(range(1, active_heads(case) + 1), reverse=case.chain == "anticausal"):
        neighbour = {"none": 0, "causal": k - 1, "anticausal": k + 1}[case.chain]
        before = states.get(neighbour, z)
        states[k] = toy_state(weights, k, before.detach() if k in case.detached else before)
    return states


@functools.cache
def toy_truth(case: ToyCase) -> ToyAnswer:
    """The answer of fp64, PyTorch's own loss and autograd, over the whole sequence and vocabulary at once."""
    from mtp_dist.model.targets import IGNORE_INDEX

    weights = toy_weights(case, 0, 1)
    real = {name: w[: case.vocab_size] if name.startswith("unembedding") else w for name, w in weights.items()}
    exact = {name: w.detach().double().requires_grad_(weights[name].requires_grad) for name, w in real.items()}
    answer = ToyAnswer([], [torch.zeros(case.heads, dtype=torch.float64) for _ in range(3)], {})
    for index in range(MICRO_BATCHES):
        z, targets = micro_batch(case, index, 0, 1)
        z = z.detach().double().requires_grad_(z.requires_grad)
        loss = z.new_zeros(())
        scales = toy_scales(case).double()
        for k, state in _states(case, exact, z).items():
            scale = scales[k - 1]
            logits = F.linear(toy_hidden(case, exact, k, state), exact[unembedding_of(case, k)]).transpose(0, 1)
            valid = targets[k - 1] != IGNORE_INDEX
            logits, chosen = logits[valid], targets[k - 1][valid]
            losses = F.cross_entropy(logits, chosen, reduction="sum")
            loss = loss + scale * (losses + case.z_loss * logits.logsumexp(1).square().sum())
            others = logits.detach().scatter(1, chosen[:, None], float("-inf")).amax(1)
            correct = (logits.detach().gather(1, chosen[:, None])[:, 0] > others).sum()
            for total, value in zip(answer.sums, (losses.detach(), correct, valid.sum()), strict=True):
                total[k - 1] += value
        (UPSTREAM * loss).backward()
        answer.losses.append(loss.detach())
        answer.gradients[f"z.{index}"] = z.grad
    answer.gradients |= {name: weight.grad for name, weight in exact.items()}
    return answer


def loss_of(mode: str) -> Callable[..., Tensor]:
    from mtp_dist.loss.naive import naive_heads_loss
    from mtp_dist.loss.sequential import sequential_heads_loss

    if mode == "naive":
        return naive_heads_loss
    return lambda *arguments: sequential_heads_loss(mode, *arguments)  # type: ignore[arg-type]


def initialize(config: Config) -> Any:
    from mtp_dist.distributed.device import select_device
    from mtp_dist.distributed.topology import initialize_topology

    return initialize_topology(config, select_device(config))


def toy_answers(config: Config, cases: list[ToyCase], modes: list[str]) -> list[dict[str, ToyAnswer]]:
    """For each case the answers of each mode."""
    topology = initialize(config)
    return [{mode: _answer(config, topology, case, mode) for mode in modes} for case in cases]


def _answer(config: Config, topology: Any, case: ToyCase, mode: str) -> ToyAnswer:
    from mtp_dist.loss.objective import HeadSums

    rank, ranks = topology.tp_rank, topology.tp_size
    weights = toy_weights(case, rank, ranks)
    heads, sums = toy_heads(case, weights, config, rank), HeadSums.zeros(case.heads, torch.device("cpu"))
    answer = ToyAnswer([], [], {})
    for name, weight in weights.items():
        if weight.requires_grad:
            weight.register_post_accumulate_grad_hook(lambda _, name=name: answer.hooks.update([name]))
    for index in range(MICRO_BATCHES):
        z, targets = micro_batch(case, index, *((rank, ranks) if config.parallel.sequence else (0, 1)))
        trunk_output = z * 1.0 if z.requires_grad else z  # as the trunk gives it: not a leaf
        with Collectives() as forward:
            loss = loss_of(mode)(heads, trunk_output, toy_objective(case, targets, config), sums)
        with Collectives() as backward:
            (UPSTREAM * loss).backward()
        answer.losses.append(loss.detach())
        answer.gradients[f"z.{index}"] = z.grad
        answer.collectives = [forward.counts, backward.counts]
    answer.sums = [sums.losses, sums.correct, sums.targets]
    answer.gradients |= {name: weight.grad for name, weight in weights.items()}
    return answer


def sums_without_gradients(config: Config, case: ToyCase, modes: list[str]) -> list[tuple[bool, list[Tensor]]]:
    """Under no_grad: whether the loss has a graph, and [loss, losses, hits, valid targets] of each mode."""
    from mtp_dist.loss.objective import HeadSums

    initialize(config)
    weights = toy_weights(case, 0, 1)
    z, targets = micro_batch(case, 0, 0, 1)
    answers = []
    for mode in modes:
        sums = HeadSums.zeros(case.heads, z.device)
        heads, objective = toy_heads(case, weights, config, 0), toy_objective(case, targets, config)
        with torch.no_grad():
            loss = loss_of(mode)(heads, z, objective, sums)
        assert all(weight.grad is None for weight in weights.values())
        answers.append((loss.requires_grad, [loss, sums.losses, sums.correct, sums.targets]))
    return answers


def runs_of_heads(config: Config, case: ToyCase, modes: list[str]) -> dict[str, Counter[tuple[str, int]]]:
    """How often each head's state and hidden states are computed in a forward and a backward pass, by mode."""
    from mtp_dist.loss.objective import HeadSums

    initialize(config)
    runs: dict[str, Counter[tuple[str, int]]] = {}
    for mode in modes:
        heads, counts = toy_heads(case, toy_weights(case, 0, 1), config, 0), Counter[tuple[str, int]]()

        def counting(name: str, function: Any, counts: Counter[tuple[str, int]] = counts) -> Any:
            def count_and_call(head: int, tensor: Tensor) -> Tensor:
                counts[name, head] += 1
                result: Tensor = function(head, tensor)
                return result

            return count_and_call

        heads = replace(heads, state=counting("state", heads.state), hidden=counting("hidden", heads.hidden))
        z, targets = micro_batch(case, 0, 0, 1)
        sums = HeadSums.zeros(case.heads, z.device)
        loss_of(mode)(heads, z, toy_objective(case, targets, config), sums).backward()
        runs[mode] = counts
    return runs


def backward_twice(config: Config, case: ToyCase, modes: list[str]) -> dict[str, str]:
    """Type and message of what a second backward pass through one loss raises, by mode."""
    initialize(config)
    return {mode: _backward_twice(config, case, mode) for mode in modes}


def _backward_twice(config: Config, case: ToyCase, mode: str) -> str:
    from mtp_dist.loss.objective import HeadSums

    z, targets = micro_batch(case, 0, 0, 1)
    heads = toy_heads(case, toy_weights(case, 0, 1), config, 0)
    sums = HeadSums.zeros(case.heads, z.device)
    loss = loss_of(mode)(heads, z * 1.0, toy_objective(case, targets, config), sums)
    loss.backward(retain_graph=True)
    assert z.grad is not None
    first = z.grad.clone()
    try:
        loss.backward()
    except (RuntimeError, TypeError, AssertionError) as error:
        assert torch.equal(z.grad, first), "a refused pass adds nothing"
        return f"{type(error).__name__}: {error}"
    return "nothing"


def peaks(config: Config, cases: list[tuple[ToyCase, str]], micro_batches: int) -> list[list[int]]:
    """For each case and mode the most memory of every micro-batch's forward and backward pass.

    The first micro-batch's is without the gradients that stay, which it allocates.
    """
    initialize(config)
    return [_peaks(config, case, mode, micro_batches) for case, mode in cases]


def _peaks(config: Config, case: ToyCase, mode: str, micro_batches: int) -> list[int]:
    from mtp_dist.bench.measure import peak_bytes
    from mtp_dist.loss.objective import HeadSums

    weights = toy_weights(case, 0, 1)
    heads, sums = toy_heads(case, weights, config, 0), HeadSums.zeros(case.heads, torch.device("cpu"))

    def peak(index: int) -> int:
        z, targets = micro_batch(case, index, 0, 1)
        objective = toy_objective(case, targets, config)
        return peak_bytes(lambda: loss_of(mode)(heads, z, objective, sums).backward(), z.device)

    first, *later = (peak(index) for index in range(micro_batches))
    kept = sum(weight.grad.nbytes for weight in weights.values() if weight.grad is not None)
    return [first - kept, *later]


def gradient_dtypes(config: Config, cases: list[ToyCase]) -> list[list[tuple[int, torch.dtype]]]:
    """For each case and head, which tensor its unembedding's gradient was added to (a number), in which precision."""
    initialize(config)
    return [_gradient_dtypes(config, case) for case in cases]


def _gradient_dtypes(config: Config, case: ToyCase) -> list[tuple[int, torch.dtype]]:
    from mtp_dist.loss import sequential
    from mtp_dist.loss.objective import HeadSums

    z, targets = micro_batch(case, 0, 0, 1)
    heads = toy_heads(case, toy_weights(case, 0, 1), config, 0)
    with mock.patch.object(sequential, "linear_cross_entropy", wraps=sequential.linear_cross_entropy) as kernel:
        loss_of("eager")(heads, z, toy_objective(case, targets, config), HeadSums.zeros(case.heads, z.device))
    requests = [call.args[5] for call in kernel.call_args_list]
    totals = [id(request.weight) for request in requests]
    return [(totals.index(id(request.weight)), request.weight.dtype) for request in requests]


def gradients_by_head(config: Config, case: ToyCase) -> list[dict[str, Tensor]]:
    """The gradients of z and of what the heads share: of the whole loss, then of each head's loss alone."""
    from mtp_dist.loss.objective import HeadSums

    initialize(config)
    scales = torch.cat([toy_scales(case)[None], toy_scales(case).diag()])
    answers = []
    for scale in scales:
        weights = toy_weights(case, 0, 1)
        z, targets = micro_batch(case, 0, 0, 1)
        heads, objective = toy_heads(case, weights, config, 0), toy_objective(case, targets, config)
        loss_of("eager")(heads, z, replace(objective, scales=scale), HeadSums.zeros(case.heads, z.device)).backward()
        found = {"z": z.grad, **{name: weights[name].grad for name in ("a", "final_norm")}}
        answers.append({name: gradient for name, gradient in found.items() if gradient is not None})
    return answers
