"""An export is a folder that transformers opens as it is."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from mtp_dist.checkpoint import writer
from mtp_dist.checkpoint.reader import load_weights
from mtp_dist.convert.from_huggingface import import_llama
from mtp_dist.convert.import_config import ImportRequest
from mtp_dist.convert.to_huggingface import export_checkpoint
from mtp_dist.errors import ConfigError
from mtp_dist.model.parameters import parameter_shapes
from mtp_dist.model.reference import ReferenceModel, reference_losses
from tests.engines import global_batch
from tests.ranks import Ranks
from tests.tiny import LINEAR_ROPE, LLAMA3_ROPE, tiny_config
from tests.unit.checkpoint.folders import flip
from tests.unit.checkpoint.folders import write_checkpoint as write_whole_checkpoint
from tests.unit.checkpoint.on_ranks import train_part
from tests.unit.convert.folders import STEP, VOCAB_SIZE, check_same_logits, open_checkpoint, write_checkpoint

CASES: dict[str, dict[str, dict[str, Any]]] = {
    "one head": {"heads": {"count": 1}},
    "four heads": {},
    "tied": {"model": {"tie_embeddings": True}},
    "no grouped queries": {"model": {"num_query_groups": 4}},
    "one key for all": {"model": {"num_query_groups": 1}},
    "theta and epsilon": {"model": {"rope_theta": 500.0, "norm_eps": 1e-2}},
    "linear rope scaling": {"model": {"rope_scaling": LINEAR_ROPE, "rope_theta": 500.0}},
    "llama3 rope scaling": {"model": {"rope_scaling": LLAMA3_ROPE}},
    "causal, two layers": {"heads": {"kind": "causal", "layers_per_head": 2}},
    "anticausal, two layers": {"heads": {"kind": "anticausal", "layers_per_head": 2, "count": 3}},
    "sequential": {"heads": {"kind": "sequential"}},
    "mlp": {"heads": {"kind": "mlp"}},
    "separate unembeddings": {"heads": {"unembedding": "separate", "token_order": 0.1}},
}


def opened(folder: Path) -> LlamaForCausalLM:
    model, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert isinstance(model, LlamaForCausalLM)
    assert not any(report.values()), report
    return model.eval()


@pytest.mark.parametrize("case", CASES)
def test_the_llama_computes_what_head_1_computes(tmp_path: Path, case: str) -> None:
    model = write_checkpoint(tmp_path / "c", **{name: dict(section) for name, section in CASES[case].items()})
    exported = export_checkpoint(tmp_path / "c", tmp_path / "out", None)
    llama = opened(tmp_path / "out")
    check_same_logits(model, llama)
    assert llama.dtype == torch.float32, "the precision of the training"
    assert exported.parameters == sum(weight.numel() for weight in llama.parameters())
    assert exported.layers == len(llama.model.layers)
    check_the_rest_is_beside(tmp_path / "out", model)


def check_the_rest_is_beside(folder: Path, model: ReferenceModel) -> None:
    """No weight is lost, and none is there twice."""
    in_llama = sum(weight.numel() for weight in opened(folder).parameters())
    ours, beside = model.named_weights(), {}
    if (folder / "mtp_heads.safetensors").exists():
        with safe_open(folder / "mtp_heads.safetensors", "pt") as file:
            beside = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, not a dict
        assert beside
    assert all(torch.equal(weight, ours[name]) for name, weight in beside.items())
    assert in_llama + sum(w.numel() for w in beside.values()) == sum(w.numel() for w in ours.values())


RANKS_CASES: list[tuple[int, bool, dict[str, Any] | None]] = [
    (1, False, None),
    (1, True, LLAMA3_ROPE),
    (4, False, LINEAR_ROPE),
    (4, True, None),
]
"""Heads, whether embeddings are tied, and the scaling of the rotary ones."""


@pytest.mark.parametrize(("count", "tied", "scaling"), RANKS_CASES)
def test_what_ranks_saved_goes_to_a_llama_and_back(
    ranks: Ranks, tmp_path: Path, count: int, tied: bool, scaling: dict[str, Any] | None
) -> None:
    config = tiny_config(
        model={"tie_embeddings": tied, "init_std": 0.2, "rope_scaling": scaling},
        heads={"count": count},
        parallel={"tensor": 2, "pipeline": 2},
        checkpoint={"directory": str(tmp_path / "runs")},
        data={"tokenizer": str(small_tokenizer(tmp_path))},
    )
    ranks.run(4, train_part, config, 0, 1)
    model = open_checkpoint(tmp_path / "runs" / "step_00000001")
    export_checkpoint(tmp_path / "runs", tmp_path / "hf", None)
    check_same_logits(model, opened(tmp_path / "hf"))

    imported = import_llama(ImportRequest(tmp_path / "hf", tmp_path / "back")).config
    before, after = model.named_weights(), open_checkpoint(tmp_path / "back").named_weights()
    assert before.keys() == after.keys() and all(torch.equal(after[name], before[name]) for name in before)
    assert imported.model.rope_scaling == config.model.rope_scaling

    other_layout = tiny_config(
        **imported.model_dump(include={"model", "heads", "data", "optimizer"}), parallel={"pipeline": 2}
    )
    samples, targets = global_batch(other_layout, 1)
    expected = reference_losses(model, samples, targets).losses
    for part in ranks.run(2, train_part, other_layout, 0, 1, tmp_path / "back", False):
        torch.testing.assert_close(part.losses[0][0].float(), expected, rtol=1e-5, atol=1e-6)


def small_tokenizer(folder: Path) -> Path:
    """A tokenizer.json of 131 tokens at most."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    library = Tokenizer(models.WordLevel({"a": 0, "b": 1, "</s>": 2}, unk_token="a"))
    library.pre_tokenizer = pre_tokenizers.Whitespace()
    library.save(str(folder / "tokenizer.json"))
    return folder / "tokenizer.json"


