"""The record of the last collectives, with a stand-in for the function that only CUDA builds of PyTorch have."""

import pickle

import pytest
from torch._C import _distributed_c10d as c10d

from mtp_dist.distributed.flight_recorder import dump_flight_recorder, enable_flight_recorder


def record_of(*entries):
    return pickle.dumps({"version": "2.10", "entries": list(entries)})


def test_nccl_record_has_precedence_over_that_of_gloo(tmp_path, monkeypatch):
    last = {"profiling_name": "nccl:all_reduce", "process_group": ("3", "tensor"), "collective_seq_id": 41}
    record = record_of({"profiling_name": "nccl:broadcast"}, last | {"state": "started"})
    monkeypatch.setattr(c10d, "_dump_nccl_trace", lambda: record, raising=False)
    path = tmp_path / "flight_recorder" / "rank_00003"
    assert dump_flight_recorder(path) == "nccl:all_reduce, number 41 of group 3 (tensor), started"
    assert path.read_bytes() == record


def test_without_collectives_there_is_no_file(tmp_path, monkeypatch):
    for name in ("_dump_nccl_trace", "_dump_fr_trace"):
        monkeypatch.setattr(c10d, name, record_of, raising=False)
    assert dump_flight_recorder(tmp_path / "rank_00000") is None
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("given", "expected"), [({}, "2000"), ({"TORCH_FR_BUFFER_SIZE": "0"}, "0")])
def test_recording_is_on_unless_the_environment_sets_it(given, expected):
    enable_flight_recorder(given)
    assert given == {"TORCH_FR_BUFFER_SIZE": expected}
