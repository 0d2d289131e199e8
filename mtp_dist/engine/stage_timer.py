"""How long a rank computes in a step, and how long it waits for the other pipeline stages."""

import time

import torch
from deepspeed.runtime.pipe import schedule
from deepspeed.runtime.pipe.engine import PipelineEngine

from mtp_dist.engine.hooks import RunInstruction, hook_instruction

TimePoint = float | torch.cuda.Event


class StageTimer:
    """Times the forward and backward passes of this rank's stage, on the GPU without waiting for it."""

    def __init__(self, pipeline: PipelineEngine, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._passes: list[tuple[TimePoint, TimePoint]] = []
        self._begun = self._ended = self._mark()
        for instruction in (schedule.ForwardPass, schedule.BackwardPass):
            hook_instruction(pipeline, instruction, self._time)
        # The first one after the last backward pass.
        hook_instruction(pipeline, schedule.ReduceTiedGrads, self._end)

    def begin(self) -> None:
        """To be called before each training batch."""
        self._passes.clear()
        self._begun = self._mark()

    def seconds(self) -> tuple[float, float]:
        """Of the last training batch, once the device has finished it: what the forward and backward passes took with
        the collectives within the stage, and all of it from the batch's begin to the end of the last backward pass."""
        return sum(self._between(*of_pass) for of_pass in self._passes), self._between(self._begun, self._ended)

    def _time(self, execute: RunInstruction) -> None:
        start = self._mark()
        execute()
        self._passes.append((start, self._mark()))

    def _end(self, execute: RunInstruction) -> None:
        self._ended = self._mark()
        execute()

    def _mark(self) -> TimePoint:
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _between(self, start: TimePoint, end: TimePoint) -> float:
        if isinstance(start, float) and isinstance(end, float):
            return end - start
        assert isinstance(start, torch.cuda.Event) and isinstance(end, torch.cuda.Event)
        return start.elapsed_time(end) / 1000
