"""Tables and pictures of the heads' loss, from `mtp-dist bench head-loss`."""

from typing import Any

from generators.common import IMAGES, pyplot, read_json, table, with_origin

FILES = {"cpu": "head-loss.png", "cuda": "head-loss-gpu.png"}


def section(result: dict[str, Any]) -> str:
    """Return the description, table and picture of a measurement."""
    machine, settings = result["machine"], result["settings"]
    sizes = " ".join(f"--{name} {settings[name]}" for name in ("tokens", "hidden", "vocab", "tp", "dtype", "device"))
    heads, modes = (",".join(map(str, settings[name])) for name in ("heads", "modes"))
    number = machine["threads_per_rank"]
    threads = f", {number} thread{'s' * (number > 1)} per rank" if settings["device"] == "cpu" else ""
    header = ["n", "mode", "seconds", "x naive", "of the matmuls' rate", "peak MiB", "gradient error"]
    if settings["tp"] > 1:
        header += ["collectives", "collective MiB"]
    return "\n".join(
        [
            f"On {machine['device']}{threads}; medians of {settings['rounds']} rounds; the matmuls alone run at "
            f"{result['matmul_flops_per_second'] / 1e9:,.0f} GFLOP/s:\n",
            f"    mtp-dist bench head-loss {sizes} --heads {heads} \\\n        --modes {modes} --json\n",
            with_origin(table(header, [cells(row)[: len(header)] for row in result["rows"]]), result),
            *([image(settings)] if settings["tp"] == 1 else []),
        ]
    )


def cells(row: dict[str, Any]) -> list[str]:
    start = [str(row["heads"]), row["mode"]]
    if row["peak_bytes"] is None:
        return [*start, "out of memory", *[""] * 6]
    return [
        *start,
        f"{row['seconds']:.3f}",
        "" if row["seconds_relative_to_naive"] is None else f"{row['seconds_relative_to_naive']:.2f}",
        f"{row['fraction_of_matmul_rate']:.0%}",
        f"{row['peak_bytes'] / 2**20:,.1f}",
        f"{row['gradient_error']:.1e}",
        str(row["collectives"]),
        f"{row['collective_bytes'] / 2**20:,.2f}",
    ]


def image(settings: dict[str, Any]) -> str:
    return f"![Memory and time of the heads' loss against the number of heads](images/{FILES[settings['device']]})\n"


def results() -> list[dict[str, Any]]:
    """Return the measurements, CPU before GPU, then by number of ranks."""
    measured = read_json("head-loss-*.json")
    return sorted(measured, key=lambda result: (result["settings"]["device"], result["settings"]["tp"]))


def tables() -> dict[str, str]:
    measured = results()
    sections = [section(result) for result in measured]
    if all(result["settings"]["device"] == "cpu" for result in measured):
        sections.append("Nothing has been measured on a GPU yet.\n")
    return {"head-loss": "\n".join(sections)}


def draw() -> None:
    for result in results():
        if result["settings"]["tp"] == 1:
            draw_result(result)


def draw_result(result: dict[str, Any]) -> None:
    plt = pyplot()
    settings = result["settings"]
    figure, (memory, time) = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    for mode in settings["modes"]:
        rows = [row for row in result["rows"] if row["mode"] == mode and row["peak_bytes"] is not None]
        heads = [row["heads"] for row in rows]
        # Dashed: eager and recompute lie on one another in memory.
        style = "s--" if mode == "recompute" else "o-"
        memory.plot(heads, [row["peak_bytes"] / 2**20 for row in rows], style, label=mode)
        time.plot(heads, [row["seconds"] for row in rows], style, label=mode)
    for axes, label in ((memory, "peak memory (MiB)"), (time, "seconds per step")):
        axes.set_xscale("log", base=2)
        axes.set_xticks(settings["heads"], settings["heads"])
        axes.set(xlabel="heads n", ylabel=label)
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
    memory.legend()
    figure.suptitle(
        f"The heads' loss: {settings['tokens']} tokens, hidden size {settings['hidden']}, vocabulary "
        f"{settings['vocab']:,}, {settings['dtype']}, {settings['device'].upper()}"
    )
    figure.savefig(IMAGES / FILES[settings["device"]], dpi=110)
