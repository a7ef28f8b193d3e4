from __future__ import annotations

import re

import pytest

from streamcomp import errors
from streamcomp.errors import BudgetError, JobMismatchError, StreamcompError

TREE = [getattr(errors, name) for name in errors.__all__]


def test_all_errors_are_of_one_tree() -> None:
    assert all(issubclass(error, StreamcompError) for error in TREE)
    assert errors.__all__ == sorted(errors.__all__)


def test_the_tree_drawn_at_the_top_is_the_tree() -> None:
    assert errors.__doc__ is not None
    drawn = dict(re.findall(r"^ *[|+\- ]*\b(\w+Error)\b(?: \((\d+)\))?", errors.__doc__, re.M))

    assert drawn.keys() == set(errors.__all__)
    for name, code in drawn.items():
        error = getattr(errors, name)
        assert ("exit_code" in vars(error)) == bool(code), name
        assert not code or error.exit_code == int(code), name


def test_each_branch_has_an_exit_code_of_its_own() -> None:
    codes = [vars(error)["exit_code"] for error in TREE if "exit_code" in vars(error)]

    assert len(set(codes)) == len(codes)
    assert 0 not in codes


def test_errors_carry_what_a_program_needs() -> None:
    budget = BudgetError("too small", budget_bytes=1, minimum_bytes=2)
    mismatch = JobMismatchError("another ratio", field="ratio")

    assert (str(budget), budget.budget_bytes, budget.minimum_bytes) == ("too small", 1, 2)
    assert (str(mismatch), mismatch.field) == ("another ratio", "ratio")
    with pytest.raises(TypeError):
        BudgetError("without numbers")  # type: ignore[call-arg]
