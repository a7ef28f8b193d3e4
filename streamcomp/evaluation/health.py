"""Numerical health of a finished job: what in its linears deserves a second look."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from streamcomp.linalg.low_rank import FIRST_DAMPING, GRADIENT_DAMPING

__all__ = ["Health", "asked_damping", "loss_of", "numerical_health"]

Record = Mapping[str, Any]  # one linear

_FAR = 10  # damping that many times what was asked for is worth a warning
_HEAVY = 0.2  # so is one linear with this share of the whole loss
_MANY = 20  # linears; of fewer, such a share is not far from an even one


@dataclass(frozen=True)
class Health:
    """Linears by what happened to them."""

    linears: Sequence[Record]
    fallbacks: Sequence[Record]  # the data did not allow the method itself
    damped: Sequence[Record]  # far more than was asked for
    singular: Sequence[Record]  # the moment that was decomposed has no finite condition number
    total_loss: float | None  # None where losses of linears do not compare
    heavy: Record | None  # one linear with a large share of it

    def warnings(self) -> list[str]:
        """One sentence for each thing that matters, with numbers and the worst of its kind."""
        found = []
        if self.fallbacks:
            first = self.fallbacks[0]
            found.append(
                f"{self._of(self.fallbacks)} took a fallback; the first is {first['name']}: "
                f"{first['fallback']}."
            )
        if self.damped:
            worst = max(self.damped, key=lambda linear: float(linear["damping"]))
            found.append(
                f"{self._of(self.damped)} needed {_FAR} times the damping asked for, or more; "
                f"most of all {worst['name']}, {worst['damping']:.2g} of the moment's mean."
            )
        if self.heavy is not None and self.total_loss:
            share = loss_of(self.heavy) / self.total_loss
            found.append(f"{self.heavy['name']} alone causes {share:.0%} of the loss.")
        return found

    def worst(self, count: int) -> list[Record]:
        """Fallbacks first, then those damped too much, then by loss."""
        fallbacks, damped = ({item["name"] for item in k} for k in (self.fallbacks, self.damped))

        def badness(linear: Record) -> tuple[bool, bool, float]:
            compares = self.total_loss is not None
            loss = loss_of(linear) if compares else _number(linear, "relative_loss")
            return linear["name"] in fallbacks, linear["name"] in damped, loss

        return sorted(self.linears, key=badness, reverse=True)[:count]

    def _of(self, some: Sequence[Record]) -> str:
        return f"{len(some)} of {len(self.linears)} linears"


def numerical_health(report: Mapping[str, Any]) -> Health:
    """Look at the linears of a report."""
    linears: list[Record] = report.get("linears", [])
    asked = asked_damping(report.get("recipe", {}))
    # one-sided losses are energies of a linear's outputs, which say nothing beside another's
    compares = report.get("recipe", {}).get("method") == "two-sided"
    total = math.fsum(map(loss_of, linears)) if compares else None
    heaviest = max(linears, key=loss_of, default=None)
    heavy = total and heaviest and len(linears) > _MANY and loss_of(heaviest) > _HEAVY * total
    return Health(
        linears,
        [linear for linear in linears if linear.get("fallback")],
        [m for m in linears if _far(m.get("damping", 0), asked)],
        [m for m in linears if "condition" in m and m["condition"] is None and not _shared(m)],
        total,
        heaviest if heavy else None,
    )


def asked_damping(recipe: Mapping[str, Any]) -> float:
    """The damping that the recipe or its method asks for."""
    usual = GRADIENT_DAMPING if recipe.get("method") == "two-sided" else 0.0
    return float(recipe.get("damping") or usual)


def loss_of(linear: Record) -> float:
    """The loss in its own unit; 0 where there is none."""
    return _number(linear, "loss")


def _far(damping: float, asked: float) -> bool:
    """Whether it is far above ``asked``, or where that is 0 above the least that is tried."""
    return damping > 0 and damping >= 0.999 * _FAR * (asked or FIRST_DAMPING)


def _shared(linear: Record) -> bool:
    """Whether its channels share weights: no moment is decomposed there."""
    return bool(linear.get("spec", {}).get("form") == "shared")


def _number(linear: Record, name: str) -> float:
    value = linear.get(name, 0.0)
    return value if math.isfinite(value) else 0.0
