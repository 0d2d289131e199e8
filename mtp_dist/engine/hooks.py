"""Hooks around the instructions that DeepSpeed's pipeline executes, and the timer that uses them."""

import time
from collections.abc import Callable

import torch
from deepspeed.runtime.pipe import schedule
from deepspeed.runtime.pipe.engine import PipelineEngine

RunInstruction = Callable[[], None]
TimePoint = float | torch.cuda.Event


def hook_instruction(pipeline: PipelineEngine, instruction: type, wrapper: Callable[[RunInstruction], None]) -> None:
    """Call `wrapper` with each instruction of that type; it must execute the instruction."""
    method = pipeline._INSTRUCTION_MAP[instruction]

    def wrapped(engine: PipelineEngine, *args: object, **kwargs: object) -> None:
        wrapper(lambda: method(engine, *args, **kwargs))

    pipeline._INSTRUCTION_MAP = {**pipeline._INSTRUCTION_MAP, instruction: wrapped}


class StageTimer:
    """Timer of the forward and backward passes of this rank's stage, on a GPU without waiting for it."""

    def __init__(self, pipeline: PipelineEngine, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._passes: list[tuple[TimePoint, TimePoint]] = []
        self._begun = self._ended = self._mark()
        for instruction in (schedule.ForwardPass, schedule.BackwardPass):
            hook_instruction(pipeline, instruction, self._time)
        # The first instruction after the last backward pass.
        hook_instruction(pipeline, schedule.ReduceTiedGrads, self._end)

    def begin(self) -> None:
        """Start a training batch."""
        self._passes.clear()
        self._begun = self._mark()

    def seconds(self) -> tuple[float, float]:
        """Return the times of the last training batch: forward and backward passes with the collectives within the
        stage, and all from the batch's begin to the end of the last backward pass. Call it when the device is done."""
        return sum(self._between(*interval) for interval in self._passes), self._between(self._begun, self._ended)

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
