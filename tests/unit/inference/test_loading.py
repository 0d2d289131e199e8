"""Models opened from folders: every kind, the weights they have, and what is refused."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch
from weakref import WeakSet

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor

from mtp_dist.analysis.trained_model import TrainedModel
from mtp_dist.checkpoint.format import CheckpointMetadata
from mtp_dist.checkpoint.manifest import record_of, write_manifest
from mtp_dist.checkpoint.reader import TensorReader
from mtp_dist.checkpoint.writer import write_weights
from mtp_dist.convert.to_huggingface import export_checkpoint
from mtp_dist.errors import CheckpointError, UserError
from mtp_dist.inference import loading
from mtp_dist.inference.generator import Generator
from mtp_dist.inference.loading import model_weights
from mtp_dist.inference.model import MTPForCausalLM
from mtp_dist.inference.speculation import DecodingStatistics, Speculation
from mtp_dist.model.parameters import parameter_shapes
from tests.tiny import LLAMA3_ROPE, tiny_config
from tests.unit.checkpoint.folders import flip
from tests.unit.convert.folders import byte_pairs, write_llama, write_model
from tests.unit.inference.models import VARIANTS

MODELS: dict[str, dict[str, Any]] = {
    **{name: {"heads": {"count": 4, **heads}} for name, heads in VARIANTS.items()},
    "tied": {"model": {"tie_embeddings": True}},
    "scaled": {"model": {"rope_theta": 500.0, "rope_scaling": LLAMA3_ROPE}},
    "token_order": {"heads": {"token_order": 0.5}},
    "one_head": {"heads": {"count": 1}},
}


def decoded(generator: Generator) -> tuple[list[list[int]], DecodingStatistics]:
    """Return a text, and how it was drafted, which wrong weights of the other heads would change."""
    speculation = Speculation(heads=generator.config.heads.count)
    texts = generator.generate([generator.prompt_ids("def f")], 50, speculation=speculation)
    speculation.statistics.seconds = 0.0
    return texts, speculation.statistics


@pytest.mark.parametrize("name", MODELS)
def test_checkpoint_and_exports_are_the_same_model(tmp_path: Path, name: str) -> None:
    """That every head drafts with the right weights: test_drafts.py."""
    folder, sections = tmp_path / "run", MODELS[name]
    reference = write_model(folder / "checkpoints" / "step_00000007", **sections | {"train": {"sequence_length": 64}})
    generator = Generator.open(folder, device_map="cpu")
    tokens = torch.randint(257, (2, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = reference.next_token_logits(tokens)
        torch.testing.assert_close(generator.model(tokens).logits, expected, rtol=0, atol=1e-5)
    assert generator.model.dtype == torch.float32 and generator.config.heads == reference.config.heads

    export_checkpoint(folder, tmp_path / "transformers", None, engine="transformers")
    assert decoded(Generator.open(tmp_path / "transformers", device_map="cpu")) == decoded(generator)
    if not generator.config.heads.traits.exportable:
        return
    state = generator.model.state_dict()
    for dtype, rounded in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        export_checkpoint(folder, tmp_path / dtype, dtype)
        exported = MTPForCausalLM.from_pretrained(tmp_path / dtype)
        assert exported.dtype == rounded
        weights = exported.state_dict()
        assert weights.keys() == state.keys()
        assert all(torch.equal(weights[key], state[key].to(rounded)) for key in state)


def test_analyses_refuse_weighted_hidden_states(tmp_path: Path) -> None:
    write_model(tmp_path / "c", heads={"weighted_hidden_states": True})
    with pytest.raises(CheckpointError, match=r"heads.weighted_hidden_states.* trained without"):
        TrainedModel.open(tmp_path / "c")


def test_precision(tmp_path: Path) -> None:
    """A checkpoint has fp32 weights: it opens in the precision of the training, or in the one that is asked for."""
    reference = write_model(tmp_path / "c", train={"precision": "bf16"})
    weight = reference.weight("final_norm.weight")
    for dtype, expected in ((None, weight.bfloat16()), (torch.float32, weight)):
        model = MTPForCausalLM.from_pretrained(tmp_path / "c", dtype=dtype)
        assert torch.equal(model.model.norm.weight, expected)


def test_devices(tmp_path: Path) -> None:
    """Texts do not depend on where accelerate puts the layers."""
    write_model(tmp_path / "c", train={"sequence_length": 64})
    places = {"model.embed_tokens": "cpu", "model.rotary_emb": "cpu", "model.norm": "disk", "lm_head": "disk"}
    places |= {"model.layers": "disk", "draft_blocks": "disk"}
    texts = []
    for device_map in ("cpu", places):
        generator = Generator.open(tmp_path / "c", device_map=device_map, offload_folder=tmp_path)
        prompts = [generator.prompt_ids("def f"), generator.prompt_ids("x")]
        texts.append(generator.generate(prompts, 20, speculation=Speculation(heads=4)))
    assert texts[0] == texts[1]


WEIGHT = "heads.3.0.mlp.linear_fc2.weight"


def checkpoint(folder: Path, change: Callable[[dict[str, Tensor]], object] = dict, **data: str) -> None:
    """Write a valid checkpoint with changed weights."""
    config = tiny_config(model={"vocab_size": 257}, data=data)
    weights = {name: torch.ones(shape) for name, shape in parameter_shapes(config).items()}
    change(weights)
    shapes = {name: tuple(weight.shape) for name, weight in weights.items()}
    folder.mkdir()
    write_weights(folder, shapes, torch.float32, iter(weights.values()))
    CheckpointMetadata(7, 0, config).write(folder)
    write_manifest(folder, {path.name: record_of(path) for path in folder.iterdir()})


def export(folder: Path, change: Callable[[Path], object], tokenizer: str = "bytes") -> None:
    """Write an export and change it."""
    write_model(folder.with_name("source"), 300, data={"tokenizer": tokenizer})
    export_checkpoint(folder.with_name("source"), folder, None)
    change(folder)


def add_tokens(folder: Path) -> None:
    file = str(folder / "tokenizer.json")
    tokenizer = Tokenizer.from_file(file)
    tokenizer.add_tokens([f"token {number}" for number in range(20)])
    tokenizer.save(file)


def damage_heads(folder: Path) -> None:
    file = folder / "mtp_heads.safetensors"
    tensors = load_file(file)
    tensors["heads.2.0.input_layernorm.weight"][0] = torch.inf
    save_file(tensors, file)


FAULTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (lambda folder: None, "does not exist: give a run's folder, a checkpoint such as step_00000010, or "),
    "file": (Path.touch, "is a file: "),
    "empty": (Path.mkdir, "contains neither a checkpoint nor an export of mtp-dist: "),
    "new run": (
        lambda folder: (folder.mkdir(), (folder / "run.json").touch()),
        "is a run that has not saved a checkpoint yet: ",
    ),
    "llama": (write_llama, "has no manifest.json: it is an incomplete checkpoint, or a model of Hugging Face, which "),
    "corrupt checkpoint": (
        lambda folder: (checkpoint(folder), flip(folder / "model-00001-of-00001.safetensors", -1)),
        "cannot be opened: {folder} is not a valid mtp_dist checkpoint (corrupt or incomplete): model-",
    ),
    "corrupt export": (
        lambda folder: export(folder, lambda folder: (folder / "mtp_config.json").write_text("{")),
        "is a corrupt export: mtp_config.json: ",
    ),
    "corrupt heads": (
        lambda folder: export(folder, lambda folder: (folder / "mtp_heads.safetensors").write_text("{")),
        "is a corrupt export: mtp_heads.safetensors: ",
    ),
    "damaged export": (
        lambda folder: export(folder, damage_heads),
        "has NaN or infinity in heads.2.0.input_layernorm.weight: the file is damaged or the training has diverged, ",
    ),
    "no heads": (
        lambda folder: export(folder, lambda folder: (folder / "mtp_heads.safetensors").unlink()),
        "is incomplete: heads.2.0.input_layernorm.weight is not in mtp_heads.safetensors",
    ),
    "no llama": (
        lambda folder: export(folder, lambda folder: (folder / "model-00001-of-00001.safetensors").unlink()),
        "model-00001-of-00001.safetensors cannot be read",
    ),
    "lost weight": (lambda folder: checkpoint(folder, lambda weights: weights.pop(WEIGHT)), f"{WEIGHT} is missing, "),
    "other shape": (
        lambda folder: checkpoint(folder, lambda weights: weights.update({WEIGHT: torch.ones(2, 2)})),
        f"{WEIGHT} is (2, 2), its configuration requires (32, 48)",
    ),
    "diverged": (
        lambda folder: checkpoint(folder, lambda weights: weights[WEIGHT][3].fill_(torch.nan)),
        f"has NaN or infinity in {WEIGHT}: its training has diverged, give an earlier checkpoint",
    ),
    "lost tokenizer": (
        lambda folder: checkpoint(folder, tokenizer="gone/tokenizer.json"),
        "was trained with a tokenizer that is not here: data.tokenizer = 'gone/tokenizer.json' is unknown",
    ),
    "no tokenizer": (
        lambda folder: export(
            folder, lambda folder: (folder / "tokenizer.json").unlink(), str(byte_pairs(folder.with_name("t")))
        ),
        "is a folder without tokenizer.json or tokenizer.model",
    ),
    "larger tokenizer": (
        lambda folder: export(folder, add_tokens, str(byte_pairs(folder.with_name("t")))),
        "has a vocabulary of 300 tokens, its tokenizer one of 313: it belongs to another model",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_fault_is_one_message(tmp_path: Path, fault: str) -> None:
    make, expected = FAULTS[fault]
    make(folder := tmp_path / "m")
    with pytest.raises(UserError) as error:
        Generator.open(folder)
    message = str(error.value)
    assert str(folder) in message and expected.format(folder=folder) in message, message
    assert "\n" not in message


def test_no_weight_is_left_random(tmp_path: Path) -> None:
    write_model(tmp_path / "c")

    def without_one(*args: Any) -> Iterator[tuple[str, Tensor]]:
        return (weight for weight in model_weights(*args) if weight[0] != "draft_blocks.2.layers.0.mlp.up_proj.weight")

    with patch.object(loading, "model_weights", without_one), pytest.raises(CheckpointError, match="up_proj"):
        Generator.open(tmp_path / "c")


def test_memory(tmp_path: Path) -> None:
    """The fp32 weights of a checkpoint are rounded one by one."""
    write_model(tmp_path / "c", train={"precision": "bf16"})
    read, alive, numbers = TensorReader.read, WeakSet[Tensor](), []

    def recording_read(reader: TensorReader, name: str) -> Tensor:
        numbers.append(len(alive))
        weight = read(reader, name)
        alive.add(weight)
        return weight

    with patch.object(TensorReader, "read", recording_read):
        Generator.open(tmp_path / "c")
    assert len(numbers) > 40 and max(numbers) <= 2
