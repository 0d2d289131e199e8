"""The record of the last collectives, with a stand-in for the function that only CUDA builds of PyTorch have."""

import pickle
from pathlib import Path

import pytest
from torch._C import _distributed_c10d as c10d

STARTED = {"profiling_name": "nccl:all_reduce", "process_group": ("3", "tensor"), "collective_seq_id": 41}


def record_of(*entries: dict[str, object]) -> bytes:
    return pickle.dumps({"version": "2.10", "entries": list(entries)})


def test_the_record_of_nccl_goes_before_that_of_gloo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mtp_dist.distributed.flight_recorder import dump_flight_recorder

    record = record_of({"profiling_name": "nccl:broadcast"}, STARTED | {"state": "started"})
    monkeypatch.setattr(c10d, "_dump_nccl_trace", lambda: record, raising=False)
    path = tmp_path / "flight_recorder" / "rank_00003"
    described = dump_flight_recorder(path)
    assert described == "nccl:all_reduce, number 41 of group 3 (tensor), started"
    assert path.read_bytes() == record


def test_without_collectives_there_is_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mtp_dist.distributed.flight_recorder import dump_flight_recorder

    for name in ("_dump_nccl_trace", "_dump_fr_trace"):
        monkeypatch.setattr(c10d, name, record_of, raising=False)
    assert dump_flight_recorder(tmp_path / "rank_00000") is None
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("given", "expected"), [(None, "2000"), ("0", "0")])
def test_recording_is_on_unless_the_environment_sets_it(
    monkeypatch: pytest.MonkeyPatch, given: str | None, expected: str
) -> None:
    from mtp_dist.distributed.flight_recorder import enable_flight_recorder

    variables = {"TORCH_FR_BUFFER_SIZE": given} if given else {}
    enable_flight_recorder(variables)
    assert variables == {"TORCH_FR_BUFFER_SIZE": expected}
