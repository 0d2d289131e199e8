"""The sample at the end of a run."""

from pathlib import Path
from typing import Any

import pytest
import torch

from mtp_dist import run
from mtp_dist.checkpoint.format import MANIFEST
from mtp_dist.checkpoint.manifest import record_of, write_manifest
from mtp_dist.checkpoint.writer import write_weights
from mtp_dist.data.tokenizer import ByteTokenizer
from mtp_dist.model.parameters import parameter_shapes
from tests.unit.convert.folders import write_model

TOKENIZER = ByteTokenizer()


def sample(folder: Path, **log: Any) -> str | None:
    config = write_model(folder, log={"sample_prompt": "def f", **log}, train={"precision": "bf16"}).config
    return run._sample(config, TOKENIZER, folder)


def test_repeats_and_leaves_the_generator_alone(tmp_path: Path) -> None:
    torch.manual_seed(7)
    state = torch.get_rng_state()
    text = sample(tmp_path / "a")
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(8)
    assert text is not None and sample(tmp_path / "b") == text and text.startswith("def f")
    assert sample(tmp_path / "c", sample_prompt=None) is None


def test_ends_at_the_sequence_length(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Half of it is left of a long prompt. The texts of the tiny model have 16 tokens."""
    for number, prompt, kept in ((1, "0123456789abcdef", "89abcdef"), (2, "x", "x")):
        text = sample(tmp_path / str(number), sample_prompt=prompt)
        assert text is not None and text.startswith(kept) and kept + text[len(kept) :] == text
        assert len(TOKENIZER.encode(text)) >= 9
    assert all("Sampling" in record.message for record in caplog.records)
    short = sample(tmp_path / "3", sample_tokens=2)
    assert short is not None and 5 <= len(short) <= 7


@pytest.mark.parametrize("value", [torch.nan, 1e38])
def test_diverged_model(tmp_path: Path, caplog: pytest.LogCaptureFixture, value: float) -> None:
    """The run has finished all the same. The larger weights are finite, their logits are not."""
    folder = tmp_path / "c"
    config = write_model(folder, log={"sample_prompt": "def f"}).config
    weights = (torch.full(shape, value) for shape in parameter_shapes(config).values())
    write_weights(folder, parameter_shapes(config), torch.float32, weights)
    records = {path.name: record_of(path) for path in folder.iterdir() if path.name != MANIFEST}
    write_manifest(folder, records)
    assert run._sample(config, TOKENIZER, folder) is None
    assert "No sample: " in caplog.text
