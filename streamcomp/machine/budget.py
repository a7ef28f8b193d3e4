"""A budget of bytes, and the error that names a sufficient one."""

from __future__ import annotations

from dataclasses import dataclass

from streamcomp.errors import BudgetError
from streamcomp.machine.addresses import AddressLimit
from streamcomp.units import format_bytes

__all__ = ["Budget"]

# Variation of the baseline from one process to the next: 3 MiB were seen.
_DRIFT_BYTES = 4 * 2**20


@dataclass(frozen=True)
class Budget:
    """Bytes asked for, the option that sets them, and the fewest that any plan needs.

    Fewer may be usable where addresses are limited.
    """

    option: str
    asked: int
    fewest: int
    addresses: AddressLimit | None = None

    @property
    def nbytes(self) -> int:
        """Bytes allowed."""
        return self.asked if self.addresses is None else min(self.asked, self.addresses.budget)

    @property
    def minimum(self) -> int:
        """The smallest sufficient budget, in whole MiB, with a reserve for a larger baseline."""
        return -(-(self.fewest + _DRIFT_BYTES) // 2**20) * 2**20

    def check(self, needed: int, what: str, purpose: str = "") -> None:
        """BudgetError where the ``needed`` bytes of ``what`` do not fit."""
        if needed > self.nbytes:
            raise BudgetError(
                f"{what} needs {format_bytes(needed)}{purpose}, the budget is "
                f"{format_bytes(self.nbytes)}: {self._remedy()} fits",
                budget_bytes=self.nbytes,
                minimum_bytes=self.minimum,
            )

    def _remedy(self) -> str:
        """The option, the limit of addresses, or both."""
        option, addresses = f"{self.option} {self.minimum // 2**20}M", self.addresses
        if addresses is None or addresses.budget >= self.minimum:
            return option
        limit = f"ulimit -v {addresses.enough(self.minimum)}"
        return limit if self.asked >= self.minimum else f"{option} with {limit}"
