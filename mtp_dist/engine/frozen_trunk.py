"""The pipeline's schedule while the trunk is frozen (`train.freeze: [trunk]`)."""

from collections.abc import Iterator
from typing import Any

from deepspeed.runtime.pipe import schedule
from deepspeed.runtime.pipe.engine import PipelineEngine


class FrozenTrunkSchedule(schedule.TrainSchedule):  # type: ignore[misc]
    """1F1B in which only the last stage, which has the heads, runs backward: no gradient leaves it."""

    def steps(self) -> Iterator[list[Any]]:
        skipped = {schedule.SendGrad, schedule.RecvGrad}
        if not self.is_last_stage:
            skipped.add(schedule.BackwardPass)
        for instructions in super().steps():
            yield [instruction for instruction in instructions if type(instruction) not in skipped]

    def num_pipe_buffers(self) -> int:
        """Return the number of micro-batches whose activations a stage holds: one in use, one on its way."""
        return 2


def use_frozen_trunk_schedule(pipeline: PipelineEngine) -> None:
    """Let the engine train by FrozenTrunkSchedule."""
    pipeline._train_schedule = lambda: FrozenTrunkSchedule(
        pipeline.micro_batches, pipeline.num_stages, pipeline.stage_id
    )
