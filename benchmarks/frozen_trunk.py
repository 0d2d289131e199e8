"""Measure what training further heads on a frozen trunk costs, next to training everything.

    OMP_NUM_THREADS=1 DS_ACCELERATOR=cpu python benchmarks/frozen_trunk.py > docs/data/frozen-trunk.json

In one process on the CPU, for each kind of heads: the seconds of a training step, whose ratio is compared with that of
the FLOPs; the bytes that stay between steps (weights, gradients, moments); the peak above them within a step.
"""

import json
import statistics
import sys
from typing import Any

from mtp_dist.bench.measure import paired_seconds, peak_bytes
from mtp_dist.config import Config, build_config, resolve
from mtp_dist.distributed.device import select_device
from mtp_dist.distributed.topology import close_topology, initialize_topology
from mtp_dist.engine.engine import TrainingEngine, build_engine
from mtp_dist.loss.schedule import head_schedule
from mtp_dist.planner.flops import model_flops_per_token, parameter_counts, trained_parameters
from mtp_dist.provenance import provenance
from mtp_dist.verify.reference_training import local_batch, random_batch

MODEL = {"hidden_size": 256, "trunk_layers": 8, "num_attention_heads": 4, "ffn_hidden_size": 704, "vocab_size": 2048}
TRAIN = {"steps": 100, "global_batch_size": 4, "micro_batch_size": 2, "sequence_length": 256, "precision": "fp32"}
KINDS: dict[str, dict[str, Any]] = {
    "parallel": {},
    "parallel, separate": {"unembedding": "separate"},
    "causal": {"kind": "causal"},
    "linear": {"kind": "linear"},
    "mlp": {"kind": "mlp"},
    "sequential": {"kind": "sequential"},
}
ROUNDS = 15


def config_of(heads: dict[str, Any], freeze: list[str]) -> Config:
    values = {
        "run": {"device": "cpu"},
        "model": MODEL,
        "heads": {"count": 4} | heads,
        "data": {"train": [{"path": "python-stdlib"}]},
        "train": TRAIN | {"freeze": freeze},
    }
    return resolve(build_config(values), MODEL["vocab_size"], 1)


def resident_bytes(engine: TrainingEngine) -> int:
    """Return the bytes of weights, gradients and moments."""
    params = list(engine.stage.parameters())
    tensors = [*params, *(param.grad for param in params if param.grad is not None)]
    tensors += [value for values in engine.pipeline.basic_optimizer.state.values() for value in values.values()]
    return sum(tensor.nbytes for tensor in tensors)


def measure(name: str, heads: dict[str, Any]) -> dict[str, Any]:
    configs = {"all": config_of(heads, []), "frozen": config_of(heads, ["trunk"])}
    topology = initialize_topology(configs["all"], select_device(configs["all"]))
    engines = {key: build_engine(config, topology) for key, config in configs.items()}
    batch = {key: local_batch(config, topology, *random_batch(config)) for key, config in configs.items()}

    def step(key: str) -> None:
        engines[key].train_step(batch[key], 1, 1e-4, head_schedule(configs[key], 1))

    steps = {key: lambda key=key: step(key) for key in configs}
    for run in [*steps.values()] * 2:
        run()
    seconds = {key: statistics.median(each) for key, each in paired_seconds(steps, ROUNDS, topology.device).items()}
    row = {
        "heads": name,
        "parameters": parameter_counts(configs["all"]).total,
        "trained": trained_parameters(configs["frozen"]),
        "flops_per_token": {key: model_flops_per_token(config, 4) for key, config in configs.items()},
        "seconds": seconds,
        "resident_bytes": {key: resident_bytes(engine) for key, engine in engines.items()},
        "peak_bytes_above": {key: peak_bytes(run, topology.device) for key, run in steps.items()},
    }
    close_topology()
    return row


def main() -> None:
    rows = []
    for name, heads in KINDS.items():
        rows.append(row := measure(name, heads))
        time, flops = (row[key]["frozen"] / row[key]["all"] for key in ("seconds", "flops_per_token"))
        print(f"{name}: time {time:.3f}, FLOPs {flops:.3f}, time / FLOPs {time / flops:.3f}", file=sys.stderr)
    print(json.dumps({"model": MODEL, "train": TRAIN, "rows": rows, "measured": provenance()}, indent=1))


if __name__ == "__main__":
    main()
