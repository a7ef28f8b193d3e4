"""The linears of a compressed model at run time. Needs torch and transformers alone.

Each is an ``nn.Linear`` by inheritance, so that adapters and tools that look for linears
find them, and each names its r x n factor ``weight``: a program that does not know the
format meets a weight of the wrong shape and stops, instead of making up random ones.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

__all__ = [
    "AXES",
    "FLOATS",
    "FORMAT_VERSION",
    "MODULES",
    "FactoredLinear",
    "LowRankLinear",
    "PivotLinear",
    "SharedLinear",
    "check_dtype",
    "check_finite",
    "check_permutations",
    "factored",
    "gather",
    "refuse_unknown",
    "shown",
]

FORMAT_VERSION = 1

# Dtypes of factors, as safetensors names them.
FLOATS = ("F64", "F32", "F16", "BF16")

# Which channels of a linear share weights: outputs (rows) or inputs (columns).
AXES = ("rows", "columns")


class FactoredLinear(nn.Linear):
    """A linear of ``rank`` r below both its sides: n inputs, m outputs."""

    form = ""
    leaves: frozenset[str] = frozenset()  # names of its tensors, without weight and bias
    converted: frozenset[str] = frozenset()  # names of tensors that transformers may split on disk
    keys: frozenset[str] = frozenset()  # in the config's entry, in addition to those of every form
    weight: nn.Parameter  # (r, n)
    transposed = False  # the dense weight that it replaces is stored (n, m)

    def __init__(
        self, in_features: int, out_features: int, rank: int, bias: bool = False, **place: Any
    ) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.rank = in_features, out_features, rank
        self.weight = nn.Parameter(torch.empty(rank, in_features, **place))
        self.register_parameter(
            "bias", nn.Parameter(torch.empty(out_features, **place)) if bias else None
        )

    @classmethod
    def options(cls, spec: Mapping[str, Any], rows: int, columns: int) -> dict[str, Any]:
        """Arguments that ``keys`` of ``spec`` give; ValueError where they are impossible."""
        return {}

    def reset_parameters(self) -> None:
        """Nothing: factors come from a checkpoint."""

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, rank={self.rank}"

    def tensors(self) -> dict[str, Tensor]:
        """Tensors that a checkpoint must hold for this linear, by their names there."""
        return {**dict(self.named_parameters()), **dict(self.named_buffers())}

    @property
    def factors(self) -> tuple[str, ...]:
        """Names of its tensors without the bias; all floats among them are of one dtype."""
        return ("weight", *self.leaves)

    def check_values(self, name: str) -> None:
        """ValueError where tensors of the linear ``name`` hold what no checkpoint may.

        Tensors on ``meta`` pass.
        """
        check_finite(name, self.tensors())
        self.check_indices(name)

    def check_indices(self, name: str) -> None:
        """ValueError where an index of the linear ``name`` points to what is not there."""

    def dense_weight(self) -> Tensor:
        """The product of the factors, (m, n), in fp32 at least."""
        return self.left_factor() @ _wide(self.weight)

    def left_factor(self) -> Tensor:
        """The m x r factor that ``weight`` is multiplied by, in fp32 at least."""
        raise NotImplementedError


class LowRankLinear(FactoredLinear):
    """Form ``uv``: y = U (V x) + bias, V stored as ``weight``."""

    form = "uv"
    leaves = frozenset({"U"})

    def __init__(
        self, in_features: int, out_features: int, rank: int, bias: bool = False, **place: Any
    ) -> None:
        super().__init__(in_features, out_features, rank, bias, **place)
        self.U = nn.Parameter(torch.empty(out_features, rank, **place))  # (m, r)

    def forward(self, input: Tensor) -> Tensor:
        return nn.functional.linear(nn.functional.linear(input, self.weight), self.U, self.bias)

    def left_factor(self) -> Tensor:
        return _wide(self.U)


class PivotLinear(FactoredLinear):
    """Form ``pivot``: h = W_p x, then row i of y is row ``pivots[i]`` of [h; C h] (+ bias).

    W_p is stored as ``weight``, C as ``coef``.
    """

    form = "pivot"
    leaves = frozenset({"coef", "pivots"})
    pivots: Tensor  # (m,) int32, a permutation

    def __init__(
        self, in_features: int, out_features: int, rank: int, bias: bool = False, **place: Any
    ) -> None:
        super().__init__(in_features, out_features, rank, bias, **place)
        self.coef = nn.Parameter(torch.empty(out_features - rank, rank, **place))  # (m - r, r)
        device = place.get("device")
        self.register_buffer("pivots", torch.empty(out_features, dtype=torch.int32, device=device))

    def forward(self, input: Tensor) -> Tensor:
        pivot = nn.functional.linear(input, self.weight)  # (..., r)
        if torch.is_grad_enabled() and self.coef.requires_grad:  # gathering rows of C is faster
            return nn.functional.linear(pivot, self._left(self.coef), self.bias)
        rest = nn.functional.linear(pivot, self.coef)  # (..., m - r)
        output = torch.cat((pivot, rest), dim=-1)  # (..., m)
        output = gather(output, self.pivots.long().expand(output.shape))
        return output if self.bias is None else output + self.bias

    def check_indices(self, name: str) -> None:
        if self.pivots.is_meta:
            return
        check_permutations(f"{name}.pivots", self.pivots)

    def left_factor(self) -> Tensor:
        return self._left(_wide(self.coef))

    def _left(self, coef: Tensor) -> Tensor:
        identity = torch.eye(self.rank, dtype=coef.dtype, device=coef.device)
        return torch.cat((identity, coef)).index_select(0, self.pivots)


class SharedLinear(FactoredLinear):
    """Form ``shared``: channels share the ``clusters`` k columns or rows of a codebook (SWSC).

    With labels l and y_uv = U (V x) + bias, V stored as ``weight``:

    - ``rows``: y_i = (codebook x)_{l_i} + y_uv_i, with a codebook (k, n);
    - ``columns``: y = codebook z + y_uv with z_c the sum of the x_j of label c, codebook (m, k).

    No m x n matrix is made.
    """

    form = "shared"
    leaves = frozenset({"U", "codebook", "labels"})
    keys = frozenset({"clusters", "axis"})
    labels: Tensor  # (m,) for rows, (n,) for columns; int16 where that holds k, else int32

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        bias: bool = False,
        *,
        clusters: int,
        axis: str,
        **place: Any,
    ) -> None:
        super().__init__(in_features, out_features, rank, bias, **place)
        self.axis, self.clusters = axis, clusters
        rows = axis == "rows"
        shape = (clusters, in_features) if rows else (out_features, clusters)
        self.U = nn.Parameter(torch.empty(out_features, rank, **place))  # (m, r)
        self.codebook = nn.Parameter(torch.empty(shape, **place))
        whole = torch.int16 if clusters <= torch.iinfo(torch.int16).max else torch.int32
        channels = out_features if rows else in_features
        labels = torch.empty(channels, dtype=whole, device=place.get("device"))
        self.register_buffer("labels", labels)

    @classmethod
    def options(cls, spec: Mapping[str, Any], rows: int, columns: int) -> dict[str, Any]:
        clusters, axis = spec.get("clusters"), spec.get("axis")
        if axis not in AXES:
            raise ValueError(f"streamcomp: axis {shown(axis)} is impossible: {' or '.join(AXES)}")
        channels = rows if axis == "rows" else columns
        if type(clusters) is not int or not 0 < clusters <= channels:
            raise ValueError(
                f"streamcomp: clusters {shown(clusters)} are impossible for {channels} {axis}"
            )
        return {"clusters": clusters, "axis": axis}

    def forward(self, input: Tensor) -> Tensor:
        output = nn.functional.linear(nn.functional.linear(input, self.weight), self.U, self.bias)
        labels = self.labels.int()  # an index is int32 at least
        if self.axis == "rows":
            shared = nn.functional.linear(input, self.codebook)  # (..., k)
            return output + shared.index_select(-1, labels)
        wide = _wide(input)
        sums = wide.new_zeros(*input.shape[:-1], self.clusters).index_add(-1, labels, wide)
        return output + nn.functional.linear(sums.to(input.dtype), self.codebook)

    def check_indices(self, name: str) -> None:
        if self.labels.is_meta:
            return
        low, high = int(self.labels.min()), int(self.labels.max())
        if low < 0 or high >= self.clusters:
            raise ValueError(
                f"streamcomp: {name}.labels are {low} to {high}, for {self.clusters} clusters"
            )

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, clusters={self.clusters}, axis={self.axis}"

    def dense_weight(self) -> Tensor:
        """The product of the factors and what the channels share, (m, n), in fp32 at least."""
        shared = _wide(self.codebook).index_select(AXES.index(self.axis), self.labels.int())
        return super().dense_weight() + shared

    def left_factor(self) -> Tensor:
        return _wide(self.U)


MODULES: dict[str, type[FactoredLinear]] = {
    module.form: module for module in (LowRankLinear, PivotLinear, SharedLinear)
}

_KEYS = {"form", "rank", "dtype"}


def factored(dense: nn.Linear | Conv1D, spec: Mapping[str, Any]) -> FactoredLinear:
    """An empty factored linear instead of ``dense``, as ``spec`` of the config says.

    ``spec`` holds ``form``, ``rank`` and ``dtype``, and the keys of its form. Raises ValueError.
    """
    form, rank = spec.get("form"), spec.get("rank")
    kind = MODULES.get(form) if isinstance(form, str) else None
    refuse_unknown(set(spec) - _KEYS - (kind.keys if kind else set()))
    if kind is None:
        raise ValueError(f"streamcomp: unknown form {shown(form)}: written by a newer version?")
    check_dtype(spec)
    transposed = isinstance(dense, Conv1D)  # GPT-2's linears
    rows, columns = dense.weight.shape[::-1] if transposed else dense.weight.shape  # (m, n)
    if type(rank) is not int or not 0 < rank < min(rows, columns):
        raise ValueError(f"streamcomp: rank {shown(rank)} is impossible for {rows} x {columns}")
    place = {"device": dense.weight.device, "dtype": dense.weight.dtype}
    bias = dense.bias is not None
    module = kind(columns, rows, rank, bias, **kind.options(spec, rows, columns), **place)
    module.transposed = transposed
    return module


# -- checks ------------------------------------------------------------------------------------


def refuse_unknown(keys: set[str], where: str = "") -> None:
    """ValueError where there are ``keys`` that this reader does not know."""
    if keys:
        place = f" {where}" if where else ""
        raise ValueError(
            f"streamcomp: unknown key {shown(min(keys))}{place}: written by a newer version?"
        )


def check_dtype(spec: Mapping[str, Any]) -> None:
    """ValueError where the dtype in an entry of the config is none of a factor."""
    if "dtype" in spec and spec["dtype"] not in FLOATS:
        raise ValueError(
            f"streamcomp: dtype {shown(spec['dtype'])} is impossible: {', '.join(FLOATS)}"
        )


def check_finite(name: str, tensors: Mapping[str, Tensor]) -> None:
    """ValueError where one of ``tensors`` of the module ``name`` holds NaN or infinity."""
    for leaf, tensor in tensors.items():
        if tensor.is_floating_point() and not tensor.is_meta and not _is_finite(tensor):
            raise ValueError(f"streamcomp: {name}.{leaf} holds NaN or infinity")


def check_permutations(name: str, pivots: Tensor) -> None:
    """ValueError where a row of ``pivots`` (..., m), which has ``name``, is no permutation."""
    order = torch.arange(pivots.shape[-1], dtype=pivots.dtype, device=pivots.device)
    if not bool((pivots.sort().values == order).all()):
        raise ValueError(f"streamcomp: {name} is no permutation of 0 to {len(order) - 1}")


def _is_finite(tensor: Tensor) -> bool:
    """Whether no number is NaN or infinite; the sum is one pass without memory of its own."""
    return bool(tensor.sum().isfinite()) or bool(tensor.isfinite().all())


def shown(value: object, *, quoted: bool = True) -> str:
    """``value`` of a config as one short line; a plain name may go without quotes."""
    if isinstance(value, str) and value.isprintable() and not quoted:
        return value[:200]
    return f"{value!r:.80}"


def gather(output: Tensor, places: Tensor) -> Tensor:
    """``output`` (..., m) in the order of ``places`` (..., m).

    A CPU gathers half-precision numbers one by one, and integers of their size twice as fast.
    """
    if output.element_size() == 2 and not output.requires_grad:
        return output.view(torch.int16).gather(-1, places).view(output.dtype)
    return output.gather(-1, places)


def _wide(tensor: Tensor) -> Tensor:
    """``tensor`` in fp32, or as it is where it is wider."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()
