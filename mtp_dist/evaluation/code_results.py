"""Execution of samples, and their pass@k by temperature."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from typing import Any

from mtp_dist.evaluation.code_samples import Sample
from mtp_dist.evaluation.pass_at_k import pass_at_k
from mtp_dist.evaluation.problems import Problem
from mtp_dist.evaluation.sandbox import Outcome, Sandbox, run_programs

KS = (1, 10, 100)
"""The k of pass@k in the paper's tables."""


def execute_samples(
    sandbox: Sandbox,
    problems: Sequence[Problem],
    samples: Sequence[Sample],
    workers: int,
    on_progress: Callable[[int, int], None],
) -> list[Outcome]:
    """Return the outcome of each sample. Equal ones are executed once."""
    by_id = {problem.task_id: problem for problem in problems}
    programs = {
        (sample.task_id, sample.completion): by_id[sample.task_id].program(sample.completion) for sample in samples
    }
    outcomes = dict(zip(programs, run_programs(sandbox, list(programs.values()), workers, on_progress), strict=True))
    return [outcomes[sample.task_id, sample.completion] for sample in samples]


def summarize(problems: Sequence[Problem], samples: Sequence[Sample], outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """Return pass@k by temperature, and for each k the largest one, at the oracle temperature.

    The oracle (Gloeckle et al. 2024, appendix F) grants each k its best temperature, as models that were trained
    differently may need different ones.
    """
    groups: dict[float | None, list[tuple[Sample, Outcome]]] = defaultdict(list)
    for sample, outcome in zip(samples, outcomes, strict=True):
        groups[sample.temperature].append((sample, outcome))
    rows = [_row(temperature, groups[temperature]) for temperature in sorted(groups, key=lambda t: (t is None, t))]
    oracle = {}
    for name in dict.fromkeys(name for row in rows for name in row["pass_at"]):
        best = max((row for row in rows if name in row["pass_at"]), key=lambda row: row["pass_at"][name])
        oracle[name] = {"value": best["pass_at"][name], "temperature": best["temperature"]}
    return {
        "problems": len(problems),
        "temperatures": rows,
        "oracle": oracle,
        "prompts_too_long": len({s.task_id for s in samples if s.model and not s.forward_passes}),
        "outcomes": dict(Counter(outcome.reason.partition(":")[0] for outcome in outcomes).most_common()),
    }


def _row(temperature: float | None, results: Sequence[tuple[Sample, Outcome]]) -> dict[str, Any]:
    passed: dict[str, list[bool]] = defaultdict(list)
    for sample, outcome in results:
        passed[sample.task_id].append(outcome.passed)
    fewest = min(map(len, passed.values()))
    passes = sum(sample.forward_passes for sample, _ in results)
    return {
        "temperature": temperature,
        "problems": len(passed),
        "samples_per_problem": fewest,
        "pass_at": {
            str(k): sum(pass_at_k(len(values), sum(values), k) for values in passed.values()) / len(passed)
            for k in KS
            if k <= fewest
        },
        "tokens_per_forward": sum(sample.tokens for sample, _ in results) / passes if passes else None,
    }
