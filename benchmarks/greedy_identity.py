"""Show that drafting leaves greedy text as it is.

    python benchmarks/greedy_identity.py [--models FOLDER] [--output FILE] [--prompts 1000]

For every kind of heads, with trained and with random weights in fp32 on the CPU: texts of plain decoding, of chains of
drafts of fixed and of adapted length and of trees are compared token for token with those of transformers' `generate`
on the export as a Llama (of linear heads, which have none: on the model itself). Where a text first differs, the two
largest logits must be closer than 1e-5; such near ties are counted. Models that are not in FOLDER are trained first.
Exit with status 1 if a text differs otherwise, if there are more than 5 near ties per kind, weights and way to decode,
or if a trained model drafts fewer than 1.3 tokens per forward pass.
"""

import argparse
import json
import os
import platform
import random
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedModel
from transformers.generation import GenerationMixin
from transformers.utils import logging as transformers_logging

from mtp_dist.config import Config, load_config, resolve
from mtp_dist.convert.plain_weights import plain_weights, split
from mtp_dist.convert.to_huggingface import export_checkpoint, plain_config
from mtp_dist.data.build_tokenizer import build_tokenizer
from mtp_dist.inference.acceptance import candidate_acceptance
from mtp_dist.inference.configuration import generation_model_config
from mtp_dist.inference.generator import Generator
from mtp_dist.inference.loading import model_weights
from mtp_dist.inference.model import MTPForCausalLM
from mtp_dist.inference.speculation import Speculation
from mtp_dist.inference.tree import choose_tree
from mtp_dist.model.reference import ReferenceModel
from mtp_dist.provenance import provenance

ROOT = Path(__file__).resolve().parents[1]
KINDS: dict[str, list[str]] = {
    "parallel": [],
    "causal": ["heads.kind=causal"],
    "anticausal": ["heads.kind=anticausal"],
    "linear": ["heads.kind=linear"],
    "mlp": ["heads.kind=mlp"],
    "sequential": ["heads.kind=sequential"],
    "repeated": ["heads.kind=sequential", "heads.repeated=true"],
    "separate": ["heads.unembedding=separate"],
    "leap": ["heads.prediction_distances=[1, 3, 5, 7]"],
    "anticausal_leap": ["heads.kind=anticausal", "heads.prediction_distances=[1, 2, 4, 6]"],
}
"""Overrides of configs/demo.yaml by kind of heads."""
SMALL = [
    "run.device=cpu",
    "parallel.pipeline=1",
    "model.hidden_size=64",
    "model.trunk_layers=2",
    "model.ffn_hidden_size=160",
    "train.steps=100",
    "train.micro_batch_size=16",
    "train.validation_samples=16",
    "optimizer.lr=1e-2",
    "log.sample_prompt=null",
]
TRAIN = "from mtp_dist.cli import main; main()"
NEAR_TIE, MOST_NEAR_TIES = 1e-5, 5
TRAINED_TOKENS_PER_FORWARD = 1.3
LONGEST_PROMPT, TREE_NODES = 32, 10


def small_config(kind: str, *overrides: str) -> Config:
    config = load_config(ROOT / "configs" / "demo.yaml", [*SMALL, *KINDS[kind], *overrides])
    return resolve(config, build_tokenizer(config.data.tokenizer).vocab_size, 1)


def train(kind: str, folder: Path) -> None:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    command = [sys.executable, "-c", TRAIN, "launch", "--ranks", "1", "--config", str(ROOT / "configs" / "demo.yaml")]
    command += [*SMALL, *KINDS[kind], f"run.output_dir={folder}"]
    subprocess.run(command, cwd=ROOT, env=environment, check=True, stdout=subprocess.DEVNULL)


def trained_models(folder: Path) -> tuple[MTPForCausalLM, PreTrainedModel]:
    """Return the model for generation and the plain one of a run."""
    model = Generator.open(folder).model
    if not model.heads.traits.exportable:
        return model, model
    with tempfile.TemporaryDirectory() as scratch:
        export_checkpoint(folder / "checkpoints", Path(scratch) / "export", "fp32")
        return model, LlamaForCausalLM.from_pretrained(Path(scratch) / "export")


def random_models(kind: str) -> tuple[MTPForCausalLM, PreTrainedModel]:
    """Return both models with the same random weights, large enough for texts that do not repeat one token."""
    config = small_config(kind, "model.init_std=0.3")
    end = config.vocab_size - 1
    weights = ReferenceModel(config).named_weights()
    model = MTPForCausalLM.from_pretrained(
        None,
        config=generation_model_config(config, end, "fp32"),
        state_dict=dict(model_weights(config, weights.items())),
    ).eval()
    if not config.heads.traits.exportable:
        return model, model
    in_plain = plain_weights(config)
    parts = [zip(in_plain[name], split(name, weights[name], config.model), strict=True) for name in in_plain]
    llama_config = LlamaConfig(**plain_config(config, end, "fp32"))
    state = {name: weight for part in parts for name, weight in part}
    return model, LlamaForCausalLM.from_pretrained(None, config=llama_config, state_dict=state).eval()


