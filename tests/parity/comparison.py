"""A layout's training beside the plain reference's, and how much they may differ."""

import functools
from typing import Any

from mtp_dist.config import Config
from tests.errors import largest_error, norm_error
from tests.parity.runs import Run, merge, reference_run, sharded_run
from tests.ranks import Ranks
from tests.tiny import tiny_config

Layout = tuple[int, int, int, bool]
"""(tensor, pipeline, data, sequence)."""


def name_of(layout: Layout) -> str:
    tensor, pipeline, data, sequence = layout
    return f"tp{tensor}-pp{pipeline}-dp{data}{'-sp' if sequence else ''}"


def layout_config(layout: Layout, accumulation: int, zero_stage: int = 0, **sections: Any) -> Config:
    tensor, pipeline, data, sequence = layout
    parallel = {"tensor": tensor, "pipeline": pipeline, "sequence": sequence, "zero_stage": zero_stage}
    sections["parallel"] = parallel | sections.get("parallel", {})
    sections["train"] = {"micro_batch_size": 8 // data // accumulation} | sections.get("train", {})
    return tiny_config(**sections)


@functools.cache
def _reference(key: str, steps: int) -> Run:
    return reference_run(Config.model_validate_json(key, strict=False), steps)


def reference_of(config: Config, steps: int) -> Run:
    """The reference's run: computed once for all layouts and ways to the loss, because it knows none of them."""
    plain = config.model_copy(update={"parallel": type(config.parallel)()})
    train = plain.train.model_copy(
        update={"micro_batch_size": 1, "precision": "fp32", "activation_checkpointing": "none"}
    )
    heads = plain.heads.model_copy(update={"loss_mode": "eager", "chunk_tokens": None})
    return _reference(plain.model_copy(update={"train": train, "heads": heads}).model_dump_json(), steps)


def run_sharded(ranks: Ranks, config: Config, layout: Layout, steps: int) -> Run:
    tensor, pipeline, data, _ = layout
    return merge(ranks.run(tensor * pipeline * data, sharded_run, config, steps))


def errors_of(run: Run, truth: Run) -> dict[str, float]:
    """Largest relative errors of a run."""
    assert run.gradients.keys() == run.weights.keys() == truth.gradients.keys() == truth.weights.keys()
    return {
        "losses": largest_error(run.losses[0], truth.losses[0]),
        "gradient norm": largest_error(run.norms[0], truth.norms[0]),
        "norm curve": largest_error(run.norms, truth.norms),
        "gradients": max(norm_error(run.gradients[name], truth.gradients[name]) for name in truth.gradients),
        "loss curve": largest_error(run.losses, truth.losses),
        "weights": max(norm_error(run.weights[name], truth.weights[name]) for name in truth.weights),
    }


BOUNDS = {
    "fp32": {
        "losses": 1e-5,
        "gradient norm": 1e-5,
        "gradients": 1e-4,
        "loss curve": 1e-4,
        "norm curve": 1e-3,
        "weights": 1e-3,
    },
    "bf16": {"gradient norm": 2e-3, "gradients": 0.1, "loss curve": 1e-2, "norm curve": 5e-2},
}


def assert_within_bounds(config: Config, errors: dict[str, float]) -> None:
    for name, bound in BOUNDS[config.train.precision].items():
        assert errors[name] <= bound, f"{name}: {errors[name]:.1e}"


def assert_equals_reference(ranks: Ranks, config: Config, layout: Layout, steps: int) -> None:
    """Train that many steps both ways, and compare."""
    assert_within_bounds(config, errors_of(run_sharded(ranks, config, layout, steps), reference_of(config, steps)))
