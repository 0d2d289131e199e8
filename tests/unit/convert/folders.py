"""Small checkpoints of ours and small Llamas of Hugging Face, with weights that leave no factor hidden."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from mtp_dist.checkpoint.format import MODEL, CheckpointMetadata, tensor_file
from mtp_dist.checkpoint.manifest import record_of, write_manifest
from mtp_dist.checkpoint.reader import load_weights
from mtp_dist.config import Config
from mtp_dist.model.parameters import parameter_shapes
from mtp_dist.model.reference import ReferenceModel
from tests.tiny import tiny_config

VOCAB_SIZE = 257
"""That of the bytes."""
STEP = 7


def lively(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    noise = torch.randn(shape, generator=generator)
    return noise * 0.2 if len(shape) > 1 else 1 + 0.3 * noise


def write_checkpoint(folder: Path, vocab_size: int = VOCAB_SIZE, **sections: dict[str, Any]) -> ReferenceModel:
    """A checkpoint of step 7 of a tiny model, and that model."""
    config = tiny_config(**sections | {"model": {"vocab_size": vocab_size} | sections.get("model", {})})
    generator = torch.Generator().manual_seed(8)
    weights = {name: lively(shape, generator) for name, shape in parameter_shapes(config).items()}
    folder.mkdir(parents=True)
    save_file(weights, folder / tensor_file(MODEL, 0, 1))
    index = {"weight_map": dict.fromkeys(weights, tensor_file(MODEL, 0, 1))}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    CheckpointMetadata(STEP, 0, config).write(folder)
    write_manifest(folder, {path.name: record_of(path) for path in folder.iterdir()})
    return ReferenceModel(config, weights)


def write_llama(folder: Path, tokenizer: str | None = "bytes", **changes: Any) -> LlamaForCausalLM:
    """A tiny Llama as transformers saves it, with a tokenizer, and that Llama."""
    settings = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
    }
    llama = LlamaForCausalLM(LlamaConfig(**settings | changes)).eval()
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for weight in llama.parameters():
            weight.copy_(lively(tuple(weight.shape), generator))
    llama.save_pretrained(folder)
    if tokenizer:
        from mtp_dist.convert.tokenizer_files import write_tokenizer

        write_tokenizer(tokenizer, folder)
    return llama


def tokens_of(batch: int, length: int, vocab_size: int = VOCAB_SIZE) -> Tensor:
    return torch.randint(0, vocab_size, (batch, length), generator=torch.Generator().manual_seed(3))


def check_same_logits(model: ReferenceModel, llama: PreTrainedModel) -> None:
    tokens = tokens_of(2, 40, model.weight("embedding.weight").shape[0])
    with torch.no_grad():
        ours, theirs = model.next_token_logits(tokens), llama(tokens).logits
    assert float(ours.std()) > 0.3, "logits that say something"
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def open_checkpoint(folder: Path) -> ReferenceModel:
    return ReferenceModel(*load_weights(folder))


def config_of(folder: Path) -> Config:
    return load_weights(folder)[0]
