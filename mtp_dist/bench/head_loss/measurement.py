"""The measurement of every mode at every number of heads, on --tp ranks."""

import gc
import statistics
from contextlib import nullcontext
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import torch

from mtp_dist.bench.head_loss.baselines import BASELINES, Inputs, gradient
from mtp_dist.bench.head_loss.settings import DTYPES, Settings
from mtp_dist.bench.measure import CollectiveCounter, Step, paired_seconds, peak_bytes
from mtp_dist.bench.ranks import NewProgress, run_on_ranks
from mtp_dist.distributed.device import select_device
from mtp_dist.distributed.launcher import env_world_size
from mtp_dist.errors import LaunchError
from mtp_dist.monitoring.output import silence_import_warnings
from mtp_dist.provenance import processor_name, usable_cores

# Megatron-core and DeepSpeed probe the device when they are imported, so ranks import them once it is selected.
if TYPE_CHECKING:
    from mtp_dist.bench.head_loss.problem import ReferenceGradients
    from mtp_dist.distributed.topology import Topology

ROUNDS = 3
MATMULS = "matmuls"
"""Name of the step with the three matmuls of one head and nothing else."""

Result = dict[str, Any]


def measure_head_loss(settings: Settings, new_progress: NewProgress) -> Result:
    """Run the benchmark, on ranks that it starts itself. Raise LaunchError if a rank fails."""
    if env_world_size() > 1:
        raise LaunchError("WORLD_SIZE is above 1: start this benchmark as one process, it starts those of --tp itself")
    if settings.tp == 1:
        return measure_on_rank(settings, new_progress)
    return run_on_ranks(settings.tp, "head-loss", measure_on_rank, settings, new_progress)


