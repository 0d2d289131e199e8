"""Ranks that find each other, and who is named where one does not come."""

import threading
import time

import pytest

from mtp_dist.config import ConfigError
from mtp_dist.parallel import rendezvous
from mtp_dist.parallel.rendezvous import join
from tests.integration.jobs import free_port


@pytest.fixture
def meeting_point(monkeypatch: pytest.MonkeyPatch) -> str:
    port = str(free_port())
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", port)
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    return f"127.0.0.1:{port}"


def join_all(ranks: list[int], world_size: int, seconds: float) -> dict[int, object]:
    """What each rank gets, or the sentence it ends with; each is a thread here."""
    results: dict[int, object] = {}

    def run(rank: int) -> None:
        try:
            results[rank] = join(rank, world_size, seconds)
        except ConfigError as error:
            results[rank] = str(error)

    threads = [threading.Thread(target=run, args=(rank,)) for rank in ranks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def test_all_ranks_share_a_store(meeting_point: str) -> None:
    stores = join_all([2, 0, 1], 3, 60)
    stores[2].set("word", "heard")  # type: ignore[attr-defined]
    assert [stores[rank].get("word") for rank in (0, 1)] == [b"heard"] * 2  # type: ignore[attr-defined]


def test_missing_ranks_are_named(
    meeting_point: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(rendezvous, "SECONDS_OF_SILENCE", 0.5)
    said = join_all([0, 2], 4, 2)
    came = f"2 of 4 ranks came to {meeting_point} (MASTER_ADDR:MASTER_PORT), missing: 1, 3"
    assert said[0] == (
        f"within run.join_timeout = 2 s only {came}: look at their logs, or start as many as WORLD_SIZE says"
    )
    assert "not all of the 4 ranks" in str(said[2])
    errors = capfd.readouterr().err
    assert errors == f"{came}; waits within run.join_timeout = 2 s\n", "it says so once, without C++ tracebacks"


@pytest.mark.parametrize("address", ["127.0.0.1", "no-such-host.invalid"])
def test_nobody_listens(
    meeting_point: str, address: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MASTER_ADDR", address)
    with pytest.raises(ConfigError, match=rf"rank 1 cannot reach {address}:\d+ .* within run.join_timeout = 1 s \("):
        join(1, 2, 1)
    assert capfd.readouterr().err == ""


def test_rank_0_comes_later(meeting_point: str) -> None:
    stores: dict[int, object] = {}
    thread = threading.Thread(target=lambda: stores.update({1: join(1, 2, 60)}))
    thread.start()
    time.sleep(0.5)
    stores[0] = join(0, 2, 60)
    thread.join()
    assert set(stores) == {0, 1}


def test_a_port_that_is_taken(meeting_point: str) -> None:
    first = join_all([0, 1], 2, 60)
    with pytest.raises(ConfigError, match=r"rank 0 cannot open the meeting point .* choose another MASTER_PORT"):
        join(0, 3, 1)
    del first


@pytest.mark.parametrize(("address", "port"), [("", "29500"), ("node-0", ""), ("node-0", "abc"), ("node-0", "99999")])
def test_no_meeting_point(address: str, port: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASTER_ADDR", address)
    monkeypatch.setenv("MASTER_PORT", port)
    with pytest.raises(ConfigError, match=f"WORLD_SIZE = 2 with MASTER_ADDR = '{address}' and MASTER_PORT = '{port}'"):
        join(1, 2, 1)
