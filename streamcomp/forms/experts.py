"""The factored experts of a mixture at run time. Needs torch and transformers alone.

transformers holds one matrix of all experts of a layer in one parameter, ``gate_up_proj``
(experts, m, n), and multiplies each token by the experts that the router chose for it. Here
:class:`FactoredExperts` runs instead, where each expert's matrix has its own rank.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn import functional
from transformers.integrations.moe import _grouped_linear

from streamcomp.forms.runtime import (
    LowRankLinear,
    PivotLinear,
    check_dtype,
    check_finite,
    check_permutations,
    refuse_unknown,
    shown,
)

__all__ = [
    "EXPERT_FORMS",
    "EXPERT_LEAVES",
    "FIRST_MATRICES",
    "ExpertMatrices",
    "ExpertParts",
    "FactoredExperts",
    "expert_parts",
    "factored_experts",
    "guard_of",
    "has_experts",
    "matrices_of",
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

_EXPERT_KEYS = {"form", "ranks", "dtype"}
_FLAGS = ("has_gate", "has_bias", "is_transposed", "num_experts", "config")
_ALIGNED = 16  # bytes to which rows must be aligned for grouped products
_FEW = 4  # rows for each busy expert: with fewer, one product after the other is faster


def has_experts(module: nn.Module) -> bool:
    """Whether ``module`` holds fused experts behind transformers' experts interface."""
    if not all(hasattr(module, flag) for flag in _FLAGS):
        return False
    parameters = (module._parameters.get(name) for name in _names(module))
    return all(value is not None and value.dim() == 3 for value in parameters)


def matrices_of(experts: nn.Module) -> dict[str, tuple[int, int]]:
    """Rows m and columns n of each matrix of an expert, by its name, in the order of their use."""
    shapes = {}
    for name in _names(experts):
        first, second = experts.get_parameter(name).shape[1:]
        shapes[name] = (second, first) if _is_transposed(experts) else (first, second)
    return shapes


def _names(experts: Any) -> tuple[str, str]:
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
class _Alike:
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

    def starts(self, expert: int) -> dict[str, int]:
        """Where the :meth:`pieces` of one expert begin in each stored tensor, on its first axis."""
        group = next(group for group in self.alike if expert in group.experts)
        number = group.experts.index(expert)
        starts = {self.right: group.row + number * group.rank}
        starts[self.left] = group.start + number * group.rank * self.left_rows(group.rank)
        if self.pivots:
            starts[self.pivots] = expert
        return starts

    @cached_property
    def alike(self) -> tuple[_Alike, ...]:
        """Experts of equal rank together, in the order in which they are stored."""
        groups, row, start = [], 0, 0
        for rank in sorted(set(self.ranks)):
            experts = tuple(e for e, other in enumerate(self.ranks) if other == rank)
            groups.append(_Alike(experts, rank, row, start))
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
    name = _names(experts)[0]
    return name, torch.zeros(1, 1 + (name == FIRST_MATRICES[0]), 1, dtype=dtype)


# -- the module --------------------------------------------------------------------------------


def factored_experts(dense: nn.Module, spec: Mapping[str, Any]) -> FactoredExperts:
    """Empty factored experts instead of ``dense``, as ``spec`` of the config says.

    ``spec`` holds ``form``, ``dtype`` and ``ranks`` by matrix and expert. Raises ValueError.
    """
    refuse_unknown(set(spec) - _EXPERT_KEYS)
    check_dtype(spec)
    ranks, names = spec.get("ranks"), _names(dense)
    if not isinstance(ranks, dict) or set(ranks) != set(names):
        given = sorted(map(str, ranks)) if isinstance(ranks, dict) else ranks
        raise ValueError(f"streamcomp: ranks are of {shown(given)}, not of {' and '.join(names)}")
    for name, of_experts in ranks.items():
        count = len(dense.get_parameter(name))
        if not isinstance(of_experts, list) or len(of_experts) != count:
            raise ValueError(
                f"streamcomp: ranks {shown(of_experts)} of {name} are no list of {count}"
            )
    return FactoredExperts(dense, spec.get("form", ""), ranks)


