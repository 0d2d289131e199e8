"""Doing something around the instructions that DeepSpeed's pipeline executes."""

from collections.abc import Callable

from deepspeed.runtime.pipe.engine import PipelineEngine

RunInstruction = Callable[[], None]


def hook_instruction(pipeline: PipelineEngine, instruction: type, wrapper: Callable[[RunInstruction], None]) -> None:
    """From now on `wrapper` is called with each instruction of that type, and is to execute it."""
    method = pipeline._INSTRUCTION_MAP[instruction]

    def wrapped(engine: PipelineEngine, *args: object, **kwargs: object) -> None:
        wrapper(lambda: method(engine, *args, **kwargs))

    pipeline._INSTRUCTION_MAP = {**pipeline._INSTRUCTION_MAP, instruction: wrapped}
