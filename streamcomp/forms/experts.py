"""The experts of a mixture: their matrices, what each computes, and where factors are stored.

transformers holds one matrix of all experts of a layer in one parameter, ``gate_up_proj``
(experts, m, n), and multiplies each token by the experts that the router chose for it. Factored,
each expert's matrix has its own rank (:mod:`streamcomp.forms.expert_module`). Needs torch alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from streamcomp.forms.runtime import (
    MODULES,
    FactoredLinear,
    LowRankLinear,
    PivotLinear,
    shown,
)

__all__ = [
    "EXPERT_FORMS",
    "EXPERT_LEAVES",
    "FIRST_MATRICES",
    "Alike",
    "ExpertMatrices",
    "ExpertParts",
    "expert_parts",
    "guard_of",
    "has_experts",
    "matrices_of",
    "names_of",
]

# Forms that experts can be stored in.
EXPERT_FORMS = (LowRankLinear.form, PivotLinear.form)
# Names of an expert's first matrix, with a gate and without; and of the second one.
FIRST_MATRICES, _SECOND = ("gate_up_proj", "up_proj"), "down_proj"
# Names of the stored tensors of a matrix, in whatever form, by its name.
EXPERT_LEAVES = {
    name: frozenset(f"{name}_{part}" for part in ("V", "U", "coef", "pivots"))
    for name in (*FIRST_MATRICES, _SECOND)
}

_FLAGS = ("has_gate", "has_bias", "is_transposed", "num_experts", "config")


def has_experts(module: nn.Module) -> bool:
    """Whether ``module`` holds fused experts behind transformers' experts interface."""
    if not all(hasattr(module, flag) for flag in _FLAGS):
        return False
    parameters = (module._parameters.get(name) for name in names_of(module))
    return all(value is not None and value.dim() == 3 for value in parameters)


def matrices_of(experts: nn.Module) -> dict[str, tuple[int, int]]:
    """Rows m and columns n of each matrix of an expert, by its name, in the order of their use."""
    shapes = {}
    for name in names_of(experts):
        first, second = experts.get_parameter(name).shape[1:]
        shapes[name] = (second, first) if _is_transposed(experts) else (first, second)
    return shapes


def names_of(experts: Any) -> tuple[str, str]:
    """Names of the two matrices of an expert, in the order of their use."""
    return FIRST_MATRICES[0 if experts.has_gate else 1], _SECOND


def _is_transposed(experts: Any) -> bool:
    return bool(experts.is_transposed)


# -- what one expert computes ------------------------------------------------------------------


