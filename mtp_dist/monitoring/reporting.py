"""What rank 0 shows and writes of a run, from its first step to the table at its end."""

import json
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from itertools import count
from pathlib import Path
from signal import Signals

from mtp_dist.checkpoint.find import ResumePoint
from mtp_dist.checkpoint.format import CHECKPOINT_FILES, installed_versions
from mtp_dist.config import Config
from mtp_dist.data.datasets import ValidationSet
from mtp_dist.distributed.device import device_name
from mtp_dist.distributed.flight_recorder import FLIGHT_RECORDER
from mtp_dist.distributed.topology import Topology
from mtp_dist.metrics import HeadMetrics, StepMetrics
from mtp_dist.monitoring.callback import Callback, StopReason
from mtp_dist.monitoring.callbacks import MetricsFile, MetricsLogger, MetricsWriter, ThroughputUnits
from mtp_dist.monitoring.dashboards import WANDB_FOLDER, TensorBoardWriter, WandbWriter, wandb_files
from mtp_dist.monitoring.events import EVENTS, EventsHandler
from mtp_dist.monitoring.logs import PACKAGE_LOGGER
from mtp_dist.monitoring.profiling import PROFILE, PROFILE_FILES
from mtp_dist.monitoring.progress import ProgressBar
from mtp_dist.monitoring.rank_logs import LOG_FILES, LOGS, earlier_logs
from mtp_dist.monitoring.summary import RunSummary, ValidationResult, print_summary, write_summary
from mtp_dist.planner.flops import model_flops_per_token, parameter_counts, peak_flops
from mtp_dist.planner.partition import trunk_layers_per_stage

logger = logging.getLogger(__name__)

RUN = "run.json"
PREFLIGHT = "preflight.json"
FILES = ("metrics.jsonl", EVENTS, RUN, "summary.json", PREFLIGHT)
FOLDERS: dict[str, tuple[str, ...]] = {
    "tensorboard": ("events.out.tfevents.*",),
    "checkpoints": CHECKPOINT_FILES,
    PROFILE: PROFILE_FILES,
    FLIGHT_RECORDER: ("rank_[0-9]*",),
    LOGS: LOG_FILES,
}
"""By folder that a run makes in its own, patterns of what it writes there."""

EARLIER = "earlier-"
"""What the folders' names begin with that the files of earlier runs are moved into."""


def archive_previous_run(config: Config) -> None:
    """Move what an earlier run wrote into `earlier-1`, `earlier-2`, ... so that neither curves nor checkpoints mix.

    A folder of the run that is a link or a mount point stays, and may be used by others too: of what is in it only that
    which a run writes is moved, within it.
    """
    output_dir = config.output_dir
    moved = {output_dir / name: name for name in FILES}
    for name, patterns in (FOLDERS | {WANDB_FOLDER: wandb_files(output_dir / WANDB_FOLDER)}).items():
        folder = output_dir / name
        content = earlier_logs(folder, config.log.rank_logs) if name == LOGS else folder
        if folder.is_symlink() or folder.is_mount():
            _archive(folder, _matching(content, patterns))
        else:
            moved[content] = name
    _archive(output_dir, moved)
    _archive(config.checkpoint_dir, _matching(config.checkpoint_dir, CHECKPOINT_FILES))


def _matching(folder: Path, patterns: Iterable[str]) -> dict[Path, str]:
    return {path: path.name for pattern in patterns for path in sorted(folder.glob(pattern))}


def _archive(folder: Path, names: Mapping[Path, str]) -> None:
    """names: of paths in the folder, what they are called afterwards."""
    left = [path for path in names if path.exists()]
    if not left:
        return
    aside = next(path for number in count(1) if not (path := folder / f"{EARLIER}{number}").exists())
    aside.mkdir()
    for path in left:
        path.rename(aside / names[path])
    logger.info("%s contains an earlier run: its files are now in %s", folder, aside)


