"""Tables and the picture of decoding, from `mtp-dist bench decode`."""

from typing import Any

from generators.common import IMAGES, pyplot, read_json, table, with_origin

from mtp_dist.cli.tables import DECODE_COLUMNS, bound_cells, decode_cells, decode_machine


def tables() -> dict[str, str]:
    measured = results()
    return {
        "decoding-paper": next_to_the_paper(measured),
        "decoding-bounds": bounds(measured),
        "decoding-speed": speed(measured),
    }


def results() -> list[dict[str, Any]]:
    """Return the measurements: generated models before trained ones, CPU before GPU, then by layers."""

    def key(result: dict[str, Any]) -> tuple[bool, str, int]:
        model = result["model"]
        return model["source"] != "generated", result["settings"]["device"], model["layers"]

    return sorted(read_json("decode-*.json"), key=key)


def title(model: dict[str, Any]) -> str:
    source = "Generated model" if model["source"] == "generated" else f"Byte model, `{model['source']}`"
    return (
        f"{source}, {model['parameters'] / 1e6:.1f} M parameters, {model['layers']} layers with head 1, hidden size "
        f"{model['hidden']}, vocabulary {model['vocab']:,}, {model['heads']} {model['kind']} heads"
    )


def speed(measured: list[dict[str, Any]]) -> str:
    """Return one table per model, with 2, 4, 8, ... of the fixed numbers of heads."""
    sections = []
    for result in measured:
        settings = result["settings"]
        shown = {f"k = {2**power}" for power in range(1, 11)} | {f"k = {result['model']['heads']}"}
        rows = [row for row in result["rows"] if not row["variant"].startswith("k = ") or row["variant"] in shown]
        sections.append(
            f"{title(result['model'])}; {settings['dtype']}, {settings['prompt_tokens']} + "
            f"{settings['new_tokens']} tokens, {decode_machine(result['machine'])}, medians of {settings['rounds']} "
            "rounds:\n"
        )
        sections.append(with_origin(table(DECODE_COLUMNS, map(decode_cells, rows)), result))
    return "\n".join(sections)


def bounds(measured: list[dict[str, Any]]) -> str:
    rows = []
    for result in measured:
        model, device = result["model"], result["machine"]["device"]
        name = f"{'generated' if model['source'] == 'generated' else 'byte model'}, {model['layers']} layers"
        name += "" if device == "CPU" else f", {device.removeprefix('NVIDIA ')}"
        for bound in result["bounds"]:
            rows.append([name, *bound_cells(bound), "yes" if bound["holds"] else "**no**"])
    return with_origin(table(["model", "figure", "batch", "measured", "limit", "holds"], rows), *measured)


def next_to_the_paper(measured: list[dict[str, Any]]) -> str:
    """Return the speed-ups of Gloeckle et al. 2024, tables S2 and S3, next to those of the trained models."""
    header = ["model", "heads", "batch", "speed-up", "tokens per pass", "ratio"]
    rows = [
        ["paper, 7B on code", "4", "42", "3.05", "3.50", "0.87"],
        ["paper, 7B on bytes", "8", "16", "6.39", "7.04", "0.91"],
    ]
    trained = [result for result in measured if result["model"]["source"] != "generated"]
    for result in trained:
        model = result["model"]
        name = f"ours, {model['parameters'] / 1e6:.1f} M on bytes"
        for row in result["rows"]:
            if row["variant"] in (f"k = {model['heads']}", "adaptive"):
                heads = "adaptive" if row["variant"] == "adaptive" else str(model["heads"])
                rows.append([name, heads, str(row["batch"]), *decode_cells(row)[3:6]])
    return with_origin(table(header, rows), *trained)


def draw() -> None:
    """Draw the speed-up on CPUs against the number of heads: one panel per model, one colour per batch size."""
    plt, measured = pyplot(), [result for result in results() if result["settings"]["device"] == "cpu"]
    size = (4 * len(measured), 3.6)
    figure, panels = plt.subplots(1, len(measured), figsize=size, layout="constrained", squeeze=False)
    for axes, result in zip(panels[0], measured, strict=True):
        model = result["model"]
        for color, batch in enumerate(result["settings"]["batch_sizes"]):
            rows = {row["variant"]: row for row in result["rows"] if row["batch"] == batch}
            chains = [rows["plain"], *(rows[f"k = {k}"] for k in range(2, model["heads"] + 1))]
            heads = range(1, model["heads"] + 1)
            axes.plot(heads, [row["speed_up"] for row in chains], f"C{color}o-", label=f"batch {batch}")
            axes.axhline(rows["adaptive"]["speed_up"], color=f"C{color}", linestyle=":", linewidth=1)
            if batch == 1:
                least = [row["attainable"] * row["tokens_per_forward"] for row in chains]
                axes.plot(heads, least, "k--", linewidth=1, label="attainable at batch 1")
                tokens = [row["tokens_per_forward"] for row in chains]
                axes.plot(heads, tokens, color="gray", linewidth=1, label="tokens per pass")
        source = "generated" if model["source"] == "generated" else "trained on bytes"
        axes.set(title=f"{source}, {model['layers']} layers of {model['hidden']}", xlabel="heads k")
        axes.set_xticks(range(1, model["heads"] + 1))
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
    panels[0][0].set(ylabel="speed-up (dotted: adaptive)")
    for axes in panels[0]:
        axes.legend(fontsize=7)
    figure.savefig(IMAGES / "decoding.png", dpi=110)
