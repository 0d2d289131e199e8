"""The rendezvous of ranks, and the messages that name missing or deviating ones."""

import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from mtp_dist.distributed import rendezvous
from mtp_dist.distributed.environment import REMEDIES, describe_rank, find_differences
from mtp_dist.distributed.rendezvous import join
from mtp_dist.errors import LaunchError
from tests.integration.jobs import free_port
from tests.tiny import tiny_config

REFUSED = "this run cannot start: rank 0 reports why"


@pytest.fixture
def meeting_point(monkeypatch):
    port = str(free_port())
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", port)
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    return f"127.0.0.1:{port}"


def described(**differing):
    """Describe a rank like all others, except for the given values."""
    return {"host": "node-0", **dict.fromkeys(REMEDIES, "as usual"), **differing}


def join_all(ranks, world_size, seconds=60, refusal=None, late=None):
    """Return each rank's store, or the message of its error; each rank is a thread here."""

    def run(rank):
        if rank == late:
            time.sleep(0.5)
        try:
            return join(rank, world_size, seconds, described(), None if rank else refusal)
        except LaunchError as error:
            return str(error)

    with ThreadPoolExecutor(len(ranks)) as pool:
        return dict(zip(ranks, pool.map(run, ranks), strict=True))


@pytest.mark.parametrize("late", [None, 0])
def test_all_ranks_share_a_store(meeting_point, late):
    stores = join_all([2, 0, 1], 3, late=late)
    stores[2].set("key", "value")
    assert [stores[rank].get("key") for rank in (0, 1)] == [b"value"] * 2
    with pytest.raises(LaunchError, match=r"rank 0 cannot open the rendezvous address .* choose another MASTER_PORT"):
        join(0, 4, 1, described())


def test_rank_0_refuses_for_all_ranks(meeting_point):
    """Only rank 0 has the reason, which has precedence over a port that another run uses."""
    assert join_all([0, 1, 2], 3, refusal="in use") == {0: "in use", 1: REFUSED, 2: REFUSED}
    other_run = join(0, 1, 60, described())
    assert other_run and join_all([0], 3, refusal="in use") == {0: "in use"}


def test_missing_ranks_are_named(meeting_point, monkeypatch, caplog, capfd):
    monkeypatch.setattr(rendezvous, "FIRST_STATUS_AFTER_S", 0.5)
    results = join_all([0, 2], 4, 2)
    came = f"2 of 4 ranks joined at {meeting_point} (MASTER_ADDR:MASTER_PORT), missing: 1, 3"
    assert results[0] == f"within run.join_timeout = 2 s only {came}: check their logs, or start WORLD_SIZE = 4 ranks"
    assert "not all of the 4 ranks" in results[2]
    assert caplog.messages == [f"{came}; waiting within run.join_timeout = 2 s"], "once"
    assert capfd.readouterr().err == "", "no C++ tracebacks"


@pytest.mark.parametrize("address", ["127.0.0.1", "no-such-host.invalid"])
def test_no_process_listens(meeting_point, address, monkeypatch, capfd):
    monkeypatch.setenv("MASTER_ADDR", address)
    with pytest.raises(LaunchError, match=rf"rank 1 cannot reach {address}:\d+ .* within run.join_timeout = 1 s \("):
        join(1, 2, 1, described())
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(("address", "port"), [("", "29500"), ("node-0", ""), ("node-0", "abc"), ("node-0", "99999")])
def test_invalid_address_or_port(address, port, monkeypatch):
    monkeypatch.setenv("MASTER_ADDR", address)
    monkeypatch.setenv("MASTER_PORT", port)
    with pytest.raises(LaunchError, match=f"WORLD_SIZE = 2 with MASTER_ADDR = '{address}' and MASTER_PORT = '{port}'"):
        join(1, 2, 1, described())


def test_every_property_is_compared():
    here = describe_rank(tiny_config(), torch.device("cpu"))
    assert find_differences([here] * 3) is None
    for name, remedy in REMEDIES.items():
        message = f"the {name} is other on rank 0 ({here['host']}), and {here[name]} on 2 other ranks: {remedy}"
        assert find_differences([here | {name: "other"}, here, here]) == message
    assert here["configuration"] != describe_rank(tiny_config(run={"seed": 7}), torch.device("cpu"))["configuration"]


def test_each_difference_has_a_line_and_lists_of_ranks_an_end():
    ranks = [described(host=f"node-{number // 8}") for number in range(64)]
    for number in range(8, 56):
        ranks[number] |= {"version of torch": "2.12"}
    ranks[3] |= {"configuration": "1234"}
    configuration, torch_version = find_differences(ranks).splitlines()
    assert configuration.startswith("the configuration is 1234 on rank 3 (node-0), and as usual on 63 other ranks: ")
    assert torch_version.startswith("the version of torch is as usual on rank 0 (node-0), rank 1 (node-0), ")
    assert "rank 63 (node-7), and 2.12 on 48 other ranks: " in torch_version
    ranks[60] |= {"configuration": "5678"}
    assert len(find_differences(ranks).splitlines()) == 3
    message = find_differences([described(device="cuda" if number < 40 else "cpu") for number in range(60)])
    assert message.count("node-0") == 16 and "rank 55 (node-0) and 4 more, and cuda on 40" in message


def test_ranks_that_share_a_gpu_are_named():
    ranks = [described(gpu=f"GPU-{number % 3}") for number in range(4)]
    assert find_differences(ranks[:3]) is None
    message = "rank 0 (node-0), rank 3 (node-0) have the same GPU: start as many ranks per node as it has GPUs"
    assert find_differences(ranks) == message
