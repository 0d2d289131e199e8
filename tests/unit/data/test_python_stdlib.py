"""The standard library as data: the same files in the same split wherever it lies."""

import hashlib
import sysconfig
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from mtp_dist.data.sources.python_stdlib import SKIPPED_FOLDERS, in_validation_split, stdlib_files


def test_the_splits_are_disjoint_complete_and_keep_the_order() -> None:
    everything, train, validation = (stdlib_files(split) for split in ("all", "train", "validation"))
    assert sorted(train + validation) == sorted(everything)
    assert [file for file in everything if file in set(validation)] == validation
    assert 0 < len(validation) < len(everything) / 5


def test_the_files_are_source_code_of_the_library_sorted_by_path() -> None:
    root = Path(sysconfig.get_paths()["stdlib"])
    names = [file.relative_to(root).as_posix() for file in stdlib_files("all")]
    assert names == sorted(names) and len(names) > 300
    assert {"argparse.py", "json/decoder.py"} <= set(names)
    assert not any(SKIPPED_FOLDERS & set(Path(name).parts[:-1]) for name in names)


@given(st.text(st.characters(codec="utf-8")))
def test_validation_is_the_lowest_twentieth_of_the_hashes(path: str) -> None:
    fraction = int(hashlib.sha256(path.encode()).hexdigest(), 16) / 2**256
    assert in_validation_split(path) == (fraction < 0.05)
