"""Trainings of a sharded model and of the plain reference, and how much they may differ."""

import functools
import re
from collections import defaultdict
from typing import Any, NamedTuple

import torch
import yaml

from mtp_dist.config import Config
from tests.errors import largest_error, norm_error
from tests.parity.runs import Run, merge, reference_run, sharded_run
from tests.ranks import Ranks
from tests.tiny import BLOCKS, tiny_config


class Layout(NamedTuple):
    """Degrees of the axes, whether activations are sequence-parallel, and whether the schedule is DualPipeV."""

    tensor: int
    pipeline: int
    data: int
    sequence: bool = False
    dualpipev: bool = False

    @property
    def world_size(self) -> int:
        return self.tensor * self.pipeline * self.data

    def __str__(self) -> str:
        options = f"{'-sp' if self.sequence else ''}{'-v' if self.dualpipev else ''}"
        return f"tp{self.tensor}-pp{self.pipeline}-dp{self.data}{options}"


def parse_case(text: str, micro_batches: int = 4) -> tuple[Layout, Config]:
    """Build a configuration from a layout's name and `key=value` words, such as `tp2-pp1-dp1-sp heads.kind=causal`.

    Keys are those of the configuration, `micro_batches` (by default the argument), and `blocks`: one of BLOCKS.
    """
    name, *words = text.split()
    match = re.fullmatch(r"tp(\d)-pp(\d)-dp(\d)(-sp)?(-v)?", name)
    assert match, text
    layout = Layout(*map(int, match.groups()[:3]), bool(match[4]), bool(match[5]))
    values = dict(word.split("=", 1) for word in words)
    micro_batches = int(values.pop("micro_batches", micro_batches))
    sections: dict[str, dict[str, Any]] = defaultdict(dict)
    if "blocks" in values:
        sections["model"] |= BLOCKS[values.pop("blocks")]
    for key, value in values.items():
        section, _, field = key.partition(".")
        sections[section][field] = yaml.safe_load(value)
    return layout, layout_config(layout, micro_batches, **sections)


def layout_config(layout: Layout, micro_batches: int, zero_stage: int = 0, **sections: Any) -> Config:
    """Build a configuration at a layout with that many micro-batches per step."""
    tensor, pipeline, data, sequence, dualpipev = layout
    parallel = {"tensor": tensor, "pipeline": pipeline, "sequence": sequence, "zero_stage": zero_stage}
    parallel["schedule"] = "dualpipev" if dualpipev else "1f1b"
    sections["parallel"] = parallel | sections.get("parallel", {})
    sections["train"] = {"micro_batch_size": 8 // data // micro_batches} | sections.get("train", {})
    return tiny_config(**sections)


@functools.cache
def _reference(key: str, steps: int) -> Run:
    return reference_run(Config.model_validate_json(key, strict=False), steps)


def reference_of(config: Config, steps: int) -> Run:
    """Return the reference's run, which is the same at all layouts and for all ways to the loss."""
    plain = config.model_copy(update={"parallel": type(config.parallel)()})
    train = plain.train.model_copy(
        update={"micro_batch_size": 1, "precision": "fp32", "activation_checkpointing": "none"}
    )
    heads = plain.heads.model_copy(update={"loss_mode": "eager", "chunk_tokens": None, "stages": 1})
    return _reference(plain.model_copy(update={"train": train, "heads": heads}).model_dump_json(), steps)


def run_sharded(ranks: Ranks, config: Config, layout: Layout, steps: int) -> Run:
    return merge(ranks.run(layout.world_size, sharded_run, config, steps))


def errors_of(run: Run, truth: Run) -> dict[str, float]:
    """Return the largest relative errors of a run."""
    assert run.gradients.keys() == truth.gradients.keys() and run.weights.keys() == truth.weights.keys()
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


def assert_bitwise_equal(one: Run, other: Run) -> None:
    assert torch.equal(one.losses, other.losses) and torch.equal(one.norms, other.norms)
    for name, weight in one.weights.items():
        assert torch.equal(weight, other.weights[name]), name
