"""Small checkpoints, Llamas and tokenizers, with weights that leave no factor hidden."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen2Tokenizer,
)

from mtp_dist.checkpoint.format import CheckpointMetadata
from mtp_dist.checkpoint.manifest import record_of, write_manifest
from mtp_dist.checkpoint.reader import load_weights
from mtp_dist.checkpoint.writer import write_weights
from mtp_dist.convert.architectures.registry import ARCHITECTURES
from mtp_dist.convert.from_huggingface import import_model
from mtp_dist.convert.import_config import ImportRequest
from mtp_dist.convert.tokenizer_files import byte_level_tokenizer, write_tokenizer
from mtp_dist.convert.weight_folder import SINGLE
from mtp_dist.model.parameters import parameter_shapes
from mtp_dist.model.reference import ReferenceModel
from tests.tiny import tiny_config
from tests.unit.data import preparing

VOCAB_SIZE = 257
"""Vocabulary size of the byte tokenizer."""
STEP = 7
TEXT = "def f(x):\n\treturn  x * 2\n\nNaïve café, 東京 and 😀.\n"


def lively(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    noise = torch.randn(shape, generator=generator)
    return noise * 0.2 if len(shape) > 1 else 1 + 0.3 * noise


def write_model(folder: Path, vocab_size: int = VOCAB_SIZE, **sections: dict[str, Any]) -> ReferenceModel:
    """Write a checkpoint of step 7 of a tiny model, and return that model."""
    config = tiny_config(**sections | {"model": {"vocab_size": vocab_size} | sections.get("model", {})})
    generator = torch.Generator().manual_seed(8)
    weights = {name: lively(shape, generator) for name, shape in parameter_shapes(config).items()}
    return save_model(folder, ReferenceModel(config, weights))


def save_model(folder: Path, model: ReferenceModel) -> ReferenceModel:
    """Write a checkpoint of step 7 of a model, and return the model."""
    folder.mkdir(parents=True)
    weights = model.named_weights()
    shapes = {name: tuple(weight.shape) for name, weight in weights.items()}
    write_weights(folder, shapes, torch.float32, (weight.detach() for weight in weights.values()))
    CheckpointMetadata(STEP, 0, model.config).write(folder)
    write_manifest(folder, {path.name: record_of(path) for path in folder.iterdir()})
    return model


def write_llama(folder: Path, tokenizer: str | None = "bytes", **changes: Any) -> LlamaForCausalLM:
    """Write a tiny Llama as transformers saves it, with a tokenizer, and return that Llama."""
    settings = {"vocab_size": VOCAB_SIZE, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3}
    settings |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
    llama = LlamaForCausalLM(LlamaConfig(**settings | changes)).eval()
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for weight in llama.parameters():
            weight.copy_(lively(tuple(weight.shape), generator))
    llama.save_pretrained(folder)
    if tokenizer:
        write_tokenizer(tokenizer, folder)
    return llama


SIZES = {"vocab_size": VOCAB_SIZE, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
SIZES |= {"num_attention_heads": 4, "max_position_embeddings": 64}
CHAT_TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{{ eos_token }}{% endfor %}"


def write_qwen_tokenizer(folder: Path) -> None:
    """Write a tokenizer with one token per byte, and a chat template.

    It splits as Qwen2's does: of a Qwen2, transformers loads the vocabulary of every tokenizer into that class.
    """
    vocab = byte_level_tokenizer().get_vocab()
    Qwen2Tokenizer(vocab=vocab, merges=[], chat_template=CHAT_TEMPLATE).save_pretrained(folder)


def write_architecture(folder: Path, name: str, dtype: torch.dtype = torch.float32, **changes: Any) -> PreTrainedModel:
    """Write a tiny model of an architecture as transformers saves it, with a tokenizer, and return that model."""
    model_type = ARCHITECTURES[name].model_type
    groups = {} if model_type == "gpt_neox" else {"num_key_value_heads": 2}
    if model_type == "qwen3":
        groups["head_dim"] = 8
    config = AutoConfig.for_model(model_type, **SIZES | groups | changes)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for weight_name, weight in model.named_parameters():
            noise = lively(tuple(weight.shape), generator)
            weight.copy_(noise - 1 if weight_name.endswith("bias") else noise)
    model.save_pretrained(folder)
    write_qwen_tokenizer(folder)
    return model


def change_config(**changes: Any) -> Callable[[Path], None]:
    """Return a change of a folder's config.json."""

    def change(folder: Path) -> None:
        values = json.loads((folder / "config.json").read_text()) | changes
        (folder / "config.json").write_text(json.dumps(values))

    return change


def change_weights(change: Callable[[dict[str, Tensor]], object]) -> Callable[[Path], None]:
    """Return a change of the weights in a folder's single file."""

    def rewrite(folder: Path) -> None:
        tensors = load_file(folder / SINGLE)
        change(tensors)
        save_file(tensors, folder / SINGLE, {"format": "pt"})

    return rewrite


def import_from(folder: Path, *overrides: str, to: str = "c", **options: Any) -> Path:
    """Import `folder/hf`."""
    import_model(ImportRequest(folder / "hf", folder / to, overrides=overrides, **options))
    return folder / to


def open_model(folder: Path) -> ReferenceModel:
    return ReferenceModel(*load_weights(folder))


def check_logits(model: ReferenceModel, llama: PreTrainedModel) -> None:
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randint(0, model.config.vocab_size, (2, 40), generator=generator)
    with torch.no_grad():
        logits, expected = model.next_token_logits(tokens), llama(tokens).logits
    assert float(logits.std()) > 0.3, "the logits are not trivial"
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)


def check_weights(model: ReferenceModel, other: ReferenceModel) -> None:
    weights, others = model.named_weights(), other.named_weights()
    assert weights.keys() == others.keys() and all(torch.equal(others[name], weights[name]) for name in weights)


def byte_pairs(folder: Path, end: str = "<|endoftext|>") -> Path:
    """Train a tokenizer as docs/data.md does."""
    library = Tokenizer(models.BPE())
    library.pre_tokenizer, library.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, special_tokens=[end])
    library.train_from_iterator([TEXT] * 9, trainer)
    folder.mkdir(parents=True, exist_ok=True)
    library.save(str(folder / "tokenizer.json"))
    return folder / "tokenizer.json"


def train_sentencepiece(folder: Path, text: str = TEXT, **options: object) -> Path:
    settings = {"vocab_size": 400, "hard_vocab_limit": False, "byte_fallback": True, "model_type": "unigram"} | options
    return preparing.train_sentencepiece(folder / "tokenizer.model", (text * 9).split("\n"), **settings)
