"""A checkpoint's low-rank adapters as a folder that peft opens on the model before the adaptation."""

import json
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from mtp_dist.checkpoint.merged import MergedWeights
from mtp_dist.config import LowRankConfig
from mtp_dist.convert.plain_weights import plain_weights, split
from mtp_dist.model.parameters import LORA_A, LORA_B


def write_adapter(folder: Path, weights: MergedWeights, low_rank: LowRankConfig) -> None:
    """Write adapter_config.json and adapter_model.safetensors, in fp32.

    The model's matrices that one matrix here consists of, such as q_proj, k_proj and v_proj, each get its A, and their
    rows of its B.
    """
    tensors: dict[str, Tensor] = {}
    for name, parts in plain_weights(weights.config).items():
        if adapter := weights.adapter(name):
            a, b = map(weights.tensors.read, adapter)
            for part, rows in zip(parts, split(name, b, weights.config.model), strict=True):
                matrix = f"base_model.model.{part.removesuffix('weight')}"
                tensors[f"{matrix}{LORA_A}"] = a.clone()  # the file must not contain one tensor under two names
                tensors[f"{matrix}{LORA_B}"] = rows.contiguous()
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": None,
        "inference_mode": True,
        "r": low_rank.rank,
        "lora_alpha": low_rank.alpha,
        "lora_dropout": 0.0,
        "target_modules": sorted({name.split(".")[-3] for name in tensors}),
        "bias": "none",
        "fan_in_fan_out": False,
    }
    (folder / "adapter_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
