"""Training of the plain reference model, which sharded training is compared with."""

import math
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from mtp_dist.config import Config
from mtp_dist.distributed.topology import Topology
from mtp_dist.engine.engine import TrainingEngine
from mtp_dist.engine.optimizer import parameter_groups, set_learning_rate
from mtp_dist.engine.optimizer_state import set_master_weight
from mtp_dist.loss.schedule import HeadSchedule
from mtp_dist.metrics import HeadMetrics
from mtp_dist.model.parameters import LORA_B, initial_weight, named_weights, parameter_shapes, starts_at_zero
from mtp_dist.model.reference import ReferenceModel, reference_losses
from mtp_dist.model.sharding import shard
from mtp_dist.model.targets import (
    IGNORE_INDEX,
    TrainBatch,
    count_valid_targets,
    document_ids,
    head_targets,
    split_into_micro_batches,
)

END_OF_DOCUMENT = 0
"""Token that ends the documents of random batches."""

TOKENS_AT_ONCE = 2048
"""Number of tokens per backward pass of the reference, if a sample has no more."""


def zipf_tokens(vocab_size: int, shape: tuple[int, int], generator: torch.Generator) -> Tensor:
    """Draw token ids as frequent as those of a language: the r-th most frequent one with probability ~ 1/r (Zipf).

    The order of the ids is random, except that END_OF_DOCUMENT is the least frequent one.
    """
    others = 1 + torch.randperm(vocab_size - 1, generator=generator)
    by_rank = torch.cat([others, torch.tensor([END_OF_DOCUMENT])])
    frequencies = 1 / torch.arange(1, vocab_size + 1, dtype=torch.float64)
    return by_rank[torch.multinomial(frequencies, shape[0] * shape[1], True, generator=generator)].view(shape)


def random_batch(config: Config) -> tuple[Tensor, Tensor]:
    """Return samples `[B, S + lookahead]` and targets `[n, B, S]` of a global batch.

    A few tokens make up most of the text, as in real data, so that sums over a token's positions are long. The
    fraction of masked targets grows from 0 to 0.9 over the samples, so micro-batches and data-parallel ranks have
    unequal numbers of valid targets. If document boundaries matter, the number of documents per sample decreases, too.
    """
    generator = torch.Generator().manual_seed(config.run.seed)
    number = config.train.global_batch_size
    shape = (number, config.train.sequence_length + config.heads.lookahead)
    samples = zipf_tokens(config.vocab_size, shape, generator)
    if not (config.data.loss_across_documents and config.data.attention_across_documents):
        ends = torch.rand(shape, generator=generator) < torch.linspace(0.3, 0, number)[:, None]
        samples = samples.masked_fill(ends, END_OF_DOCUMENT)
    documents = None if config.data.loss_across_documents else document_ids(samples, END_OF_DOCUMENT)
    targets = head_targets(samples, config.heads.distances, config.train.sequence_length, documents)
    masked = torch.rand(targets.shape, generator=generator) < torch.linspace(0, 0.9, number)[:, None]
    return samples, targets.masked_fill(masked, IGNORE_INDEX)


def local_batch(config: Config, topology: Topology, samples: Tensor, targets: Tensor) -> TrainBatch:
    """Return this data-parallel rank's micro-batches of a global batch."""
    samples, targets = (
        samples.chunk(topology.dp_size)[topology.dp_rank],
        targets.chunk(topology.dp_size, 1)[topology.dp_rank],
    )
    micro_batches = split_into_micro_batches(
        samples, targets, document_ids(samples, END_OF_DOCUMENT), config.train.micro_batch_size
    )
    return TrainBatch(micro_batches, len(micro_batches), count_valid_targets(micro_batches, config.heads.count))


def mean_losses(metrics: HeadMetrics, heads: int) -> Tensor:
    """Return `[4, n]`, fp64: the mean cross-entropies, those to head 1's distribution, in the third row's first column
    that to the order of the upcoming tokens, and the total variation distances to head 1's distribution; 0 for a loss
    that does not exist."""
    table = torch.zeros(4, heads, dtype=torch.float64)
    later_heads = (None, *metrics.distillation), (None, *metrics.total_variation)
    rows = metrics.losses, later_heads[0], (metrics.token_order,), later_heads[1]
    for row, losses in zip(table, rows, strict=True):
        row[: len(losses)] = torch.tensor([loss or 0.0 for loss in losses], dtype=torch.float64)
    return table


