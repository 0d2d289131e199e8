import torch

from mtp_dist.bench.measure import paired_seconds, peak_bytes
from tests.ranks import Ranks
from tests.unit.bench import on_ranks

CPU = torch.device("cpu")
KIBIBYTE = 1024


def block(kibibytes: int) -> torch.Tensor:
    return torch.empty(kibibytes * KIBIBYTE, dtype=torch.uint8)


def test_peak_of_tensors_alive_at_once() -> None:
    def step() -> None:
        first = block(64)
        second = block(256)
        del first
        third = block(128)
        del second, third
        block(300)

    assert peak_bytes(step, CPU) == (256 + 128) * KIBIBYTE


def test_peak_excludes_earlier_tensors() -> None:
    held = [block(512)]
    assert peak_bytes(lambda: held.append(block(16)), CPU) == 16 * KIBIBYTE


def test_peak_of_a_backward_pass() -> None:
    weight = torch.ones(KIBIBYTE, requires_grad=True)
    # The constant gradient of the sum and the product, in addition to scalars.
    peak = peak_bytes(lambda: (weight * 2).sum().backward(), CPU)
    assert 4 * KIBIBYTE <= peak <= 3 * 4 * KIBIBYTE


def test_collectives_are_counted_in_both_passes(ranks: Ranks) -> None:
    each = 4 * on_ranks.TOKENS * on_ranks.WIDTH
    for counts, idle in ranks.run(2, on_ranks.count_collectives):
        assert counts == [(1, each), (2, 2 * each), (3, 3 * each), (3, 3 * each), (4, 4 * each)]
        assert idle == (0, 0)


def test_steps_take_turns() -> None:
    calls: list[str] = []
    steps = {name: lambda name=name: calls.append(name) for name in ("a", "b", "c")}
    seconds = paired_seconds(steps, 2, CPU, lambda name: calls.append(f"after {name}"))
    assert calls[::2] == ["a", "b", "c", "b", "c", "a"]
    assert calls[1::2] == [f"after {name}" for name in calls[::2]]
    assert {name: len(values) for name, values in seconds.items()} == {"a": 2, "b": 2, "c": 2}
    assert all(value >= 0 for values in seconds.values() for value in values)
