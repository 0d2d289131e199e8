"""Comparison of one sharded training step with one of the plain reference, on this machine and at this layout."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from mtp_dist.config import Config
from mtp_dist.distributed.collectives import all_gather_objects
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
    set_nonzero_weights,
)

PARAMETER_LIMIT = 20_000_000
"""A larger model is checked at reduced widths: every rank has the full reference, in fp64."""
WORK_LIMIT = 40_000_000_000
"""A model with more parameters * tokens per rank than this is reduced too: it takes a minute of one CPU core."""
MICRO_BATCHES_PER_STAGE = 2
LENGTH_LIMIT = 2048
"""Longer samples are shortened: the reference's attention has S x S scores per attention head, in fp64."""

UNIT_ROUNDOFF = {"fp32": 2.0**-24, "bf16": 2.0**-8}
ROUNDINGS_OUTSIDE_LAYERS = 8
"""Roundings of the embedded token, the normalized hidden states, their gradient, a parameter's gradient, and of the
values between them."""
RELATIVE_LEARNING_RATE = 0.02
"""Ratio of the learning rate to the smallest standard deviation of initial parameters."""


@dataclass(frozen=True)
class Comparison:
    """The largest relative error of one quantity over all ranks, and the tensor or loss that has it."""

    quantity: str
    precision: str
    error: float
    tolerance: float
    where: str

    @property
    def passed(self) -> bool:
        return self.error <= self.tolerance


