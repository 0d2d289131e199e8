"""The training program: arguments, device, stop signals and exit statuses. `launchers/pretrain.py` calls `main`."""

import argparse
import faulthandler
import sys
import time
from collections.abc import Sequence

from mtp_dist.config import load_config
from mtp_dist.distributed.launcher import env_world_size
from mtp_dist.errors import UserError, exit_with_error
from mtp_dist.monitoring.output import make_output_optional, silence_import_warnings
from mtp_dist.training.run_lock import hold_folders
from mtp_dist.training.stopping import StopSignals

PEER_EXIT_GRACE_S = 3


def main(arguments: Sequence[str] | None = None) -> None:
    """Train as the command line asks. A user error ends the program with one message on rank 0 and exit status 2.

    SIGTERM, SIGUSR1, SIGINT and SIGHUP end it with `stopping.exit_status`: at once until the model is built,
    then after a step and a checkpoint.
    """
    make_output_optional()
    try:
        with StopSignals() as stop_signals:
            stop_signals.end_at_once()
            status = pretrain(arguments, stop_signals)
        # From here on SIGTERM ends the process by default: the launcher sends it to the ranks that wait below.
    except UserError as error:
        exit_with_error(error)
    except Exception:
        if env_world_size() > 1:
            # If another rank has ended, it has reported why, and the launcher ends this rank meanwhile.
            time.sleep(PEER_EXIT_GRACE_S)
        raise
    sys.exit(status)


def pretrain(arguments: Sequence[str] | None, stop_signals: StopSignals) -> int:
    """Check the job, select its device, train, and return the exit status. Raise UserError if the user can fix it."""
    parser = argparse.ArgumentParser(description="Pretrain a multi-token prediction model.")
    parser.add_argument("--config", required=True, help="YAML file of the run")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="keys that replace the file's")
    parser.add_argument("--local_rank", "--local-rank", type=int, help="set by the deepspeed launcher")
    parser.add_argument("--preflight", action="store_true", help="measure matmuls and collectives of every rank first")
    parser.add_argument("--memory-snapshot", action="store_true", help="record GPU allocations and their stacks")
    options = parser.parse_intermixed_args(arguments)
    config = load_config(options.config, options.overrides)
    # It imports torch, which takes seconds: a wrong key is reported before.
    from mtp_dist.verify.startup import check_startup

    job = check_startup(config, memory_snapshot=options.memory_snapshot)
    with hold_folders(job.config, stop_signals):
        silence_import_warnings()
        # DeepSpeed and Megatron-core probe the device when they are imported, so it must be selected by now.
        from mtp_dist.run import run

        return run(job, stop_signals, options.preflight, options.memory_snapshot)


if __name__ == "__main__":
    faulthandler.enable()  # a rank that is ended by a signal such as SIGBUS prints its stack
    main()
