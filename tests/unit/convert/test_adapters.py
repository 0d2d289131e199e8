"""Low-rank adapters: merged into an export and wherever a checkpoint is opened, and alone as a folder for peft."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from mtp_dist.checkpoint.merged import MergedWeights
from mtp_dist.convert.to_huggingface import export_checkpoint
from mtp_dist.errors import CheckpointError
from mtp_dist.inference.loading import read_full_weights
from mtp_dist.model.reference import ReferenceModel
from tests.unit.convert.folders import check_logits, save_model, write_model

LOW_RANK: dict[str, Any] = {"rank": 3, "alpha": 5.0}


@pytest.fixture(scope="module")
def adapted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ReferenceModel]:
    """A folder with the checkpoint of a model with adapters, `adapted`, and of the model without them, `base`."""
    folder = tmp_path_factory.mktemp("adapters")
    model = write_model(folder / "adapted", train={"low_rank": LOW_RANK}, heads={"count": 3})
    base = {name: weight for name, weight in model.named_weights().items() if ".lora_" not in name}
    save_model(folder / "base", ReferenceModel(model.config.without_adapters(), base))
    return folder, model


def test_opened_models_have_merged_adapters(adapted: tuple[Path, ReferenceModel]) -> None:
    folder, model = adapted
    read = read_full_weights(folder / "adapted")
    merged = ReferenceModel(read.config, dict(read.weights))
    tokens = torch.randint(0, 200, (2, 24), generator=torch.Generator().manual_seed(5))
    for head, logits in merged(tokens, 16).items():
        torch.testing.assert_close(logits, model(tokens, 16)[head], rtol=1e-5, atol=1e-5)
    weights, name = MergedWeights(folder / "adapted"), "heads.1.0.mlp.linear_fc2.weight"
    block = (slice(3, 9), slice(5, 20))
    torch.testing.assert_close(weights.read_block(name, block), merged.weight(name).detach()[block])
    assert weights.shapes().keys() == merged.named_weights().keys()


def test_merged_export_is_the_base_with_the_adapter(adapted: tuple[Path, ReferenceModel], tmp_path: Path) -> None:
    folder, model = adapted
    exported = export_checkpoint(folder / "adapted", tmp_path / "merged", "fp32", adapter=tmp_path / "adapter")
    assert exported.describe().endswith(f"\n{tmp_path / 'adapter'}: the low-rank adapters alone, for peft")
    check_logits(model, merged := AutoModelForCausalLM.from_pretrained(tmp_path / "merged"))
    export_checkpoint(folder / "base", tmp_path / "base", "fp32")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")

    tensors, unused = load_file(tmp_path / "adapter" / "adapter_model.safetensors"), set(base.state_dict())
    settings = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert len(settings["target_modules"]) == 7 and len(tensors) == 2 * 7 * base.config.num_hidden_layers
    for name, weight in base.state_dict().items():
        matrix = f"base_model.model.{name.removesuffix('weight')}"
        if f"{matrix}lora_A.weight" in tensors:
            product = tensors[f"{matrix}lora_B.weight"] @ tensors[f"{matrix}lora_A.weight"]
            weight = weight + settings["lora_alpha"] / settings["r"] * product
            unused.remove(name)
        torch.testing.assert_close(merged.state_dict()[name], weight, rtol=0, atol=1e-6)
    assert not any(name.endswith("_proj.weight") for name in unused)

    export_checkpoint(folder / "adapted", tmp_path / "bf16", "bf16")
    rounded = AutoModelForCausalLM.from_pretrained(tmp_path / "bf16").state_dict()
    assert all(torch.equal(rounded[name], weight.bfloat16()) for name, weight in merged.state_dict().items())
    with pytest.raises(CheckpointError, match=r"has no low-rank adapters \(train\.low_rank\): leave out --adapter"):
        export_checkpoint(folder / "base", tmp_path / "none", "fp32", adapter=tmp_path / "no")
    assert not (tmp_path / "none").exists()

    peft = pytest.importorskip("peft", reason="peft is not installed")
    opened = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    tokens = torch.randint(0, 200, (2, 16), generator=torch.Generator().manual_seed(6))
    with torch.no_grad():
        torch.testing.assert_close(opened(tokens).logits, merged(tokens).logits, rtol=1e-5, atol=1e-5)
