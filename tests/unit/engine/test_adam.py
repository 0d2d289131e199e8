"""The AdamW of a GPU, on the CPU, and the counters of its updates."""

import sys
from collections.abc import Callable, Iterable
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
from tests.parity.resuming import ONE, at
from tests.ranks import RankError, Ranks
from tests.tiny import tiny_config
from tests.unit.checkpoint.on_ranks import Part, train_part

MIDDLE, END = 2, 4
GPU = torch.device("cuda")


class ApexFusedAdam(torch.optim.Optimizer):
    """A stand-in for NVIDIA Apex's FusedAdam, which counts its updates per group."""

    def __init__(self, params: Iterable[Any], lr: float, betas: tuple[float, float], eps: float) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": 0.0})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            first, second = group["betas"]
            for weight in group["params"]:
                if weight.grad is None:
                    continue
                state = self.state[weight]
                if not state:
                    state |= {"exp_avg": torch.zeros_like(weight), "exp_avg_sq": torch.zeros_like(weight)}
                state["exp_avg"].lerp_(weight.grad, 1 - first)
                state["exp_avg_sq"].lerp_(weight.grad.square(), 1 - second)
                mean = state["exp_avg"] / (1 - first ** group["step"])
                deviation = (state["exp_avg_sq"] / (1 - second ** group["step"])).sqrt() + group["eps"]
                weight.mul_(1 - group["lr"] * group["weight_decay"]).sub_(group["lr"] * mean / deviation)


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
    config, weights = tiny_config(), [nn.Parameter(torch.ones(2, 2))]
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
    config = at(ONE, tmp_path)
    [whole] = ranks.run(1, train_part_as_on_a_gpu, apex, config, 0, END, None, False)
    ranks.run(1, train_part_as_on_a_gpu, apex, config, 0, MIDDLE)
    folder = tmp_path / f"step_{MIDDLE:08d}"
    assert read_metadata(folder).optimizer_updates == MIDDLE
    [rest] = ranks.run(1, train_part_as_on_a_gpu, apex, config, MIDDLE, END, folder)
    assert read_metadata(tmp_path / f"step_{END:08d}").optimizer_updates == END
    for after, expected in ((rest.weights, whole.weights), (rest.moments, whole.moments)):
        assert after.keys() == expected.keys()
        assert all(torch.equal(tensor, expected[name]) for name, tensor in after.items())


def train_part_with_wrong_counters(config: Config) -> None:
    """On each rank: save after two updates of an optimizer whose counters disagree."""
    with patch("mtp_dist.engine.optimizer.adamw_class", lambda device: LastCounterAdamW):
        train_part(config, 0, 2)


def test_counters_that_disagree_are_not_saved(ranks: Ranks, tmp_path: Path) -> None:
    """Otherwise a resume would silently drop the moments."""
    with pytest.raises(RankError, match=r"counters are \[0, 2\] after 2 updates"):
        ranks.run(1, train_part_with_wrong_counters, at(ONE, tmp_path))
