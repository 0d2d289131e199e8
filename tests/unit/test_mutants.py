"""The deliberate faults still fit the code, so that the tests can be tried on them."""

import pytest

from tests.mutants.__main__ import ROOT, apply, judge, read_mutants

MUTANTS = read_mutants()
ENOUGH = 60


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_patch_applies_and_names_tests(mutant):
    assert apply(mutant.patch, ROOT, "--check") is None, "put the same fault where the code is now, see tests.mutants"
    assert mutant.fault and mutant.tests
    for test in mutant.tests:
        file, _, function = test.partition("[")[0].partition("::")
        assert f"def {function}(" in (ROOT / file).read_text(), f"name a test that finds the fault: {test} is gone"


def test_there_are_enough_and_each_has_a_number_of_its_own():
    assert len(MUTANTS) >= ENOUGH
    assert len({mutant.name.partition("-")[0] for mutant in MUTANTS}) == len(MUTANTS)


@pytest.mark.parametrize(
    ("status", "output", "found"),
    [
        (1, "E   assert 2 == 3\nFAILED tests/a.py::test_b - assert 2 == 3", True),
        (1, "E   NameError: name 'x' is not defined\nFAILED tests/a.py::test_b - NameError", False),
        (2, "E   ImportError: no\nERROR tests/a.py - ImportError: no", False),
        (0, "1 passed", False),
    ],
)
def test_only_a_failed_test_finds_a_fault(status, output, found):
    assert judge(status, output)[0] == found