def test_greedy_continuation_is_the_same(tmp_path: Path) -> None:
    model = write_checkpoint(tmp_path / "c")
    export_checkpoint(tmp_path / "c", tmp_path / "out", None)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    prompt = tokenizer("def ", return_tensors="pt")
    generated = opened(tmp_path / "out").generate(**prompt, max_new_tokens=12, do_sample=False)[0].tolist()
    text = list(b"def ")
    for _ in range(12):
        text.append(int(model.next_token_logits(torch.tensor([text]))[0, -1].argmax()))
    assert generated == text


def test_files_are_small_and_indexed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer, "FILE_BYTES", 20_000)
    model = write_checkpoint(tmp_path / "c")
    seen: list[tuple[int, int]] = []
    export_checkpoint(tmp_path / "c", tmp_path / "out", "fp32", lambda done, total: seen.append((done, total)))
    shards = sorted((tmp_path / "out").glob("model-*.safetensors"))
    assert len(shards) > 3 and shards[0].name == f"model-00001-of-{len(shards):05d}.safetensors"
    sizes = [path.stat().st_size for path in shards]
    assert [size > 22_000 for size in sizes] == [True, *[False] * (len(sizes) - 2), True], "embedding and unembedding"
    check_same_logits(model, opened(tmp_path / "out"))
    assert seen[-1] == (len(seen), len(seen)), "who watches hears of every weight"


def test_bf16_rounds_once(tmp_path: Path) -> None:
    model = write_checkpoint(tmp_path / "c")
    assert export_checkpoint(tmp_path / "c", tmp_path / "out", "bf16").dtype == "bf16"
    with safe_open(tmp_path / "out" / "model-00001-of-00001.safetensors", "pt") as file:
        assert torch.equal(file.get_tensor("lm_head.weight"), model.weight("unembedding.weight").bfloat16())
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").dtype == torch.bfloat16
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    llama = opened(tmp_path / "out")
    assert index["metadata"]["total_size"] == 2 * sum(weight.numel() for weight in llama.parameters())


