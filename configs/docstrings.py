"""Write functions of the Python standard library as finetuning data: the signature and docstring ask for the body.

`python configs/docstrings.py` writes `docstrings-train.jsonl` and `docstrings-validation.jsonl` into the current
folder, of the files of the two splits of `python-stdlib`.
"""

import ast
import json
from pathlib import Path

from mtp_dist.data.sources.python_stdlib import stdlib_files

MAX_BYTES = 240
"""Length of an example: the demo's model has been trained on samples of 128 bytes."""


def examples(text):
    """Yield the prompt and the completion of each short function that has a docstring and a body."""
    for function in ast.walk(ast.parse(text)):
        if not isinstance(function, ast.FunctionDef) or ast.get_docstring(function) is None or len(function.body) < 2:
            continue
        lines = text.splitlines(keepends=True)
        indent = " " * function.col_offset
        first, body, end = function.lineno - 1, function.body[1].lineno - 1, function.end_lineno
        parts = (lines[first:body], lines[body:end])
        prompt, completion = ("".join(line.removeprefix(indent) for line in part) for part in parts)
        if len((prompt + completion).encode()) <= MAX_BYTES:
            yield {"prompt": prompt, "completion": completion}


def main():
    for split in ("train", "validation"):
        files = (path.read_text(encoding="utf-8", errors="replace") for path in stdlib_files(split))
        records = [record for text in files for record in examples(text)]
        target = Path(f"docstrings-{split}.jsonl")
        target.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
        print(f"{target}: {len(records):,} functions")


if __name__ == "__main__":
    main()
