"""Sampling of the completions of programming problems that a file lacks."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import torch

from mtp_dist.evaluation.code_samples import Sample, SamplingOptions, append_samples, read_own_samples
from mtp_dist.evaluation.problems import Benchmark, Problem
from mtp_dist.inference.detokenizer import Detokenizer
from mtp_dist.inference.generator import Generator
from mtp_dist.inference.speculation import Speculation

CPU_BATCH, GPU_BATCH = 8, 64


def sample_missing(
    generator: Generator,
    benchmark: Benchmark,
    problems: Sequence[Problem],
    options: SamplingOptions,
    file: Path,
    on_progress: Callable[[int, int], None],
) -> list[Sample]:
    """Append completions to a file until it has all. Return them, with those that it had.

    A repeated call continues: each batch is on the disk before the next one. Raise DataError if the file is invalid or
    has samples of another model.
    """
    torch.seed()  # the default seed would repeat the samples before an interruption
    model = model_identity(generator)
    append_samples(file, [])  # it exists, and an error of the disk comes before the work
    samples = read_own_samples(file, problems, model)
    prompts = {problem.task_id: generator.prompt_ids(problem.prompt) for problem in problems[: options.limit]}
    missing = _missing(options, list(prompts), samples)
    total = len(options.temperatures) * options.samples * len(prompts)
    completed = total - sum(len(tasks) for _, tasks in missing)
    size = options.batch_size or (CPU_BATCH if generator.model.device.type == "cpu" else GPU_BATCH)
    new_tokens = {
        task: max(0, min(options.max_new_tokens, generator.positions - len(prompt))) for task, prompt in prompts.items()
    }
    for temperature, tasks in missing:
        tasks.sort(key=lambda task: len(prompts[task]))  # rows of a batch are padded to the longest
        for batch in _batches(tasks, size, new_tokens):
            on_progress(completed, total)
            rows = [prompts[task] for task in batch]
            completions = _complete(generator, rows, temperature, benchmark, options, new_tokens[batch[0]])
            new = [
                Sample(task_id=task, temperature=temperature, model=model, **vars(completion))
                for task, completion in zip(batch, completions, strict=True)
            ]
            append_samples(file, new)
            samples += new
            completed += len(new)
    on_progress(completed, total)
    return samples


def model_identity(generator: Generator) -> str:
    """Return a hash of the weights that every step of a training changes."""
    digest = hashlib.sha256()
    for name, weight in generator.model.named_parameters():
        if "norm" in name:
            digest.update(weight.detach().float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def _missing(
    options: SamplingOptions, tasks: Sequence[str], samples: Sequence[Sample]
) -> list[tuple[float, list[str]]]:
    """Return the tasks of which samples are missing, as often as they are, for each temperature."""
    done = Counter((sample.temperature, sample.task_id) for sample in samples)
    return [
        (temperature, [task for task in tasks for _ in range(options.samples - done[temperature, task])])
        for temperature in options.temperatures
    ]


def _batches(tasks: Sequence[str], size: int, new_tokens: Mapping[str, int]) -> Iterator[list[str]]:
    """Yield up to `size` tasks at a time with the same number of new tokens: a longer prompt would leave fewer."""
    for _, group in groupby(tasks, new_tokens.__getitem__):
        rest = list(group)
        for start in range(0, len(rest), size):
            yield rest[start : start + size]


@dataclass
class _Completion:
    completion: str = ""
    tokens: int = 0
    forward_passes: int = 0


def _complete(
    generator: Generator,
    prompts: Sequence[list[int]],
    temperature: float,
    benchmark: Benchmark,
    options: SamplingOptions,
    new_tokens: int,
) -> list[_Completion]:
    """Sample a completion of each prompt. It is empty if `new_tokens` is 0: the prompt leaves no position."""
    completions = [_Completion() for _ in prompts]
    if not new_tokens:
        return completions

    def count(row: int, tokens: Sequence[int], accepted: int) -> None:
        completions[row].tokens += len(tokens)
        completions[row].forward_passes += 1

    speculation = Speculation(options.heads, on_tokens=count)
    texts = generator.generate(prompts, new_tokens, temperature, speculation, stop_strings=benchmark.stop_strings)
    for completion, prompt, tokens in zip(completions, prompts, texts, strict=True):
        detokenizer = Detokenizer(generator.tokenizer, prompt)
        text = detokenizer.add(tokens) + detokenizer.end()
        ends = [end for stop in benchmark.stop_strings if (end := text.find(stop)) >= 0]
        completion.completion = text[: min(ends, default=len(text))]
    return completions
