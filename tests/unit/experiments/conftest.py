"""A valid experiment that tests change."""

import copy

import pytest
import yaml

from mtp_dist.experiments.schema import load_experiment

VALUES = {
    "title": "Tiny",
    "question": "Does it work?",
    "paper": {"source": "Table 9", "column": "points", "figures": {"big, n=2": 7.5, "n=2": "up"}},
    "base": {
        "model": {"num_attention_heads": 4},
        "data": {"train": [{"path": "python-stdlib"}]},
        "train": {
            "steps": 10,
            "global_batch_size": 8,
            "micro_batch_size": 8,
            "sequence_length": 32,
            "precision": "fp32",
        },
    },
    "total_layers": 5,
    "grid": {
        "size": {"little": {"model.hidden_size": 32}, "big": {"model.hidden_size": 64, "total_layers": 7}},
        "heads": {"n=1": {"heads.count": 1}, "n=2": {"heads.count": 2}},
    },
    "seeds": [1, 2, 3],
    "metrics": ["accuracy"],
    "compare": {"axis": "heads", "baseline": "n=1", "metric": "accuracy", "effect": 0.2, "effect_source": "a guess"},
    "plot": {"metric": "accuracy", "x": "size"},
    "presets": {"small": {}, "gpu": {"seeds": [7], "base": {"train": {"steps": 20}}}},
}


def set_key(values, key, value):
    """Set the value of a key such as `compare.axis`; None removes it."""
    *section, name = key.split("/")
    for part in section:
        values = values[part]
    if value is None:
        del values[name]
    else:
        values[name] = value


@pytest.fixture
def write(tmp_path):
    """Return a function that writes the experiment with changed keys, and returns its path."""

    def write_experiment(**changes):
        values = copy.deepcopy(VALUES)
        values["presets"]["small"]["output_dir"] = str(tmp_path / "out")
        for key, value in changes.items():
            set_key(values, key, value)
        path = tmp_path / "tiny.yaml"
        path.write_text(yaml.safe_dump(values, sort_keys=False))
        return path

    return write_experiment


@pytest.fixture
def load(write):
    return lambda preset="small", **changes: load_experiment(write(**changes), preset)
