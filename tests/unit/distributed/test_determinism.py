"""`train.deterministic` selects deterministic kernels and changes nothing on a CPU, whose kernels always are."""

import torch

from mtp_dist.model.layers import transformer_config
from tests.ranks import Ranks
from tests.tiny import tiny_config
from tests.unit.distributed.on_ranks import run_with_flags

FLAGS = [
    {"pytorch": False, "CUBLAS_WORKSPACE_CONFIG": None, "NCCL_ALGO": None},
    {"pytorch": True, "CUBLAS_WORKSPACE_CONFIG": ":4096:8", "NCCL_ALGO": "Ring"},
]


def test_deterministic_training_is_applied_and_equals_the_default_on_a_cpu(ranks: Ranks) -> None:
    layout = {"tensor": 2, "sequence": True}
    configs = [tiny_config(parallel=layout, train={"deterministic": flag}) for flag in (False, True)]
    (default, default_flags), (repeated, flags) = (ranks.run(2, run_with_flags, config)[0] for config in configs)
    assert [default_flags, flags] == FLAGS
    assert [transformer_config(config).deterministic_mode for config in configs] == [False, True]
    assert torch.equal(default.losses, repeated.losses) and torch.equal(default.norms, repeated.norms)
    assert all(torch.equal(weight, repeated.weights[name]) for name, weight in default.weights.items())
