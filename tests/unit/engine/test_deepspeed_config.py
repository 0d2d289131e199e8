"""The configuration that DeepSpeed gets, and the keys of the `deepspeed` section that it reads."""

import json
import math
from typing import Any

import pytest
from deepspeed.runtime.config import DeepSpeedConfig

from mtp_dist.config.validation import DERIVED_DEEPSPEED_KEYS
from mtp_dist.engine.deepspeed_config import deepspeed_config
from mtp_dist.engine.deepspeed_keys import check_deepspeed_section
from mtp_dist.errors import ConfigError
from tests.tiny import tiny_config


def derived(**sections: Any) -> dict[str, Any]:
    return deepspeed_config(tiny_config(**sections), micro_batches=4, trained=1000)


@pytest.mark.parametrize(
    ("precision", "configured", "stage"), [("fp32", 0, 0), ("fp32", 1, 1), ("bf16", 0, 1), ("bf16", 1, 1)]
)
def test_derived_values(precision: str, configured: int, stage: int) -> None:
    train = {"precision": precision, "global_batch_size": 24, "micro_batch_size": 6, "grad_clip": 0.5}
    values = derived(train=train, parallel={"zero_stage": configured})
    expected = {
        "bf16": {"enabled": precision == "bf16"},
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",
        "train_batch_size": 24,
        "train_micro_batch_size_per_gpu": 6,
        "gradient_accumulation_steps": 4,
        "gradient_clipping": 0.5,
    }
    assert values | expected == values and values["zero_optimization"]["stage"] == stage
    assert values["pipeline"]["pipe_partitioned"] is values["pipeline"]["grad_partitioned"] is False
    assert derived(train={"grad_clip": 0.0})["gradient_clipping"] == math.inf
    large = deepspeed_config(tiny_config(), micro_batches=4, trained=10**9)
    assert [each["zero_optimization"]["reduce_bucket_size"] for each in (values, large)] == [1000, 50_000_000]
    parsed = DeepSpeedConfig(json.loads(json.dumps(values)))
    assert parsed.bfloat16_config.enabled == (precision == "bf16") and parsed.zero_optimization_stage == stage
    assert parsed.pipeline["pipe_partitioned"] is False and parsed.grad_accum_dtype == "fp32"


def test_keys_of_the_user_are_added() -> None:
    own = {"wall_clock_breakdown": True, "comms_logger": {"enabled": True}}
    values = derived(deepspeed=own)
    assert values | own == values
    assert {key: value for key, value in values.items() if key not in own} == derived()


def test_keys_that_users_may_not_set_are_derived() -> None:
    assert derived().keys() & DERIVED_DEEPSPEED_KEYS == DERIVED_DEEPSPEED_KEYS - {"fp16", "optimizer", "scheduler"}


def test_sections_that_deepspeed_reads() -> None:
    off = {"enabled": False}
    check_deepspeed_section(
        {
            "csv_monitor": {"enabled": True, "output_path": "csv", "job_name": "j"},
            "tensorboard": off,
            "comms_logger": {"enabled": True, "prof_ops": ["all_reduce"]},
            "flops_profiler": off,
            "autotuning": off | {"arg_mappings": {"a": "b"}},
        }
    )


@pytest.mark.parametrize(
    "section", [{"csv_monitor": {"enabeld": True}}, {"flops_profiler": {"enabeld": True}}, {"wall_clok": True}]
)
def test_misspelt_keys_are_errors(section: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"enabeld|wall_clok"):
        check_deepspeed_section(section)
