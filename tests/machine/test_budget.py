"""A budget that is too small, and the remedy that is named."""

from __future__ import annotations

import re

import pytest

from streamcomp import BudgetError
from streamcomp.machine.addresses import AddressLimit
from streamcomp.machine.budget import Budget

MiB = 2**20
FEWEST = 500 * MiB  # with the reserve 504


@pytest.mark.parametrize(
    ("asked", "left", "remedy"),
    [
        (400, None, "the budget is 400 MiB: --max-ram 504M fits"),
        (400, 600, "the budget is 400 MiB: --max-ram 504M fits"),
        (900, 400, "the budget is 400 MiB: ulimit -v {} fits"),
        (450, 400, "the budget is 400 MiB: --max-ram 504M with ulimit -v {} fits"),
        (400, 450, "the budget is 400 MiB: --max-ram 504M with ulimit -v {} fits"),
    ],
)
def test_the_remedy_is_what_binds(asked: int, left: int | None, remedy: str) -> None:
    addresses = None if left is None else AddressLimit((300 + left) * MiB, 300 * MiB)
    budget = Budget("--max-ram", asked * MiB, FEWEST, addresses)
    told = "embed needs 500 MiB, " + remedy.format((300 + 504) * 1024)

    with pytest.raises(BudgetError, match=f"^{re.escape(told)}$") as raised:
        budget.check(FEWEST, "embed")

    assert raised.value.minimum_bytes == 504 * MiB


def test_what_fits_is_not_refused() -> None:
    Budget("--max-ram", 504 * MiB, FEWEST).check(FEWEST, "embed")
    Budget("--max-ram", 900 * MiB, FEWEST, AddressLimit(802 * MiB, 300 * MiB)).check(FEWEST, "x")