def nonzero_weights(config: Config) -> dict[str, Tensor]:
    """Return other values for the weights that start at 0, of unit variance unless they are an adapter's or biases.

    At 0 they would leave the weights before them without a gradient to compare, and biases without an effect.
    """
    weights = {}
    for name, shape in parameter_shapes(config).items():
        if starts_at_zero(name):
            normal = initial_weight(config, f"nonzero.{name.removesuffix('.weight').removesuffix('.bias')}", shape)
            weights[name] = normal if name.endswith((LORA_B, ".bias")) else normal / config.model.init_std
    return weights


@torch.no_grad()
def set_nonzero_weights(engine: TrainingEngine) -> None:
    """Give an engine the values of `nonzero_weights`."""
    full, topology = nonzero_weights(engine.config), engine.topology
    for name, weight in named_weights(engine.stage):
        if name in full:
            values = shard(full[name], weight, topology.tp_rank, topology.tp_size)
            set_master_weight(weight, values.to(weight.device))


class ReferenceStep(NamedTuple):
    """Results of one training step of the reference."""

    losses: Tensor
    """`[4, n]` before the update, with the rows of `mean_losses`; 0 for an inactive head."""
    grad_norm: float
    """Global gradient norm before clipping."""
    gradients: dict[str, Tensor]
    """Gradients of the trained parameters before clipping, by global name."""


class ReferenceTraining:
    """The reference model in fp64 with PyTorch's AdamW and clipping, trained step by step from `nonzero_weights`."""

    def __init__(self, config: Config, device: torch.device, rank: int = 0, world_size: int = 1) -> None:
        """Share each batch with the other ranks; each has the full model, and their gradients are summed."""
        self.config = config
        self.rank, self.world_size = rank, world_size
        self.model = ReferenceModel(config).double().to(device)
        for name, weight in nonzero_weights(config).items():
            self.model.weight(name).data.copy_(weight)
        self.device = device
        self.trained = {name: param for name, param in self.model.named_weights().items() if param.requires_grad}
        groups = parameter_groups(config, self.trained.items())
        options = config.optimizer
        self.optimizer = torch.optim.AdamW(groups, lr=options.lr, betas=options.betas, eps=options.eps)

    def step(
        self, samples: Tensor, targets: Tensor, step: int, learning_rate: float, schedule: HeadSchedule
    ) -> ReferenceStep:
        """Train on one global batch. step: its number, counted from 1."""
        losses = self._differentiate(samples, targets, schedule)
        gradients = {name: self._gradient(param) for name, param in self.trained.items()}
        norm = math.sqrt(sum(float(gradient.pow(2).sum()) for gradient in gradients.values()))
        if self.config.train.grad_clip:
            scale = min(1.0, self.config.train.grad_clip / (norm + 1e-6))
            for param in self.trained.values():
                if param.grad is not None:
                    param.grad.mul_(scale)
        set_learning_rate(self.optimizer, learning_rate, step)
        self.optimizer.step()
        return ReferenceStep(losses, norm, gradients)

    def _differentiate(self, samples: Tensor, targets: Tensor, schedule: HeadSchedule) -> Tensor:
        """Accumulate this rank's share of the gradients; return the losses of the batch."""
        self.optimizer.zero_grad(set_to_none=False)
        counts = (targets != IGNORE_INDEX).sum((1, 2))
        active = torch.arange(len(targets), device=self.device) < schedule.active_heads
        loss_weights = torch.tensor(schedule.loss_weights, dtype=torch.float64, device=self.device)
        losses = torch.zeros(4, len(targets), dtype=torch.float64, device=self.device)
        size = max(1, TOKENS_AT_ONCE // targets.shape[-1])
        parts = zip(samples.split(size), targets.split(size, 1), strict=True)
        for number, part in enumerate(parts):
            if number % self.world_size != self.rank:
                continue
            batch = (*part, document_ids(part[0], END_OF_DOCUMENT), counts)
            results = reference_losses(self.model, *(tensor.to(self.device) for tensor in batch))
            heads_objective = (results.objectives * loss_weights)[active].sum()
            (heads_objective + self.config.heads.token_order * results.token_order).backward()
            losses[0] += results.losses.detach() * active
            if self.config.heads.distillation:
                losses[1] += results.distillation.detach() * active
            losses[2, 0] += results.token_order.detach()
            if self.config.heads.total_variation:
                losses[3] += results.total_variation.detach() * active
        if self.world_size > 1:
            dist.all_reduce(losses)
        return losses

    def _gradient(self, param: Tensor) -> Tensor:
        """Return a copy of a parameter's gradient, summed over the ranks."""
        param.grad = torch.zeros_like(param) if param.grad is None else param.grad
        if self.world_size > 1:
            dist.all_reduce(param.grad)
        return param.grad.clone()