class FactoredExperts(nn.Module):
    """Experts whose matrices are factored in ``form``, with ``ranks`` by matrix and expert.

    It is no subclass of the dense class, whose methods look for its parameters; that class's gate
    and its settings (``act_fn``, limits, flags) are used as they are. Raises ValueError.
    """

    def __init__(self, dense: nn.Module, form: str, ranks: Mapping[str, Sequence[int]]) -> None:
        super().__init__()
        if getattr(dense, "_is_expert_parallel", False):
            raise ValueError("streamcomp: factored experts do not run expert-parallel")
        for name, value in vars(dense).items():
            if not name.startswith("_") and name != "training":
                setattr(self, name, value)
        for name, child in dense.named_children():
            self.add_module(name, child)
        self.form, self._dense = form, type(dense)
        self.matrices: dict[str, ExpertMatrices] = {}
        for name, (rows, columns) in matrices_of(dense).items():
            matrices = ExpertMatrices(form, name, rows, columns, tuple(ranks[name]))
            self.matrices[name] = matrices
            like = dense.get_parameter(name)
            for leaf, shape in matrices.shapes().items():
                dtype = torch.int32 if leaf == matrices.pivots else like.dtype
                empty = torch.empty(shape, dtype=dtype, device=like.device)
                if leaf == matrices.pivots:
                    self.register_buffer(leaf, empty)
                else:
                    self.register_parameter(leaf, nn.Parameter(empty))
            if (bias := dense._parameters.get(f"{name}_bias")) is not None:
                self.register_parameter(f"{name}_bias", bias)
        name, guard = guard_of(dense, like.dtype)
        self.register_buffer(name, guard.to(like.device))

    def extra_repr(self) -> str:
        ranks = {name: f"{min(m.ranks)}-{max(m.ranks)}" for name, m in self.matrices.items()}
        return f"form={self.form}, ranks={ranks}"

    @property
    def factors(self) -> tuple[str, ...]:
        """Names of factors and pivots; all floats among them are of one dtype."""
        return tuple(leaf for matrices in self.matrices.values() for leaf in matrices.shapes())

    @property
    def converted(self) -> frozenset[str]:
        """Names of the tensors that transformers may split on disk: biases and the guard."""
        return frozenset(self.tensors()) - frozenset(self.factors)

    def tensors(self) -> dict[str, Tensor]:
        """Tensors that a checkpoint must hold for these experts, by their names there."""
        direct = {**self._parameters, **self._buffers}
        return {name: value for name, value in direct.items() if value is not None}

    def check_values(self, name: str) -> None:
        """ValueError where tensors of the experts ``name`` hold what no checkpoint may.

        Tensors on ``meta`` pass.
        """
        check_finite(name, self.tensors())
        self.check_indices(name)

    def check_indices(self, name: str) -> None:
        """ValueError where pivots of the experts ``name`` are no permutation."""
        for matrices in self.matrices.values():
            pivots = self.get_buffer(matrices.pivots) if matrices.pivots else None
            if pivots is not None and not pivots.is_meta:
                check_permutations(f"{name}.{matrices.pivots}", pivots)

    def dense_weights(self, name: str) -> Iterator[Tensor]:
        """The matrix ``name`` of each expert in turn, (m, n), in fp32 at least."""
        for expert in range(len(self.matrices[name].ranks)):
            yield self.dense_weight(name, expert)

    def dense_weight(self, name: str, expert: int) -> Tensor:
        """The matrix ``name`` of one expert, (m, n), in fp32 at least."""
        matrices = self.matrices[name]
        group = next(group for group in matrices.alike if expert in group.experts)
        number = group.experts.index(expert)
        rights, lefts, pivots = self._stacks(matrices, group)
        wide = torch.promote_types(rights.dtype, torch.float32)
        product = right = rights[number].to(wide)
        if lefts is not None:
            product = lefts[number].to(wide) @ right
            if pivots is not None:
                product = torch.cat((right, product))
        return product if pivots is None else product.index_select(0, pivots[number])

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Outputs (T, n) for ``hidden_states`` (T, n), by the k chosen experts of each token."""
        chosen = top_k_index.shape[-1]
        experts = top_k_index.reshape(-1)
        rows = hidden_states.repeat_interleave(chosen, dim=0)  # (T k, n)
        parts = ExpertParts(self, self._dense)
        first, second = self.matrices.values()
        rows = parts.gate(self._multiply(first, rows, experts))
        rows = parts.last(self._multiply(second, rows, experts))
        rows = rows * top_k_weights.reshape(-1, 1)
        return rows.view(-1, chosen, rows.shape[-1]).sum(dim=1).to(hidden_states.dtype)

    def _multiply(self, matrices: ExpertMatrices, rows: Tensor, experts: Tensor) -> Tensor:
        """Each of ``rows`` (S, n) times the matrix of its expert, (S, m)."""
        places = torch.tensor(matrices.places, device=rows.device)[experts]
        places, order = torch.sort(places, stable=True)
        counts = _counts(places, len(matrices.ranks))
        parts, at, place = [], 0, 0
        rows = rows[order]
        for group in matrices.alike:
            here = counts[place : place + len(group.experts)]
            place += len(group.experts)
            if total := sum(here):
                parts.append(self._through(matrices, group, rows[at : at + total], here))
                at += total
        output = torch.cat(parts) if parts else rows.new_empty(0, matrices.rows)
        output = torch.empty_like(output).index_copy(0, order, output)
        if (bias := self._parameters.get(f"{matrices.name}_bias")) is not None:
            output = output + bias[experts]
        return output

    def _through(
        self, matrices: ExpertMatrices, group: _Alike, rows: Tensor, counts: list[int]
    ) -> Tensor:
        """``rows``, sorted by expert, through the factors of experts of equal rank."""
        rights, lefts, pivots = self._stacks(matrices, group)
        inner = output = _products(rows, rights, counts)
        if lefts is not None:
            output = _products(inner, lefts, counts)
            if pivots is not None:
                output = torch.cat((inner, output), dim=-1)
        if pivots is None:
            return output
        parts = zip(output.split(counts), pivots, strict=True)
        return torch.cat([part.index_select(1, order) for part, order in parts if len(part)])

    def _stacks(
        self, matrices: ExpertMatrices, group: _Alike
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Views of ``group``'s factors, (k, r, n) and (k, m or m - r, r), and pivots (k, m)."""
        count, rank, height = len(group.experts), group.rank, matrices.left_rows(group.rank)
        rights = self.get_parameter(matrices.right)[group.row : group.row + count * rank]
        rights = rights.view(count, rank, matrices.columns)
        pivots = self.get_buffer(matrices.pivots)[list(group.experts)] if matrices.pivots else None
        if not height:
            return rights, None, pivots
        stop = group.start + count * height * rank
        lefts = self.get_parameter(matrices.left)[group.start : stop]
        if pivots is not None:
            return rights, lefts.view(count, height, rank), pivots
        return rights, lefts.view(count, rank, height).transpose(1, 2), None


