"""The table and picture of a short run of each kind of head."""

from generators.common import DATA, IMAGES, pyplot, read_json, read_json_lines, table, with_origin


def runs() -> dict[str, list[dict[str, float]]]:
    """Return the metrics of a short run per kind of head."""
    return {path.stem: read_json_lines(path) for path in sorted(DATA.glob("heads/*.jsonl"))}


def tables() -> dict[str, str]:
    """Return the table of each run's last validation."""
    header = ["run", *(f"head {k}" for k in range(1, 5))]
    rows = []
    for name, records in runs().items():
        last = [record for record in records if "validation/loss/head_1" in record][-1]
        rows.append([f"`{name}`", *(f"{last[f'validation/loss/head_{k}']:.3f}" for k in range(1, 5))])
    return {"head-runs": with_origin(table(header, rows), *read_json("heads/run.json"))}


def draw() -> None:
    plt = pyplot()
    figure, grid = plt.subplots(1, 4, figsize=(12, 3.4), layout="constrained", sharey=True)
    for k, axes in enumerate(grid, 1):
        for name, records in runs().items():
            curve = [(r["step"], r[f"loss/head_{k}"]) for r in records if f"loss/head_{k}" in r]
            axes.plot(*zip(*curve, strict=True), label=name, linewidth=1.2)
        axes.set(title=f"head {k}", xlabel="step")
        axes.grid(alpha=0.3)
    grid[0].set(ylabel="training loss (nats)", ylim=(1.5, 4))
    grid[-1].legend(fontsize=7)
    figure.savefig(IMAGES / "head-runs.png", dpi=110)
