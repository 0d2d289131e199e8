"""Show that a change leaves every loss bitwise as it was.

    python benchmarks/bitwise_losses.py --before COMMIT [--output FILE]

Train the demo and six small runs, one per kind of layout, in a worktree of COMMIT and in this checkout, and compare
every number of metrics.jsonl that is not a time, a rate or a memory size. Exit with status 1 if one differs.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from mtp_dist.provenance import provenance

ROOT = Path(__file__).resolve().parents[1]
TRAIN = "import sys; from mtp_dist.cli import main; main()"
MEASURED = ("throughput/", "memory/", "time/")
"""Prefixes of the scalars that differ from one run to the next."""
SMALL = [
    "model.hidden_size=64",
    "model.ffn_hidden_size=96",
    "train.steps=12",
    "train.global_batch_size=8",
    "train.micro_batch_size=2",
    "train.sequence_length=32",
    "train.validate_every=6",
    "train.validation_samples=8",
    "log.every=1",
    "log.sample_prompt=null",
    "checkpoint.every=6",
]
RUNS: dict[str, tuple[int, list[str]]] = {
    "demo": (2, []),
    "tensor 2, sequence parallel": (2, [*SMALL, "parallel.pipeline=1", "parallel.tensor=2", "parallel.sequence=true"]),
    "pipeline 2, sequential heads, tied": (2, [*SMALL, "heads.kind=sequential", "model.tie_embeddings=true"]),
    "data 2, ZeRO 1, bf16": (2, [*SMALL, "parallel.pipeline=1", "parallel.zero_stage=1", "train.precision=bf16"]),
    "tensor 2 x pipeline 2, causal, distillation": (
        4,
        [*SMALL, "parallel.tensor=2", "heads.kind=causal", "heads.distillation=0.5", "heads.z_loss=0.001"],
    ),
    "pipeline 2 x data 2, recompute, token order": (
        4,
        [*SMALL, "heads.loss_mode=recompute", "heads.token_order=0.5", "heads.schedule=forward"],
    ),
    "pipeline 2, naive, documents apart": (
        2,
        [
            *SMALL,
            "heads.loss_mode=naive",
            "heads.unembedding=separate",
            "data.loss_across_documents=false",
            "data.attention_across_documents=false",
        ],
    ),
}
"""By name, the number of processes and the overrides of configs/demo.yaml."""


def train(tree: Path, folder: Path, processes: int, overrides: list[str]) -> list[dict[str, Any]]:
    """Train in the given checkout and return the lines of metrics.jsonl."""
    environment = os.environ | {"PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    command = [sys.executable, "-c", TRAIN, "launch", "--ranks", str(processes), "--config", "configs/demo.yaml"]
    command += ["run.device=cpu", f"run.output_dir={folder}", *overrides]
    subprocess.run(command, cwd=tree, env=environment, check=True, stdout=subprocess.DEVNULL)
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def computed(line: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in line.items() if not name.startswith(MEASURED)}


def compare(before: list[dict[str, Any]], after: list[dict[str, Any]]) -> dict[str, Any]:
    """Return how many numbers were compared and which differ. JSON holds doubles exactly."""
    differing = []
    for line, other in zip(map(computed, before), map(computed, after), strict=True):
        names = sorted(line.keys() | other.keys())
        differing += [f"step {line['step']}: {name}" for name in names if line.get(name) != other.get(name)]
    losses = {name: value for name, value in after[-1].items() if "loss/head" in name}
    return {"numbers": sum(len(computed(line)) for line in before), "differing": differing, "last_losses": losses}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", required=True, help="commit to compare with")
    parser.add_argument("--output", type=Path, help="JSON file for the comparison")
    options = parser.parse_args()
    git = ["git", "-C", str(ROOT)]
    commits = [
        subprocess.run([*git, "rev-parse", "--short", name], capture_output=True, text=True, check=True).stdout.strip()
        for name in (options.before, "HEAD")
    ]
    result: dict[str, Any] = {"measured": provenance(), "before": commits[0], "after": commits[1], "runs": {}}
    with tempfile.TemporaryDirectory() as scratch:
        tree = Path(scratch) / "tree"
        subprocess.run([*git, "worktree", "add", "--quiet", "--detach", str(tree), options.before], check=True)
        try:
            for number, (name, (processes, overrides)) in enumerate(RUNS.items()):
                curves = [
                    train(place, Path(scratch) / f"{number}-{place.name}", processes, overrides)
                    for place in (tree, ROOT)
                ]
                result["runs"][name] = {"processes": processes, "overrides": overrides, **compare(*curves)}
                print(f"{name}: {len(result['runs'][name]['differing'])} of {result['runs'][name]['numbers']} differ")
        finally:
            subprocess.run([*git, "worktree", "remove", "--force", str(tree)], check=True)
    if options.output:
        options.output.write_text(json.dumps(result, indent=1) + "\n")
    sys.exit(any(run["differing"] for run in result["runs"].values()))


if __name__ == "__main__":
    main()
