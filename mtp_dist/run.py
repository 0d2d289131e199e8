"""One training run: load the data, connect the ranks, resume, build, train, summarize.

Import it after the device is selected: DeepSpeed and Megatron-core probe the device when they are imported.
"""

import logging
import socket
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist

from mtp_dist.checkpoint.find import ResumePoint
from mtp_dist.checkpoint.format import checkpoint_path
from mtp_dist.checkpoint.restore import (
    agree_on_resume_point,
    check_weights_on_all_ranks,
    load_initial_weights,
    restore,
)
from mtp_dist.checkpoint.saver import CheckpointSaver
from mtp_dist.config import Config
from mtp_dist.config.notices import notices
from mtp_dist.convert.initial_weights import InitialWeights, find_initial_weights
from mtp_dist.data.datasets import Datasets, load_datasets, with_positions
from mtp_dist.data.tokenizer import Tokenizer
from mtp_dist.distributed.collectives import all_gather_objects, from_rank_0
from mtp_dist.distributed.device import device_name
from mtp_dist.distributed.flight_recorder import FLIGHT_RECORDER
from mtp_dist.distributed.topology import Topology, close_topology, initialize_topology, new_gloo_groups
from mtp_dist.engine.engine import TrainingEngine, build_engine
from mtp_dist.engine.measured_partition import with_measured_partition
from mtp_dist.errors import ConfigError, UserError
from mtp_dist.monitoring.callback import CallbackList, StopReason
from mtp_dist.monitoring.profiling import begin_memory_history, profiling_callbacks
from mtp_dist.monitoring.rank0 import rank0_callbacks
from mtp_dist.monitoring.rank_logs import tee_output
from mtp_dist.monitoring.summary import SummaryRecorder, print_summary, write_summary
from mtp_dist.planner.flops import parameter_counts, trained_parameters
from mtp_dist.planner.partition import pipeline_stages
from mtp_dist.training.run_folder import archive_earlier_run
from mtp_dist.training.stopping import StopSignals, exit_status
from mtp_dist.training.trainer import Trainer
from mtp_dist.training.watchdog import Watchdog
from mtp_dist.verify.memory import agree_on_memory, check_memory
from mtp_dist.verify.preflight import run_preflight
from mtp_dist.verify.startup import CheckedJob

logger = logging.getLogger(__name__)

SAMPLING_TEMPERATURE = 0.7
ALREADY_FINISHED = (
    "%s has already reached step %d/%d; nothing to do.\nStart from scratch with checkpoint.resume=none, or train "
    "longer with a larger train.steps and checkpoint.allow_changes=[train.steps]"
)


def run(job: CheckedJob, stop_signals: StopSignals, preflight: bool, memory_snapshot: bool) -> int:
    """Train from scratch or from a checkpoint, validate, save and show the result. Return the exit status."""
    config, sources, device = job
    datasets = load_datasets(config, sources)
    for notice in notices(config, datasets.tokenizer.vocab_size):
        logger.warning(notice)

    topology = initialize_topology(config, device)
    if memory_snapshot:
        begin_memory_history(config, topology.rank)
    gloo_groups = new_gloo_groups(topology)

    resumed = agree_on_resume_point(config, topology, gloo_groups.all)
    if resumed and resumed.step >= config.train.steps:
        logger.info(ALREADY_FINISHED, resumed.folder, resumed.step, config.train.steps)
        close_topology()
        return 0
    starts_new_run = _starts_new_run(resumed, config)
    if config.log.rank_logs:
        tee_output(config.output_dir, topology.rank, topology.world_size, starts_new_run)
    samples_read = _restore_samples(datasets, resumed, config)

    initial = None if resumed else _agree_on_initial_weights(config, datasets.tokenizer, topology, gloo_groups.all)
    config = check_memory(with_measured_partition(agree_on_memory(config, topology), topology), device)
    engine = _build_engine(config, topology, resumed, initial)
    stop_signals.defer()  # the collective below keeps all ranks from training until each has done so
    hosts = all_gather_objects(socket.gethostname(), gloo_groups.all)
    summary = SummaryRecorder(config, datasets.validation)
    callbacks = profiling_callbacks(config, topology, memory_snapshot)
    if topology.rank == 0:
        if starts_new_run:
            archive_earlier_run(config)
        step = resumed.step if resumed else 0
        callbacks = [*rank0_callbacks(config, topology, datasets.validation, hosts, step), summary, *callbacks]

    _log_start(config, topology, datasets, engine.optimizer_name, resumed, initial)
    with Watchdog(config.run.step_timeout, topology.rank, config.output_dir / FLIGHT_RECORDER) as watchdog:
        if preflight:
            run_preflight(config, topology, gloo_groups.all)
        trainer = Trainer(
            config=config,
            engine=engine,
            datasets=datasets,
            saver=CheckpointSaver(config, engine, gloo_groups),
            callbacks=CallbackList(callbacks),
            stop_signals=stop_signals,
            watchdog=watchdog,
            gloo_group=gloo_groups.all,
            resume_point=resumed,
            samples_read=samples_read,
            validates_first=initial is not None,
        )
        result = trainer.fit()

    if topology.rank == 0 and result.reason is StopReason.LAST_STEP:
        _show_result(config, datasets.tokenizer, summary)
    # Ranks end together: launchers kill those that outlive the first one, srun after 120 seconds.
    dist.barrier(gloo_groups.all)
    close_topology()
    return exit_status(result.signal) if result.signal else 0


