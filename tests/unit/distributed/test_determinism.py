"""`train.deterministic` selects repeatable kernels and changes nothing on a CPU, whose kernels repeat in any case."""

import torch

from mtp_dist.model.layers import transformer_config
from tests.ranks import Ranks
from tests.tiny import tiny_config
from tests.unit.engine.on_ranks import train_with_flags

LAYOUT = {"tensor": 2, "sequence": True}


def test_deterministic_training_is_applied_and_equals_the_default_on_a_cpu(ranks: Ranks) -> None:
    plain = tiny_config(parallel=LAYOUT)
    deterministic = tiny_config(parallel=LAYOUT, train={"deterministic": True})
    usual, flags = ranks.run(2, train_with_flags, plain)[0]
    assert flags == {"pytorch": False, "CUBLAS_WORKSPACE_CONFIG": None, "NCCL_ALGO": None}
    repeatable, flags = ranks.run(2, train_with_flags, deterministic)[0]
    assert flags == {"pytorch": True, "CUBLAS_WORKSPACE_CONFIG": ":4096:8", "NCCL_ALGO": "Ring"}
    assert not transformer_config(plain).deterministic_mode and transformer_config(deterministic).deterministic_mode
    assert torch.equal(usual.losses, repeatable.losses) and torch.equal(usual.norms, repeatable.norms)
    assert all(torch.equal(weight, repeatable.weights[name]) for name, weight in usual.weights.items())
