"""One training step and one evaluation of the whole model, at any layout."""

import logging
from collections.abc import Callable
from functools import partial
from itertools import repeat
from math import isfinite
from signal import NSIG
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
from mtp_dist.engine.frozen_trunk import use_frozen_trunk_schedule
from mtp_dist.engine.gradients import GradientMonitor, clip_by_global_norm, module_group
from mtp_dist.engine.hooks import StageTimer
from mtp_dist.engine.optimizer import build_optimizer, set_learning_rate
from mtp_dist.engine.optimizer_state import set_master_weight
from mtp_dist.engine.pipeline_module import MultiTokenPipeline, TwoStagePipeline, suppress_stdout
from mtp_dist.engine.stand_ins import add_zero_gradients
from mtp_dist.loss.acceptance import draft_acceptance_rates
from mtp_dist.loss.objective import HeadSums
from mtp_dist.loss.schedule import HeadSchedule
from mtp_dist.metrics import HeadMetrics
from mtp_dist.model.parameters import initial_weight, is_trained, named_weights, parameter_shapes
from mtp_dist.model.sharding import shard
from mtp_dist.model.targets import TrainBatch


class StepResult(NamedTuple):
    """Result of one training step, the same on every rank except for the seconds."""

    heads: HeadMetrics
    grad_norm: float
    """Global norm of the gradient before clipping; not finite if the step was skipped."""
    grad_norms_by_module: dict[str, float]
    """The same norm per module with trained parameters: `trunk`, `head_1`, ..., `shared` for embeddings and the final
    norm."""
    skipped: str | None
    """Reason for which the step changed no weight; None if it did."""
    stop_signal: int
    """Number of a signal that has reached a rank; 0 for none. Of several the smallest: SIGHUP and SIGINT, after which
    nothing may restart the run, precede SIGUSR1 and SIGTERM."""
    busy_seconds: float
    """Time of this rank's forward and backward passes, with the collectives within its stage."""
    schedule_seconds: float
    """Time of all micro-batches, with the wait for other stages."""


class StepTotals(NamedTuple):
    """Sums over all ranks at the end of a training step, by one collective."""

    head_sums: Tensor
    squared_norms: Tensor
    """Squared gradient norm per module."""
    fault: Tensor
    """0, or NaN if the gradient of a rank is not finite."""
    signals: Tensor
    """Number of ranks that have received each signal, by its number."""


