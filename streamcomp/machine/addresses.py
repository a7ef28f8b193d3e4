"""Addresses: what ``ulimit -v`` allows a process to map, whether it uses it or not.

Each thread maps a stack and each allocator an arena before a byte of them is resident, so that
a budget of resident memory needs more addresses than its bytes.
"""

from __future__ import annotations

import os
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from streamcomp.errors import BudgetError
from streamcomp.memory_errors import chained, lacks_memory
from streamcomp.units import format_bytes

__all__ = ["AddressLimit", "address_limit", "refusal", "within_memory"]

# Mapped by a job after it began and never resident: the code of libraries that are loaded later,
# arenas, and free pages of the heap.
_LATE_BYTES = 128 * 2**20
_STACKS = 3  # per thread of a job: two pools of OpenMP, and the one that digests
_PLANNING_BYTES, _PLANNING_STACKS = 96 * 2**20, 2  # mapped by a plan alone
_MOST_STACK_BYTES = 8 * 2**20  # an unlimited stack is taken for one of this size
_STATM = Path("/proc/self/statm")


@dataclass(frozen=True)
class AddressLimit:
    """The limit of this process, and what a job maps in addition to what is resident."""

    limit: int  # bytes that may be mapped
    beside: int  # of them, mapped without being resident by the end of a job

    @property
    def budget(self) -> int:
        """Bytes that may become resident."""
        return max(0, self.limit - self.beside)

    def enough(self, budget: int) -> int:
        """KiB for ``ulimit -v`` with which ``budget`` bytes may become resident."""
        return -(-(budget + self.beside) // 2**20) * 2**10


def address_limit(threads: int) -> AddressLimit | None:
    """What holds for a job of so many threads that begins now; None without a limit.

    BudgetError where not even its threads can start: OpenMP would end the process.
    """
    limit = _limit_bytes()
    if limit is None:
        return None
    (mapped, resident), stacks = _mapped_bytes(), threads * _stack_bytes()
    addresses = AddressLimit(limit, mapped - resident + _LATE_BYTES + _STACKS * stacks)
    least = mapped + _PLANNING_BYTES + _PLANNING_STACKS * stacks
    if limit < least:
        raise BudgetError(
            f"{format_bytes(mapped)} of addresses are mapped, a plan (threads: {threads}) needs "
            f"{format_bytes(least - mapped)} more, ulimit -v allows {format_bytes(limit)}: for a "
            f"plan ulimit -v {-(-least // 2**20) * 2**10} fits",
            budget_bytes=addresses.budget,
            minimum_bytes=resident + _PLANNING_BYTES,
        )
    return addresses


def refusal(what: str) -> str:
    """What to say where the system has refused memory for ``what``: numbers and remedy."""
    limit = _limit_bytes()
    if limit is not None:
        mapped, _ = _mapped_bytes()
        return (
            f"{what} needs more memory than the system allows: {format_bytes(mapped)} of addresses "
            f"are mapped, ulimit -v allows {format_bytes(limit)}; what is done is kept: raise that "
            "limit, or lift it (ulimit -v unlimited) and let --max-ram bound the job"
        )
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return (
        f"{what} needs more memory or threads than the system gives: {format_bytes(free)} are "
        "free; what is done is kept: end other programs, give less --max-ram, or raise the limits "
        "that ulimit -a shows"
    )


@contextmanager
def within_memory(what: str, budget: int = 0) -> Iterator[None]:
    """Raise BudgetError instead of whatever says that the system has no memory for ``what``."""
    try:
        yield
    except Exception as error:
        if isinstance(error, BudgetError) or not lacks_memory(error):
            raise
        for each in chained(error):  # frames hold tensors, and a message needs some memory, too
            traceback.clear_frames(each.__traceback__)
        raise BudgetError(refusal(what), budget_bytes=budget, minimum_bytes=budget + 1) from error


def _limit_bytes() -> int | None:
    import resource  # not on every system

    soft, _ = resource.getrlimit(resource.RLIMIT_AS)
    return None if soft == resource.RLIM_INFINITY else soft


def _mapped_bytes() -> tuple[int, int]:
    """Bytes that this process has mapped, and those of them that are resident."""
    mapped, resident = map(int, _STATM.read_text().split()[:2])
    page = os.sysconf("SC_PAGE_SIZE")
    return mapped * page, resident * page


def _stack_bytes() -> int:
    """Addresses that the stack of a thread takes."""
    import resource

    soft, _ = resource.getrlimit(resource.RLIMIT_STACK)
    return _MOST_STACK_BYTES if soft == resource.RLIM_INFINITY else soft
