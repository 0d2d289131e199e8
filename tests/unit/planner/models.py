"""Configurations of large models, which are planned and never built."""

from mtp_dist.config import build_config, resolve
from mtp_dist.planner.devices import Rates, assumed_rates, find_accelerator
from mtp_dist.planner.stage_times import Cluster

SHAPE_7B = {"hidden_size": 4096, "trunk_layers": 28, "num_attention_heads": 32, "ffn_hidden_size": 11008}
SHAPE_70B = {"hidden_size": 8192, "trunk_layers": 76, "num_attention_heads": 64, "ffn_hidden_size": 28672}
SHAPE_70B |= {"num_query_groups": 8}


def unresolved(model=SHAPE_7B, vocab_size=32_000, precision="bf16", batch=1024, heads=(), **train):
    """Return a model with four heads, sequences of 4,096 tokens and micro-batches of one sample, on one rank."""
    return build_config(
        {
            "model": {**model, "vocab_size": vocab_size},
            "heads": {"count": 4} | dict(heads),
            "data": {"train": [{"path": "python-stdlib"}]},
            "train": {
                "steps": 1000,
                "global_batch_size": batch,
                "micro_batch_size": 1,
                "sequence_length": 4096,
                "precision": precision,
            }
            | train,
        }
    )


def on_ranks(config, world_size, **parallel):
    """Return the configuration with a layout, resolved."""
    values = config.model_dump(mode="json")
    values["parallel"] |= parallel
    return resolve(build_config(values), config.vocab_size, world_size)


def cluster(name="h100", precision="bf16", **rates):
    """Return accelerators with the assumed rates, or with others."""
    accelerator = find_accelerator(name)
    assumed = assumed_rates(accelerator, precision)
    return Cluster(accelerator, Rates(**{**assumed.__dict__, **rates}))
