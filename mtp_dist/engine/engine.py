"""One training step and one evaluation of the whole model, at any layout."""

import logging
from collections.abc import Callable, Sequence
from functools import partial
from math import isfinite
from typing import NamedTuple

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.runtime.pipe.engine import PipelineEngine
from torch import Tensor, nn
from torch.profiler import record_function

from mtp_dist.config import Config
from mtp_dist.distributed.topology import Topology, dp_group
from mtp_dist.engine.deepspeed_config import deepspeed_config
from mtp_dist.engine.gradients import GradientMonitor, clip_by_global_norm, module_group
from mtp_dist.engine.hooks import StageTimer
from mtp_dist.engine.optimizer import build_optimizer
from mtp_dist.engine.optimizer_state import set_master_weight
from mtp_dist.engine.pipeline_module import MultiTokenPipeline, suppress_stdout
from mtp_dist.loss.schedule import HeadSchedule
from mtp_dist.model.parameters import initial_weight, named_weights, parameter_shapes
from mtp_dist.model.sharding import shard
from mtp_dist.model.targets import IGNORE_INDEX, MicroBatch


class StepResult(NamedTuple):
    """What one optimizer update tells, the same on every rank but for the seconds."""

    sums: Tensor
    """Per-head sums of the whole global batch, see `TrainingEngine._sums`."""
    grad_norm: float
    """Global norm of the gradient before clipping; where it is not finite no weight was changed."""
    grad_norms_by_module: dict[str, float]
    """The same norm of parts of the model: `trunk`, `head_1`, ..., `shared` for embeddings and the final norm."""
    busy_seconds: float
    """This rank's forward and backward passes, with the collectives within its stage."""
    schedule_seconds: float
    """All micro-batches, waiting for other stages included."""


