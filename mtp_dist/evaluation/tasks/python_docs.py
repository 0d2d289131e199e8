"""Functions of Python's standard library with the first line of their documentation."""

import json
from pathlib import Path
from typing import Any

from datasets import Dataset
from rouge_score.rouge_scorer import RougeScorer

FEWSHOT = 20
"""Number of examples that are for few-shot prompts only."""
ROUGE = ("rouge1", "rouge2", "rougeL")


def load(**metadata: Any) -> dict[str, Dataset]:
    """Return the splits: `signature` and `summary` of a function, and the `choices` among which `label` is right."""
    lines = Path(__file__).with_suffix(".jsonl").read_text(encoding="utf-8").splitlines()
    functions = [json.loads(line) for line in lines]
    return {"train": Dataset.from_list(functions[:FEWSHOT]), "test": Dataset.from_list(functions[FEWSHOT:])}


def score_summary(function: dict[str, Any], texts: list[str]) -> dict[str, float]:
    """Return whether the text is the summary, and their overlap: F-measures of ROUGE."""
    text = texts[0].strip()
    scores = RougeScorer([*ROUGE], use_stemmer=True).score(function["summary"], text)
    return {"exact_match": float(text == function["summary"]), **{name: scores[name].fmeasure for name in ROUGE}}