class RunReporter(Callback):
    """Progress on the terminal, `metrics.jsonl`, TensorBoard, and the result. For rank 0 only."""

    def __init__(
        self,
        config: Config,
        validation: Sequence[ValidationSet],
        topology: Topology,
        optimizer_name: str,
        resumed: ResumePoint | None,
    ) -> None:
        self.config = config
        self.validation = validation
        self.topology = topology
        self.optimizer_name = optimizer_name
        self._completed_steps = resumed.step if resumed else 0
        self._first_event = ("start", "Starting from scratch")
        if resumed:
            self._first_event = ("start", f"Resuming from step {resumed.step} ({resumed.folder})")
        self.tensorboard_dir = config.output_dir / "tensorboard" if config.log.tensorboard else None
        self.last_validation: dict[str | None, HeadMetrics] = {}
        self.tokens = 0
        self.seconds = 0.0
        self.logger = self._build_logger()
        self.events = EventsHandler(config.output_dir / EVENTS, self._completed_steps, self._show)
        PACKAGE_LOGGER.addHandler(self.events)

    def _build_logger(self) -> MetricsLogger:
        config = self.config
        config.output_dir.mkdir(parents=True, exist_ok=True)
        made = self._completed_steps
        writers: list[MetricsWriter] = [
            ProgressBar(config.train.steps),
            MetricsFile(config.output_dir / "metrics.jsonl", made),
        ]
        if self.tensorboard_dir:
            writers.append(TensorBoardWriter(self.tensorboard_dir, [of_set.name for of_set in self.validation], made))
        if config.log.wandb:
            writers.append(WandbWriter(config.log.wandb, config.run.name, config.output_dir))
        peak = peak_flops(device_name(self.topology.device), config.train.precision)
        rates = ThroughputUnits(
            flops_per_token=[model_flops_per_token(config, active) for active in range(1, config.heads.count + 1)],
            peak_flops=peak and peak * self.topology.world_size,
            bytes_per_token={of_set.name: of_set.bytes_per_token for of_set in self.validation},
        )
        return MetricsLogger(writers, rates)

    def on_start(self, completed_steps: int) -> None:
        config, topology = self.config, self.topology
        counts = parameter_counts(config)
        stages = list(trunk_layers_per_stage(config))
        micro_batches = config.micro_batches
        logger.info(
            f"{config.run.name}: {counts.total / 1e6:.2f} M parameters (trunk {counts.trunk / 1e6:.2f}, heads "
            f"{counts.heads / 1e6:.2f}, embeddings {counts.embeddings / 1e6:.2f}), {config.heads.count} heads, "
            f"{config.train.precision} on {device_name(topology.device)}, {self.optimizer_name}\n"
            f"tensor {topology.tp_size} x pipeline {topology.pp_size} x data {topology.dp_size}, trunk layers of each "
            f"stage {stages} + heads on the last, {micro_batches} micro-batches a step"
        )
        self._describe_run(asdict(counts))
        kind, text = self._first_event
        logger.info("%s, %d ranks", text, topology.world_size, extra={"event": kind})
        self.logger.on_start(completed_steps)

    def _describe_run(self, parameters: dict[str, int]) -> None:
        topology = self.topology
        description = {
            "config": self.config.model_dump(mode="json"),
            "layout": topology.degrees,
            "device": device_name(topology.device),
            "parameters": parameters,
            "versions": installed_versions(),
        }
        (self.config.output_dir / RUN).write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")
        self.logger.describe(description)

    def on_step(self, metrics: StepMetrics) -> None:
        self.tokens += metrics.tokens
        self.seconds += metrics.seconds
        self.events.step = metrics.step
        if metrics.skipped:
            self._log("skip", f"step {metrics.step} changed no parameter: {metrics.skipped}")
        self.logger.on_step(metrics)

    def roll_back(self, step: int, text: str) -> None:
        """Between two passes of the loop: the next one begins after `step`; what was written of later ones goes."""
        self._completed_steps = self.events.step = step
        self._first_event = ("rollback", text)
        self.logger = self._build_logger()

    def on_validation(self, step: int, name: str | None, heads: HeadMetrics) -> None:
        self.last_validation[name] = heads
        self.logger.on_validation(step, name, heads)

    def on_spike(self, step: int, text: str) -> None:
        self._log("spike", f"step {step} is a spike: {text}")

    def on_stop(self, step: int, signal: int) -> None:
        name, steps = Signals(signal).name, self.config.train.steps
        self._log(
            "stop",
            f"{name}: stopping after step {step} of {steps} with a checkpoint; the same command resumes the run",
        )

    def on_end(self, reason: StopReason | None) -> None:
        self.logger.on_end(reason)

    def note(self, text: str) -> None:
        """Log an event; another thread may call it."""
        self._log("note", text)

    def _log(self, kind: str, text: str) -> None:
        logger.info("%s", text, extra={"event": kind})

    def _show(self, text: str) -> None:
        self.logger.note(text)

    def show_result(self, checkpoint: Path, make_sample: Callable[[], str | None]) -> None:
        """Write `summary.json`, then add the sample, which may take minutes, and show the table."""
        results = [
            ValidationResult(
                of_set.name, self.last_validation[of_set.name], of_set.unigram_entropy, of_set.bytes_per_token
            )
            for of_set in self.validation
        ]
        summary = RunSummary(
            name=self.config.run.name,
            steps=self.config.train.steps,
            tokens_per_second=self.tokens / self.seconds,
            output_dir=self.config.output_dir,
            validation=results,
            tensorboard_dir=self.tensorboard_dir,
            checkpoint=checkpoint,
        )
        write_summary(summary)
        if (sample := make_sample()) is not None:
            summary = replace(summary, sample=sample)
            write_summary(summary)
        print_summary(summary)
