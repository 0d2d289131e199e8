"""Pipelines whose predicted processor time is compared with the measured one, large enough that operators take it."""

from mtp_dist.bench.plan_cases import Sections

TIME_BASE: Sections = {
    "run": {"device": "cpu"},
    "model": {
        "hidden_size": 256,
        "trunk_layers": 6,
        "num_attention_heads": 4,
        "ffn_hidden_size": 704,
        "vocab_size": 8192,
    },
    "heads": {"count": 4},
    "data": {"train": [{"path": "python-stdlib"}]},
    "train": {
        "steps": 4,
        "global_batch_size": 2,
        "micro_batch_size": 2,
        "sequence_length": 256,
        "precision": "fp32",
    },
}
"""Four parallel heads in fp32, and one micro-batch per step; a head costs about as much as three trunk layers."""


def _pipeline(*layers: int) -> dict[str, object]:
    return {"pipeline": len(layers), "partition": list(layers)}


TIME_CASES: dict[str, tuple[int, Sections]] = {
    "parallel": (2, {"parallel": _pipeline(3, 3)}),
    "parallel, no layer with the heads": (2, {"parallel": _pipeline(6, 0)}),
    "parallel, selective checkpointing": (
        2,
        {"parallel": _pipeline(5, 1), "train": {"activation_checkpointing": "selective"}},
    ),
    "two sequential heads, full checkpointing": (
        2,
        {
            "parallel": _pipeline(4, 2),
            "heads": {"kind": "sequential", "count": 2},
            "train": {"activation_checkpointing": "full"},
        },
    ),
    "linear, recompute": (2, {"parallel": _pipeline(2, 4), "heads": {"kind": "linear", "loss_mode": "recompute"}}),
    "mlp, naive": (2, {"parallel": _pipeline(5, 1), "heads": {"kind": "mlp", "loss_mode": "naive"}}),
    "one head, hidden size 512, V = 16,384": (
        2,
        {
            "parallel": _pipeline(5, 1),
            "heads": {"count": 1},
            "model": {"hidden_size": 512, "ffn_hidden_size": 1408, "vocab_size": 16384},
        },
    ),
    "parallel, four stages": (4, {"parallel": _pipeline(2, 3, 1, 0)}),
}
"""Number of ranks and sections of each case, in addition to TIME_BASE."""
