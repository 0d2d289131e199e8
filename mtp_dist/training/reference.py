"""Training the plain reference model: what sharded training is compared with."""

import math

import torch
from torch import Tensor

from mtp_dist.config import Config
from mtp_dist.loss.weights import HeadWeights
from mtp_dist.model.reference import ReferenceModel, reference_losses
from mtp_dist.model.targets import IGNORE_INDEX, document_ids, head_targets
from mtp_dist.parallel.pipeline import MicroBatch
from mtp_dist.parallel.topology import Topology
from mtp_dist.training.optimizer import parameter_groups

END_OF_DOCUMENT = 0
"""Token that ends the documents of random batches."""


def random_batch(config: Config, vocab_size: int) -> tuple[Tensor, Tensor]:
    """Samples `[B, S + lookahead]` and targets `[n, B, S]` of a global batch.

    The share of masked targets grows from 0 to 0.9 over the samples, so micro-batches and data-parallel ranks have
    unequal numbers of valid targets. Where documents matter their number in a sample shrinks instead.
    """
    generator = torch.Generator().manual_seed(config.run.seed)
    number = config.train.global_batch_size
    shape = (number, config.train.sequence_length + config.heads.lookahead)
    samples = torch.randint(0, vocab_size, shape, generator=generator)
    if not (config.data.loss_across_documents and config.data.attention_across_documents):
        ends = torch.rand(shape, generator=generator) < torch.linspace(0.3, 0, number)[:, None]
        samples = samples.masked_fill(ends, END_OF_DOCUMENT)
    documents = None if config.data.loss_across_documents else document_ids(samples, END_OF_DOCUMENT)
    targets = head_targets(samples, config.heads.distances, config.train.sequence_length, documents)
    masked = torch.rand(targets.shape, generator=generator) < torch.linspace(0, 0.9, number)[:, None]
    return samples, targets.masked_fill(masked, IGNORE_INDEX)


def local_micro_batches(config: Config, topology: Topology, samples: Tensor, targets: Tensor) -> list[MicroBatch]:
    """This data-parallel rank's slice of a global batch, as micro-batches."""
    size = config.train.micro_batch_size
    samples, targets = (
        samples.chunk(topology.data)[topology.data_rank],
        targets.chunk(topology.data, 1)[topology.data_rank],
    )
    documents = document_ids(samples, END_OF_DOCUMENT)
    parts = zip(samples.split(size), targets.split(size, 1), documents.split(size), strict=True)
    return [MicroBatch(*part) for part in parts]


def mean_losses(sums: Tensor) -> Tensor:
    """`[3, n]` from the engine's sums `[5, n]`: per target the cross-entropies, those to head 1, and, in head 1's place
    of the last row, those to the tokens' order."""
    losses, _, targets, distillation, token_order = sums
    return torch.stack([losses, distillation, token_order]) / targets.clamp(min=1)


class ReferenceTraining:
    """The reference model in fp64 with PyTorch's AdamW and clipping, one update at a time."""

    def __init__(self, config: Config, vocab_size: int, device: torch.device) -> None:
        self.config = config
        self.model = ReferenceModel(config, vocab_size).double().to(device)
        self.device = device
        groups = parameter_groups(config, self.model.parameters())
        options = config.optimizer
        self.optimizer = torch.optim.AdamW(groups, lr=options.lr, betas=options.betas, eps=options.eps)

    def step(
        self, samples: Tensor, targets: Tensor, learning_rate: float, weights: HeadWeights
    ) -> tuple[Tensor, float, dict[str, Tensor]]:
        """Losses `[3, n]` and gradient norm before the update, and the gradients before clipping by global name.

        The rows are those of `mean_losses`; a head that is not active has loss 0.
        """
        self.optimizer.zero_grad(set_to_none=False)
        batch = (samples, targets, document_ids(samples, END_OF_DOCUMENT))
        results = reference_losses(self.model, *(tensor.to(self.device) for tensor in batch))
        active = torch.arange(len(results.losses), device=self.device) < weights.active
        of_heads = (results.objectives * results.objectives.new_tensor(weights.weights))[active].sum()
        (of_heads + self.config.heads.token_order * results.token_order).backward()
        gradients = {}
        for name, weight in self.model.named_weights().items():
            weight.grad = torch.zeros_like(weight) if weight.grad is None else weight.grad
            gradients[name] = weight.grad.clone()
        norm = math.sqrt(sum(float(gradient.pow(2).sum()) for gradient in gradients.values()))
        if self.config.train.grad_clip:
            scale = min(1.0, self.config.train.grad_clip / (norm + 1e-6))
            for weight in self.model.parameters():
                if weight.grad is not None:
                    weight.grad.mul_(scale)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.optimizer.step()
        token_order = torch.zeros_like(results.losses).index_fill(0, torch.zeros(1, dtype=torch.long), 1.0)
        rows = [results.losses.where(active, 0.0), results.distillation.where(active, 0.0)]
        return torch.stack([*rows, token_order * results.token_order]).detach(), norm, gradients
