"""The measurement of every way to decode at every batch size, and what it is compared with."""

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from itertools import count
from typing import Any

import torch
import transformers
from torch import Tensor

from mtp_dist.bench.decode.bounds import bounds
from mtp_dist.bench.decode.cache import cache_memory
from mtp_dist.bench.decode.settings import Settings
from mtp_dist.bench.decode.subject import Subject
from mtp_dist.bench.decode.variants import (
    PLAIN,
    Variant,
    modelled_seconds,
    own_variant,
    own_variants,
    transformers_variants,
)
from mtp_dist.bench.measure import Step, paired_seconds
from mtp_dist.distributed.device import device_name
from mtp_dist.planner.decoding import DecodingCosts, Device
from mtp_dist.planner.flops import layer_matrices, parameter_counts
from mtp_dist.provenance import processor_name, usable_cores

READ, MULTIPLY = "read", "multiply"
"""Names of the steps that measure the device."""
MATRIX_SIZE = {"cpu": 1024, "cuda": 8192}
"""Rows and columns of the matrices whose product gives the device's FLOP/s."""

Result = dict[str, Any]


def measure_decoding(
    subject: Subject, settings: Settings, on_progress: Callable[[float, int], None] = lambda done, total: None
) -> Result:
    """Return the medians of paired runs; a model's loading is not part of them."""
    rows: list[Result] = []
    devices: list[Device] = []
    for number in range(len(settings.batch_sizes)):
        device, batch_rows = _measure_batch(subject, settings, number, on_progress)
        devices.append(device)
        rows += batch_rows
    config = subject.config
    cache = cache_memory(subject, settings)
    return {
        "machine": {
            "device": device_name(torch.device(settings.device)),
            "processor": processor_name(),
            "cores": usable_cores(),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "model": {
            "source": subject.source,
            "layers": subject.model.config.num_hidden_layers,
            "heads": config.heads.count,
            "kind": config.heads.kind,
            "unembedding": config.heads.unembedding,
            "hidden": config.model.hidden_size,
            "vocab": config.vocab_size,
            "parameters": parameter_counts(config).total,
        },
        "settings": asdict(settings),
        "probes": [asdict(device) for device in devices],
        "cache": cache,
        "rows": rows,
        "bounds": bounds(rows, cache, config.heads.count),
    }


def _measure_batch(
    subject: Subject, settings: Settings, number: int, on_progress: Callable[[float, int], None]
) -> tuple[Device, list[Result]]:
    """Return the device's rates and one row per way to decode, for the batch size of that number."""
    batch_size = settings.batch_sizes[number]
    prompts = subject.prompts(batch_size).to(settings.device)
    plain = own_variant(PLAIN, subject.model, prompts, settings.new_tokens, 1)
    texts = plain.run()
    variants = [plain, *own_variants(subject, prompts, texts, settings)]
    variants += transformers_variants(subject, prompts, settings.new_tokens)
    probes, device_of = _probes(subject, settings)
    steps: dict[str, Step] = probes | {variant.name: variant.run for variant in variants}
    runs, total = count(1), len(steps) * settings.rounds + len(variants)

    def on_run(name: str) -> None:
        on_progress(number + next(runs) / total, len(settings.batch_sizes))

    equal = {}
    for variant in variants:
        equal[variant.name] = _equal_tokens(variant.run(), texts, settings.prompt_tokens)
        variant.logs.clear()
        on_run(variant.name)
    for probe in probes.values():
        probe()
    seconds = paired_seconds(steps, settings.rounds, torch.device(settings.device), on_run)
    device = device_of(seconds)
    costs = DecodingCosts(subject.config, batch_size, subject.model.dtype.itemsize)
    least = {v.name: _modelled(v, costs, device, settings) for v in variants if v.logs}
    rows = [
        {"batch": batch_size, "variant": variant.name, "equal_tokens": equal[variant.name]}
        | _row(variant, seconds, settings.new_tokens * batch_size, least)
        for variant in variants
    ]
    return device, rows


def _equal_tokens(texts: Tensor, plain: Tensor, prompt_tokens: int) -> float:
    """Return the fraction of new tokens that are those of plain decoding."""
    return (texts == plain)[:, prompt_tokens:].double().mean().item()


def _modelled(variant: Variant, costs: DecodingCosts, device: Device, settings: Settings) -> float:
    nodes = len(variant.tree.parents) if variant.tree else None
    return statistics.mean(modelled_seconds(log, costs, device, settings, nodes) for log in variant.logs)


def _row(variant: Variant, seconds: Mapping[str, Sequence[float]], tokens: int, least: Mapping[str, float]) -> Result:
    own = seconds[variant.name]
    speed_up = statistics.median(plain / mine for plain, mine in zip(seconds[PLAIN], own, strict=True))
    row: Result = {
        "seconds": statistics.median(own),
        "seconds_by_round": own,
        "tokens_per_second": tokens / statistics.median(own),
        "speed_up": speed_up,
    }
    if not variant.logs:
        return row
    log = variant.log
    attainable = least[PLAIN] / least[variant.name] / log.tokens_per_forward
    return row | {
        "tokens_per_forward": log.tokens_per_forward,
        "ratio": speed_up / log.tokens_per_forward,
        "attainable": attainable,
        "fraction_of_attainable": speed_up / log.tokens_per_forward / attainable,
        "least_seconds": least[variant.name],
        "passes": statistics.mean(len(log.lengths) for log in variant.logs),
        "mean_length": statistics.mean(length for log in variant.logs for length in log.lengths[1:] or [1]),
        "acceptance": log.acceptance,
    }


def _probes(
    subject: Subject, settings: Settings
) -> tuple[dict[str, Step], Callable[[Mapping[str, Sequence[float]]], Device]]:
    """Return steps that measure the device, and the function that computes its rates from their seconds."""
    model, config = subject.model, subject.config.model
    options: Any = {"device": settings.device, "dtype": model.dtype}
    read = (
        subject.model.config.num_hidden_layers * layer_matrices(config) + config.hidden_size * subject.config.vocab_size
    )
    weights = torch.ones(read // config.hidden_size, config.hidden_size, **options)
    vector = torch.ones(config.hidden_size, **options)
    size = MATRIX_SIZE[settings.device]
    matrix = torch.ones(size, size, **options)
    steps: dict[str, Step] = {READ: lambda: weights @ vector, MULTIPLY: lambda: matrix @ matrix}

    def device(seconds: Mapping[str, Sequence[float]]) -> Device:
        return Device(
            weights.nbytes / statistics.median(seconds[READ]), 2 * size**3 / statistics.median(seconds[MULTIPLY])
        )

    return steps, device
