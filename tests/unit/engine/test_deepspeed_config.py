"""What DeepSpeed is told."""

import json
import math
from typing import Any

import pytest
from deepspeed.runtime.config import DeepSpeedConfig

from mtp_dist.config.validation import DERIVED_DEEPSPEED_KEYS
from mtp_dist.engine.deepspeed_config import deepspeed_config
from mtp_dist.errors import ConfigError
from tests.tiny import tiny_config


def derived(**sections: Any) -> dict[str, Any]:
    return deepspeed_config(tiny_config(**sections), micro_batches=4)


@pytest.mark.parametrize(
    ("precision", "asked", "stage"), [("fp32", 0, 0), ("fp32", 1, 1), ("bf16", 0, 1), ("bf16", 1, 1)]
)
def test_precision_and_zero_stage(precision: str, asked: int, stage: int) -> None:
    values = derived(train={"precision": precision}, parallel={"zero_stage": asked})
    assert values["zero_optimization"]["stage"] == stage
    assert values["bf16"] == {"enabled": precision == "bf16"}
    assert values["data_types"] == {"grad_accum_dtype": "fp32"}
    assert values["communication_data_type"] == "fp32"


def test_batch_sizes() -> None:
    values = derived(train={"global_batch_size": 24, "micro_batch_size": 3})
    assert values["train_batch_size"] == 24
    assert values["train_micro_batch_size_per_gpu"] == 3
    assert values["gradient_accumulation_steps"] == 4


def test_clipping() -> None:
    assert derived(train={"grad_clip": 0.5})["gradient_clipping"] == 0.5
    assert derived(train={"grad_clip": 0.0})["gradient_clipping"] == math.inf


def test_activations_are_never_partitioned() -> None:
    pipeline = derived()["pipeline"]
    assert pipeline["pipe_partitioned"] is False and pipeline["grad_partitioned"] is False


def test_keys_of_the_user_are_added() -> None:
    own = {"wall_clock_breakdown": True, "comms_logger": {"enabled": True}}
    values = derived(deepspeed=own)
    assert values | own == values
    assert {key: value for key, value in values.items() if key not in own} == derived()


def test_keys_that_users_may_not_set_are_derived() -> None:
    assert derived().keys() & DERIVED_DEEPSPEED_KEYS == DERIVED_DEEPSPEED_KEYS - {"fp16", "optimizer", "scheduler"}


def test_deepspeed_understands_it() -> None:
    values = derived(train={"precision": "bf16"}, parallel={"zero_stage": 1})
    parsed = DeepSpeedConfig(json.loads(json.dumps(values)) | {"train_batch_size": 8})
    assert parsed.bfloat16_config.enabled and parsed.zero_optimization_stage == 1
    assert parsed.pipeline["pipe_partitioned"] is False
    assert parsed.grad_accum_dtype == "fp32"


def test_sections_that_deepspeed_hands_on_as_a_whole_are_read() -> None:
    from mtp_dist.engine.deepspeed_keys import check_deepspeed_section

    for section in (
        {"csv_monitor": {"enabled": True, "output_path": "csv", "job_name": "j"}},
        {"tensorboard": {"enabled": False}},
        {"comms_logger": {"enabled": True, "prof_ops": ["all_reduce"]}},
        {"flops_profiler": {"enabled": False}},
        {"autotuning": {"enabled": False, "arg_mappings": {"a": "b"}}},
    ):
        check_deepspeed_section(section)
    for section in ({"csv_monitor": {"enabeld": True}}, {"flops_profiler": {"enabeld": True}}, {"wall_clok": True}):
        with pytest.raises(ConfigError, match=r"enabeld|wall_clok"):
            check_deepspeed_section(section)
