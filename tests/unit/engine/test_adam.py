"""The AdamW of a GPU, on the CPU, and the counters of its updates."""

import sys
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import nn

from mtp_dist.checkpoint.format import read_metadata
from mtp_dist.config import Config
from mtp_dist.engine.optimizer import adamw_class, build_optimizer
from tests.parity.resuming import END, MIDDLE, ONE, assert_resume_is_bitwise, at
from tests.ranks import RankError, Ranks
from tests.tiny import tiny_config
from tests.unit.checkpoint.on_ranks import Part, train_part

GPU = torch.device("cuda")


class ApexFusedAdam(torch.optim.AdamW):
    """A stand-in for NVIDIA Apex's FusedAdam, which counts its updates per group."""

    def __init__(self, params: Iterable[Any], lr: float, betas: tuple[float, float], eps: float) -> None:
        super().__init__(params, lr, betas, eps)

    def step(self, *args: Any) -> Any:
        for group in self.param_groups:
            updates = group["step"] = group.get("step", 0) + 1
            for state in (self.state[weight] for weight in group["params"] if self.state.get(weight)):
                state["step"] = torch.tensor(updates - 1.0)
        loss = super().step(*args)
        for state in self.state.values():
            del state["step"]
        return loss


class LastCounterAdamW(torch.optim.AdamW):
    """An AdamW that counts on the last weight only, like DeepSpeed's FusedAdam."""

    def step(self, *args: Any) -> Any:
        loss = super().step(*args)
        for group in self.param_groups:
            for weight in group["params"][:-1]:
                self.state[weight]["step"].zero_()
        return loss


def apex_modules(installed: bool) -> dict[str, ModuleType | None]:
    """Return the entries of `sys.modules` with Apex, or without it."""
    if not installed:
        return {"amp_C": None, "apex": None, "apex.optimizers": None}
    optimizers = ModuleType("apex.optimizers")
    optimizers.FusedAdam = ApexFusedAdam  # type: ignore[attr-defined]
    return {"amp_C": ModuleType("amp_C"), "apex": ModuleType("apex"), "apex.optimizers": optimizers}


@pytest.mark.parametrize("apex", [False, True])
def test_a_gpu_has_a_fused_kernel_and_apex_has_precedence(apex: bool) -> None:
    config, weights = tiny_config(), [("trunk.0.a", nn.Parameter(torch.ones(2, 2)))]
    with patch.dict(sys.modules, apex_modules(apex)):
        on_gpu, on_cpu = (build_optimizer(config, weights, device) for device in (GPU, torch.device("cpu")))
    assert type(on_gpu) is (ApexFusedAdam if apex else torch.optim.AdamW)
    assert apex or on_gpu.defaults["fused"] is True
    assert type(on_cpu) is torch.optim.AdamW and not on_cpu.defaults["fused"]


def train_part_as_on_a_gpu(apex: bool, *arguments: Any) -> Part:
    """On each rank: train a part with the optimizer of a GPU, on a machine with Apex or without."""
    with (
        patch.dict(sys.modules, apex_modules(apex)),
        patch("mtp_dist.engine.optimizer.adamw_class", lambda device: adamw_class(GPU)),
    ):
        return train_part(*arguments)


@pytest.mark.parametrize("apex", [False, True])
def test_resume_with_the_optimizers_of_a_gpu(ranks: Ranks, tmp_path: Path, apex: bool) -> None:
    def train(*arguments: Any) -> Part:
        [part] = ranks.run(1, train_part_as_on_a_gpu, apex, at(ONE, tmp_path), *arguments)
        return part

    assert_resume_is_bitwise(train, tmp_path)
    for step in (MIDDLE, END):
        assert read_metadata(tmp_path / f"step_{step:08d}").optimizer_updates == step


def train_part_with_wrong_counters(config: Config) -> None:
    """On each rank: save after two updates of an optimizer whose counters disagree."""
    with patch("mtp_dist.engine.optimizer.adamw_class", lambda device: LastCounterAdamW):
        train_part(config, 0, 2)


def test_counters_that_disagree_are_not_saved(ranks: Ranks, tmp_path: Path) -> None:
    """Otherwise a resume would silently drop the moments."""
    with pytest.raises(RankError, match=r"counters are \[0, 2\] after 2 updates"):
        ranks.run(1, train_part_with_wrong_counters, at(ONE, tmp_path))