def code_prompts(count: int) -> list[list[int]]:
    """Return excerpts of Python's standard library, as bytes."""
    files = sorted(Path(os.__file__).parent.glob("*.py"))
    text, choice = b"".join(path.read_bytes() for path in files), random.Random(0)
    starts = [choice.randrange(len(text) - LONGEST_PROMPT) for _ in range(count)]
    return [list(text[start : start + choice.randint(1, LONGEST_PROMPT)]) for start in starts]


def random_prompts(count: int, vocab_size: int) -> list[list[int]]:
    choice = random.Random(0)
    return [choice.choices(range(vocab_size - 1), k=choice.randint(1, LONGEST_PROMPT)) for _ in range(count)]


def compare(
    model: MTPForCausalLM, plain: PreTrainedModel, prompts: list[list[int]], new_tokens: int, batch_size: int
) -> dict[str, dict[str, Any]]:
    """Return the differences from transformers' text and the tokens per forward pass of each way to decode."""
    end, tree = model.config.vocab_size - 1, None
    settings = GenerationConfig(max_new_tokens=new_tokens, do_sample=False, pad_token_id=end)
    ways: dict[str, Speculation] = {}
    result: dict[str, dict[str, Any]] = {}
    for start in range(0, len(prompts), batch_size):
        batch = prompts[start : start + batch_size]
        longest = max(map(len, batch))
        token_ids = torch.tensor([[end] * (longest - len(prompt)) + prompt for prompt in batch])
        mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in batch])
        inputs = {"attention_mask": mask, "generation_config": settings}
        expected = GenerationMixin.generate(plain, token_ids, **inputs)
        assert expected.shape[1] == longest + new_tokens, "no token ends a text"
        if tree is None:
            tree = choose_tree(candidate_acceptance(model, expected[:, -new_tokens:], 3), TREE_NODES)
            count = model.heads.count
            ways = {
                "plain": Speculation(heads=1),
                "fixed": Speculation(heads=count),
                "adaptive": Speculation(),
                "tree": Speculation(tree=tree),
            }
            result = {name: {"near_ties": 0, "different": 0} for name in ways}
        for name, speculation in ways.items():
            found = model.generate(token_ids, speculation=speculation, **inputs)
            for row in (found != expected).any(1).nonzero().flatten().tolist():
                column = int((found[row] != expected[row]).nonzero()[0])
                with torch.no_grad():
                    logits = plain(expected[row : row + 1, longest - len(batch[row]) : column]).logits[0, -1]
                first, second = logits.topk(2).values.tolist()
                result[name]["near_ties" if first - second < NEAR_TIE else "different"] += 1
    for name, speculation in ways.items():
        result[name]["tokens_per_forward"] = round(speculation.statistics.tokens_per_forward, 3)
    return result


def faults(weights: str, ways: dict[str, dict[str, Any]]) -> list[str]:
    found = [f"{name}: {way['different']} texts differ" for name, way in ways.items() if way["different"]]
    ties = {name: way["near_ties"] for name, way in ways.items()}
    found += [f"{name}: {count} near ties" for name, count in ties.items() if count > MOST_NEAR_TIES]
    rate = ways["fixed"]["tokens_per_forward"]
    if weights == "trained" and rate < TRAINED_TOKENS_PER_FORWARD:
        found.append(f"{rate} tokens per forward pass are too few to show much")
    return found


def compare_kind(kind: str, models: Path, prompts: int, new_tokens: int, batch_size: int) -> dict[str, Any]:
    """Return the results of `compare` with trained and with random weights."""
    torch.set_num_threads(1)
    transformers_logging.disable_progress_bar()
    folder = models.resolve() / kind
    if not (folder / "checkpoints").exists():
        train(kind, folder)
    model, plain = trained_models(folder)
    trained = compare(model, plain, code_prompts(prompts), new_tokens, batch_size)
    model, plain = random_models(kind)
    random_texts = random_prompts(prompts, model.config.vocab_size)
    return {"trained": trained, "random": compare(model, plain, random_texts, new_tokens, batch_size)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, help="folder of the trained models, which are kept there")
    parser.add_argument("--output", type=Path, help="JSON file for the comparison")
    parser.add_argument("--prompts", type=int, default=1000)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--batch", type=int, default=250)
    parser.add_argument("--jobs", type=int, default=2, help="kinds that are compared at the same time")
    options = parser.parse_args()
    versions = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    sizes = {"prompts": options.prompts, "new_tokens": options.new_tokens, "batch": options.batch}
    kinds: dict[str, Any] = {}
    failed = False
    with tempfile.TemporaryDirectory() as scratch, ProcessPoolExecutor(options.jobs, get_context("spawn")) as pool:
        models = options.models or Path(scratch)
        runs = {kind: pool.submit(compare_kind, kind, models, *sizes.values()) for kind in KINDS}
        for kind, run in runs.items():
            kinds[kind] = run.result()
            for weights, ways in kinds[kind].items():
                found = faults(weights, ways)
                failed |= bool(found)
                print(f"{kind}, {weights}:", *(found or ["identical"]), ways, flush=True)
    if options.output:
        result = {"measured": provenance(), "versions": versions, **sizes, "kinds": kinds}
        options.output.write_text(json.dumps(result, indent=1) + "\n")
    sys.exit(failed)


if __name__ == "__main__":
    main()
