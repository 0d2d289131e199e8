"""`parallel.partition: measured`: trunk layers per stage by the times of the model's parts on the run's devices."""

import logging
import statistics
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from mtp_dist.config import Config
from mtp_dist.distributed.collectives import all_gather_floats
from mtp_dist.distributed.device import synchronize
from mtp_dist.distributed.topology import Topology
from mtp_dist.engine.heads_with_loss import HeadsWithLoss
from mtp_dist.engine.pipeline_module import HeadsInput
from mtp_dist.model.layers import AttentionInputs, transformer_config
from mtp_dist.model.parameters import is_trained, named_weights
from mtp_dist.model.rope import rope_angles
from mtp_dist.model.targets import MicroBatch, attention_bias, head_targets
from mtp_dist.model.trunk import TokenEmbedding, TrunkLayer
from mtp_dist.planner.layouts import replace_values
from mtp_dist.planner.partition import trunk_layers_per_stage
from mtp_dist.planner.parts import Parts, Passes
from mtp_dist.planner.stage_cost import backward_passes
from mtp_dist.planner.weights import heads_have_embedding

logger = logging.getLogger(__name__)

SECONDS = 1.0
"""Time of the measurement after one round to warm up."""
MIN_ROUNDS, MAX_ROUNDS = 3, 50


def with_measured_partition(config: Config, topology: Topology) -> Config:
    """Return the configuration with the trunk layers of each stage as a list if they are to be measured.

    A collective over all ranks, which return the same.
    """
    if config.parallel.partition != "measured":
        return config
    parts = measure_parts(config, topology)
    split = trunk_layers_per_stage(config, parts)
    embedding, layer, heads = (
        f"{1000 * passes.total:.1f} ms" for passes in (parts.embedding, parts.layer, parts.heads)
    )
    logger.info(
        "Measured per micro-batch: embedding %s, trunk layer %s, heads %s; trunk layers per stage %s",
        *(embedding, layer, heads, [*split]),
    )
    return replace_values(config, {"parallel.partition": split})


def measure_parts(config: Config, topology: Topology) -> Parts:
    """Return the seconds of embedding, trunk layer and heads: medians of the rounds, then of the ranks."""
    passes = PartPasses(config, topology)
    started = time.perf_counter()
    passes.measure()
    warm_up = all_gather_floats([time.perf_counter() - started], topology)
    # The same number on all ranks, whose tensor-parallel groups compute together.
    rounds = min(MAX_ROUNDS, max(MIN_ROUNDS, int(SECONDS / max(seconds for [seconds] in warm_up))))
    parts = median_parts([passes.measure() for _ in range(rounds)], config, topology)
    if topology.device.type == "cuda":
        del passes
        torch.cuda.empty_cache()  # training's tensors have other sizes
    return parts


def median_parts(rounds: Sequence[Sequence[float]], config: Config, topology: Topology) -> Parts:
    """Return the costs of the parts by medians of the rounds of `PartPasses.measure`, then of the ranks."""
    local = [statistics.median(column) for column in zip(*rounds, strict=True)]
    medians = map(statistics.median, zip(*all_gather_floats(local, topology), strict=True))
    embedding, layer, heads = (Passes(forward, backward) for forward, backward in zip(medians, medians, strict=True))
    head = heads.scaled(1 / config.heads.count)  # one stage has all heads
    return Parts(embedding, layer, head, head, config.heads.count, backward_passes(config))


class PartPasses:
    """The embedding, one trunk layer and all heads with random weights, and the forward and backward pass of each."""

    def __init__(self, config: Config, topology: Topology, clock: Callable[[], float] = time.perf_counter) -> None:
        self.device, self._clock = topology.device, clock
        dtype = torch.bfloat16 if config.train.precision == "bf16" else torch.float32
        megatron = transformer_config(config)
        embedding, layer = TokenEmbedding(config, megatron), TrunkLayer(config, megatron, 0)
        heads = HeadsWithLoss(config, megatron)
        modules = nn.ModuleList([embedding, layer, heads]).to(self.device, dtype)
        generator = torch.Generator(self.device).manual_seed(config.run.seed)
        for name, weight in named_weights(modules):
            nn.init.normal_(weight, std=config.model.init_std, generator=generator)
            weight.requires_grad_(is_trained(config, name))
        heads.begin(torch.ones(config.heads.count + 1, device=self.device), config.heads.count)

        length, samples = config.train.sequence_length, config.train.micro_batch_size
        shape = samples, length + config.heads.lookahead
        tokens = torch.randint(config.vocab_size, shape, generator=generator, device=self.device)
        documents = None if config.data.attention_across_documents else torch.zeros_like(tokens)
        targets = head_targets(tokens, config.heads.distances, length)
        bias, window = None, config.model.sliding_window
        if documents is not None or window is not None:
            bias = attention_bias(torch.zeros_like(tokens[:, :length]), dtype, window)
        attention = AttentionInputs(rope_angles(config.model, length).to(self.device), bias)
        positions = length // (config.parallel.tensor if config.parallel.sequence else 1)
        hidden = torch.randn(
            positions, samples, config.model.hidden_size, generator=generator, device=self.device, dtype=dtype
        )
        hidden.requires_grad_(not config.train.freezes_trunk)
        z = HeadsInput(hidden, embedding.weight) if heads_have_embedding(config) else hidden
        weighted_sum = hidden if config.heads.weighted_hidden_states else None
        micro_batch = MicroBatch(tokens, targets, documents)
        self.forward_passes: Sequence[Callable[[], Tensor]] = (
            lambda: embedding(tokens[:, :length]),
            lambda: layer(hidden, attention),
            lambda: heads(z, micro_batch, attention, weighted_sum),
        )

    def measure(self) -> list[float]:
        """Return the seconds of one forward and one backward pass of each part."""
        seconds = []
        for forward in self.forward_passes:
            times = [self._now()]
            output = forward()
            times.append(self._now())
            if output.requires_grad:
                output.backward(torch.ones_like(output))
            times.append(self._now())
            seconds += [times[1] - times[0], times[2] - times[1]]
        return seconds

    def _now(self) -> float:
        synchronize(self.device)
        return self._clock()
