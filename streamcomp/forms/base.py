"""The interface of forms: the matrices stored instead of a weight W (m x n), and their cost."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from streamcomp.errors import NonFiniteError
from streamcomp.forms.runtime import FactoredLinear
from streamcomp.forms.storage import Floats, Storage
from streamcomp.linalg.allocation import Curve, even_choices, min_loss_choices
from streamcomp.linalg.dtypes import solve_dtype
from streamcomp.linalg.symmetric import PANEL

__all__ = ["Allowance", "Form", "Matrix"]


class Matrix(Protocol):
    """A weight as a form sees it: m = ``rows`` outputs, n = ``columns`` inputs."""

    @property
    def disk_name(self) -> str: ...

    @property
    def rows(self) -> int: ...

    @property
    def columns(self) -> int: ...

    @property
    def rank_step(self) -> int:
        """Ranks that are chosen by loss are multiples of it."""


@dataclass(frozen=True)
class Allowance:
    """The rank of one compressed weight, and how many numbers it may store."""

    rank: int
    numbers: int


@dataclass(frozen=True)
class Form(ABC):
    """Encodes W' = left right, counts numbers and bytes, and shares them among weights.

    ``storage`` gives the storage of each matrix by the dtype of the dense weight; it raises
    RecipeError for integers. Costs are counts of numbers. Working bytes and operations include
    those of :mod:`streamcomp.linalg`.
    """

    storage: Callable[[torch.dtype], Storage] = Floats

    name: ClassVar[str]
    source: ClassVar[str] = ""  # where it was published, if it was
    is_product: ClassVar[bool] = True  # whether it can hold any product of two factors
    tensors: ClassVar[tuple[str, ...]]  # names on disk; the first is the r x n factor
    rows_tensor: ClassVar[str]  # the tensor with as many rows as W
    module: ClassVar[type[FactoredLinear]]  # at run time

    # -- how much it stores ----------------------------------------------------------------

    @abstractmethod
    def shapes(self, rows: int, columns: int, rank: Any) -> dict[str, tuple[Any, Any]]:
        """Rows and columns of each matrix, by its name; ``rank`` may be a tensor of ranks."""

    def numbers(self, rows: int, columns: int, rank: Any) -> Any:
        """Numbers stored at ``rank``; for a tensor of ranks, a tensor of equal length."""
        return sum(m * n for m, n in self.shapes(rows, columns, rank).values())

    def costs(self, rows: int, columns: int, step: int = 1) -> Tensor:
        """Numbers stored at ranks that are fewer than W's, then those of W.

        Ranks are 1, 2, ..., or multiples of ``step``. (candidates,) fp64, ascending: the costs of a
        :class:`~streamcomp.linalg.allocation.Curve`.
        """
        return _costs(self, rows, columns, step)

    def largest_rank(self, rows: int, columns: int, numbers: float = math.inf) -> int:
        """The largest rank that stores at most ``numbers``, and fewer than the dense W; or 0."""
        return int(torch.searchsorted(self.costs(rows, columns)[:-1], numbers, right=True))

    def can_hold(self, rows: int, columns: int) -> bool:
        """Whether the form can be smaller than a dense W of this shape."""
        return self.largest_rank(rows, columns) > 0

    def extra_bytes(self, rows: int, columns: int) -> int:
        """Bytes on disk of indices, which do not count as numbers."""
        return 0

    def nbytes(self, rows: int, columns: int, allowance: Allowance, dtype: torch.dtype) -> int:
        """Bytes on disk of all tensors that stand for a weight in ``dtype``."""
        matrices, storage = self.shapes(rows, columns, allowance.rank).values(), self.storage(dtype)
        return sum(storage.nbytes(*shape) for shape in matrices) + self.extra_bytes(rows, columns)

    # -- how numbers are shared ------------------------------------------------------------

    def share_evenly(self, weights: Sequence[Matrix], ratio: float) -> list[Allowance | None]:
        """Remove an equal share of each weight, ``ratio`` of all numbers; None: stays dense."""
        costs = [self._costs_of(weight) for weight in weights]
        return self._chosen(weights, costs, even_choices(costs, ratio))

    def share_by_loss(
        self, weights: Sequence[Matrix], spectra: Iterable[Tensor], ratio: float
    ) -> list[Allowance | None]:
        """Remove ``ratio`` of all numbers at the smallest loss; None: stays dense.

        ``spectra`` are tensors (k,) fp64 of energies, descending, in one unit, of which one is held
        at a time. Ranks without energy are never kept, so that more than ``ratio`` may be removed.
        """
        curves = [self._curve(*pair) for pair in zip(weights, spectra, strict=True)]
        places = min_loss_choices(curves, ratio)
        return self._chosen(weights, [curve.costs for curve in curves], places)

    def _costs_of(self, weight: Matrix) -> Tensor:
        return self.costs(weight.rows, weight.columns, weight.rank_step)

    def _curve(self, weight: Matrix, energies: Tensor) -> Curve:
        if not bool(energies.sum().isfinite()):
            raise NonFiniteError(
                f"the energies of {weight.disk_name} ({weight.rows} x {weight.columns}) are "
                "NaN or infinite; is the dtype of the model too narrow?"
            )
        return Curve.of_spectrum(self._costs_of(weight), energies, weight.rank_step)

    def _chosen(
        self, weights: Sequence[Matrix], costs: Sequence[Tensor], places: Sequence[int]
    ) -> list[Allowance | None]:
        """The ranks at ``places`` in ``costs``; None for the last place of each, which is dense."""
        return [
            None
            if place == len(each) - 1
            else Allowance((place + 1) * weight.rank_step, int(each[place]))
            for weight, each, place in zip(weights, costs, places, strict=True)
        ]

    # -- encoding --------------------------------------------------------------------------

    @abstractmethod
    def encode(self, left: Tensor, right: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
        """W' = left right as the tensors of this form, by their names on disk.

        They stand for a weight in ``dtype``. ``left`` (m, r) and ``right`` (r, n) are overwritten.
        The r x n factor is rounded first and the other one fitted to it.
        """

    def encoding_bytes(self, rows: int, columns: int, rank: int, dtype: torch.dtype) -> int:
        """Peak of ``Decomposition.factors`` and :meth:`encode` in addition to the bases.

        Both factors and the rounded right one are held; in addition three r x r matrices in LU or
        in the fit, and panels, or two copies of the rounded left one.
        """
        longest, wide = max(rows, columns), solve_dtype(dtype).itemsize
        working = wide * (3 * rank * rank + 2 * min(PANEL, longest) * longest)
        held = rank * (wide * (rows + columns) + dtype.itemsize * columns)
        return held + max(working, dtype.itemsize * 2 * rows * rank)

    def encoding_flops(self, rows: int, columns: int, rank: int) -> dict[str, float]:
        """Operations of encoding, by the rate that they run at (fields of ``MachineRates``)."""
        solving = 2.0 * rows * columns * rank + 7 / 3 * rank**3  # the product, the fit's solution
        return {
            "moment_flops": (3.0 * columns + 2.0 * rows) * rank**2,  # the fit's products
            "solve_flops": solving,
        }

    def spec(self, rank: int, **options: Any) -> dict[str, Any]:
        """The entry in config.json of a weight of that rank, without the dtype."""
        return {"form": self.name, "rank": rank, **options}

    # -- at run time -----------------------------------------------------------------------

    def running_bytes(self, rows: int, columns: int, rank: int, dtype: torch.dtype) -> int:
        """Peak of the factored linear while its block runs."""
        return int(dtype.itemsize * self.numbers(rows, columns, rank)) + 8 * (rows + columns)


@cache
def _costs(form: Form, rows: int, columns: int, step: int) -> Tensor:
    ranks = torch.arange(step, min(rows, columns) + 1, step, dtype=torch.float64)  # exact
    numbers, dense = form.numbers(rows, columns, ranks), float(rows * columns)
    return torch.cat((numbers[numbers < dense], numbers.new_tensor([dense])))
