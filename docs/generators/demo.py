"""The picture of `make demo`."""

from generators.common import DATA, IMAGES, pyplot, read_json, read_json_lines


def draw() -> None:
    plt = pyplot()
    lines = read_json_lines(DATA / "demo-metrics.jsonl")
    (summary,) = read_json("demo-summary.json")
    figure, axes = plt.subplots(figsize=(8, 4), layout="constrained")
    for k in range(1, len(summary["validation"][0]["heads"]) + 1):
        training = [(line["step"], line[f"loss/head_{k}"]) for line in lines if f"loss/head_{k}" in line]
        key = f"validation/loss/head_{k}"
        validation = [(line["step"], line[key]) for line in lines if key in line]
        axes.plot(*zip(*training, strict=True), color=f"C{k - 1}", alpha=0.5)
        axes.plot(*zip(*validation, strict=True), "o-", color=f"C{k - 1}", label=f"head {k}: token t+{k}")
    entropy = summary["validation"][0]["unigram_entropy"]
    axes.axhline(entropy, color="black", linestyle=":", label="unigram entropy")
    axes.set(xlabel="step", ylabel="loss (nats per byte)", ylim=(1.2, 4.2))
    axes.set_title("make demo: training (thin) and validation loss of each head")
    axes.legend(ncols=2)
    figure.savefig(IMAGES / "demo.png", dpi=110)