def _counts(places: Tensor, experts: int) -> list[int]:
    """Rows for each expert; an even share where tensors hold no data and shapes alone count."""
    if _has_no_data(places):
        share, rest = divmod(len(places), experts)
        return [share + (number < rest) for number in range(experts)]
    counts: list[int] = torch.bincount(places, minlength=experts).tolist()
    return counts


def _has_no_data(tensor: Tensor) -> bool:
    return tensor.is_meta or isinstance(tensor, FakeTensor)


def _products(rows: Tensor, stack: Tensor, counts: list[int]) -> Tensor:
    """``rows`` (S, in), ``counts`` of them for each matrix of ``stack`` (k, out, in), (S, out)."""
    busy = sum(count > 0 for count in counts)
    if busy > 1 and len(rows) > _FEW * busy and _can_be_grouped(rows, stack):
        ends = torch.tensor(counts, device=rows.device).cumsum(0).to(torch.int32)
        output: Tensor = _grouped_linear(rows, stack, ends)
        return output
    parts = zip(rows.split(counts), stack, strict=True)
    return torch.cat([functional.linear(part, matrix) for part, matrix in parts if len(part)])


def _can_be_grouped(rows: Tensor, stack: Tensor) -> bool:
    """Whether the kernel takes them: floats of 32 bits at most, aligned, and with data."""
    if stack.dtype == torch.float64 or _has_no_data(rows):
        return False
    sizes = (*stack.shape[1:], stack.storage_offset())
    return all(size * stack.element_size() % _ALIGNED == 0 for size in sizes)
