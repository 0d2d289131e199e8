"""Pretraining: parse, build, fit. `launchers/pretrain.py` only calls `main`."""

import argparse
import faulthandler
import os
import socket
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from mtp_dist.config import Config, load_config
from mtp_dist.config.notices import notices
from mtp_dist.distributed.flight_recorder import FLIGHT_RECORDER
from mtp_dist.errors import UserError
from mtp_dist.monitoring.callbacks import Callback, StopReason
from mtp_dist.monitoring.output import make_output_optional, silence_import_warnings
from mtp_dist.monitoring.rank_logs import tee_output
from mtp_dist.training.run_lock import hold_folders
from mtp_dist.training.stopping import StopSignals, exit_status
from mtp_dist.training.watchdog import Watchdog

if TYPE_CHECKING:
    import torch.distributed as dist

    from mtp_dist.checkpoint.find import ResumePoint
    from mtp_dist.data.datasets import Datasets
    from mtp_dist.data.run_sources import RunSources
    from mtp_dist.data.tokenizer import Tokenizer
    from mtp_dist.engine.engine import TrainingEngine
    from mtp_dist.monitoring.reporting import RunReporter

RANK0_REPORT_GRACE_S = 10
PEER_EXIT_GRACE_S = 3


def main(arguments: Sequence[str] | None = None) -> None:
    """Train as the command line says. A mistake of the user ends with one message on rank 0 and exit status 2.

    SIGTERM, SIGUSR1, SIGINT and SIGHUP end it with `stopping.exit_status`: at once before the first step, after the
    current step and with a checkpoint later.
    """
    make_output_optional()
    try:
        with StopSignals() as stop_signals:
            stop_signals.end_at_once()
            status = run(arguments, stop_signals)
    # From here on SIGTERM ends the process by default: the launcher sends it to the ranks that wait below.
    except UserError as error:
        exit_with_error(error)
    except Exception:
        if int(os.environ.get("WORLD_SIZE", 1)) > 1:
            # If another rank has ended, it has reported why, and the launcher ends this rank meanwhile.
            time.sleep(PEER_EXIT_GRACE_S)
        raise
    sys.exit(status)


def run(arguments: Sequence[str] | None, stop_signals: StopSignals) -> int:
    """Train as the command line says and return the exit status. Raise ConfigError if the user made a mistake."""
    parser = argparse.ArgumentParser(description="Pretrain a multi-token prediction model.")
    parser.add_argument("--config", required=True, help="YAML file of the run")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="keys that replace the file's")
    parser.add_argument("--local_rank", "--local-rank", type=int, help="set by the deepspeed launcher")
    parser.add_argument("--preflight", action="store_true", help="measure matmuls and collectives of every rank first")
    parser.add_argument("--memory-snapshot", action="store_true", help="record what lies in the GPU's memory, and why")
    options = parser.parse_intermixed_args(arguments)
    config = load_config(options.config, options.overrides)
    from mtp_dist.verify.startup import check_startup

    sources = check_startup(config, memory_snapshot=options.memory_snapshot)
    with hold_folders(config, stop_signals):
        return pretrain(config, sources, stop_signals, options.preflight, options.memory_snapshot)


def exit_with_error(error: UserError) -> NoReturn:
    """Say why and end this process with status 2; only rank 0 speaks of what all ranks see."""
    rank, prefix = os.environ.get("RANK", "0"), "error"
    if rank.isdecimal() and int(rank):
        # Launchers kill the other ranks as soon as one has ended, so rank 0 must get to say why. Whoever still lives
        # after that has a mistake that rank 0 has not, such as a missing GPU.
        time.sleep(RANK0_REPORT_GRACE_S)
        prefix = f"error on rank {rank}"
    print("\n".join(f"{prefix}: {line}" for line in str(error).splitlines()), file=sys.stderr, flush=True)
    if (torch := sys.modules.get("torch")) and torch.distributed.is_initialized():
        # A thread that saves may be inside a collective. To take Python down around it ends in an abort, not in 2.
        sys.stdout.flush()
        os._exit(2)
    sys.exit(2)