@dataclass(frozen=True)
class ExpertParts:
    """The steps of one expert: y = last(second(gate(first(x, W1, b1)), W2, b2)).

    Each W is (m, n), whichever way round the parameter is stored. Rows x are (tokens, n).
    """

    experts: Any  # the module whose settings count: act_fn, limits, flags
    kind: Any  # the dense class, whose gate it is

    def matrix(self, name: str, expert: int) -> Tensor:
        """A view of the dense matrix ``name`` of one expert, (m, n)."""
        weight: Tensor = self.experts.get_parameter(name)[expert]
        return weight.T if _is_transposed(self.experts) else weight

    def bias(self, name: str, expert: int) -> Tensor | None:
        """The bias (m,) of the matrix ``name`` of one expert."""
        biases = self.experts._parameters.get(f"{name}_bias")
        return None if biases is None else biases[expert]

    def first(self, rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Outputs of ``gate_up_proj``, or of ``up_proj`` where there is no gate."""
        return functional.linear(rows, weight, bias)

    def gate(self, rows: Tensor) -> Tensor:
        """The activation of :meth:`first`'s outputs, with the gate where there is one."""
        output: Tensor
        if self.experts.has_gate:
            output = self.kind._apply_gate(self.experts, rows)
        else:
            output = self.experts.act_fn(rows)
        return output

    def second(self, rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Outputs of ``down_proj``."""
        return functional.linear(rows, weight, bias)

    def last(self, rows: Tensor) -> Tensor:
        """The norm of :meth:`second`'s outputs, in the few classes that have one."""
        if getattr(self.experts, "has_post_expert_norm", False):
            rows = self.experts.post_expert_norm(rows)
        return rows


def expert_parts(experts: nn.Module) -> ExpertParts:
    """The steps of each expert of ``experts``, a dense module (:func:`has_experts`)."""
    return ExpertParts(experts, type(experts))


# -- where factors are stored ------------------------------------------------------------------


@dataclass(frozen=True)
class Alike:
    """Experts of equal rank, whose factors follow each other."""

    experts: tuple[int, ...]
    rank: int
    row: int  # their first row of V
    start: int  # their first number of the left factors


@dataclass(frozen=True)
class ExpertMatrices:
    """Places of the factors of one matrix (m x n) of each expert in the stored tensors.

    Experts are stored by rank, the smallest first, so that those of equal rank are one stack,
    without a copy. Rank m means that this expert's matrix is dense. Tensors:

    - ``<name>_V`` (sum of ranks, n): right factors, pivot rows or dense matrices;
    - form ``uv``: ``<name>_U`` (numbers,), each expert's U as (r, m);
    - form ``pivot``: ``<name>_coef`` (numbers,), each expert's (m - r, r), and ``<name>_pivots``
      (experts, m) int32, in the order of the experts' numbers.

    A dense matrix has no left factor, and where all are dense that tensor is not stored.
    """

    form: str
    name: str
    rows: int
    columns: int
    ranks: tuple[int, ...]  # by expert

    def __post_init__(self) -> None:
        if self.form not in EXPERT_FORMS:
            raise ValueError(
                f"streamcomp: form {shown(self.form)} is unknown for experts: "
                f"{' or '.join(EXPERT_FORMS)}; written by a newer version?"
            )
        largest = min(self.rows, self.columns) if self._has_pivots else self.rows
        for rank in self.ranks:
            if type(rank) is not int or not (0 < rank <= largest or rank == self.rows):
                raise ValueError(
                    f"streamcomp: rank {shown(rank)} of {self.name} is impossible for "
                    f"{self.rows} x {self.columns}"
                )

    @property
    def right(self) -> str:
        """The name of the tensor of right factors."""
        return f"{self.name}_V"

    @property
    def left(self) -> str:
        """The name of the tensor of left factors."""
        return f"{self.name}_coef" if self._has_pivots else f"{self.name}_U"

    @property
    def pivots(self) -> str | None:
        """The name of the tensor of pivots, None in a form without."""
        return f"{self.name}_pivots" if self._has_pivots else None

    @property
    def _has_pivots(self) -> bool:
        return self.form == PivotLinear.form

    def left_rows(self, rank: int) -> int:
        """Rows of one expert's left factor, of ``rank`` columns."""
        if rank == self.rows:
            return 0
        return self.rows - rank if self._has_pivots else self.rows

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the stored tensors, by name. All are floats but :attr:`pivots`, int32."""
        shapes: dict[str, tuple[int, ...]] = {self.right: (sum(self.ranks), self.columns)}
        if numbers := sum(rank * self.left_rows(rank) for rank in self.ranks):
            shapes[self.left] = (numbers,)
        if self.pivots:
            shapes[self.pivots] = (len(self.ranks), self.rows)
        return shapes

    def pieces(self, expert: int, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Parts of the stored tensors for one expert, by the names of the stored tensors.

        ``tensors`` are those of its form by their names (``weight`` and ``U``, or ``weight``,
        ``coef`` and ``pivots``), or the dense ``weight`` alone. Parts are joined along the first
        axis in :attr:`order`; those of :attr:`pivots`, (1, m), by the experts' numbers.
        """
        rank, weight = self.ranks[expert], tensors["weight"]
        assert weight.shape == (rank, self.columns)
        pieces = {self.right: weight}
        if rank < self.rows:
            left = tensors["coef"] if self._has_pivots else tensors["U"].T
            pieces[self.left] = left.reshape(-1)  # (m - r, r) or (r, m), flat
        if self.pivots:
            dense = torch.arange(self.rows, dtype=torch.int32, device=weight.device)
            pieces[self.pivots] = tensors.get("pivots", dense)[None]
        return pieces

    def slices(self, expert: int) -> dict[str, slice]:
        """Where :meth:`pieces` of one expert are along the first axis of the stored tensors."""
        group = next(group for group in self.alike if expert in group.experts)
        number, rank = group.experts.index(expert), group.rank
        row = group.row + number * rank
        slices = {self.right: slice(row, row + rank)}
        if size := rank * self.left_rows(rank):
            start = group.start + number * size
            slices[self.left] = slice(start, start + size)
        if self.pivots:
            slices[self.pivots] = slice(expert, expert + 1)
        return slices

    def tensors(self, expert: int, pieces: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors of one expert that :meth:`pieces` were made from."""
        rank, weight = self.ranks[expert], pieces[self.right]
        pivots = pieces[self.pivots][0] if self.pivots else None
        if rank == self.rows:
            return {"weight": weight if pivots is None else weight.index_select(0, pivots)}
        left = pieces[self.left]
        if pivots is None:
            return {"weight": weight, "U": left.view(rank, self.rows).T}
        return {"weight": weight, "coef": left.view(-1, rank), "pivots": pivots}

    def linear(self, tensors: Mapping[str, Tensor]) -> FactoredLinear:
        """The factored linear that ``tensors`` of one expert make; it holds them, no copies."""
        with torch.device("meta"):
            linear = MODULES[self.form](self.columns, self.rows, len(tensors["weight"]))
        linear.load_state_dict(tensors, assign=True)
        return linear.requires_grad_(False)

    def dense_weight(self, expert: int, pieces: Mapping[str, Tensor]) -> Tensor:
        """The matrix (m, n) of one expert, in fp32 at least."""
        tensors = self.tensors(expert, pieces)
        if self.ranks[expert] < self.rows:
            return self.linear(tensors).dense_weight()
        weight = tensors["weight"]
        return weight.to(torch.promote_types(weight.dtype, torch.float32))

    @cached_property
    def alike(self) -> tuple[Alike, ...]:
        """Experts of equal rank together, in the order in which they are stored."""
        groups, row, start = [], 0, 0
        for rank in sorted(set(self.ranks)):
            experts = tuple(e for e, other in enumerate(self.ranks) if other == rank)
            groups.append(Alike(experts, rank, row, start))
            row += rank * len(experts)
            start += rank * self.left_rows(rank) * len(experts)
        return tuple(groups)

    @cached_property
    def order(self) -> tuple[int, ...]:
        """Numbers of the experts in the order in which they are stored."""
        return tuple(expert for group in self.alike for expert in group.experts)

    @cached_property
    def places(self) -> tuple[int, ...]:
        """The place of each expert in :attr:`order`."""
        return tuple(self.order.index(expert) for expert in range(len(self.ranks)))


def guard_of(experts: nn.Module, dtype: torch.dtype) -> tuple[str, Tensor]:
    """A small tensor to be stored under the name of the first dense parameter, with that name.

    A program that does not know the format meets a parameter of the wrong shape and stops, instead
    of making up random experts. transformers can split it by expert and by gate when it saves the
    model, and join it when it loads it, as it does with the dense parameter.
    """
    name = names_of(experts)[0]
    return name, torch.zeros(1, 1 + (name == FIRST_MATRICES[0]), 1, dtype=dtype)
