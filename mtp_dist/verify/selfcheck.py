"""Does this machine, at this layout, compute what one plain PyTorch process computes?"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from mtp_dist.config import Config
from mtp_dist.distributed.topology import Topology
from mtp_dist.engine.engine import build_engine
from mtp_dist.engine.tensor_shards import capture_first_gradients, full_tensors, master_weight
from mtp_dist.loss.schedule import HeadSchedule, head_schedule
from mtp_dist.model.parameters import parameter_shapes
from mtp_dist.planner.flops import parameter_counts
from mtp_dist.verify.reference_training import (
    ReferenceStep,
    ReferenceTraining,
    local_batch,
    mean_losses,
    random_batch,
)

PARAMETER_LIMIT = 20_000_000
"""A larger model is checked at reduced widths: every rank has the full reference, in fp64."""
WORK_LIMIT = 40_000_000_000
"""So is a model of which a rank would do more than so many parameters * tokens: a minute of one CPU core."""
MICRO_BATCHES_PER_STAGE = 2
LENGTH_LIMIT = 2048
"""Longer samples are shortened: the reference's attention has S x S scores for each attention head, in fp64."""

UNIT_ROUNDOFF = {"fp32": 2.0**-24, "bf16": 2.0**-8}
ROUNDINGS_OUTSIDE_LAYERS = 8
"""Of the embedded token, the normalized hidden states, their gradient, that of a weight, and what lies between."""
FIRST_STEP = 0.02
"""Learning rate over the smallest standard deviation of initial weights."""


@dataclass(frozen=True)
class Comparison:
    """The worst relative error of one quantity over all ranks, and where it is."""

    quantity: str
    precision: str
    error: float
    tolerance: float
    where: str

    @property
    def passed(self) -> bool:
        return self.error <= self.tolerance


