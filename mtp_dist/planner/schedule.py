"""Timelines of DeepSpeed's pipeline schedules, from the times of the stages."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Literal, NamedTuple

from mtp_dist.config import Config
from mtp_dist.planner.parts import Passes

ScheduleName = Literal["1f1b", "dualpipev", "frozen_trunk"]
"""`frozen_trunk` is 1F1B without what a frozen trunk does not need: gradients between the stages, and backward passes
on all but the last one, which has the heads."""
PassKind = Literal["forward", "backward"]
InstructionKind = Literal[
    "forward", "backward", "send_activation", "receive_activation", "send_gradient", "receive_gradient", "commit"
]


class Instruction(NamedTuple):
    """One instruction of a rank."""

    kind: InstructionKind
    """`commit` starts the transfers since the one before and waits for them."""
    phase: int = 0
    """1 for DualPipeV's stage 2p - 1 - rank of p ranks, 0 for stage `rank`."""
    micro_batch: int = 0


class Pass(NamedTuple):
    """A forward or backward pass of a micro-batch in a timeline, in seconds from the start of the step."""

    rank: int
    phase: int
    kind: PassKind
    micro_batch: int
    start: float
    end: float


@dataclass(frozen=True)
class Timeline:
    """The passes of one training step, without reduction of gradients and optimizer."""

    ranks: int
    passes: tuple[Pass, ...]
    """Passes of rank 0 in the order in which they run, then those of rank 1, ..."""

    @property
    def seconds(self) -> float:
        """Time from the first pass's start to the last one's end."""
        return max(each.end for each in self.passes)

    @property
    def busy_seconds(self) -> list[float]:
        """Time of each rank's passes."""
        seconds = [0.0] * self.ranks
        for each in self.passes:
            seconds[each.rank] += each.end - each.start
        return seconds

    @property
    def bubble(self) -> float:
        """Fraction of the time of all ranks in which they wait."""
        return 1 - sum(self.busy_seconds) / (self.ranks * self.seconds)


def schedule_name(config: Config) -> ScheduleName:
    """Return the schedule that the engine runs."""
    return "frozen_trunk" if config.train.freezes_trunk else config.parallel.schedule


def instructions(schedule: ScheduleName, rank: int, ranks: int, micro_batches: int) -> Iterator[Instruction]:
    """Yield a rank's instructions in the order of DeepSpeed's TrainSchedule or DualPipeVSchedule, or of our
    FrozenTrunkSchedule."""
    return _INSTRUCTIONS[schedule](rank, ranks, micro_batches)


def _one_forward_one_backward(rank: int, ranks: int, micro_batches: int) -> Iterator[Instruction]:
    """Yield the instructions of 1F1B, in which each transfer is waited for on its own."""
    valid, previous = range(micro_batches), -1
    for step in range(2 * (micro_batches + ranks - 1)):
        is_forward = step % 2 == rank % 2
        current = (step - rank) // 2 if is_forward else (step + rank + 1) // 2 - ranks
        transfers: list[tuple[InstructionKind, int]] = []
        if is_forward and rank > 0:
            transfers = [("send_gradient", previous), ("receive_activation", current)]
        elif not is_forward and rank < ranks - 1:
            transfers = [("receive_gradient", current), ("send_activation", previous)]
        for kind, micro_batch in transfers:
            if micro_batch in valid:
                yield Instruction(kind, 0, micro_batch)
                yield Instruction("commit")
        if current in valid:
            yield Instruction("forward" if is_forward else "backward", 0, current)
        previous = current


def _frozen_trunk(rank: int, ranks: int, micro_batches: int) -> Iterator[Instruction]:
    """Yield the instructions of 1F1B with a frozen trunk."""
    skipped = {"send_gradient", "receive_gradient"} | ({"backward"} if rank < ranks - 1 else set())
    previous = None
    for instruction in _one_forward_one_backward(rank, ranks, micro_batches):
        if instruction.kind not in skipped and not (instruction.kind == "commit" and previous in skipped):
            yield instruction
        previous = instruction.kind


_WORDS: dict[str, InstructionKind] = {
    "F": "forward",
    "B": "backward",
    "sa": "send_activation",
    "ra": "receive_activation",
    "sg": "send_gradient",
    "rg": "receive_gradient",
}
_BOTH_WAYS = "ra0 rg1 | F0 B1 sa0 sg1 ra1 rg0 | F1 B0 sa1 sg0 "


