"""Timelines of the pipeline schedules."""

import itertools

import pytest
from deepspeed.runtime.pipe import schedule as deepspeed_schedule

from mtp_dist.engine.frozen_trunk import FrozenTrunkSchedule
from mtp_dist.planner.parts import Passes
from mtp_dist.planner.schedule import Instruction, in_flight_peaks, instructions, simulate

KINDS = {
    "ForwardPass": "forward",
    "BackwardPass": "backward",
    "SendActivation": "send_activation",
    "RecvActivation": "receive_activation",
    "SendGrad": "send_gradient",
    "RecvGrad": "receive_gradient",
    "CommitP2P": "commit",
}
SCHEDULES = {
    "1f1b": deepspeed_schedule.TrainSchedule,
    "dualpipev": deepspeed_schedule.DualPipeVSchedule,
    "frozen_trunk": FrozenTrunkSchedule,
}


def deepspeed_instructions(name, rank, ranks, micro_batches):
    """Yield DeepSpeed's instructions; those of 1F1B have no phase and a buffer that several micro-batches use."""
    schedule = SCHEDULES[name](micro_batches, ranks, rank)
    counts = {}
    for command in (command for step in schedule.steps() for command in step):
        kind, phase = KINDS.get(command.name), getattr(command, "phase", 0)
        if kind == "commit":
            yield Instruction("commit")
        elif kind:
            micro_batch = counts[kind, phase] = counts.get((kind, phase), -1) + 1
            buffers = micro_batches if name == "dualpipev" else schedule.num_pipe_buffers()
            assert command.buffer_id == phase * micro_batches + micro_batch % buffers
            yield Instruction(kind, phase, micro_batch)


@pytest.mark.parametrize("name", SCHEDULES)
def test_instructions_are_deepspeeds(name):
    for ranks in range(1, 9):
        fewest = 2 * ranks if name == "dualpipev" else 1
        for micro_batches in {fewest, fewest + 1, 2 * ranks + 3, 5 * ranks}:
            for rank in range(ranks):
                ours = [*instructions(name, rank, ranks, micro_batches)]
                if name != "dualpipev":  # transfers that DeepSpeed waits for without a commit
                    ours = [each for each in ours if each.kind != "commit"]
                assert ours == [*deepspeed_instructions(name, rank, ranks, micro_batches)], (ranks, micro_batches, rank)


@pytest.mark.parametrize(("ranks", "micro_batches"), [(1, 3), (2, 1), (4, 4), (4, 13), (8, 16)])
def test_one_forward_one_backward_of_equal_stages(ranks, micro_batches):
    timeline = simulate("1f1b", [Passes(1, 2)] * ranks, micro_batches)
    assert timeline.seconds == (micro_batches + ranks - 1) * 3
    assert timeline.bubble == pytest.approx((ranks - 1) / (micro_batches + ranks - 1))
    assert timeline.busy_seconds == [3 * micro_batches] * ranks


@pytest.mark.parametrize(("ranks", "micro_batches"), [(1, 2), (2, 4), (4, 8), (4, 13), (8, 16)])
def test_dual_pipe_v_of_equal_stages(ranks, micro_batches):
    timeline = simulate("dualpipev", [Passes(0.5, 1)] * 2 * ranks, micro_batches)
    assert timeline.busy_seconds == pytest.approx([3 * micro_batches] * ranks)
    # 1F1B waits 3 (p - 1): without separate passes for the weights little of the bubble disappears.
    assert timeline.seconds == 3 * micro_batches + max(0, 2.5 * ranks - 3)


@pytest.mark.parametrize("name", ["1f1b", "dualpipev"])
def test_passes_wait_for_their_inputs(name):
    """Each pass begins after those that it needs, at any times of the stages, and no rank runs two at once."""
    times = [Passes(forward, backward) for forward, backward in ((3, 1), (0.5, 2), (1, 7), (2, 2), (1, 1), (4, 0))]
    ranks = len(times) // (2 if name == "dualpipev" else 1)
    timeline = simulate(name, times, 9, transfer_seconds=0.25)
    ends = {}
    for each in timeline.passes:
        stage = each.rank if each.phase == 0 else 2 * ranks - 1 - each.rank
        ends[stage, each.kind, each.micro_batch] = each
    assert len(ends) == 2 * 9 * len(times)
    for (stage, kind, micro_batch), each in ends.items():
        assert each.end - each.start == pytest.approx(getattr(times[stage], kind))
        neighbour = stage - 1 if kind == "forward" else stage + 1
        if (before := ends.get((neighbour, kind, micro_batch))) is None and kind == "backward":
            before = ends[stage, "forward", micro_batch]
        if before:
            assert each.start >= before.end + (0.25 if before.rank != each.rank else 0) - 1e-9
    for rank in range(ranks):
        own = sorted((each.start, each.end) for each in timeline.passes if each.rank == rank)
        assert all(end <= start + 1e-9 for (_, end), (start, _) in itertools.pairwise(own))


def test_slowest_stage_and_transfers_decide():
    """By hand: two stages, forward 1 and 2, backward 2 and 4, three micro-batches."""
    times = [Passes(1, 2), Passes(2, 4)]
    assert simulate("1f1b", times, 3).seconds == 1 + 3 * 6 + 2
    # Activations and gradients take turns: rank 1 waits for three activations; two of its gradients for rank 0.
    assert simulate("1f1b", times, 3, transfer_seconds=0.5).seconds == 1 + 3 * 6 + 2 + (3 + 3) * 0.5


def test_frozen_trunk_waits_for_no_gradient():
    """By hand: the last stage's passes take 1 + 2, and a micro-batch arrives before it is needed."""
    times = [Passes(1, 0), Passes(1, 0), Passes(1, 2)]
    assert simulate("frozen_trunk", times, 5).seconds == 2 + 5 * 3
    assert simulate("frozen_trunk", times, 5, transfer_seconds=0.5).seconds == 2 + 5 * 3 + (2 + 4) * 0.5
    assert in_flight_peaks("frozen_trunk", 0, 3, 5) == [(2, 0)] and in_flight_peaks("frozen_trunk", 2, 3, 5) == [(1, 0)]
