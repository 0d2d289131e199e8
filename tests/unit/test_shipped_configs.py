"""Every configuration that ships is valid with the overrides that it names, and trains when it is shrunk."""

import json
import re
import runpy
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from mtp_dist.config import Config, ModelConfig, build_config, load_config, resolve
from mtp_dist.config.heads import weight_differences
from mtp_dist.convert.config_json import read_config_json
from mtp_dist.convert.plain_weights import layers_after_trunk
from mtp_dist.data.build_tokenizer import build_tokenizer
from mtp_dist.experiments.grid import expand
from mtp_dist.experiments.schema import find_experiment, load_experiment
from mtp_dist.planner.devices import assumed_rates, find_accelerator
from mtp_dist.planner.estimate import estimate
from mtp_dist.planner.fit import fit
from mtp_dist.planner.flops import parameter_counts
from mtp_dist.planner.stage_times import Cluster
from tests.ranks import Ranks

PROJECT = Path(__file__).parents[2]
CONFIGS = PROJECT / "configs"
PATHS = sorted(CONFIGS.rglob("*.yaml"))
LAYOUTS = runpy.run_path(str(PROJECT / "docs/generate.py"))["layouts"]
GPU_BYTES = 75_000_000_000
"""Memory of a GPU of 80 GB, without what CUDA, NCCL and the allocator's gaps take."""
SMALL_MODEL = {"hidden_size": 32, "trunk_layers": 2, "num_attention_heads": 4, "num_query_groups": 2}
SMALL_TRAINING = {"steps": 2, "global_batch_size": 2, "micro_batch_size": 2, "sequence_length": 16}
LEARNED = ("steps", "global_batch_size", "sequence_length", "precision", "grad_clip")
"""Keys of `train` that decide what a model learns."""


class Variant(NamedTuple):
    """A configuration that a file describes: its own values, or those with overrides from its first comment."""

    path: Path
    name: str
    config: Config
    world_sizes: list[int]

    def resolved(self) -> Iterator[Config]:
        """Yield the configuration at each world size."""
        tokenizer = self.config.data.tokenizer
        built_in = tokenizer == "bytes" or tokenizer.startswith("synthetic/")
        vocab_size = build_tokenizer(tokenizer).vocab_size if built_in else LAYOUTS.VOCAB_SIZE
        return (resolve(self.config, vocab_size, world_size) for world_size in self.world_sizes)


def variants(path: Path) -> list[Variant]:
    """Return the configurations of a file, first the one without overrides.

    Those for other numbers of GPUs have these numbers, the others those of the file itself.
    """
    config, overrides = load_config(path), LAYOUTS.overrides_by_name(path)
    assert len(overrides) == path.read_text().count("\n#   "), "a line of overrides has another form"
    own = [size for name, words in overrides.items() if not words for size in LAYOUTS.gpu_counts(name)]
    own = own or [config.parallel.tensor * config.parallel.pipeline]
    found = [Variant(path, f"n = {config.heads.count}", config, own)]
    for name, words in overrides.items():
        found.append(Variant(path, name, load_config(path, words), LAYOUTS.gpu_counts(name) or own))
    return found


def shrunk(config: Config) -> Config:
    """Return the same kind of training for a moment, on at most two ranks of each axis."""
    values: dict[str, Any] = config.model_dump()
    values["model"] |= SMALL_MODEL | {"ffn_hidden_size": 48}
    values["train"] |= SMALL_TRAINING
    values["parallel"] |= {axis: min(2, values["parallel"][axis]) for axis in ("tensor", "pipeline")}
    values["run"]["device"] = "cpu"
    return build_config(values)


def train(config: Config) -> list[float]:
    """Return the loss of head 1 in two steps on one random batch."""
    from mtp_dist.loss.schedule import head_schedule
    from tests.engines import open_engine, step_batch

    engine = open_engine(config)
    batch = step_batch(engine)
    return [engine.train_step(batch, step, 1e-3, head_schedule(config, step)).heads.losses[0] or 0.0 for step in (1, 2)]


@pytest.mark.parametrize("path", PATHS, ids=lambda path: str(path.relative_to(CONFIGS)))
def test_config(ranks: Ranks, path: Path) -> None:
    for config in (config for variant in variants(path) for config in variant.resolved()):
        assert config.micro_batches > 0
        h100 = find_accelerator("h100")
        planned = estimate(fit(config), Cluster(h100, assumed_rates(h100, config.train.precision)))
        # Layers reach 52.5 % of the peak, and the MFU counts 12 / 7 of the attention's FLOPs: those of all keys.
        assert planned.fit.binding.memory.total <= GPU_BYTES and 0 < planned.mfu < 0.525 * 12 / 7
    config = shrunk(load_config(path))
    losses = ranks.run(config.parallel.tensor * config.parallel.pipeline, train, config)
    assert all(second < first for first, second in losses)