def _dual_pipe_v(rank: int, ranks: int, micro_batches: int) -> Iterator[Instruction]:
    """Yield the instructions of DualPipeV for at least 2 * ranks micro-batches.

    Each word below is an instruction and its phase; `|` is a commit. Micro-batches follow in order by kind and phase.
    """
    after, is_last = ranks - 1 - rank, rank == ranks - 1
    program = "ra0 | F0 sa0 " * (2 * after) + "ra0 "
    for index in range(rank + 1):
        # The last rank's activations of phase 1 go on their way in the main part.
        program += f"| F0 ra0 ra1 | F1 {'sa1' if not is_last or index < rank else ''} sa0 "
    program += "rg1 | B1 sg1 ra1 | | F1 sa1 " * after
    if is_last:
        program += "| F0 sa1 rg1 | B1 sa0 sg1 ra1 rg0 | F1 B0 sa1 sg0 "
    else:
        program += _BOTH_WAYS.removeprefix("ra0 ")
    program += _BOTH_WAYS * (micro_batches - 2 * ranks + rank)
    program += "rg1 | B1 sg1 ra1 rg0 | F1 B0 sa1 sg0 " * after
    program += "rg1 | B1 sg1 rg0 | B0 sg0 " * (rank + 1)
    program += "| rg0 | B0 sg0 " * after + "| " * (rank + 2)
    # Without a neighbour: before the first stage, after the last one, and at the turn on the last rank.
    starts = {0: rank == 0, 1: is_last}
    ends = {0: is_last, 1: rank == 0}
    counts: Counter[str] = Counter()
    for word in program.split():
        if word == "|":
            yield Instruction("commit")
            continue
        name, phase = word[:-1], int(word[-1])
        if not (starts[phase] if name in ("ra", "sg") else name in ("sa", "rg") and ends[phase]):
            yield Instruction(_WORDS[name], phase, counts[word])
            counts[word] += 1


_INSTRUCTIONS = {"1f1b": _one_forward_one_backward, "dualpipev": _dual_pipe_v, "frozen_trunk": _frozen_trunk}


@cache
def in_flight_peaks(schedule: ScheduleName, rank: int, ranks: int, micro_batches: int) -> list[tuple[int, int]]:
    """Return how many micro-batches a rank keeps the activations of in each of its stages, at all moments at which one
    more would not have fewer in either.

    With more than 3 * ranks micro-batches the schedules only repeat what they do.
    """
    if schedule == "frozen_trunk" and rank < ranks - 1:  # no backward pass frees them: the engine has two buffers
        return [(min(2, micro_batches), 0)]
    held, peaks = [0, 0], set()
    for instruction in instructions(schedule, rank, ranks, min(micro_batches, 3 * ranks)):
        if instruction.kind in ("forward", "backward"):
            held[instruction.phase] += 1 if instruction.kind == "forward" else -1
            peaks.add((held[0], held[1]))
    return [a for a in peaks if not any(a != b and a[0] <= b[0] and a[1] <= b[1] for b in peaks)]


Message = tuple[bool, int, int]
"""Whether it is a gradient, the stage before the boundary that it crosses, and the micro-batch."""


class _Rank:
    """A rank that executes its instructions."""

    def __init__(self, rank: int, ranks: int, instructions: Iterator[Instruction]) -> None:
        self.rank, self.instructions = rank, instructions
        self.stages = rank, 2 * ranks - 1 - rank
        self.clock = 0.0
        self.messages: list[Message] = []
        """Transfers since the last commit."""
        self.passes: list[Pass] = []

    def run(self, stage_seconds: Sequence[Passes]) -> bool:
        """Execute the instructions up to the next commit with transfers; return whether there is one."""
        for kind, phase, micro_batch in self.instructions:
            stage = self.stages[phase]
            if kind == "commit":
                if self.messages:
                    return True
            elif kind == "forward" or kind == "backward":
                start = self.clock
                self.clock += getattr(stage_seconds[stage], kind)
                self.passes.append(Pass(self.rank, phase, kind, micro_batch, start, self.clock))
            else:
                crosses_back = kind in ("receive_activation", "send_gradient")
                self.messages.append((kind.endswith("gradient"), stage - crosses_back, micro_batch))
        return False


def simulate(
    schedule: ScheduleName, stage_seconds: Sequence[Passes], micro_batches: int, transfer_seconds: float = 0.0
) -> Timeline:
    """Return the timeline of one training step.

    stage_seconds: by stage, one per rank; with `dualpipev` two, of which rank r of p has stages r and 2p - 1 - r.
    transfer_seconds: time of one commit's transfers; as with NCCL, it begins when both sides have come to it, and both
    wait until it ends.
    """
    ranks = len(stage_seconds) // (2 if schedule == "dualpipev" else 1)
    runners = [_Rank(rank, ranks, instructions(schedule, rank, ranks, micro_batches)) for rank in range(ranks)]
    posted: dict[Message, list[float]] = {}
    waiting = [runner for runner in runners if _run_and_post(runner, stage_seconds, posted)]
    while waiting:
        ready = [runner for runner in waiting if all(len(posted[message]) == 2 for message in runner.messages)]
        assert ready, "the schedule has no deadlock"
        for runner in ready:
            runner.clock = max(max(posted[message]) for message in runner.messages) + transfer_seconds
            runner.messages = []
            if not _run_and_post(runner, stage_seconds, posted):
                waiting.remove(runner)
    return Timeline(ranks, tuple(each for runner in runners for each in runner.passes))


def _run_and_post(runner: _Rank, stage_seconds: Sequence[Passes], posted: dict[Message, list[float]]) -> bool:
    """Let a rank run and announce the transfers that it waits for; return whether it has not finished."""
    if not runner.run(stage_seconds):
        return False
    for message in runner.messages:
        posted.setdefault(message, []).append(runner.clock)
    return True
