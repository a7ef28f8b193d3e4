"""Numerical problems of a finished job: linears whose figures deserve a second look."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from streamcomp.job.rows import LinearRow, Report
from streamcomp.linalg.low_rank import FIRST_DAMPING
from streamcomp.methods import find_method

__all__ = ["Health", "loss_of", "numerical_health"]

_FAR = 10  # times the damping asked for; from there on a linear is warned of
_HEAVY = 0.2  # share of the whole loss above which a single linear is warned of
_MANY = 20  # linears; with fewer, an even share is not far below _HEAVY


@dataclass(frozen=True)
class Health:
    """Linears of a report, and those among them with numerical problems."""

    linears: Sequence[LinearRow]
    fallbacks: Sequence[LinearRow]  # the data did not allow the method itself
    damped: Sequence[LinearRow]  # with far more damping than was asked for
    singular: Sequence[LinearRow]  # the moment that was decomposed has no finite condition number
    total_loss: float | None  # None where losses of linears do not compare
    heavy: LinearRow | None  # the linear that causes a large share of it, if one does

    def warnings(self) -> list[str]:
        """One sentence for each kind of problem, with its count and the worst linear."""
        told = []
        if self.fallbacks:
            first = self.fallbacks[0]
            told.append(
                f"{self._count(self.fallbacks)} took a fallback; the first is {first.name}: "
                f"{first.fallback}."
            )
        if self.damped:
            worst = max(self.damped, key=lambda linear: linear.damping)
            told.append(
                f"{self._count(self.damped)} needed {_FAR} times the damping asked for, or more; "
                f"most of all {worst.name}, {worst.damping:.2g} of the moment's mean."
            )
        if self.heavy is not None and self.total_loss:
            share = loss_of(self.heavy) / self.total_loss
            told.append(f"{self.heavy.name} alone causes {share:.0%} of the loss.")
        return told

    def worst(self, count: int) -> list[LinearRow]:
        """Fallbacks first, then those damped too much, then by loss."""
        fallbacks, damped = ({row.name for row in k} for k in (self.fallbacks, self.damped))

        def badness(linear: LinearRow) -> tuple[bool, bool, float]:
            compares = self.total_loss is not None
            loss = loss_of(linear) if compares else _finite(linear.relative_loss)
            return linear.name in fallbacks, linear.name in damped, loss

        return sorted(self.linears, key=badness, reverse=True)[:count]

    def _count(self, some: Sequence[LinearRow]) -> str:
        return f"{len(some)} of {len(self.linears)} linears"


def numerical_health(report: Report) -> Health:
    """Find the linears of a report that have numerical problems."""
    linears, settings = report.linears, report.settings
    # one-sided losses are energies of a linear's outputs, which do not compare between linears
    method = find_method(settings.method)
    compares = method.losses_compare
    asked = settings.damping or method.default_damping or FIRST_DAMPING
    total = math.fsum(map(loss_of, linears)) if compares else None
    heaviest = max(linears, key=loss_of, default=None)
    heavy = total and heaviest and len(linears) > _MANY and loss_of(heaviest) > _HEAVY * total
    return Health(
        linears,
        [row for row in linears if row.fallback],
        [row for row in linears if row.damping >= 0.999 * _FAR * asked],
        [row for row in linears if row.condition is None and row.energy is not None],
        total,
        heaviest if heavy else None,
    )


def loss_of(linear: LinearRow) -> float:
    """The loss in the unit of the method; 0 where there is none."""
    return _finite(linear.loss or 0.0)


def _finite(value: float) -> float:
    return value if math.isfinite(value) else 0.0