@pytest.mark.parametrize("scaling", [None, LLAMA3_ROPE])
def test_older_programs_read_the_same_configuration(tmp_path: Path, scaling: dict[str, Any] | None) -> None:
    model = write_checkpoint(tmp_path / "c", model={"rope_theta": 500.0, "rope_scaling": scaling})
    export_checkpoint(tmp_path / "c", tmp_path / "out", None)
    values = json.loads((tmp_path / "out" / "config.json").read_text())
    assert values["rope_theta"] == values["rope_parameters"]["rope_theta"] == 500.0
    assert values["rope_scaling"] == scaling, "the keys before transformers 5"
    for theirs in ({"rope_theta", "rope_scaling"}, {"rope_parameters"}):
        others = {"rope_theta", "rope_scaling", "rope_parameters"} - theirs
        alone = {key: value for key, value in values.items() if key not in others}
        (tmp_path / "out" / "config.json").write_text(json.dumps(alone))
        check_same_logits(model, opened(tmp_path / "out"))
    assert (values["vocab_size"], values["max_position_embeddings"]) == (VOCAB_SIZE, 16)
    assert values["eos_token_id"] == values["bos_token_id"] == 256


def test_our_configuration_is_told(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "c")
    export_checkpoint(tmp_path / "c", tmp_path / "out", None)
    told = json.loads((tmp_path / "out" / "mtp_config.json").read_text())
    assert (told["step"], told["vocab_size"]) == (STEP, VOCAB_SIZE)
    assert told["config"]["heads"]["count"] == 4
    card = (tmp_path / "out" / "README.md").read_text()
    assert "`heads.2`, `heads.3`, `heads.4`" in card and "{" not in card.split("```json")[0]


def test_the_card_begins_a_document_as_the_training_did(tmp_path: Path) -> None:
    """With the run's own prompt; what its text is about is not known."""
    for name, log, prompt in (
        ("a", {"sample_prompt": 'Es "war"\n'}, '<|endoftext|>Es "war"\n'),
        ("b", {}, "<|endoftext|>"),
    ):
        write_checkpoint(tmp_path / name, log=log)
        export_checkpoint(tmp_path / name, tmp_path / f"out-{name}", None)
        card = (tmp_path / f"out-{name}" / "README.md").read_text()
        [line] = [line for line in card.splitlines() if line.startswith("prompt = tokenizer(")]
        assert line == f'prompt = tokenizer({prompt!r}, return_tensors="pt")'
        ids = AutoTokenizer.from_pretrained(tmp_path / f"out-{name}")(prompt).input_ids
        assert ids == [256, *prompt.removeprefix("<|endoftext|>").encode()]


def write_run(folder: Path, checkpoints: Path, **changes: Any) -> Path:
    """A checkpoint, and the summary of its run in that folder."""
    checkpoint = checkpoints / f"step_{STEP:08d}"
    write_checkpoint(checkpoint, run={"name": "books", "output_dir": str(folder)})
    heads = [{"head": k, "loss": 1.0 + k, "bits_per_byte": None, "accuracy": 0.5} for k in range(1, 5)]
    summary = {"name": "books", "steps": STEP, "checkpoint": str(checkpoint)}
    summary |= {"validation": [{"name": None, "heads": heads}]} | changes
    folder.mkdir(exist_ok=True)
    (folder / "summary.json").write_text(json.dumps(summary))
    return checkpoint


def losses_in_card(checkpoint: Path, to: Path) -> str:
    export_checkpoint(checkpoint, to, None)
    return (to / "README.md").read_text().partition("## Validation\n\n")[2].partition("\n\n")[0]


def test_the_card_has_the_columns_that_have_figures(tmp_path: Path) -> None:
    checkpoint = write_run(tmp_path / "run", tmp_path / "run" / "checkpoints")
    rows = losses_in_card(checkpoint, tmp_path / "out").splitlines()
    assert rows[0] == "| head | loss (nats per token) | accuracy |" and rows[2] == "| 1 | 2.0000 | 0.5000 |"
    heads = [{"head": 1, "loss": None, "bits_per_byte": 2.5, "accuracy": None}]
    sets = [{"name": name, "heads": heads} for name in ("prose", "co|de")]
    checkpoint = write_run(tmp_path / "two", tmp_path / "two" / "checkpoints", validation=sets)
    rows = losses_in_card(checkpoint, tmp_path / "both").splitlines()
    assert rows[0] == "| set | head | bits per byte |" and rows[2:] == [
        "| prose | 1 | 2.5000 |",
        "| co\\|de | 1 | 2.5000 |",
    ]


