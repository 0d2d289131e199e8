"""A valid configuration file that unit tests change."""

import pytest

BASE_TEXT = """\
run: {name: base}
model: {hidden_size: 128, trunk_layers: 4, num_attention_heads: 4, num_query_groups: 2, ffn_hidden_size: 384}
heads: {count: 4}
parallel: {pipeline: 2}
data:
  train: [{path: python-stdlib, split: train}]
  validation: [{path: python-stdlib, split: validation}]
train: {steps: 300, global_batch_size: 32, micro_batch_size: 4, sequence_length: 256, precision: fp32}
optimizer: {lr: 2e-3}
log: {every: 10}
"""


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    path = tmp_path_factory.mktemp("config") / "base.yaml"
    path.write_text(BASE_TEXT)
    return path