def _build_engine(
    config: Config, topology: Topology, resumed: ResumePoint | None, initial: InitialWeights | None
) -> TrainingEngine:
    """Build this rank's stage with the weights, and the optimizer with the moments, that the run starts with.

    Raise ConfigError if untrained weights would be frozen.
    """
    if config.train.freezes_weights and not (resumed or initial):
        key = "train.low_rank" if config.train.low_rank else "train.freeze = [trunk]"
        raise ConfigError(
            f"{key} would freeze random weights: name a trained model in checkpoint.initial_weights, "
            "or a checkpoint in checkpoint.resume"
        )
    engine = build_engine(config, topology, initialize=not (resumed or initial))
    if resumed:
        restore(engine, resumed.folder)
    elif initial:
        load_initial_weights(engine, initial.open())
    return engine


def _log_start(
    config: Config,
    topology: Topology,
    datasets: Datasets,
    optimizer_name: str,
    resumed: ResumePoint | None,
    initial: InitialWeights | None,
) -> None:
    """Log what was read of the sources, the size of the model, the layout and where the run starts."""
    for description in datasets.descriptions:
        logger.info(description)
    counts, stages = parameter_counts(config), pipeline_stages(config)
    heads = "heads on the last" if config.heads.stages == 1 else f"heads {[stage.heads for stage in stages]}"
    trained = f"; {trained_parameters(config) / 1e6:.2f} M of them trained" if config.train.freezes_weights else ""
    logger.info(
        f"{config.run.name}: {counts.total / 1e6:.2f} M parameters (trunk {counts.trunk / 1e6:.2f}, heads "
        f"{counts.heads / 1e6:.2f}, embeddings {counts.embeddings / 1e6:.2f}{trained}), {config.heads.count} heads, "
        f"{config.train.precision} on {device_name(topology.device)}, {optimizer_name}\n"
        f"tensor {topology.tp_size} x pipeline {topology.pp_size} x data {topology.dp_size}, trunk layers per stage "
        f"{[stage.layers for stage in stages]} + {heads}, {config.micro_batches} micro-batches per step"
        f"{'' if topology.schedule == '1f1b' else f', schedule {topology.schedule}'}"
    )
    start = f"Resuming from step {resumed.step} ({resumed.folder})" if resumed else "Starting from scratch"
    if initial:
        logger.info(initial.describe())
        start = f"Starting from the weights of {initial.folder}"
    logger.info("%s, %d ranks", start, topology.world_size, extra={"event": "start"})


def _agree_on_initial_weights(
    config: Config, tokenizer: Tokenizer, topology: Topology, gloo_group: dist.ProcessGroup
) -> InitialWeights | None:
    """Return the weights that a new run starts from, the same on every rank. A collective over all ranks.

    Raise UserError, on every rank, if they are corrupt or are those of another model.
    """
    if config.checkpoint.initial_weights is None:
        return None
    initial = from_rank_0(lambda: find_initial_weights(config, tokenizer), gloo_group)
    if not initial.is_export:  # which has no checksums
        check_weights_on_all_ranks(initial.folder, topology, gloo_group)
    return initial


def _starts_new_run(resumed: ResumePoint | None, config: Config) -> bool:
    """Return whether the run does not continue the one in its folder, so that files there are another run's."""
    return not resumed or resumed.folder.parent.resolve() != config.checkpoint_dir.resolve()


def _restore_samples(datasets: Datasets, resumed: ResumePoint | None, config: Config) -> int:
    """Move the training samples to where the checkpoint was saved. Return the number of samples read before."""
    if not resumed or not resumed.step:  # step 0 is an imported model, for which no samples were read
        return 0
    samples = with_positions(resumed.samples, resumed.config)
    return datasets.restore(samples, may_change="data.train" in config.checkpoint.allow_changes)


def _show_result(config: Config, tokenizer: Tokenizer, recorder: SummaryRecorder) -> None:
    """Write `summary.json`, add the sample, which may take minutes, and print both."""
    checkpoint = checkpoint_path(config, config.train.steps)
    summary = recorder.summary(checkpoint)
    write_summary(summary)
    if (sample := _sample(config, tokenizer, checkpoint)) is not None:
        summary = replace(summary, sample=sample)
        write_summary(summary)
    print_summary(summary)


def _sample(config: Config, tokenizer: Tokenizer, checkpoint: Path) -> str | None:
    """Return the prompt and its continuation by the saved model; None if no prompt is configured, or it fails."""
    if config.log.sample_prompt is None:
        return None
    logger.info("Sampling: verifying and reading the weights of %s", checkpoint)
    from mtp_dist.inference.generator import Generator  # transformers takes seconds to import
    from mtp_dist.inference.speculation import Speculation

    try:
        # bf16 is slow on most CPUs.
        generator = Generator.open(checkpoint, dtype=torch.float32)
        prompt = generator.prompt_ids(config.log.sample_prompt)[-max(1, generator.positions // 2) :]
        # A fixed number of heads: the fastest one depends on the load of the machine, and with it the random numbers.
        speculation = Speculation(heads=config.heads.count)
        new_tokens = min(config.log.sample_tokens, generator.positions - len(prompt))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.run.seed)
            tokens = generator.generate([prompt], new_tokens, SAMPLING_TEMPERATURE, speculation)[0]
    except (UserError, RuntimeError) as error:  # such as NaN, or too little memory: the training itself is complete
        logger.warning("No sample: %s", error)
        return None
    return tokenizer.decode(prompt + tokens)
