"""Every configuration that ships is valid at the size of its job, and trains when it is shrunk."""

from pathlib import Path
from typing import Any

import pytest

from mtp_dist.config import Config, build_config, load_config, resolve
from tests.ranks import Ranks

CONFIGS = Path(__file__).parents[2] / "configs"
RANKS = {"demo": 2, "codecontests": 8, "bytes-7b": 32}
"""Processes of those that need more than one."""
OVERRIDES = {"finetune": ["heads.count=1"], "codecontests": ["heads.count=1"], "bytes-7b": ["heads.count=32"]}
"""Those that a comment in the file names."""
SMALL_MODEL = {"hidden_size": 32, "trunk_layers": 2, "num_attention_heads": 4, "num_query_groups": 2}
SMALL_TRAINING = {"steps": 2, "global_batch_size": 2, "micro_batch_size": 2, "sequence_length": 16}


def shrunk(config: Config) -> Config:
    """Return the same kind of training for one process and a moment."""
    values: dict[str, Any] = config.model_dump()
    values["model"] |= SMALL_MODEL | {"ffn_hidden_size": 48}
    values["train"] |= SMALL_TRAINING
    values["parallel"] = {"zero_stage": config.parallel.zero_stage}
    values["run"]["device"] = "cpu"
    return build_config(values)


def train(config: Config) -> list[float]:
    """Return the loss of head 1 in two steps on one random batch."""
    from mtp_dist.loss.schedule import head_schedule
    from tests.engines import open_engine, step_batch

    engine = open_engine(config)
    batch = step_batch(engine)
    return [engine.train_step(batch, step, 1e-3, head_schedule(config, step)).heads.losses[0] or 0.0 for step in (1, 2)]


@pytest.mark.parametrize("path", sorted(CONFIGS.rglob("*.yaml")), ids=lambda path: path.stem)
def test_config(ranks: Ranks, path: Path) -> None:
    for overrides in ([], OVERRIDES.get(path.stem, [])):
        config = load_config(path, overrides)
        resolved = resolve(config, 257 if config.data.tokenizer == "bytes" else 32_000, RANKS.get(path.stem, 1))
        assert resolved.micro_batches > 0 and resolved.run.name not in ("run", "")
    first, second = ranks.run(1, train, shrunk(config))[0]
    assert second < first
