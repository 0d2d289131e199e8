"""Does this machine, at this layout, compute what one plain PyTorch process computes?"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from mtp_dist.config import Config
from mtp_dist.loss.weights import HeadWeights, head_weights
from mtp_dist.model.weights import parameter_shapes
from mtp_dist.parallel.engine import TrainingEngine
from mtp_dist.parallel.topology import Topology
from mtp_dist.parallel.weights import first_gradients, master_weight, whole_tensors
from mtp_dist.planner.flops import parameter_counts
from mtp_dist.training.optimizer import build_optimizer
from mtp_dist.training.reference import ReferenceTraining, local_micro_batches, mean_losses, random_batch

PARAMETER_LIMIT = 20_000_000
"""A larger model is checked at reduced widths: the reference runs whole, in fp64, on every rank."""

TOLERANCES = {
    "fp32": {"losses": 1e-5, "gradient norm": 1e-5, "gradients": 1e-4, "updated weights": 1e-4},
    "bf16": {"losses": 1e-2, "gradient norm": 2e-2, "gradients": 1e-1, "updated weights": 1e-1},
}
"""Largest relative error by precision; bf16 has 8 bits of mantissa."""


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


def reduced(config: Config, vocab_size: int) -> tuple[Config, int]:
    """The configuration and vocabulary to check: the same layout and kinds, at small widths where the model is large.

    Prediction heads, precision and every degree stay, and whether queries are grouped; so do the trunk layers of an
    explicit partition.
    """
    model, parallel, train = config.model, config.parallel, config.train
    vocab_size = min(vocab_size, 1000)
    length = min(train.sequence_length, 64 * parallel.tensor)
    if parameter_counts(config, vocab_size).total > PARAMETER_LIMIT:
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
    train = train.model_copy(update={"sequence_length": length, "micro_batch_size": min(train.micro_batch_size, 2)})
    return config.model_copy(update={"model": model, "train": train}), vocab_size


def with_small_batch(config: Config, data_parallel: int) -> Config:
    """The configuration with two micro-batches for each pipeline stage."""
    samples = config.train.micro_batch_size * 2 * config.parallel.pipeline * data_parallel
    return config.model_copy(update={"train": config.train.model_copy(update={"global_batch_size": samples})})


def with_gentle_step(config: Config) -> Config:
    """The configuration with a learning rate of 2 % of the smallest initial weights' standard deviation.

    Adam's first step is about lr * sign(gradient). Where a gradient is near 0 rounding decides its sign, so the user's
    rate would decide how far correct layouts may lie apart.
    """
    depth = config.model.trunk_layers + config.heads.layers_per_head
    rate = 0.02 * config.model.init_std / math.sqrt(2 * depth)
    return config.model_copy(update={"optimizer": config.optimizer.model_copy(update={"lr": rate})})


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


def compare_with_reference(config: Config, vocab_size: int, topology: Topology) -> list[Comparison]:
    """One step of the sharded model beside one of the reference, on the same random batch."""
    samples, targets = random_batch(config, vocab_size)
    weights = HeadWeights(head_weights(config, 1).weights, config.heads.count)
    reference = ReferenceTraining(config, vocab_size, topology.device)
    losses, norm, truth = reference.step(samples, targets, config.optimizer.lr, weights)

    engine = TrainingEngine(
        config, vocab_size, topology, lambda weights: build_optimizer(config, weights, topology.device)
    )
    shapes = parameter_shapes(config, vocab_size)
    with first_gradients(engine, shapes) as gradients:
        sums, sharded_norm, *_ = engine.train_step(
            local_micro_batches(config, topology, samples, targets), config.optimizer.lr, weights
        )
    updated = dict(whole_tensors(engine.stage, shapes, topology, master_weight))
    compared_by_any = [names_over_ranks(tensors) for tensors in (gradients, updated)]
    assert compared_by_any == [set(shapes)] * 2, "every weight is compared"
    expected = reference.model.named_weights()
    kinds = ("head", "distillation of head", "token order of head")
    names = [f"{kind} {k}" for kind in kinds for k in range(1, config.heads.count + 1)]
    compared = zip(names, mean_losses(sums).flatten(), losses.flatten(), strict=True)
    errors = {
        "losses": {name: relative_error(value, loss) for name, value, loss in compared},
        "gradient norm": {"all parameters": relative_error(*torch.tensor([sharded_norm, norm], dtype=torch.float64))},
        "gradients": {name: relative_error(value, truth[name]) for name, value in gradients.items()},
        "updated weights": {name: relative_error(value, expected[name].detach()) for name, value in updated.items()},
    }
    precision = config.train.precision
    comparisons = []
    for quantity, of_names in errors.items():
        error, where = worst(of_names)
        comparisons.append(Comparison(quantity, precision, error, TOLERANCES[precision][quantity], where))
    return comparisons


def selfcheck(config: Config, vocab_size: int, topology: Topology) -> list[Comparison]:
    """Every comparison at the configuration's layout: in fp32, where agreement must be close, then in its precision."""
    config, vocab_size = reduced(config, vocab_size)
    config = with_small_batch(with_gentle_step(config), topology.data)
    comparisons = []
    for precision in dict.fromkeys(["fp32", config.train.precision]):
        train = config.train.model_copy(update={"precision": precision})
        comparisons += compare_with_reference(config.model_copy(update={"train": train}), vocab_size, topology)
    return comparisons
