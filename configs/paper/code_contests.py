"""Write the Python part of CodeContests (Li et al. 2022) as finetuning data for codecontests.yaml.

`python configs/paper/code_contests.py` streams the dataset `deepmind/code_contests` from the Hugging Face hub and
writes `code-contests-train.jsonl` and `code-contests-validation.jsonl` into the current folder. As in Gloeckle et al.
2024, appendix F, correct and incorrect solutions are learned, each after a line that tells the two apart; the prompt of
an evaluation ends with the line of a correct one.
"""

import json
from pathlib import Path

PYTHON = (1, 3)
"""Python 2 and 3 in the dataset's enumeration of languages."""
SPLITS = {"train": "train", "validation": "valid"}


def examples(problem):
    """Yield the prompt and the completion of each Python solution of a problem."""
    for label, key in (("correct", "solutions"), ("incorrect", "incorrect_solutions")):
        for language, solution in zip(problem[key]["language"], problem[key]["solution"], strict=True):
            if language in PYTHON:
                yield {"prompt": f"{problem['description']}\n# {label}\n", "completion": solution}


def main():
    import datasets

    for name, split in SPLITS.items():
        target, number = Path(f"code-contests-{name}.jsonl"), 0
        with target.open("w", encoding="utf-8") as file:
            for problem in datasets.load_dataset("deepmind/code_contests", split=split, streaming=True):
                for record in examples(problem):
                    file.write(json.dumps(record) + "\n")
                    number += 1
        print(f"{target}: {number:,} solutions")


if __name__ == "__main__":
    main()
