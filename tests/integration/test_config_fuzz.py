"""Whatever a configuration contains, a run starts or ends with status 2 and plain messages."""

import io
import math
from contextlib import redirect_stderr, redirect_stdout

import pytest
import torch
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from mtp_dist.config import Config, SourceConfig
from mtp_dist.pretrain import main
from tests.integration import jobs

SECTIONS = {name: getattr(field.annotation, "model_fields", {}) for name, field in Config.model_fields.items()}
NESTED = "data.train.0 deepspeed.comms_logger model.rope_scaling.factor".split()
KEYS = [
    *SECTIONS,
    *(f"{name}.{key}" for name, keys in SECTIONS.items() for key in keys),
    *(f"data.train.0.{key}" for key in SourceConfig.model_fields),
    *NESTED,
]
NOT_FUZZED = {"log.rank_logs", "log.wandb"}
"""One redirects this process's output, the other asks a server."""
TEXTS = ["", "\0", "x\0y", "~nouser/x", "/no/such", ".", "/", "é" * 300, "\u2028", "null", "-1", "[", "{}", "x" * 300]
NUMBERS = [0, -1, 1, 3, 2**31 - 1, 2**31, 2**63, 10**30, -(10**30), 0.0, -0.5, 1e-320, 1e308, math.inf, math.nan]
SCALARS = st.sampled_from([None, True, False, *NUMBERS, *TEXTS])
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(TEXTS), inner, max_size=2)
)


class Started(BaseException):
    """The run has come to the point where it opens its process group."""


@pytest.fixture
def config(tmp_path, monkeypatch):
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    monkeypatch.setattr(torch.cuda, "current_device", torch.cuda.current_device)

    def start(*_):
        raise Started

    monkeypatch.setattr("mtp_dist.distributed.topology.initialize_topology", start)
    yield jobs.write_config(tmp_path)


def outcome_of(config, *overrides):
    """Return what a start prints on standard error until it reaches its process group or ends."""
    errors = io.StringIO()
    with redirect_stdout(io.StringIO()), redirect_stderr(errors):
        try:
            main(["--config", str(config), *overrides])
        except Started:
            pass
        except SystemExit as end:
            assert end.code == 2, end.code
    return errors.getvalue()


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(changes=st.dictionaries(st.sampled_from(sorted(set(KEYS) - NOT_FUZZED)), VALUES, min_size=1, max_size=2))
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
        message = outcome_of(config)
    finally:
        config.write_text(original)
    assert all(line.startswith(("error: ", "warning: ")) for line in message.splitlines()), message


@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(key=st.sampled_from(sorted(set(KEYS) - NOT_FUZZED)), text=st.text(max_size=20) | st.sampled_from(TEXTS))
@example(key="run.name", text="!!bool x")
@example(key="model.rope_scaling.factor", text="!!int")
def test_any_override(config, key, text):
    message = outcome_of(config, f"{key}={text}")
    assert all(line.startswith(("error: ", "warning: ")) for line in message.splitlines()), message


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("optimizer.warmup_steps=9", "warning: optimizer.warmup_steps = 9 exceeds train.steps = 5: "),
        (
            "model.vocab_size=300",
            "warning: model.vocab_size = 300 exceeds the 257 tokens of data.tokenizer = 'bytes': ",
        ),
    ],
)
def test_silent_choices_get_a_line(config, override, line):
    assert outcome_of(config) == ""
    assert outcome_of(config, override).startswith(line)
