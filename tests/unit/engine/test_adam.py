"""Which AdamW trains on a GPU, and that its updates are counted right."""

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from mtp_dist.checkpoint.format import read_metadata
from mtp_dist.engine.optimizer import build_optimizer
from tests.parity.comparison import layout_config
from tests.parity.resuming import ONE, at
from tests.ranks import RankError, Ranks
from tests.tiny import tiny_config
from tests.unit.engine.adam_on_ranks import (
    ApexFusedAdam,
    apex_modules,
    timers_after_steps,
    train_part_as_on_a_gpu,
    train_part_with_wrong_counters,
)

MIDDLE, END = 2, 4
GPU = torch.device("cuda")


def test_a_gpu_without_apex_has_the_fused_kernel_of_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, module in apex_modules(installed=False).items():
        monkeypatch.setitem(sys.modules, name, module)
    optimizer = build_optimizer(tiny_config(), [nn.Parameter(torch.ones(2, 2))], GPU)
    assert type(optimizer) is torch.optim.AdamW and optimizer.defaults["fused"] is True


def test_apex_is_used_if_it_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, module in apex_modules(installed=True).items():
        monkeypatch.setitem(sys.modules, name, module)
    config, weights = tiny_config(), [nn.Parameter(torch.ones(2, 2))]
    assert type(build_optimizer(config, weights, GPU)) is ApexFusedAdam
    on_cpu = build_optimizer(config, weights, torch.device("cpu"))
    assert type(on_cpu) is torch.optim.AdamW and not on_cpu.defaults["fused"]


@pytest.mark.parametrize(
    "apex",
    [pytest.param(False, id="PyTorch"), pytest.param(True, id="Apex")],
)
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


def test_counters_that_disagree_are_not_saved(ranks: Ranks, tmp_path: Path) -> None:
    """Otherwise a resume would drop the moments in silence."""
    with pytest.raises(RankError, match=r"counters say \[0, 2\], 2 updates were made"):
        ranks.run(1, train_part_with_wrong_counters, at(ONE, tmp_path))


def test_measurements_of_deepspeed_do_not_pile_up(ranks: Ranks) -> None:
    """On a GPU each holds two CUDA events."""
    [held] = ranks.run(1, timers_after_steps, layout_config(ONE, 2))
    assert held == [0] * 4