def reduced(config: Config) -> Config:
    """Return the configuration to check: the same layout and kinds, at small widths if the model is
    large.

    Prediction heads, precision and every degree stay, and whether queries are grouped; so do the trunk layers of an
    explicit partition, and the tokens of a micro-batch: if its samples are shortened, there are more of them.
    """
    parallel, train = config.parallel, config.train
    model = config.model.model_copy(update={"vocab_size": min(config.vocab_size, 1000)})
    length, samples = train.sequence_length, train.micro_batch_size
    if length > LENGTH_LIMIT:
        length = LENGTH_LIMIT // parallel.tensor * parallel.tensor
        samples = -(-samples * train.sequence_length // length)
    parameters = parameter_counts(config.model_copy(update={"model": model})).total
    work = parameters * MICRO_BATCHES_PER_STAGE * samples * length / parallel.tensor
    if parameters > PARAMETER_LIMIT or work > WORK_LIMIT:
        explicit = not isinstance(parallel.partition, str)
        groups = parallel.tensor
        attention_heads = groups * min(2, model.num_attention_heads // model.query_groups)
        model = model.model_copy(
            update={
                "hidden_size": 8 * attention_heads,
                "num_attention_heads": attention_heads,
                "num_query_groups": groups,
                "ffn_hidden_size": 32 * parallel.tensor,
                "trunk_layers": model.trunk_layers if explicit else min(model.trunk_layers, 2 * parallel.pipeline),
            }
        )
    train = train.model_copy(update={"sequence_length": length, "micro_batch_size": samples})
    return config.model_copy(update={"model": model, "train": train})


def with_small_batch(config: Config, data_parallel: int) -> Config:
    """Return the configuration with MICRO_BATCHES_PER_STAGE for each pipeline stage."""
    micro_batches = MICRO_BATCHES_PER_STAGE * config.parallel.pipeline
    samples = config.train.micro_batch_size * micro_batches * data_parallel
    return config.model_copy(update={"train": config.train.model_copy(update={"global_batch_size": samples})})


def with_gentle_step(config: Config) -> Config:
    """Return the configuration with a learning rate of FIRST_STEP times the smallest initial weights' deviation.

    Adam's first step is about lr * sign(gradient). Where a gradient is near 0 rounding decides its sign, so the user's
    rate would decide how far correct layouts may lie apart.
    """
    depth = config.model.trunk_layers + config.heads.layers_per_head
    rate = FIRST_STEP * config.model.init_std / math.sqrt(2 * depth)
    return config.model_copy(update={"optimizer": config.optimizer.model_copy(update={"lr": rate})})


def tolerances(config: Config, data_parallel: int) -> dict[str, float]:
    """Return the largest relative error by quantity that rounding explains: that of independent roundings in series.

    Each layer rounds the sums with its two branches, forward and backward; with tensor parallelism each of them is a
    sum over ranks, rounded as often. Matrix products and other long sums add in fp32.
    """
    model, heads, parallel, train = config.model, config.heads, config.parallel, config.train
    chained = heads.kind in ("causal", "anticausal", "sequential")
    depth = model.trunk_layers + heads.layers_per_head * (heads.count if chained else 1)
    roundings = ROUNDINGS_OUTSIDE_LAYERS + 4 * depth * parallel.tensor
    if parallel.grad_reduce_dtype == "bf16":
        roundings += data_parallel
    additions = max(
        train.micro_batch_size * train.sequence_length, config.vocab_size, model.ffn_size, model.hidden_size
    )
    of_sums = UNIT_ROUNDOFF["fp32"] * math.sqrt(additions)
    gradients = UNIT_ROUNDOFF[train.precision] * math.sqrt(roundings) + of_sums
    return {
        # A mean over many tokens, whose errors differ in sign.
        "losses": UNIT_ROUNDOFF[train.precision] + of_sums,
        "gradient norm": gradients,
        "gradients": gradients,
        # About that share of the gradient's signs is wrong, and Adam's first step goes the other way there.
        "updated weights": 2 * FIRST_STEP * math.sqrt(gradients),
    }


def relative_error(value: Tensor, truth: Tensor) -> float:
    """|value - truth| / |truth| in the 2-norm; absolute where the truth is 0, infinite where value is not finite."""
    truth = truth.double().cpu()
    error = float((value.double().cpu() - truth).norm() / (truth.norm() or 1.0))
    return error if math.isfinite(error) else math.inf  # NaN would lose every comparison


def worst(errors: Mapping[str, float]) -> tuple[float, str]:
    """The largest error and its name over all ranks."""
    local = max(((error, name) for name, error in errors.items()), default=(0.0, ""))
    everywhere: list[tuple[float, str]] = [(0.0, "")] * dist.get_world_size()
    dist.all_gather_object(everywhere, local)
    return max(everywhere)


def names_over_ranks(tensors: Mapping[str, Tensor]) -> set[str]:
    """The names that at least one rank has."""
    everywhere: list[set[str]] = [set()] * dist.get_world_size()
    dist.all_gather_object(everywhere, set(tensors))
    return set().union(*everywhere)


class Truth(NamedTuple):
    """What the reference computes on a batch."""

    samples: Tensor
    targets: Tensor
    step: ReferenceStep
    weights: dict[str, Tensor]
    """After the update, by global name."""


def reference_truth(config: Config, topology: Topology) -> Truth:
    """Return one step of the reference; the ranks share the work."""
    samples, targets = random_batch(config)
    training = ReferenceTraining(config, topology.device, topology.rank, topology.world_size)
    step = training.step(samples, targets, config.optimizer.lr, all_heads_schedule(config))
    return Truth(samples, targets, step, {name: w.detach() for name, w in training.model.named_weights().items()})


def all_heads_schedule(config: Config) -> HeadSchedule:
    """Return the weights of step 1, with all heads active."""
    return HeadSchedule(head_schedule(config, 1).loss_weights, config.heads.count)


def errors_of_sharded(config: Config, topology: Topology, truth: Truth) -> dict[str, dict[str, float]]:
    """Return the relative errors of one step of the sharded model on the same batch, by quantity and name."""
    engine = build_engine(config, topology)
    shapes = parameter_shapes(config)
    batch = local_batch(config, topology, truth.samples, truth.targets)
    with capture_first_gradients(engine, shapes) as gradients:
        result = engine.train_step(batch, config.optimizer.lr, all_heads_schedule(config))
    updated = dict(full_tensors(engine.stage, shapes, topology, master_weight))
    compared_by_any = [names_over_ranks(tensors) for tensors in (gradients, updated)]
    assert compared_by_any == [set(shapes)] * 2, "every weight is compared"
    kinds = ("head", "distillation of head", "token order of head")
    names = [f"{kind} {k}" for kind in kinds for k in range(1, config.heads.count + 1)]
    computed = mean_losses(result.heads, config.heads.count)
    losses = zip(names, computed.flatten(), truth.step.losses.flatten(), strict=True)
    norms = torch.tensor([result.grad_norm, truth.step.grad_norm], dtype=torch.float64)
    of_gradients = {name: relative_error(value, truth.step.gradients[name]) for name, value in gradients.items()}
    if (name := "embedding.weight") in gradients:
        # The longest sum over positions: a seventh of the tokens.
        token = int(truth.samples.flatten().mode().values)
        row, true_row = gradients[name][token], truth.step.gradients[name][token]
        of_gradients[f"{name}, token {token}"] = relative_error(row, true_row)
    return {
        "losses": {name: relative_error(value, loss) for name, value, loss in losses},
        "gradient norm": {"all parameters": relative_error(*norms)},
        "gradients": of_gradients,
        "updated weights": {name: relative_error(value, truth.weights[name]) for name, value in updated.items()},
    }


def selfcheck(config: Config, topology: Topology) -> list[Comparison]:
    """Return every comparison at the configuration's layout: in fp32, where agreement must be close, then in its
    precision."""
    config = with_small_batch(with_gentle_step(reduced(config)), topology.dp_size)
    truth = reference_truth(config, topology)
    comparisons = []
    for precision in dict.fromkeys(["fp32", config.train.precision]):
        train = config.train.model_copy(update={"precision": precision})
        in_precision = config.model_copy(update={"train": train})
        bounds = tolerances(in_precision, topology.dp_size)
        for quantity, of_names in errors_of_sharded(in_precision, topology, truth).items():
            error, where = worst(of_names)
            comparisons.append(Comparison(quantity, precision, error, bounds[quantity], where))
    return comparisons
