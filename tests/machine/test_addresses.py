"""Addresses that a limit leaves, and what is said where the system refuses memory."""

from __future__ import annotations

import os
import resource
from pathlib import Path

import pytest
import torch

from streamcomp import BudgetError, Resources
from streamcomp.machine import addresses
from streamcomp.machine.addresses import (
    AddressLimit,
    address_limit,
    refusal,
    within_memory,
)
from streamcomp.machine.session import machine
from tests.jobs import BUDGET, REPOSITORY, run_python

MiB, GiB = 2**20, 2**30


@pytest.fixture
def limits(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[int, int]:
    """Limits of a process that has mapped 800 MiB, 300 of them resident."""
    set_to = {resource.RLIMIT_AS: 2 * GiB, resource.RLIMIT_STACK: 8 * MiB}
    page = resource.getpagesize()
    (tmp_path / "statm").write_text(f"{800 * MiB // page} {300 * MiB // page} 0 0 0 0 0\n")
    monkeypatch.setattr(addresses, "_STATM", tmp_path / "statm")
    monkeypatch.setattr(resource, "getrlimit", lambda which: (set_to[which], set_to[which]))
    return set_to


def test_a_limit_leaves_a_budget_and_stacks(limits: dict[int, int]) -> None:
    one, eight = address_limit(1), address_limit(8)
    assert one is not None and eight is not None

    assert one.limit == eight.limit == 2 * GiB
    assert eight.beside - one.beside == 7 * 3 * 8 * MiB
    assert 500 * MiB < one.beside == 2 * GiB - one.budget

    limits[resource.RLIMIT_STACK] = resource.RLIM_INFINITY
    assert address_limit(8) == eight
    limits[resource.RLIMIT_AS] = resource.RLIM_INFINITY
    assert address_limit(8) is None


def test_a_limit_that_is_called_enough_is(limits: dict[int, int]) -> None:
    for budget in (260 * MiB + 1, 300 * MiB, 5 * GiB + 1):
        before = address_limit(2)
        assert before is not None
        limits[resource.RLIMIT_AS] = before.enough(budget) * 1024
        after = address_limit(2)

        assert after is not None and budget <= after.budget < budget + MiB
        limits[resource.RLIMIT_AS] = 2 * GiB


def test_a_limit_too_small_for_the_threads_of_a_plan_is_refused(limits: dict[int, int]) -> None:
    limits[resource.RLIMIT_AS] = 950 * MiB

    assert address_limit(1) is not None
    with pytest.raises(
        BudgetError, match=r"800 MiB of addresses are mapped, a plan \(threads: 8\)"
    ) as raised:
        address_limit(8)

    limits[resource.RLIMIT_AS] = int(str(raised.value).split()[-2]) * 1024
    assert address_limit(8) is not None
    limits[resource.RLIMIT_AS] = 850 * MiB
    with pytest.raises(BudgetError), machine(Resources(BUDGET, threads=1)):
        pass


def test_a_plan_for_another_machine_knows_no_limit(limits: dict[int, int]) -> None:
    with machine(Resources(BUDGET, threads=1)) as here:
        assert here.addresses == address_limit(1)
    limits[resource.RLIMIT_AS] = 850 * MiB
    with machine(Resources(BUDGET, threads=1), elsewhere=True) as here:
        assert here.addresses is None


def test_no_budget_is_below_zero() -> None:
    assert AddressLimit(limit=GiB, beside=2 * GiB).budget == 0


# -- memory that is refused ---------------------------------------------------------------------


def test_a_refusal_tells_the_numbers_of_the_limit(limits: dict[int, int]) -> None:
    assert refusal("embed") == (
        "embed needs more memory than the system allows: 800 MiB of addresses are mapped, "
        "ulimit -v allows 2.00 GiB; what is done is kept: raise that limit, or lift it (ulimit -v "
        "unlimited) and let --max-ram bound the job"
    )


def test_without_a_limit_it_tells_what_is_free(
    limits: dict[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    limits[resource.RLIMIT_AS] = resource.RLIM_INFINITY
    monkeypatch.setattr(os, "sysconf", lambda name: 4096)

    assert "16.0 MiB are free; what is done is kept: end other programs" in refusal("embed")


def test_only_memory_is_turned_into_an_error_of_the_budget() -> None:
    with pytest.raises(BudgetError, match="embed") as raised, within_memory("embed", 7):
        raise MemoryError
    assert (raised.value.budget_bytes, raised.value.minimum_bytes) == (7, 8)

    inner = BudgetError("a plan's", budget_bytes=1, minimum_bytes=2)
    for error in (inner, KeyboardInterrupt()):
        with pytest.raises(type(error)) as others, within_memory("embed"):
            try:
                raise MemoryError
            except MemoryError:
                raise error from None
        assert others.value is error
    with pytest.raises(ValueError, match="another"), within_memory("embed"):
        raise ValueError("another")


def test_tensors_of_frames_that_failed_are_let_go() -> None:
    freed: list[bool] = []

    class Held:
        def __del__(self) -> None:
            freed.append(True)

    def work() -> None:
        held = Held()  # noqa: F841
        torch.empty(0)
        raise MemoryError

    with pytest.raises(BudgetError) as raised, within_memory("work"):
        work()

    assert raised.value.__cause__ is not None and freed == [True]


LIMITED = """
import resource, torch
from streamcomp.machine.addresses import _mapped_bytes, within_memory
limit = _mapped_bytes()[0] + 2**27
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
with within_memory("a tensor"):
    torch.empty(2**30)
"""


def test_a_real_limit_is_noticed_and_named() -> None:
    done = run_python("-c", LIMITED, cwd=REPOSITORY)

    last = done.err.strip().splitlines()[-1]
    assert last.startswith("streamcomp.errors.BudgetError: a tensor needs more memory than the")
    assert "ulimit -v allows" in last
