"""Losses of short trainings in full precision, which reveal an unintended change of numerics.

`python -m tests.parity.golden` rewrites `golden.json` after an intended change.
"""

import json
from pathlib import Path
from typing import Any

from mtp_dist.config import Config
from tests.parity.runs import sharded_run
from tests.ranks import Ranks
from tests.tiny import tiny_config

FILE = Path(__file__).with_suffix(".json")
STEPS = 4
BOUNDS = {"fp32": 2e-6, "bf16": 2e-3}
"""Largest relative differences: processors with other vector units sum in another order, and those that compute in bf16
round at other places (half of bf16's relative precision)."""
CONFIGS: dict[str, Config] = {
    "parallel heads": tiny_config(),
    "sequential heads, tied embeddings": tiny_config(
        model={"tie_embeddings": True}, heads={"kind": "sequential", "count": 3}
    ),
    "causal heads, z-loss, distillation, token order": tiny_config(
        heads={"kind": "causal", "count": 3, "z_loss": 1e-3, "distillation": 0.5, "token_order": 0.5}
    ),
    "documents apart": tiny_config(data={"loss_across_documents": False, "attention_across_documents": False}),
    "bf16": tiny_config(train={"precision": "bf16"}),
}


def golden_run(config: Config) -> dict[str, Any]:
    """Return losses `[step][kind][head]` and gradient norms `[step]` of a training on one rank."""
    run = sharded_run(config, STEPS)
    assert run is not None
    return {"losses": run.losses.tolist(), "grad_norms": run.norms.tolist()}


if __name__ == "__main__":
    pool = Ranks(1)
    FILE.write_text(json.dumps({n: pool.run(1, golden_run, c)[0] for n, c in CONFIGS.items()}, indent=1) + "\n")
    pool.close()