def measure_on_rank(settings: Settings, new_progress: NewProgress) -> Result:
    """Run this rank's part and return its result; rank 0's is shown. Raise LaunchError if memory is exhausted."""
    device = select_device(settings.config)
    silence_import_warnings()
    from mtp_dist.distributed.topology import close_topology, initialize_topology

    threads = torch.get_num_threads()
    if device.type == "cpu":
        torch.set_num_threads(max(1, usable_cores() // settings.tp))
    topology = initialize_topology(settings.config, device)
    try:
        return _Benchmark(settings, topology, new_progress).run()
    except RuntimeError as error:
        if not _is_out_of_memory(error):
            raise
        raise LaunchError("not even the inputs fit into memory: lower --tokens, --hidden or --vocab") from None
    finally:
        torch.set_num_threads(threads)
        close_topology()


def _is_out_of_memory(error: RuntimeError) -> bool:
    # The CPU's allocator has no exception of its own.
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


class _Benchmark:
    """One rank's modes, inputs and progress bar; the first rank also has the reference."""

    def __init__(self, settings: Settings, topology: "Topology", new_progress: NewProgress) -> None:
        from mtp_dist.bench.head_loss.problem import Problem
        from mtp_dist.distributed.topology import tp_group

        self.settings = settings
        self.device = topology.device
        self.is_first = topology.rank == 0
        self.group = tp_group()
        self.problem = Problem(settings.config, settings.tokens, DTYPES[settings.dtype], self.device, self.group)
        self.matmul_seconds: list[float] = []
        self.progress = new_progress(self.is_first)
        head_runs = len(settings.modes) * sum(settings.heads) * (1 + ROUNDS)
        self.task = self.progress.add_task("reference", total=max(settings.heads) + head_runs)

    def run(self) -> Result:
        settings = self.settings
        with self.progress:
            references = self._references()
            matmuls = self.problem.matmuls()
            matmuls()
            rows = [row for heads in settings.heads for row in self._rows(heads, references.get(heads), matmuls)]
        return {
            "machine": {
                "device": torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else processor_name(),
                "cores": usable_cores(),
                "threads_per_rank": torch.get_num_threads(),
                "torch": torch.__version__,
            },
            "settings": asdict(settings) | {"rounds": ROUNDS},
            "matmul_flops_per_second": settings.flops_per_head / statistics.median(self.matmul_seconds),
            "rows": rows,
        }

    def _references(self) -> "dict[int, ReferenceGradients]":
        """Return the references by number of heads on the first rank, none on the others."""
        from mtp_dist.bench.head_loss.problem import reference_gradients

        if not self.is_first:
            return {}
        references = {}
        for heads, gradients in enumerate(reference_gradients(self.problem, max(self.settings.heads)), 1):
            self.progress.advance(self.task)
            if heads in self.settings.heads:
                references[heads] = gradients.copy()
        return references

    def _rows(self, heads: int, reference: "ReferenceGradients | None", matmuls: Step) -> list[Result]:
        """Return one row per mode; its measurements are None if memory does not suffice."""
        rows: list[Result] = []
        steps: dict[str, Step] = {MATMULS: matmuls}
        inputs: dict[str, Inputs] = {}
        for mode in self.settings.modes:
            self.progress.update(self.task, description=f"n = {heads}, {mode}")
            inputs[mode] = self.problem.inputs(mode, heads)
            steps[mode] = self._step(mode, inputs[mode])
            row = self._examine(mode, steps[mode], inputs[mode], reference)
            rows.append({"mode": mode, "heads": heads, "flops": heads * self.settings.flops_per_head} | row)
            if row["peak_bytes"] is None:
                del steps[mode]
            self.progress.advance(self.task, heads if mode in steps else heads * (1 + ROUNDS))

        def after_each(name: str) -> None:
            if name != MATMULS:
                inputs[name].clear()
                self.progress.advance(self.task, heads)

        self.progress.update(self.task, description=f"n = {heads}, timing")
        seconds = paired_seconds(steps, ROUNDS, self.device, after_each)
        self.matmul_seconds += seconds[MATMULS]
        for row in rows:
            self._add_times(row, seconds)
        return rows

    def _add_times(self, row: Result, seconds: dict[str, list[float]]) -> None:
        mode_seconds = seconds.get(row["mode"])
        row["seconds"] = statistics.median(mode_seconds) if mode_seconds else None
        row["seconds_by_round"] = mode_seconds
        row["seconds_relative_to_naive"] = _median_ratio(mode_seconds, seconds.get("naive"))
        matmuls = [row["heads"] * head_seconds for head_seconds in seconds[MATMULS]]
        row["fraction_of_matmul_rate"] = _median_ratio(matmuls, mode_seconds)
        text = f"{row['seconds']:.3f} s" if mode_seconds else "not enough memory"
        self.progress.console.print(f"n = {row['heads']}, {row['mode']}: {text}", highlight=False)

    def _step(self, mode: str, inputs: Inputs) -> Step:
        loss, targets = self.problem.loss(mode), self.problem.targets[: len(inputs.norms)]

        def step() -> None:
            inputs.clear()
            loss(inputs, targets).backward()

        return step

    def _examine(self, mode: str, step: Step, inputs: Inputs, reference: "ReferenceGradients | None") -> Result:
        """Measure memory, communication and error of one step, which also warms up."""
        collectives = CollectiveCounter()
        peak, error = None, None
        try:
            if mode in BASELINES:  # some compile in their first step, which takes memory that no later step takes
                step()
                inputs.clear()
            # One rank sends nothing, whatever it calls; and torch.compile does not compile under the counter.
            with collectives if self.settings.tp > 1 else nullcontext():
                peak = peak_bytes(step, self.device) - sum(leaf.nbytes for leaf in inputs.parameters)
            error = self._gradient_error(inputs, reference)
        except RuntimeError as failure:
            if not _is_out_of_memory(failure):
                raise
        inputs.clear()
        gc.collect()  # the exception's frames, with what they allocated
        return {
            "peak_bytes": peak,
            "collectives": None if peak is None else collectives.count,
            "collective_bytes": None if peak is None else collectives.bytes,
            "gradient_error": error,
        }

    def _gradient_error(self, inputs: Inputs, reference: "ReferenceGradients | None") -> float | None:
        """Return the error on the first rank, which has the reference; None on the others."""
        grad_unembedding = gradient(inputs.unembedding)
        if self.settings.tp > 1:
            shards = [torch.empty_like(grad_unembedding) for _ in range(self.settings.tp)]
            torch.distributed.all_gather(shards, grad_unembedding, group=self.group)
            grad_unembedding = torch.cat(shards)
        return reference.error(inputs, grad_unembedding[: self.settings.vocab]) if reference else None


def _median_ratio(numerators: list[float] | None, denominators: list[float] | None) -> float | None:
    """Return the median ratio of measurements of the same rounds."""
    if not numerators or not denominators:
        return None
    return statistics.median(one / other for one, other in zip(numerators, denominators, strict=True))
