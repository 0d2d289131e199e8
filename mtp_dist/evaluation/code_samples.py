"""The JSONL file of completions of programming problems."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel, ConfigDict, FiniteFloat, ValidationError

from mtp_dist.errors import DataError
from mtp_dist.evaluation.problems import Problem
from mtp_dist.fs import append_durably, explain_os_errors


class Sample(BaseModel):
    """One completion. Files of other tools have the first two fields."""

    model_config = ConfigDict(frozen=True, strict=True)

    task_id: str
    completion: str
    temperature: FiniteFloat | None = None
    model: str | None = None
    """Identity of the model that wrote it."""
    tokens: int = 0
    forward_passes: int = 0


@dataclass(frozen=True)
class SamplingOptions:
    """The completions to sample."""

    temperatures: Sequence[float]
    samples: int
    """Number of completions per problem and temperature."""
    max_new_tokens: int
    limit: int | None = None
    """Number of problems to sample, the first ones; None for all."""
    batch_size: int | None = None
    """Number of completions that are sampled together; by default 8 on a CPU, 64 on a GPU."""
    heads: int | None = None
    """Number of heads that predict; None for as many as are fastest."""


def read_samples(file: Path, problems: Sequence[Problem]) -> list[Sample]:
    """Read a file of samples. Raise DataError if it has none, or a line that is not a sample of one of the problems."""
    if not (samples := _parse(_content(file), file, problems)):
        raise DataError(f"--samples = '{file}' is empty: give --model to sample completions")
    return samples


def read_own_samples(file: Path, problems: Sequence[Problem], model: str) -> list[Sample]:
    """Read the samples that a model has written so far, and remove a last line that was not written to its end.

    Raise DataError as `read_samples` does, and if there are samples of another model.
    """
    content = _content(file)
    complete = content[: content.rfind("\n") + 1]
    samples = _parse(complete, file, problems)
    if any(sample.model != model for sample in samples):
        raise DataError(
            f"--samples = '{file}' has samples of another model: name a new file, or evaluate this one without --model"
        )
    if complete != content:
        os.truncate(file, len(complete.encode()))
    return samples


def _content(file: Path) -> str:
    try:
        return file.read_bytes().decode()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise DataError(f"--samples = '{file}' cannot be read: {reason}") from None


def _parse(content: str, file: Path, problems: Sequence[Problem]) -> list[Sample]:
    known, samples = {problem.task_id for problem in problems}, []
    for number, line in enumerate(content.split("\n"), 1):  # other ends of a line occur within completions
        if not line.strip():
            continue
        try:
            sample = Sample.model_validate_json(line)
        except ValidationError as error:
            fault = error.errors()[0]
            key = ".".join(map(str, fault["loc"]))
            raise DataError(
                f"--samples = '{file}' line {number} is not a sample: {f'{key}: ' * bool(key)}{fault['msg']}. "
                'Correct or remove the line; one such as {"task_id": "HumanEval/0", "completion": "..."} is valid'
            ) from None
        if sample.task_id not in known:
            raise DataError(
                f"--samples = '{file}' line {number} has the task_id {sample.task_id!r}, which is not one of the "
                f"{len(known)} problems such as {problems[0].task_id!r}: name the problems that it is from"
            )
        samples.append(sample)
    return samples


def append_samples(file: Path, samples: Sequence[Sample]) -> None:
    """Append a batch to a file in one write."""
    lines = "".join(sample.model_dump_json() + "\n" for sample in samples)
    with explain_os_errors(file, "write"):
        file.parent.mkdir(parents=True, exist_ok=True)
        append_durably(file, lines)
