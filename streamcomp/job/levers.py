"""What runs at a time, and the bytes that it has to fit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from streamcomp.errors import BudgetError
from streamcomp.units import format_bytes

__all__ = ["Budget", "Levers"]

# By which the baseline differs from one process to the next.
_DRIFT_BYTES = 2 * 2**20


@dataclass(frozen=True)
class Levers:
    """What runs at a time; a job keeps those that it began with, for they change rounding.

    All but ``linears`` and ``groups``, which cost time alone: a block is read once for every so
    many of its linears where they are factored from kept decompositions, and read and run once
    for every so many of its groups where their moments are taken.
    """

    batch: int  # windows per forward
    reverse_batch: int  # windows per forward and backward
    head_tokens: int  # tokens per call of the head
    feed_forward_tokens: int  # tokens of each window per call of a block's feed-forward
    linears: int  # linears per reading of a block, where no window runs
    groups: int  # moment groups of a block per pass over the windows

    @classmethod
    def of_journal(cls, held: Mapping[str, Any]) -> Levers:
        """Those that a job began with, among ``held``, all of its journal's."""
        return cls(**{field.name: held[field.name] for field in fields(cls)})


@dataclass(frozen=True)
class Budget:
    """Bytes allowed, the option that says so, and the least that some plan needs."""

    option: str
    nbytes: int
    least: int

    @property
    def minimum(self) -> int:
        """Whole MiB, enough also for a process that begins a little larger."""
        return -(-(self.least + _DRIFT_BYTES) // 2**20) * 2**20

    def check(self, needed: int, what: str, purpose: str = "") -> None:
        """BudgetError where the ``needed`` bytes of ``what`` do not fit."""
        if needed > self.nbytes:
            raise BudgetError(
                f"{what} needs {format_bytes(needed)}{purpose}, the budget is "
                f"{format_bytes(self.nbytes)}: {self.option} {self.minimum // 2**20}M fits",
                budget_bytes=self.nbytes,
                minimum_bytes=self.minimum,
            )
