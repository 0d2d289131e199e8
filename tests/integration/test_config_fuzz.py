"""Whatever a configuration contains, a run starts or ends with status 2 and plain messages."""

import io
import math
from contextlib import redirect_stderr, redirect_stdout, suppress
from unittest.mock import Mock

import pytest
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from mtp_dist.config import Config, SourceConfig
from mtp_dist.pretrain import main

SECTIONS = {name: getattr(field.annotation, "model_fields", {}) for name, field in Config.model_fields.items()}
NAMES = {*SECTIONS, "deepspeed.comms_logger", "model.rope_scaling.factor", "data.train.0"}
NAMES |= {f"{name}.{key}" for name, keys in SECTIONS.items() for key in keys}
NAMES |= {f"data.train.0.{key}" for key in SourceConfig.model_fields}
# The first redirects this process's output, the other asks a server.
KEYS = st.sampled_from(sorted(NAMES - {"log.rank_logs", "log.wandb"}))
TEXTS = ["", "\0", "x\0y", "~nouser/x", "/no/such", ".", "/", "é" * 300, "\u2028", "null", "-1", "[", "{}", "x" * 300]
NUMBERS = [0, -1, 1, 3, 2**31 - 1, 2**31, 2**63, 10**30, -(10**30), 0.0, -0.5, 1e-320, 1e308, math.inf, math.nan]
SCALARS = st.sampled_from([None, True, False, *NUMBERS, *TEXTS])
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(TEXTS), inner, max_size=2)
)


class Started(BaseException):
    """The run has come to the point where it opens its process group."""


@pytest.fixture(autouse=True)
def process_group(monkeypatch):
    monkeypatch.setattr("mtp_dist.run.initialize_topology", Mock(side_effect=Started))


def outcome_of(config, *overrides):
    """Return the lines that a start prints on standard error until it reaches its process group or ends."""
    errors = io.StringIO()
    with redirect_stdout(io.StringIO()), redirect_stderr(errors), suppress(Started):
        with pytest.raises(SystemExit) as end:
            main(["--config", str(config), *overrides])
        assert end.value.code == 2
    lines = errors.getvalue().splitlines()
    assert all(line.startswith(("error: ", "warning: ")) for line in lines), lines
    return lines


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(changes=st.dictionaries(KEYS, VALUES, min_size=1, max_size=2))
@example(changes={"run.output_dir": "~nouser/x"})
@example(changes={"run.step_timeout": 1e308})
def test_any_value_of_any_key(config, changes):
    original = config.read_text()
    values = yaml.safe_load(original)
    for key, value in changes.items():
        *parents, name = key.split(".")
        section = values
        for parent in parents:
            if isinstance(section, dict):
                section = section.get(parent) if section.get(parent) is not None else section.setdefault(parent, {})
            elif isinstance(section, list) and section:
                section = section[0]
        if isinstance(section, dict):
            section[name] = value
    try:
        config.write_text(yaml.safe_dump(values, allow_unicode=True))
        outcome_of(config)
    finally:
        config.write_text(original)


@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(key=KEYS, text=st.text(max_size=20) | st.sampled_from(TEXTS))
@example(key="run.name", text="!!bool x")
@example(key="model.rope_scaling.factor", text="!!int")
def test_any_override(config, key, text):
    outcome_of(config, f"{key}={text}")


def test_silent_choices_get_a_line(config):
    assert outcome_of(config) == []
    for override, start in {
        "optimizer.warmup_steps=9": "optimizer.warmup_steps = 9 exceeds train.steps = 5: ",
        "model.vocab_size=300": "model.vocab_size = 300 exceeds the 257 tokens of data.tokenizer = 'bytes': ",
    }.items():
        assert outcome_of(config, override)[0].startswith(f"warning: {start}")