class TrainingEngine:
    """The model of this rank's stage under DeepSpeed's PipelineEngine, which owns the micro-batch loop."""

    def __init__(
        self, config: Config, vocab_size: int, topology: Topology, stage: MultiTokenPipeline, pipeline: PipelineEngine
    ) -> None:
        self.config = config
        self.vocab_size = vocab_size
        self.topology = topology
        self.micro_batches = config.micro_batches(topology.world_size)
        self.stage = stage
        self.pipeline = pipeline
        self.pipeline.set_batch_fn(self._load)
        # In fp32 without ZeRO DeepSpeed counts some weights twice and others not at all.
        self.pipeline.clip_fp32_gradients = self._clip
        parts = tuple(dict.fromkeys(map(module_group, parameter_shapes(config, vocab_size))))
        self.gradient_monitor = GradientMonitor(self.pipeline, self.stage, topology, parts)
        self.pipeline._take_model_step = partial(self._agree_and_update, self.pipeline._take_model_step)
        self._totals: list[Tensor] = []
        self.clock = StageTimer(self.pipeline, topology.device)
        self.optimizer_updates = 0
        """Steps made, without those dropped for a gradient that was not finite: what Adam's bias correction counts."""

    @torch.no_grad()
    def set_initial_weights(self) -> None:
        """Give the weights the initial values of a new run."""
        # Not before there is the optimizer: its fp32 copies would be those of weights that are rounded to bf16.
        shapes = parameter_shapes(self.config, self.vocab_size)
        for name, weight in named_weights(self.stage):
            set_master_weight(weight, self.initial_values(name, weight, shapes[name]))

    def initial_values(self, name: str, weight: nn.Parameter, shape: tuple[int, ...]) -> Tensor:
        """Return this rank's part of a weight's initial values, in fp32. shape: that of the whole weight."""
        whole = initial_weight(self.config, name, shape)
        return shard(whole, weight, self.topology.tp_rank, self.topology.tp_size).to(weight.device)

    @property
    def optimizer_name(self) -> str:
        """Such as `torch AdamW` or `apex FusedAdam`."""
        optimizer = type(self.pipeline.basic_optimizer)
        return f"{optimizer.__module__.split('.')[0]} {optimizer.__name__}"

    def train_step(self, batch: Sequence[MicroBatch], learning_rate: float, weights: HeadSchedule) -> StepResult:
        """One optimizer update on this data-parallel rank's micro-batches; empty on stages that read no data."""
        for group in self.pipeline.optimizer.param_groups:
            group["lr"] = learning_rate
        self._begin(batch, self.micro_batches, weights)
        self.clock.begin()
        with record_function("training step"):
            self.pipeline.train_batch(iter(batch))
        # Nobody reads DeepSpeed's timers, which keep two CUDA events per measurement until they are reset.
        for timer in self.pipeline.timers.get_timers().values():
            timer.reset()
        sums, squares, _ = self._totals
        norms = dict(zip(self.gradient_monitor.parts, squares.sqrt().tolist(), strict=True))
        grad_norm = float(self.pipeline.get_global_grad_norm())
        self.optimizer_updates += isfinite(grad_norm)
        return StepResult(sums.cpu(), grad_norm, norms, *self.clock.seconds())

    def evaluate(self, batch: Sequence[MicroBatch], micro_batches: int) -> Tensor:
        """Per-head sums (see `_sums`) over `micro_batches` micro-batches of every data-parallel rank."""
        heads = self.config.heads.count
        self._begin(batch, micro_batches, HeadSchedule((1.0,) * heads, heads))
        self.pipeline.eval_batch(iter(batch), num_micro_batches=micro_batches, bcast_loss=False)
        return self._over_ranks(self._sums())[0].cpu()

    def _agree_and_update(self, update: Callable[..., None], *args: object) -> None:
        """Let DeepSpeed update the weights, on all ranks or on none: it asks only the ranks of one replica."""
        watch = self.gradient_monitor
        # One collective for all.
        self._totals = self._over_ranks(self._sums(), watch.squares, watch.fault)
        sums, _, fault = self._totals
        watch.spread(fault + 0 * sums.sum())  # 0 times what is not finite is NaN
        update(*args)

    def _begin(self, batch: Sequence[MicroBatch], micro_batches: int, weights: HeadSchedule) -> None:
        """Scale head k's sum of cross-entropies by w_k over the number of its valid targets in the GLOBAL batch.

        DeepSpeed averages over micro-batches and data-parallel ranks, so the scale undoes that.
        """
        self.stage.enqueue(batch)
        if not self.topology.is_last_stage:
            return
        valid = sum((micro_batch.targets != IGNORE_INDEX).sum((1, 2)) for micro_batch in batch)
        counts = torch.as_tensor(valid, dtype=torch.float64, device=self.topology.device)
        dist.all_reduce(counts, group=dp_group())
        averaged_over = micro_batches * self.topology.dp_size
        per_target = averaged_over / counts.clamp(min=1)
        scales = counts.new_tensor(weights.loss_weights) * per_target
        token_order_scale = self.config.heads.token_order * per_target[0]
        self.stage.heads.begin(scales.float(), weights.active_heads, token_order_scale.float())

    def _load(self, batch: MicroBatch) -> tuple[Tensor, tuple[()]]:
        """What the first stage embeds; DeepSpeed asks for it on the first and the last stage."""
        return batch.samples[:, : self.config.train.sequence_length], ()

    def _sums(self) -> Tensor:
        """`[5, n]`, fp64: each head's cross-entropies, correct predictions, valid targets and cross-entropies to head 1
        over this rank's micro-batches, 0 where another rank has them; in head 1's place of the last row the
        cross-entropies to the tokens' order."""
        sums = torch.zeros(5, self.config.heads.count, dtype=torch.float64, device=self.topology.device)
        if self.topology.is_last_stage and self.topology.tp_rank == 0:
            heads = self.stage.heads.sums
            token_order = torch.zeros_like(heads.losses)
            token_order[0] = heads.token_order
            sums = torch.stack([heads.losses, heads.correct, heads.targets, heads.distillation, token_order])
        return sums

    @staticmethod
    def _over_ranks(*tensors: Tensor) -> list[Tensor]:
        """Return the sums over all ranks."""
        together = torch.cat([tensor.flatten() for tensor in tensors])
        dist.all_reduce(together)
        parts = together.split([tensor.numel() for tensor in tensors])
        return [part.view_as(tensor) for part, tensor in zip(parts, tensors, strict=True)]

    def _clip(self) -> None:
        self.pipeline._global_grad_norm = clip_by_global_norm(self.stage.parameters(), self.pipeline)


def build_engine(config: Config, vocab_size: int, topology: Topology, initialize: bool = True) -> TrainingEngine:
    """Build this rank's stage and its optimizer.

    initialize: give the weights their initial values; False if a checkpoint is restored next.
    """
    stage = MultiTokenPipeline(config, vocab_size, topology)
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    with suppress_stdout():
        pipeline, *_ = deepspeed.initialize(
            model=stage,
            model_parameters=list(stage.parameters()),
            optimizer=lambda parameters: build_optimizer(config, parameters, topology.device),
            config=deepspeed_config(config, config.micro_batches(topology.world_size)),
        )
    engine = TrainingEngine(config, vocab_size, topology, stage, pipeline)
    if initialize:
        engine.set_initial_weights()
    return engine
