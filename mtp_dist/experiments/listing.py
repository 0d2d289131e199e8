"""The list of the experiments of this checkout."""

from typing import Any

from mtp_dist.experiments.grid import expand
from mtp_dist.experiments.schema import available, load_experiment, presets


def listing() -> list[dict[str, Any]]:
    """Return each experiment's name, title, question, source in the paper and number of runs by preset."""
    rows = []
    for name, path in available().items():
        settings = {preset: load_experiment(path, preset) for preset in presets(path)}
        first = next(iter(settings.values()))
        runs = {preset: len(expand(path, experiment)) for preset, experiment in settings.items()}
        rows.append(
            {"name": name, "title": first.title, "question": first.question, "paper": first.paper.source, "runs": runs}
        )
    return rows
