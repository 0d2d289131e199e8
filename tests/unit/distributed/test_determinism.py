"""`train.deterministic` selects deterministic kernels and changes nothing on a CPU, whose kernels always are."""

import os

import torch

from mtp_dist.model.layers import transformer_config
from tests.parity.comparison import assert_bitwise_equal
from tests.parity.runs import sharded_run
from tests.tiny import tiny_config

NAMES = ("CUBLAS_WORKSPACE_CONFIG", "NCCL_ALGO")


def run_with_flags(config):
    """On each rank: return a short training and settings of deterministic kernels that it leaves, which are undone."""
    try:
        run = sharded_run(config, 3)
        return run, [torch.are_deterministic_algorithms_enabled(), *map(os.environ.get, NAMES)]
    finally:
        torch.use_deterministic_algorithms(False)
        for name in NAMES:
            os.environ.pop(name, None)


def test_deterministic_training_is_applied_and_equals_the_default_on_a_cpu(ranks):
    layout = {"tensor": 2, "sequence": True}
    configs = [tiny_config(parallel=layout, train={"deterministic": flag}) for flag in (False, True)]
    (default, default_flags), (repeated, flags) = (ranks.run(2, run_with_flags, config)[0] for config in configs)
    assert (default_flags, flags) == ([False, None, None], [True, ":4096:8", "Ring"])
    assert [transformer_config(config).deterministic_mode for config in configs] == [False, True]
    assert_bitwise_equal(default, repeated)