class TrainingEngine:
    """The model of this rank's stage under DeepSpeed's PipelineEngine, which owns the micro-batch loop.

    In a training step, `train_step` enqueues the micro-batches; DeepSpeed runs their forward passes, in which the heads
    add to HeadSums, and their backward passes, and reduces the gradients; GradientMonitor measures them;
    `_agree_and_update`, which replaces PipelineEngine._take_model_step, sums over all ranks and updates the weights.
    """

    def __init__(self, config: Config, topology: Topology, stage: MultiTokenPipeline, pipeline: PipelineEngine) -> None:
        self.config = config
        self.topology = topology
        self.stage = stage
        self.pipeline = pipeline
        self.pipeline.set_batch_fn(stage.load)
        # In fp32 without ZeRO DeepSpeed's norm counts some weights twice and others not at all.
        self.pipeline.clip_fp32_gradients = self._clip
        trained = (name for name in parameter_shapes(config) if is_trained(config, name))
        modules = tuple(dict.fromkeys(map(module_group, trained)))
        self.gradient_monitor = GradientMonitor(self.pipeline, self.stage, topology, modules)
        self.pipeline._take_model_step = partial(self._agree_and_update, self.pipeline._take_model_step)
        self._dp_group = dp_group()
        self._totals: list[Tensor] = []
        """Sums over all ranks of HeadSums and, after a training step, of the other fields of StepTotals, after an
        evaluation of the drafts that head 1 accepts."""
        self._stop_signal: Callable[[], int] = lambda: 0
        self.clock = StageTimer(self.pipeline, topology.device)
        self.optimizer_updates = 0
        """Steps without those skipped for a gradient that was not finite, as Adam's bias correction counts them."""

    @torch.no_grad()
    def set_initial_weights(self) -> None:
        """Give the weights the initial values of a new run."""
        # After the optimizer exists, whose fp32 copies would otherwise be those of weights rounded to bf16.
        shapes = parameter_shapes(self.config)
        for name, weight in named_weights(self.stage):
            set_master_weight(weight, self.initial_values(name, weight, shapes[name]))

    def initial_values(self, name: str, weight: nn.Parameter, shape: tuple[int, ...]) -> Tensor:
        """Return this rank's shard of a weight's initial values, in fp32. shape: that of the full weight."""
        full = initial_weight(self.config, name, shape)
        return shard(full, weight, self.topology.tp_rank, self.topology.tp_size).to(weight.device)

    @property
    def optimizer_name(self) -> str:
        """Package and class, such as `torch AdamW` or `apex FusedAdam`."""
        optimizer = type(self.pipeline.basic_optimizer)
        return f"{optimizer.__module__.split('.')[0]} {optimizer.__name__}"

    def train_step(
        self,
        batch: TrainBatch,
        step: int,
        learning_rate: float,
        schedule: HeadSchedule,
        stop_signal: Callable[[], int] = lambda: 0,
    ) -> StepResult:
        """Train on one global batch. If a gradient is not finite, no rank updates its weights.

        step: its number, counted from 1, which decides the factors of `optimizer.multipliers`.
        stop_signal returns the number of a signal that has reached this rank, or 0; it is called after the backward
        passes.
        """
        set_learning_rate(self.pipeline.optimizer, learning_rate, step)
        self._begin(batch, schedule)
        self._stop_signal = stop_signal
        self.clock.begin()
        with record_function("training step"):
            self.pipeline.train_batch(repeat(None))
        # Nothing reads DeepSpeed's timers, which keep two CUDA events per measurement until they are reset.
        for timer in self.pipeline.timers.get_timers().values():
            timer.reset()
        totals = StepTotals(*(total.cpu() for total in self._totals))
        grad_norm = float(self.pipeline.get_global_grad_norm())
        finite = isfinite(grad_norm)  # the same on all ranks, see _agree_and_update
        self.optimizer_updates += finite
        return StepResult(
            heads=head_metrics(self.config, HeadSums(totals.head_sums), schedule),
            grad_norm=grad_norm,
            grad_norms_by_module=dict(
                zip(self.gradient_monitor.modules, totals.squared_norms.sqrt().tolist(), strict=True)
            ),
            skipped=None if finite else f"the gradient is not finite, {self.gradient_monitor.find_non_finite()}",
            stop_signal=min(totals.signals.nonzero().flatten().tolist(), default=0),
            busy_seconds=(seconds := self.clock.seconds())[0],
            schedule_seconds=seconds[1],
        )

    def evaluate(self, batch: TrainBatch, schedule: HeadSchedule) -> HeadMetrics:
        """Evaluate a batch and return the active heads' metrics."""
        self._begin(batch, schedule)
        if self.config.heads.stages > 1:
            self.pipeline.reset_activation_shape()  # stages with heads also send tokens
        # Not the parameter num_micro_batches: DualPipeV places its buffers by the engine's number.
        training_micro_batches, self.pipeline.micro_batches = self.pipeline.micro_batches, batch.num_micro_batches
        self.pipeline.eval_batch(repeat(None), bcast_loss=False)
        self.pipeline.micro_batches = training_micro_batches
        if self.config.heads.stages > 1:
            self.pipeline.reset_activation_shape()
        distances = self.config.heads.distances[-1] - 1
        self._sum_over_ranks(self.stage.heads.acceptance_sums if self._has_sums else self._zeros(distances, 2))
        head_sums, acceptance_sums = (total.cpu() for total in self._totals)
        return head_metrics(self.config, HeadSums(head_sums), schedule, acceptance_sums)

    def _agree_and_update(self, update: Callable[..., None], *args: object) -> None:
        """Let DeepSpeed update the weights, on all ranks or on none: it compares only the ranks of one replica.

        The only collective over all ranks in a step also carries what the step reports. In its sum each signal has a
        slot of its own, so that several signals do not add up to another one.
        """
        monitor = self.gradient_monitor
        signals = monitor.squared_norms.new_zeros(NSIG)
        if number := self._stop_signal():
            signals[number] = 1
        self._sum_over_ranks(monitor.squared_norms, monitor.fault, signals)
        totals = StepTotals(*self._totals)
        monitor.add_fault(totals.fault + 0 * totals.head_sums.sum())  # 0 * NaN and 0 * inf are NaN
        update(*args)

    def _begin(self, batch: TrainBatch, schedule: HeadSchedule) -> None:
        """Enqueue the micro-batches. Scale head k's loss by w_k over its number of valid targets in the GLOBAL batch.

        DeepSpeed averages over micro-batches and data-parallel ranks, so the scale undoes that. The count has a
        collective of its own, over the data-parallel ranks, because the first loss needs it.
        """
        self.stage.enqueue(batch)
        if not self.topology.holds_loss:
            return
        counts = batch.valid_targets.to(self.topology.device, non_blocking=True, copy=True)
        dist.all_reduce(counts, group=self._dp_group)
        averaged_over = batch.num_micro_batches * self.topology.dp_size
        per_target = averaged_over / counts.clamp(min=1)
        token_order_scale = self.config.heads.token_order * per_target[:1]
        scales = torch.cat([counts.new_tensor(schedule.loss_weights) * per_target, token_order_scale])
        self.stage.heads.begin(scales.float(), schedule.active_heads)

    def _sum_over_ranks(self, *others: Tensor) -> None:
        """Leave the sums over all ranks of HeadSums and of other tensors in `_totals`, by one collective."""
        shape = self.config.heads.count + 1, len(HeadSums.COLUMNS)
        tensors = [self.stage.heads.sums.tensor if self._has_sums else self._zeros(*shape), *others]
        together = torch.cat([*map(torch.flatten, tensors)])
        dist.all_reduce(together)
        totals = together.split([tensor.numel() for tensor in tensors])
        self._totals = [*map(Tensor.view_as, totals, tensors)]

    @property
    def _has_sums(self) -> bool:
        """True on the one rank of a stage with heads whose sums count."""
        return self.topology.holds_loss and self.topology.tp_rank == 0

    def _zeros(self, *shape: int) -> Tensor:
        """Return what other ranks add to the sums."""
        return torch.zeros(shape, dtype=torch.float64, device=self.topology.device)

    def _clip(self) -> None:
        self.pipeline._global_grad_norm = clip_by_global_norm(self.stage.parameters(), self.pipeline)


