"""The table of balance and the picture of schedules on planning.md, computed by the planner."""

from generators.common import IMAGES, table

from mtp_dist.cli.timeline import draw_timelines
from mtp_dist.config import build_config, resolve
from mtp_dist.planner.balance import arrangements, optimum
from mtp_dist.planner.parts import Parts, part_flops
from mtp_dist.planner.schedule import simulate

LAYERS, STAGES, VOCABULARIES = 28, (4, 8, 16), (32_000, 131_072, 262_144)
NAMES = {
    "uniform": "1F1B, uniform",
    "balanced": "1F1B, balanced",
    "dualpipev": "DualPipeV",
    "balanced, split heads": "1F1B, split heads",
    "dualpipev, split heads": "DualPipeV, split heads",
}
DRAWN_STAGES, DRAWN_MICRO_BATCHES = 4, 12


def tables() -> dict[str, str]:
    rows = [cells(ranks, vocabulary) for ranks in STAGES for vocabulary in VOCABULARIES]
    return {"balance": table(["PP", "V", *NAMES.values(), "optimum"], rows)}


def cells(ranks: int, vocabulary: int) -> list[str]:
    """Return the balance of each arrangement that has no empty stage."""
    parts = parts_of_7b(vocabulary)
    found = arrangements(parts, LAYERS, ranks)
    shown = [f"{found[name].balance(parts):.2f}" if name in found else "-" for name in NAMES]
    return [str(ranks), f"{vocabulary:,}", *shown, f"{optimum(parts, LAYERS, ranks):.2f}"]


def parts_of_7b(vocabulary: int) -> Parts:
    """Return the costs of the parts of a 7B model with four heads, in forward passes of a trunk layer."""
    config = build_config(
        {
            "model": {
                "hidden_size": 4096,
                "trunk_layers": LAYERS,
                "num_attention_heads": 32,
                "ffn_hidden_size": 11008,
            },
            "heads": {"count": 4},
            "data": {"train": [{"path": "python-stdlib"}]},
            "train": {"steps": 1, "global_batch_size": 1, "micro_batch_size": 1, "sequence_length": 4096},
        }
    )
    flops = part_flops(resolve(config, vocabulary, 1))
    return flops.scaled(1 / flops.layer.forward)


def draw() -> None:
    parts = parts_of_7b(131_072)
    found = arrangements(parts, LAYERS, DRAWN_STAGES)
    timelines = {
        title: simulate(found[name].schedule, found[name].passes(parts), DRAWN_MICRO_BATCHES)
        for name, title in NAMES.items()
    }
    draw_timelines(timelines, IMAGES / "schedules.png", "forward passes of a trunk layer")
