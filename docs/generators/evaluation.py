"""The table of pass@k, from `mtp-dist evaluate humaneval`."""

from generators.common import read_json, table, with_origin

PAPER = {
    "313B bytes, n = 1": ("19.3 / 42.4 / 64.7", "18.1 / 28.2 / 47.8", "0.1 / 0.5 / 2.4"),
    "313B bytes, n = 8": ("32.3 / 50.0 / 69.6", "21.8 / 34.1 / 57.9", "1.2 / 5.7 / 14.0"),
    "313B bytes, n = 16": ("28.6 / 47.1 / 68.0", "20.4 / 32.7 / 54.3", "1.0 / 5.0 / 12.9"),
    "313B bytes, n = 32": ("23.0 / 40.7 / 60.3", "17.2 / 30.2 / 49.7", "0.6 / 2.8 / 8.8"),
    "200B tokens, n = 1": ("30.0 / 53.8 / 73.7", "22.8 / 36.4 / 62.0", "2.8 / 7.8 / 17.4"),
    "200B tokens, n = 2": ("30.3 / 55.1 / 76.2", "22.2 / 38.5 / 62.6", "2.1 / 9.0 / 21.7"),
    "200B tokens, n = 4": ("33.8 / 55.9 / 76.9", "24.0 / 40.1 / 66.1", "1.6 / 7.1 / 19.9"),
    "200B tokens, n = 6": ("31.9 / 53.9 / 73.1", "20.6 / 38.4 / 63.9", "3.5 / 10.8 / 22.7"),
    "200B tokens, n = 8": ("30.7 / 52.2 / 73.4", "20.0 / 36.6 / 59.6", "3.5 / 10.4 / 22.1"),
    "1T tokens, n = 1": ("40.7 / 65.4 / 83.4", "31.7 / 57.6 / 83.0", "5.4 / 17.8 / 34.1"),
    "1T tokens, n = 4": ("43.1 / 65.9 / 83.7", "31.6 / 57.3 / 86.2", "4.3 / 15.6 / 33.7"),
}
"""pass@1 / 10 / 100 on MBPP, HumanEval and APPS/Intro of the 7B models of Gloeckle et al. 2024, table 1."""


def tables() -> dict[str, str]:
    rows = [[f"paper, 7B, {name}", *scores] for name, scores in PAPER.items()]
    results = read_json("humaneval-*.json")
    for result in results:
        scores = " / ".join(f"{100 * oracle['value']:.1f}" for oracle in result["oracle"].values())
        samples = min(row["samples_per_problem"] for row in result["temperatures"])
        name = f"ours, `{result['model']}`, {result['problems']} problems, {samples} samples each"
        rows.append([name, "", scores, ""])
    shown = table(["model and training", "MBPP", "HumanEval", "APPS, introductory"], rows)
    return {"humaneval-paper": with_origin(shown, *results)}
