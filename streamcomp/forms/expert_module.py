"""The module that runs the factored experts of a mixture. Needs torch and transformers alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn import functional
from transformers.integrations.moe import _grouped_linear

from streamcomp.forms.experts import (
    ExpertMatrices,
    ExpertParts,
    guard_of,
    matrices_of,
    names_of,
)
from streamcomp.forms.runtime import (
    check_dtype,
    check_finite,
    check_permutations,
    gather,
    refuse_unknown,
    shown,
)

__all__ = ["FactoredExperts", "factored_experts"]

# Right factors, left factors and pivots of experts of equal rank.
_Stacks = tuple[Tensor, Tensor | None, Tensor | None]

_EXPERT_KEYS = {"form", "ranks", "dtype"}
_ALIGNED = 16  # bytes to which rows must be aligned for grouped products
_FEW = 4  # rows for each busy expert: with fewer, one product after the other is faster


def factored_experts(dense: nn.Module, spec: Mapping[str, Any]) -> FactoredExperts:
    """Empty factored experts instead of ``dense``, as ``spec`` of the config says.

    ``spec`` holds ``form``, ``dtype`` and ``ranks`` by matrix and expert. Raises ValueError.
    """
    refuse_unknown(set(spec) - _EXPERT_KEYS)
    check_dtype(spec)
    ranks, names = spec.get("ranks"), names_of(dense)
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

    def dense_weight(self, name: str, expert: int) -> Tensor:
        """The matrix ``name`` of one expert, (m, n), in fp32 at least."""
        matrices, tensors = self.matrices[name], self.tensors()
        places = matrices.slices(expert)
        pieces = {leaf: tensors[leaf].detach()[place] for leaf, place in places.items()}
        return matrices.dense_weight(expert, pieces)

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
        rows = rows.index_select(0, order)  # many times faster than rows[order]
        for group, stacks in zip(matrices.alike, self._stacks(matrices), strict=True):
            here = counts[place : place + len(group.experts)]
            place += len(group.experts)
            if total := sum(here):
                parts.append(_through(*stacks, rows[at : at + total], here))
                at += total
        output = torch.cat(parts) if parts else rows.new_empty(0, matrices.rows)
        output = output.index_select(0, order.argsort())
        if (bias := self._parameters.get(f"{matrices.name}_bias")) is not None:
            output = output + bias.index_select(0, experts)
        return output

    def _stacks(self, matrices: ExpertMatrices) -> list[_Stacks]:
        """Views of the factors of experts of equal rank: (k, r, n), (k, m or m - r, r), (k, m).

        The left one and pivots are None where there is none. Split at once, for the gradient of a
        slice is as large as what it was cut from.
        """
        groups = matrices.alike
        counts = [len(group.experts) for group in groups]
        # No get_parameter: a forward with other tensors in their place has no nn.Parameter there.
        right_factors: Tensor = getattr(self, matrices.right)
        rights = right_factors.split(
            [count * group.rank for count, group in zip(counts, groups, strict=True)]
        )
        sizes = [group.rank * matrices.left_rows(group.rank) for group in groups]
        flat = self._parameters.get(matrices.left)
        lefts = (
            [None] * len(groups)
            if flat is None
            else flat.split([count * size for count, size in zip(counts, sizes, strict=True)])
        )
        stacks = []
        for group, count, right, left in zip(groups, counts, rights, lefts, strict=True):
            right = right.view(count, group.rank, matrices.columns)
            pivots = None
            if matrices.pivots:
                pivots = self.get_buffer(matrices.pivots)[list(group.experts)]
            height = matrices.left_rows(group.rank)
            if left is None or not height:
                left = None
            elif pivots is None:
                left = left.view(count, group.rank, height).transpose(1, 2)
            else:
                left = left.view(count, height, group.rank)
            stacks.append((right, left, pivots))
        return stacks


def _through(
    rights: Tensor, lefts: Tensor | None, pivots: Tensor | None, rows: Tensor, counts: list[int]
) -> Tensor:
    """``rows``, sorted by expert, through the factors of experts of equal rank."""
    inner = output = _products(rows, rights, counts)
    if lefts is not None:
        output = _products(inner, lefts, counts)
        if pivots is not None:
            output = torch.cat((inner, output), dim=-1)
    if pivots is None:
        return output
    parts = zip(output.split(counts), pivots, strict=True)
    ordered = [gather(part, order.long().expand(part.shape)) for part, order in parts if len(part)]
    return torch.cat(ordered)


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
    parts = zip(rows.split(counts), stack.unbind(), strict=True)
    return torch.cat([functional.linear(part, matrix) for part, matrix in parts if len(part)])


def _can_be_grouped(rows: Tensor, stack: Tensor) -> bool:
    """Whether the kernel takes them: floats of 32 bits at most, aligned, and with data."""
    if stack.dtype == torch.float64 or _has_no_data(rows):
        return False
    sizes = (*stack.shape[1:], stack.storage_offset())
    return all(size * stack.element_size() % _ALIGNED == 0 for size in sizes)
