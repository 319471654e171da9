"""Every wrong call of `mutations.py` is found by the check it names."""

import pytest
import torch

from tests.npu.mutations import CHECKS, MUTATIONS, Mutated
from tests.npu.operators import CALLS, register

FOUND = (AssertionError, RuntimeError, ValueError, IndexError, KeyError)  # a wrong result, or a refused call


@pytest.mark.parametrize("name", CHECKS)
def test_right_calls_pass(name: str) -> None:
    CALLS.clear()
    CHECKS[name]()
    assert CALLS, "the check calls an operator"


@pytest.mark.parametrize(("name", "fault"), MUTATIONS, ids=lambda part: part.replace(" ", "_"))
def test_a_wrong_call_is_found(name: str, fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    register()
    change, check = MUTATIONS[name, fault]
    mutated = Mutated(name, change)
    monkeypatch.setattr(torch.ops.npu, name, mutated)
    with pytest.raises(FOUND):
        CHECKS[check]()
    assert mutated.calls > 0


def test_there_are_enough() -> None:
    assert len(MUTATIONS) >= 30
    assert {check for _, check in MUTATIONS.values()} == CHECKS.keys()
