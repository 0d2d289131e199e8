"""Decoding with the heads on NVIDIA GPUs. Skipped on other machines."""

import json

import pytest
import torch

from mtp_dist.cli.generate import generate
from mtp_dist.inference.generator import Generator
from mtp_dist.inference.speculation import Speculation
from mtp_dist.inference.tree import choose_tree
from tests.unit.convert.folders import write_model
from tests.unit.inference.models import VARIANTS, padded_prompts, tiny_model

GPUS = torch.cuda.device_count()
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(GPUS == 0, reason="PyTorch finds no NVIDIA GPU on this machine")]
NEW_TOKENS = 48


@pytest.mark.parametrize("variant", VARIANTS)
def test_drafts_do_not_change_the_text(variant: str) -> None:
    tiny = tiny_model(variant)
    prompts, mask = padded_prompts([9, 4, 1])
    longest = tiny.config.heads.distances[-1]
    tree = choose_tree([[0.5, 0.3, 0.2]] * (longest - 1), 12)
    on_cpu = _generate(tiny.model, prompts, mask, Speculation(heads=1))
    model = tiny.model.cuda()
    for speculation in (Speculation(heads=1), Speculation(heads=4), Speculation(), Speculation(tree=tree)):
        found = _generate(model, prompts.cuda(), mask.cuda(), speculation)
        assert torch.equal(found.cpu(), on_cpu), speculation


@pytest.mark.parametrize("variant", ["parallel", "sequential"])
def test_bf16_drafts_are_accepted_as_in_fp32(variant: str) -> None:
    """Rounding may decide near ties of random weights, but no more often than now and then."""
    tiny = tiny_model(variant, init_std=0.3)
    prompts, mask = (tensor.cuda() for tensor in padded_prompts([8] * 16))
    model = tiny.model.cuda().bfloat16()
    plain = _generate(model, prompts, mask, Speculation(heads=1))
    drafted = _generate(model, prompts, mask, Speculation(heads=4))
    first_tokens = slice(8, 12)
    assert (plain[:, first_tokens] == drafted[:, first_tokens]).float().mean() > 0.9


def test_command_runs_on_the_gpu(tmp_path, capsys) -> None:
    write_model(tmp_path / "c", train={"sequence_length": 64})
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    generate(model=str(tmp_path / "c"), prompt="def f", speculative=4, as_json=True)
    assert torch.cuda.max_memory_allocated() > before
    result, on_cpu = json.loads(capsys.readouterr().out), Generator.open(tmp_path / "c")
    assert on_cpu.generate([on_cpu.prompt_ids("def f")], result["new_tokens"]) == [result["token_ids"]]


@pytest.mark.multi_gpu
@pytest.mark.skipif(GPUS < 2, reason=f"needs 2 NVIDIA GPUs, this machine has {GPUS}")
def test_a_model_spread_over_two_gpus(tmp_path) -> None:
    from accelerate import dispatch_model, infer_auto_device_map

    tiny = tiny_model("sequential")
    prompts, mask = (tensor.cuda() for tensor in padded_prompts([9, 4, 1]))
    expected = _generate(tiny.model.cuda(), prompts, mask, Speculation(heads=1))
    half = sum(weight.nbytes for weight in tiny.model.parameters()) // 2
    places = infer_auto_device_map(tiny.model, {0: half, 1: 10 * half}, no_split_module_classes=["LlamaDecoderLayer"])
    model = dispatch_model(tiny.model.cpu(), places)
    assert {str(weight.device) for weight in model.parameters()} == {"cuda:0", "cuda:1"}
    assert torch.equal(_generate(model, prompts, mask, Speculation(heads=4)), expected)


def _generate(model, prompts, mask, speculation) -> torch.Tensor:
    return model.generate(
        prompts, attention_mask=mask, max_new_tokens=NEW_TOKENS, do_sample=False, speculation=speculation
    )