def test_runs_have_names_of_their_own() -> None:
    """Two models of one name would share a folder, and the second would be refused its checkpoints."""
    models: dict[str, set[tuple[Path, str]]] = {}
    for variant in (each for path in PATHS for each in variants(path) if not LAYOUTS.gpu_counts(each.name)):
        models.setdefault(variant.config.run.name, set()).add((variant.path, variant.config.model_dump_json()))
    assert "run" not in models
    assert not {name for name, found in models.items() if len(found) > 1}


def models_by_size() -> dict[tuple[Path, str], dict[int, Config]]:
    """Return, by file and size, the models whose names differ in the number of heads, such as `1M, n = 2`."""
    found: dict[tuple[Path, str], dict[int, Config]] = {}
    for variant in (each for path in PATHS for each in variants(path)):
        match = re.fullmatch(r"(?:(\S+), )?n = (\d+)", variant.name)
        size = match and (match[1] or variant.path.stem.rpartition("-")[2])
        if match and size and re.fullmatch(r"[\d.]+[mbMB]", size):
            assert variant.config.heads.count == int(match[2]), variant.name
            found.setdefault((variant.path, size), {})[int(match[2])] = next(variant.resolved())
    return found


MODELS = models_by_size()


@pytest.mark.parametrize(
    ("path", "size"), MODELS, ids=[f"{path.parent.name}-{path.stem}-{size}" for path, size in MODELS]
)
def test_models_of_one_size_are_matched(path: Path, size: str) -> None:
    """Heads take layers from the trunk, so models with other numbers of heads have as many parameters."""
    models = MODELS[path, size]
    counts = [parameter_counts(config) for config in models.values()]
    assert len(counts) > 1
    assert len({each.trunk + each.heads for each in counts}) == 1
    if models[1].heads.unembedding == "shared":
        assert len({each.embeddings for each in counts}) == 1
    for each in counts:
        assert each.total == pytest.approx(LAYOUTS.nominal_size(size), rel=0.12)


@pytest.mark.parametrize("name", ["scaling", "induction", "arithmetic"])
def test_paper_models_are_those_of_the_experiments(name: str) -> None:
    """The preset `paper` of `mtp-dist experiment scaling` trains the models of 0.3b.yaml to 13b.yaml, for example."""
    path = find_experiment(name)
    for run in expand(path, load_experiment(path, "paper")):
        size = run.cell["size"].lower() if name == "scaling" else run.cell["size"]
        file = CONFIGS / "paper" / f"{size if name == 'scaling' else name}.yaml"
        found = MODELS[file, size][int(run.cell["heads"].removeprefix("n="))]
        expected = build_config(run.training.config)
        assert found.model.model_copy(update={"vocab_size": None}) == expected.model, run.cell
        assert (found.heads, found.optimizer) == (expected.heads, expected.optimizer), run.cell
        assert [getattr(found.train, key) for key in LEARNED] == [getattr(expected.train, key) for key in LEARNED]


def test_finetuning_starts_from_models_that_ship() -> None:
    """Another architecture, kind of heads or tokenizer than that of the trained model would be refused."""
    all_variants = [each.config for path in PATHS for each in variants(path)]
    trained = {str(config.output_dir): config for config in all_variants}
    imported = {"runs/qwen-imported"}
    starts = [config for config in all_variants if (config.checkpoint.initial_weights or "") not in {"", *imported}]
    assert {config.run.name for config in starts} >= {"finetuned", "chat", "codecontests", "codecontests-n1-n1"}
    for config in starts:
        start = trained[config.checkpoint.initial_weights or ""]
        exclude = {"init_std", "vocab_size"}
        assert config.model.model_dump(exclude=exclude) == start.model.model_dump(exclude=exclude), config.run.name
        assert not [*weight_differences(start.heads, config.heads, config.model.hidden_size)]
        assert config.data.tokenizer == start.data.tokenizer


def test_qwen_is_that_of_its_config_json(tmp_path: Path) -> None:
    """The keys are those of the config.json of Qwen/Qwen2.5-0.5B on the Hugging Face hub."""
    keys = {
        "architectures": ["Qwen2ForCausalLM"],
        "bos_token_id": 151643,
        "eos_token_id": 151643,
        "hidden_act": "silu",
        "hidden_size": 896,
        "initializer_range": 0.02,
        "intermediate_size": 4864,
        "max_position_embeddings": 32768,
        "max_window_layers": 24,
        "model_type": "qwen2",
        "num_attention_heads": 14,
        "num_hidden_layers": 24,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-06,
        "rope_theta": 1000000.0,
        "sliding_window": 32768,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "use_sliding_window": False,
        "vocab_size": 151936,
    }
    (tmp_path / "config.json").write_text(json.dumps(keys))
    _, found = read_config_json(tmp_path)
    config = load_config(CONFIGS / "qwen.yaml")
    trunk_layers = found.num_hidden_layers - len(layers_after_trunk(config.heads))
    assert config.model == ModelConfig(**found.model_section(tmp_path), trunk_layers=trunk_layers)
