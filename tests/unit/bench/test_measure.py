import torch
import torch.distributed as dist

from mtp_dist.bench.measure import CollectiveCounter, paired_seconds, peak_bytes

CPU = torch.device("cpu")
KIBIBYTE = 1024
TOKENS, WIDTH = 6, 4


def block(kibibytes):
    return torch.empty(kibibytes * KIBIBYTE, dtype=torch.uint8)


def test_peak_of_tensors_alive_at_once():
    def step():
        first = block(64)
        second = block(256)
        del first
        third = block(128)
        del second, third
        block(300)

    assert peak_bytes(step, CPU) == (256 + 128) * KIBIBYTE

    held = [block(512)]
    assert peak_bytes(lambda: held.append(block(16)), CPU) == 16 * KIBIBYTE, "without earlier tensors"


def test_peak_of_a_backward_pass():
    weight = torch.ones(KIBIBYTE, requires_grad=True)
    # The constant gradient of the sum and the product, in addition to scalars.
    peak = peak_bytes(lambda: (weight * 2).sum().backward(), CPU)
    assert 4 * KIBIBYTE <= peak <= 3 * 4 * KIBIBYTE


def count_collectives():
    """On each rank: return (collectives, bytes) after each kind forward, after the backward pass, and when idle."""
    value = torch.ones(TOKENS, WIDTH)
    weight = torch.ones(TOKENS, WIDTH, requires_grad=True)
    counter, idle = CollectiveCounter(), CollectiveCounter()
    with idle:
        dist.barrier()
        (weight * 2).sum().backward()
    summed = weight.clone()
    summed.register_hook(lambda gradient: dist.all_reduce(gradient.clone()))
    counts = []
    with counter:
        for start in (
            lambda: dist.all_reduce(value.clone()),
            lambda: dist.all_gather_into_tensor(torch.empty(2 * TOKENS, WIDTH), value),
            lambda: dist.reduce_scatter_tensor(torch.empty(TOKENS // 2, WIDTH), value.clone()),
            lambda: summed.double().sum(),
            lambda: summed.double().sum().backward(),
        ):
            start()
            counts.append((counter.count, counter.bytes))
    return counts, (idle.count, idle.bytes)


def test_collectives_are_counted_in_both_passes(ranks):
    each = 4 * TOKENS * WIDTH
    for counts, idle in ranks.run(2, count_collectives):
        assert counts == [(1, each), (2, 2 * each), (3, 3 * each), (3, 3 * each), (4, 4 * each)]
        assert idle == (0, 0)


def test_steps_take_turns():
    calls = []
    steps = {name: lambda name=name: calls.append(name) for name in ("a", "b", "c")}
    seconds = paired_seconds(steps, 2, CPU, lambda name: calls.append(f"after {name}"))
    assert calls[::2] == ["a", "b", "c", "b", "c", "a"]
    assert calls[1::2] == [f"after {name}" for name in calls[::2]]
    assert {name: len(values) for name, values in seconds.items()} == {"a": 2, "b": 2, "c": 2}
    assert all(value >= 0 for values in seconds.values() for value in values)