def test_the_card_has_the_losses_of_its_own_run(tmp_path: Path) -> None:
    """A folder of checkpoints may be elsewhere, where another run's summary is next to it."""
    checkpoint = write_run(tmp_path / "run", tmp_path / "shared" / "checkpoints")
    assert losses_in_card(checkpoint, tmp_path / "own"), "in the run folder, by the checkpoint's configuration"
    other = json.loads((tmp_path / "run" / "summary.json").read_text()) | {"name": "code"}
    (tmp_path / "shared" / "summary.json").write_text(json.dumps(other))
    (tmp_path / "run" / "summary.json").unlink()
    assert not losses_in_card(checkpoint, tmp_path / "another's")


@pytest.mark.parametrize(
    "changes", [{"steps": STEP + 1}, {"validation": []}, {"validation": None}, {"checkpoint": None}]
)
def test_the_card_has_no_losses_of_another_step(tmp_path: Path, changes: dict[str, Any]) -> None:
    checkpoint = write_run(tmp_path / "run", tmp_path / "run" / "checkpoints", **changes)
    assert not losses_in_card(checkpoint, tmp_path / "out")


def test_what_cannot_be_exported(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "c", heads={"kind": "linear"})
    with pytest.raises(ConfigError, match=r"heads\.kind = 'linear': its head 1 multiplies the trunk's output"):
        export_checkpoint(tmp_path / "c", tmp_path / "out", None)
    with pytest.raises(ConfigError, match=r"^--checkpoint = '.*missing' has no checkpoint"):
        export_checkpoint(tmp_path / "missing", tmp_path / "out", None)
    with pytest.raises(ConfigError, match=r"^--dtype = 'fp16' is not one of bf16, fp32$"):
        export_checkpoint(tmp_path / "c", tmp_path / "out", "fp16")
    write_checkpoint(tmp_path / "d")
    for there in (tmp_path, tmp_path / "c" / "config.json"):
        with pytest.raises(ConfigError, match=r"^--to = '.*' exists: "):
            export_checkpoint(tmp_path / "d", there, None)
    with pytest.raises(ConfigError, match=r"^cannot write --to = '.*': Not a directory"):
        export_checkpoint(tmp_path / "d", tmp_path / "c" / "config.json" / "out", None)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c", "d"], "nothing unfinished is left"


def test_only_what_is_read_is_verified(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The moments are two thirds of a checkpoint; neither an export nor a sample reads them."""
    from mtp_dist.checkpoint import manifest

    folder = write_whole_checkpoint(tmp_path / "checkpoints", 3)
    shards = sorted(path for path in folder.glob("*.safetensors") if path.name.startswith("model"))
    flip(folder / "optimizer-00001-of-00002.safetensors", 5000)
    verified: list[str] = []
    record_of = manifest.record_of

    def recorded(path: Path, *rest: Any) -> manifest.FileRecord:
        verified.append(path.name)
        return record_of(path, *rest)

    monkeypatch.setattr(manifest, "record_of", recorded)
    load_weights(folder)
    assert [name for name in verified if name.endswith(".safetensors")] == [path.name for path in shards]
    verified.clear()
    seen: list[tuple[int, int]] = []
    watch = {"watch_check": lambda done, total: seen.append((done, total))}
    monkeypatch.setattr("mtp_dist.convert.to_huggingface.write_tokenizer", lambda *rest: ("<|endoftext|>", 256))
    export_checkpoint(tmp_path / "checkpoints", tmp_path / "out", None, **watch)
    assert [name for name in verified if name.endswith(".safetensors")] == [path.name for path in shards]
    size = sum(path.stat().st_size for path in shards)
    assert seen[-1] == (size, size), "progress counts the bytes of the weights"

    flip(shards[1], 5000)
    with pytest.raises(ConfigError, match=r"model-00002-of-00002\.safetensors has the SHA-256"):
        export_checkpoint(tmp_path / "checkpoints", tmp_path / "other", None)


def test_nothing_is_left_of_a_damaged_checkpoint(tmp_path: Path) -> None:
    model = write_checkpoint(tmp_path / "c")
    shard = next((tmp_path / "c").glob("model-*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(ConfigError, match="is not a checkpoint of ours, or a damaged one"):
        export_checkpoint(tmp_path / "c", tmp_path / "out", None)
    assert [path.name for path in tmp_path.iterdir()] == ["c"]
    assert parameter_shapes(model.config).keys() == model.named_weights().keys()
