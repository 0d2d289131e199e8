"""`train.deterministic` selects deterministic kernels and changes nothing on a CPU, whose kernels always are."""

import os

import torch

from mtp_dist.config import Config
from mtp_dist.model.layers import transformer_config
from tests.parity.runs import Run, sharded_run
from tests.ranks import Ranks
from tests.tiny import tiny_config

FLAGS = [
    {"pytorch": False, "CUBLAS_WORKSPACE_CONFIG": None, "NCCL_ALGO": None},
    {"pytorch": True, "CUBLAS_WORKSPACE_CONFIG": ":4096:8", "NCCL_ALGO": "Ring"},
]


def run_with_flags(config: Config) -> tuple[Run | None, dict[str, object]]:
    """On each rank: return a short training and settings of deterministic kernels that it leaves, which are undone."""
    names = ("CUBLAS_WORKSPACE_CONFIG", "NCCL_ALGO")
    try:
        run = sharded_run(config, 3)
        environment = {name: os.environ.get(name) for name in names}
        return run, {"pytorch": torch.are_deterministic_algorithms_enabled()} | environment
    finally:
        torch.use_deterministic_algorithms(False)
        for name in names:
            os.environ.pop(name, None)


def test_deterministic_training_is_applied_and_equals_the_default_on_a_cpu(ranks: Ranks) -> None:
    layout = {"tensor": 2, "sequence": True}
    configs = [tiny_config(parallel=layout, train={"deterministic": flag}) for flag in (False, True)]
    (default, default_flags), (repeated, flags) = (ranks.run(2, run_with_flags, config)[0] for config in configs)
    assert [default_flags, flags] == FLAGS
    assert [transformer_config(config).deterministic_mode for config in configs] == [False, True]
    assert torch.equal(default.losses, repeated.losses) and torch.equal(default.norms, repeated.norms)
    assert all(torch.equal(weight, repeated.weights[name]) for name, weight in default.weights.items())