def reduced(config: Config) -> Config:
    """Return the configuration to check: the same layout and kinds, at small widths if the model is large.

    Prediction heads, precision, all degrees, grouped queries, the building blocks of the layers and the trunk layers of
    an explicit partition are kept, as is the number of tokens per micro-batch: if samples are shortened, there are more
    of them.
    """
    parallel, train = config.parallel, config.train
    model = config.model.model_copy(update={"vocab_size": min(config.vocab_size, 1000)})
    length, samples = train.sequence_length, train.micro_batch_size
    if length > LENGTH_LIMIT:
        length = LENGTH_LIMIT // parallel.tensor * parallel.tensor
        samples = -(-samples * train.sequence_length // length)
        if model.sliding_window:  # it stays shorter than the samples
            model = model.model_copy(update={"sliding_window": min(model.sliding_window, length // 2)})
    parameters = parameter_counts(config.model_copy(update={"model": model})).total
    work = parameters * MICRO_BATCHES_PER_STAGE * samples * length / parallel.tensor
    if parameters > PARAMETER_LIMIT or work > WORK_LIMIT:
        explicit = not isinstance(parallel.partition, str)
        attention_heads = parallel.tensor * min(2, model.num_attention_heads // model.query_groups)
        model = model.model_copy(
            update={
                "hidden_size": 8 * attention_heads,
                "num_attention_heads": attention_heads,
                "num_query_groups": parallel.tensor,
                "kv_channels": model.kv_channels and 12,
                "rotary_percent": 1.0 if model.rotary_percent == 1 else 0.5,
                "ffn_hidden_size": 32 * parallel.tensor,
                "trunk_layers": model.trunk_layers if explicit else min(model.trunk_layers, 2 * parallel.pipeline),
            }
        )
    train = train.model_copy(update={"sequence_length": length, "micro_batch_size": samples})
    return config.model_copy(update={"model": model, "train": train})


def with_small_batch(config: Config, data_parallel: int) -> Config:
    """Return the configuration with MICRO_BATCHES_PER_STAGE micro-batches per pipeline stage."""
    micro_batches = MICRO_BATCHES_PER_STAGE * config.parallel.pipeline
    samples = config.train.micro_batch_size * micro_batches * data_parallel
    return config.model_copy(update={"train": config.train.model_copy(update={"global_batch_size": samples})})


def with_gentle_step(config: Config) -> Config:
    """Return the configuration with a learning rate of RELATIVE_LEARNING_RATE times the smallest standard deviation.

    Adam's first step is about lr * sign(gradient), and rounding decides the sign of a gradient near 0: the difference
    between correct layouts would depend on the user's rate.
    """
    depth = config.model.trunk_layers + config.heads.layers_per_head
    rate = RELATIVE_LEARNING_RATE * config.model.init_std / math.sqrt(2 * depth)
    return config.model_copy(update={"optimizer": config.optimizer.model_copy(update={"lr": rate})})


def tolerances(config: Config, data_parallel: int) -> dict[str, float]:
    """Return by quantity the largest relative error that independent roundings in series explain.

    Each layer rounds the sums with its two branches, forward and backward; with tensor parallelism each of them is a
    sum over ranks with as many roundings. Matrix products and other long sums accumulate in fp32.
    """
    model, heads, parallel, train = config.model, config.heads, config.parallel, config.train
    depth = model.trunk_layers + heads.layers_per_head * (1 if heads.traits.reads == "trunk" else heads.count)
    roundings = ROUNDINGS_OUTSIDE_LAYERS + 4 * depth * parallel.tensor
    if parallel.grad_reduce_dtype == "bf16":
        roundings += data_parallel
    additions = max(
        train.micro_batch_size * train.sequence_length, config.vocab_size, model.ffn_size, model.hidden_size
    )
    accumulation = UNIT_ROUNDOFF["fp32"] * math.sqrt(additions)
    gradients = UNIT_ROUNDOFF[train.precision] * math.sqrt(roundings) + accumulation
    return {
        # A mean over many tokens, whose errors differ in sign.
        "losses": UNIT_ROUNDOFF[train.precision] + accumulation,
        "gradient norm": gradients,
        "gradients": gradients,
        # About that fraction of the gradient's signs is wrong, and Adam's first step has the wrong sign there.
        "updated weights": 2 * RELATIVE_LEARNING_RATE * math.sqrt(gradients),
    }


def relative_error(value: Tensor, truth: Tensor) -> float:
    """Return |value - truth| / |truth| in the 2-norm: absolute if the truth is 0, infinite for NaN or Inf."""
    truth = truth.double().cpu()
    error = float((value.double().cpu() - truth).norm() / (truth.norm() or 1.0))
    return error if math.isfinite(error) else math.inf  # max() would drop NaN


def worst(errors: Mapping[str, float]) -> tuple[float, str]:
    """Return the largest error over all ranks and its name."""
    local = max(((error, name) for name, error in errors.items()), default=(0.0, ""))
    return max(all_gather_objects(local))


class Truth(NamedTuple):
    """A batch and the reference's results on it."""

    samples: Tensor
    targets: Tensor
    step: ReferenceStep
    params: dict[str, Tensor]
    """Parameters after the update, by global name."""


def reference_truth(config: Config, topology: Topology) -> Truth:
    """Return one step of the reference; the ranks share the work."""
    samples, targets = random_batch(config)
    training = ReferenceTraining(config, topology.device, topology.rank, topology.world_size)
    step = training.step(samples, targets, 1, config.optimizer.lr, all_heads_schedule(config))
    params = {name: param.detach() for name, param in training.model.named_weights().items()}
    return Truth(samples, targets, step, params)


def all_heads_schedule(config: Config) -> HeadSchedule:
    """Return the loss weights of step 1, with all heads active."""
    return HeadSchedule(head_schedule(config, 1).loss_weights, config.heads.count)


def sharded_errors(config: Config, topology: Topology, truth: Truth) -> dict[str, dict[str, float]]:
    """Return the relative errors of one step of the sharded model on the same batch, by quantity and name."""
    engine = build_engine(config, topology)
    set_nonzero_weights(engine)
    shapes = parameter_shapes(config)
    batch = local_batch(config, topology, truth.samples, truth.targets)
    with capture_first_gradients(engine, shapes) as gradients:
        result = engine.train_step(batch, 1, config.optimizer.lr, all_heads_schedule(config))
    updated = dict(full_tensors(engine.stage, shapes, topology, master_weight))
    compared = [set().union(*all_gather_objects(set(tensors))) for tensors in (gradients, updated)]
    assert compared == [set(truth.step.gradients), set(shapes)], "every parameter is compared"
    kinds = ("head", "distillation of head", "token order of head", "total variation of head")
    names = [f"{kind} {k}" for kind in kinds for k in range(1, config.heads.count + 1)]
    computed = mean_losses(result.heads, config.heads.count)
    losses = zip(names, computed.flatten(), truth.step.losses.flatten(), strict=True)
    norms = torch.tensor([result.grad_norm, truth.step.grad_norm], dtype=torch.float64)
    gradient_errors = {name: relative_error(value, truth.step.gradients[name]) for name, value in gradients.items()}
    if (name := "embedding.weight") in gradients:
        # The longest sum over positions: a seventh of the tokens.
        token = int(truth.samples.flatten().mode().values)
        row, true_row = gradients[name][token], truth.step.gradients[name][token]
        gradient_errors[f"{name}, token {token}"] = relative_error(row, true_row)
    return {
        "losses": {name: relative_error(value, loss) for name, value, loss in losses},
        "gradient norm": {"all parameters": relative_error(*norms)},
        "gradients": gradient_errors,
        "updated weights": {name: relative_error(value, truth.params[name]) for name, value in updated.items()},
    }


def selfcheck(config: Config, topology: Topology) -> list[Comparison]:
    """Return all comparisons at the configured layout: in fp32, which must agree closely, then in its precision."""
    config = with_small_batch(with_gentle_step(reduced(config)), topology.dp_size)
    truth = reference_truth(config, topology)
    comparisons = []
    for precision in dict.fromkeys(["fp32", config.train.precision]):
        train = config.train.model_copy(update={"precision": precision})
        in_precision = config.model_copy(update={"train": train})
        bounds = tolerances(in_precision, topology.dp_size)
        for quantity, errors in sharded_errors(in_precision, topology, truth).items():
            error, where = worst(errors)
            comparisons.append(Comparison(quantity, precision, error, bounds[quantity], where))
    return comparisons