def build_engine(config: Config, topology: Topology, initialize: bool = True) -> TrainingEngine:
    """Build this rank's stage and its optimizer.

    initialize: give the weights their initial values; False if a checkpoint is restored next.
    """
    # On a CPU DeepSpeed would first compile a shared-memory collective that only its inference uses.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_init_required=False, verbose=False)
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    stage = (TwoStagePipeline if config.parallel.schedule == "dualpipev" else MultiTokenPipeline)(config, topology)
    trained = [param for param in stage.parameters() if param.requires_grad]
    with suppress_stdout():
        pipeline, *_ = deepspeed.initialize(
            model=stage,
            model_parameters=trained,
            optimizer=lambda _: build_optimizer(config, stage.trained_parameters(), topology.device),
            config=deepspeed_config(config, config.micro_batches, sum(param.numel() for param in trained)),
        )
    if stage.trunk_is_frozen:
        use_frozen_trunk_schedule(pipeline)
    add_zero_gradients(pipeline, list(stage.stand_ins))
    engine = TrainingEngine(config, topology, stage, pipeline)
    if initialize:
        engine.set_initial_weights()
    return engine


def head_metrics(
    config: Config, sums: HeadSums, schedule: HeadSchedule, acceptance_sums: Tensor | None = None
) -> HeadMetrics:
    """Return the active heads' metrics from the sums over all ranks.

    acceptance_sums: those of `draft_acceptance_sums` in a validation, None in training.
    """
    heads = config.heads
    rates: tuple[float | None, ...] = ()
    if acceptance_sums is not None:
        rates = draft_acceptance_rates(acceptance_sums[: heads.distances[schedule.active_heads - 1] - 1])
    has_target = (sums.targets[: schedule.active_heads] > 0).tolist()
    losses, accuracies, distillation, total_variation = (
        tuple(
            total / target if has else None
            for total, target, has in zip(column.tolist(), sums.targets.tolist(), has_target, strict=False)
        )
        for column in (sums.cross_entropy, sums.correct, sums.soft_cross_entropy, sums.total_variation)
    )
    token_order = float(sums.soft_cross_entropy[-1] / sums.targets[0].clamp(min=1))
    objective = sum(
        weight * (loss + heads.distillation * (soft or 0.0) + heads.total_variation * (distance or 0.0))
        for weight, loss, soft, distance in zip(
            schedule.loss_weights, losses, distillation, total_variation, strict=False
        )
        if loss is not None
    )
    return HeadMetrics(
        losses=losses,
        accuracies=accuracies,
        distillation=distillation[1:] if heads.distillation else (),
        total_variation=total_variation[1:] if heads.total_variation else (),
        token_order=token_order if heads.token_order and has_target[0] else None,
        total=objective + heads.token_order * token_order if any(has_target) else None,
        draft_acceptance_rates=rates,
    )
