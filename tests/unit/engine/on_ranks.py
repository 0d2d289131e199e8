"""What the tests of this folder run on every rank."""

import os
import resource

import torch
import torch.distributed as dist
from torch import Tensor

from mtp_dist.config import Config
from mtp_dist.distributed.topology import initialize_topology, tp_group
from mtp_dist.engine.tensor_shards import full_tensors, master_weight
from mtp_dist.errors import ConfigError
from mtp_dist.loss.schedule import head_schedule
from mtp_dist.metrics import HeadMetrics
from mtp_dist.model.parameters import named_weights, parameter_shapes
from mtp_dist.model.targets import IGNORE_INDEX
from mtp_dist.verify.reference_training import local_batch, random_batch
from tests.engines import open_engine
from tests.parity.runs import Run, sharded_run

SILENT_HEAD = 2
"""Prediction distance of the head that has no valid target."""


def initial_weights(config: Config) -> dict[str, Tensor]:
    """Of this rank's stage, as the optimizer has them; the model's own must be the same in its precision."""
    engine = open_engine(config)
    for name, weight in named_weights(engine.stage):  # the copy of a tied weight too
        assert torch.equal(weight, master_weight(weight).to(weight.dtype)), name
    return dict(full_tensors(engine.stage, parameter_shapes(config), engine.topology, master_weight))


def train_with_a_silent_head(config: Config) -> tuple[list[HeadMetrics], list[float], dict[str, Tensor]]:
    """Return metrics of three steps and an evaluation, the steps' gradient norms and this stage's weights."""
    engine, schedule = open_engine(config), head_schedule(config, 1)
    tokens, targets = random_batch(config)
    targets[SILENT_HEAD - 1] = IGNORE_INDEX
    # One micro-batch of head 1 is empty too, although the head is not.
    targets[0, : config.train.micro_batch_size] = IGNORE_INDEX
    batch = local_batch(config, engine.topology, tokens, targets)
    results = [engine.train_step(batch, 1e-3, schedule) for _ in range(3)]
    assert torch.as_tensor(engine.pipeline.agg_train_loss).isfinite(), "the loss that DeepSpeed sees"
    metrics = [*(result.heads for result in results), engine.evaluate(batch, schedule)]
    shapes = parameter_shapes(config)
    weights = {n: w.clone() for n, w in full_tensors(engine.stage, shapes, engine.topology, master_weight)}
    return metrics, [result.grad_norm for result in results], weights


def patience(config: Config, port: int) -> list[float]:
    """Seconds that collectives of all ranks and of a tensor-parallel group wait, and that the store does."""
    dist.destroy_process_group()
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    initialize_topology(config, torch.device("cpu"))
    groups = [dist.distributed_c10d._get_default_group(), tp_group()]
    timeouts = [group._get_backend(torch.device("cpu")).options._timeout for group in groups]
    return [time.total_seconds() for time in (*timeouts, dist.distributed_c10d._get_default_store().timeout)]


def resources(config: Config, port: int, soft_limit: int) -> tuple[int, int, str | None]:
    """Open the topology in an environment without settings of its own. Return PyTorch's number of threads, the limit
    of open files and gloo's network interface."""
    dist.destroy_process_group()
    environment, limits = dict(os.environ), resource.getrlimit(resource.RLIMIT_NOFILE)
    for name in ("OMP_NUM_THREADS", "GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        os.environ.pop(name, None)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ["LOCAL_WORLD_SIZE"] = str(len(os.sched_getaffinity(0)))
    torch.set_num_threads(7)
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft_limit, limits[1]))
    try:
        initialize_topology(config, torch.device("cpu"))
        open_files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        return torch.get_num_threads(), open_files, os.environ.get("GLOO_SOCKET_IFNAME")
    finally:
        os.environ.clear()
        os.environ |= environment
        torch.set_num_threads(1)
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def train_with_flags(config: Config) -> tuple[Run | None, dict[str, object]]:
    """A short training, and which settings for deterministic kernels it left in this process; they are undone."""
    names = ("CUBLAS_WORKSPACE_CONFIG", "NCCL_ALGO")
    try:
        run = sharded_run(config, 3)
        flags = {"pytorch": torch.are_deterministic_algorithms_enabled()} | {
            name: os.environ.get(name) for name in names
        }
    finally:
        torch.use_deterministic_algorithms(False)
        for name in names:
            os.environ.pop(name, None)
    return run, flags


def join_with_other_seeds(config: Config, seeds: list[int], port: int) -> str | None:
    """Open the topology with this rank's seed. Return what the user is shown if the ranks refuse to start."""
    rank = dist.get_rank()
    dist.destroy_process_group()
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    config = config.model_copy(update={"run": config.run.model_copy(update={"seed": seeds[rank]})})
    try:
        initialize_topology(config, torch.device("cpu"))
    except ConfigError as error:
        return str(error)
    return None