def pretrain(
    config: Config, sources: "RunSources", stop_signals: StopSignals, preflight: bool, memory_snapshot: bool
) -> int:
    """Train from the start or from a checkpoint, validate, save and show the result. Return the exit status.

    Before, measure each rank if preflight is asked for; memory_snapshot is of what --memory-snapshot writes.
    """
    from mtp_dist.data.datasets import load_datasets
    from mtp_dist.distributed.device import select_device

    vocab_size = sources.vocab_size
    datasets = load_datasets(config, sources)
    _print_notices(config, datasets)
    device = select_device(config)
    silence_import_warnings()

    # DeepSpeed and Megatron-core look at the device when they are imported.
    from mtp_dist.checkpoint.restore import agree_on_resume_point, restore
    from mtp_dist.checkpoint.saver import CheckpointSaver
    from mtp_dist.distributed.topology import all_gather_objects, close_topology, initialize_topology, new_gloo_groups
    from mtp_dist.engine.engine import build_engine
    from mtp_dist.monitoring.profiling import begin_memory_history, profiling_callbacks
    from mtp_dist.training.recovery import fit_and_recover
    from mtp_dist.training.trainer import Trainer
    from mtp_dist.verify.preflight import Preflight

    topology = initialize_topology(config, device)
    if memory_snapshot:
        begin_memory_history(config, topology.rank)
    gloo_groups = new_gloo_groups(topology)
    resumed = agree_on_resume_point(config, vocab_size, topology, gloo_groups.all)
    if resumed and resumed.step >= config.train.steps:
        _say_finished(config, resumed)
        close_topology()
        return 0
    if config.log.rank_logs:
        tee_output(config.output_dir, _is_new(resumed, config))
    samples_read = _restore_samples(datasets, resumed, config)
    engine = build_engine(config, vocab_size, topology, initialize=not resumed)
    if resumed:
        restore(engine, resumed.folder)
    reporter = _reporter(config, vocab_size, datasets, engine, resumed) if topology.rank == 0 else None
    heard = (reporter.note, reporter.on_saved) if reporter else (print, print)  # of other ranks nobody hears
    saver = CheckpointSaver(config, vocab_size, engine, gloo_groups, *heard)
    stop_signals.defer()  # before a collective: no rank starts to train while another one still ends at once
    hosts = all_gather_objects(socket.gethostname(), gloo_groups.all)
    callbacks = _callbacks_of_rank_0(reporter, hosts) if reporter else []
    callbacks += [Preflight(config, topology, gloo_groups.all, heard[0])] if preflight else []
    callbacks += profiling_callbacks(config, topology, memory_snapshot, heard[0])
    with Watchdog(config.run.step_timeout, topology.rank, config.output_dir / FLIGHT_RECORDER) as watchdog:
        trainer = Trainer(config, engine, datasets, callbacks, saver.save, stop_signals, watchdog)
        ending = fit_and_recover(trainer, saver, gloo_groups.all, reporter, resumed, samples_read)
    finished = reporter if ending.reason is StopReason.LAST_STEP else None
    _end_together(config, finished, datasets.tokenizer, gloo_groups.all)
    return exit_status(ending.signal) if ending.signal else 0


def _end_together(
    config: Config, finished: "RunReporter | None", tokenizer: "Tokenizer", gloo_group: "dist.ProcessGroup"
) -> None:
    """Show the result of a finished run on rank 0, and leave the process groups when all ranks have come this far.

    Launchers give the ranks that are left little time after the first one has ended: srun 120 seconds.
    """
    import torch.distributed as dist

    from mtp_dist.checkpoint.format import checkpoint_path
    from mtp_dist.distributed.topology import close_topology

    if finished:
        checkpoint = checkpoint_path(config, config.train.steps)
        finished.show_result(checkpoint, lambda: _sample(config, tokenizer, checkpoint))
    dist.barrier(gloo_group)
    close_topology()


def _restore_samples(datasets: "Datasets", resumed: "ResumePoint | None", config: Config) -> int:
    """Return the number of samples read before."""
    from mtp_dist.data.datasets import with_positions

    if not resumed or not resumed.step:  # a checkpoint of step 0 is an imported model's, which no samples were read for
        return 0
    samples = with_positions(resumed.samples, resumed.config)
    return datasets.restore(samples, may_change="data.train" in config.checkpoint.allow_changes)


def _reporter(
    config: Config, vocab_size: int, datasets: "Datasets", engine: "TrainingEngine", resumed: "ResumePoint | None"
) -> "RunReporter":
    """Rank 0's, in a folder that has no other run's files. Print what was read of the sources first."""
    from mtp_dist.monitoring.reporting import RunReporter, archive_previous_run

    for line in datasets.notices:
        print(line, flush=True)
    if _is_new(resumed, config):
        archive_previous_run(config)
    return RunReporter(config, vocab_size, datasets.validation, engine.topology, engine.optimizer_name, resumed)


def _callbacks_of_rank_0(reporter: "RunReporter", hosts: Sequence[str]) -> list[Callback]:
    """hosts: name of each rank's machine."""
    from mtp_dist.monitoring.stragglers import Stragglers

    return [reporter, Stragglers(hosts, reporter.note)]


def _is_new(resumed: "ResumePoint | None", config: Config) -> bool:
    """Whether this is not the run that wrote what may lie in the run's folder."""
    return not resumed or resumed.folder.parent.resolve() != config.checkpoint_dir.resolve()


def _print_notices(config: Config, datasets: "Datasets") -> None:
    """Print the settings that are more often a mistake than a choice, on rank 0."""
    if int(os.environ.get("RANK", 0)) == 0:
        world_size = int(os.environ.get("WORLD_SIZE", 1))
        for line in notices(config, datasets.tokenizer.vocab_size, world_size):
            print(f"warning: {line}", file=sys.stderr, flush=True)


def _say_finished(config: Config, resumed: "ResumePoint") -> None:
    if int(os.environ.get("RANK", 0)) == 0:
        print(
            f"{resumed.folder} is at step {resumed.step} of {config.train.steps}: nothing is left to train.\n"
            "Start anew with checkpoint.resume=none, or train on with a larger train.steps and "
            "checkpoint.allow_changes=[train.steps]"
        )


def _sample(config: Config, tokenizer: "Tokenizer", checkpoint: Path) -> str | None:
    """The prompt and a continuation of it by the model as it was saved."""
    from mtp_dist.checkpoint.reader import load_weights
    from mtp_dist.inference.sampling import sample_continuation
    from mtp_dist.model.reference import ReferenceModel

    if config.log.sample_prompt is None:
        return None
    print(f"Sampling: verifying and reading the weights of {checkpoint}", flush=True)
    prompt = [tokenizer.end_of_document, *tokenizer.encode(config.log.sample_prompt).tolist()]
    model = ReferenceModel(*load_weights(checkpoint))
    tokens = sample_continuation(
        model, prompt, config.log.sample_tokens, 0.7, config.run.seed, tokenizer.end_of_document
    )
    return tokenizer.decode(prompt + tokens)


if __name__ == "__main__":
    faulthandler.enable()  # a rank that a signal such as SIGBUS ends reports where it was
    main()
