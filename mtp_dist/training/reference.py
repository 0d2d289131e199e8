"""Training the plain reference model: what sharded training is compared with."""

import math

import torch
from torch import Tensor

from mtp_dist.config import Config
from mtp_dist.model.reference import ReferenceModel, reference_losses
from mtp_dist.model.targets import IGNORE_INDEX, head_targets
from mtp_dist.parallel.engine import MicroBatch
from mtp_dist.parallel.topology import Topology
from mtp_dist.training.optimizer import parameter_groups


def random_batch(config: Config, vocab_size: int) -> tuple[Tensor, Tensor]:
    """Tokens `[B, S]` and targets `[n, B, S]` of a global batch; the share of masked targets grows from 0 to 0.9 over
    its samples, so micro-batches and data-parallel ranks have unequal numbers of valid targets."""
    generator = torch.Generator().manual_seed(config.run.seed)
    heads, samples = config.heads.count, config.train.global_batch_size
    shape = (samples, config.train.sequence_length + heads)
    tokens = torch.randint(0, vocab_size, shape, generator=generator)
    targets = head_targets(tokens, heads)
    masked = torch.rand(targets.shape, generator=generator) < torch.linspace(0, 0.9, samples)[:, None]
    return tokens[:, :-heads], targets.masked_fill(masked, IGNORE_INDEX)


def local_micro_batches(config: Config, topology: Topology, tokens: Tensor, targets: Tensor) -> list[MicroBatch]:
    """This data-parallel rank's slice of a global batch, as micro-batches."""
    size = config.train.micro_batch_size
    tokens, targets = (
        tokens.chunk(topology.data)[topology.data_rank],
        targets.chunk(topology.data, 1)[topology.data_rank],
    )
    return list(zip(tokens.split(size), targets.split(size, 1), strict=True))


class ReferenceTraining:
    """The reference model in fp64 with PyTorch's AdamW and clipping, one update at a time."""

    def __init__(self, config: Config, vocab_size: int, device: torch.device) -> None:
        self.config = config
        self.model = ReferenceModel(config, vocab_size).double().to(device)
        self.device = device
        groups = parameter_groups(config, self.model.parameters())
        options = config.optimizer
        self.optimizer = torch.optim.AdamW(groups, lr=options.lr, betas=options.betas, eps=options.eps)

    def step(self, tokens: Tensor, targets: Tensor, learning_rate: float) -> tuple[Tensor, float, dict[str, Tensor]]:
        """Losses `[n]` and gradient norm before the update, and the gradients before clipping by global name."""
        self.optimizer.zero_grad()
        losses, objectives = reference_losses(self.model, tokens.to(self.device), targets.to(self.device))
        (objectives * objectives.new_tensor(self.config.heads.weights)).sum().backward()
        gradients = {
            name: weight.grad.clone() for name, weight in self.model.named_weights().items() if weight.grad is not None
        }
        norm = math.sqrt(sum(float(gradient.pow(2).sum()) for gradient in gradients.values()))
        if self.config.train.grad_clip:
            scale = min(1.0, self.config.train.grad_clip / (norm + 1e-6))
            for weight in self.model.parameters():
                if weight.grad is not None:
                    weight.grad.mul_(scale)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.optimizer.step()
        return losses.detach(), norm, gradients
