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
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

__all__ = [
    "AXES",
    "FORMAT_VERSION",
    "MODULES",
    "FactoredLinear",
    "LowRankLinear",
    "NameMap",
    "PivotLinear",
    "SharedLinear",
    "factored",
    "install_factored",
]

FORMAT_VERSION = 1

# Which channels of a linear share weights: outputs (rows) or inputs (columns).
AXES = ("rows", "columns")


class FactoredLinear(nn.Linear):
    """A linear of ``rank`` r below both its sides: n inputs, m outputs."""

    form = ""
    keys: frozenset[str] = frozenset()  # in the config's entry, in addition to those of every form
    weight: nn.Parameter  # (r, n)

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
        """What a checkpoint must hold for this linear, by the name it has there."""
        return {**dict(self.named_parameters()), **dict(self.named_buffers())}

    def dense_weight(self) -> Tensor:
        """The product of the factors, (m, n), in fp32 at least."""
        return self.left_factor() @ _wide(self.weight)

    def left_factor(self) -> Tensor:
        """The m x r factor that ``weight`` is multiplied by, in fp32 at least."""
        raise NotImplementedError


class LowRankLinear(FactoredLinear):
    """Form ``uv``: y = U (V x) + bias, V stored as ``weight``."""

    form = "uv"

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
        output = _gather(output, self.pivots.long().expand(output.shape))
        return output if self.bias is None else output + self.bias

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
            raise ValueError(f"streamcomp: axis {axis!r} is impossible: {' or '.join(AXES)}")
        channels = rows if axis == "rows" else columns
        if type(clusters) is not int or not 0 < clusters <= channels:
            raise ValueError(
                f"streamcomp: clusters {clusters!r} are impossible for {channels} {axis}"
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


def factored(dense: nn.Linear, spec: Mapping[str, Any]) -> FactoredLinear:
    """An empty factored linear instead of ``dense``, as ``spec`` of the config says.

    ``spec`` holds ``form``, ``rank`` and ``dtype``, and the keys of its form. Anything else is
    refused, for a reader that skips what it does not know returns a wrong model. Raises ValueError.
    """
    form, rank = spec.get("form"), spec.get("rank")
    kind = MODULES.get(form) if isinstance(form, str) else None
    unknown = sorted(set(spec) - _KEYS - (kind.keys if kind else set()))
    if unknown:
        raise ValueError(f"streamcomp: unknown key {unknown[0]!r}: written by a newer version?")
    if kind is None:
        raise ValueError(f"streamcomp: unknown form {form!r}: written by a newer version?")
    rows, columns = dense.out_features, dense.in_features
    if type(rank) is not int or not 0 < rank < min(rows, columns):
        raise ValueError(f"streamcomp: rank {rank!r} is impossible for {rows} x {columns}")
    place = {"device": dense.weight.device, "dtype": dense.weight.dtype}
    bias = dense.bias is not None
    return kind(columns, rows, rank, bias, **kind.options(spec, rows, columns), **place)


class NameMap:
    """Where transformers loads a checkpoint's tensors: names on disk -> parameters of ``model``."""

    def __init__(self, model: PreTrainedModel) -> None:
        mapping = get_model_conversion_mapping(model)
        self._renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
        self._converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
        self._prefix = model.base_model_prefix
        self._known = model.state_dict()

    def parameter(self, key: str) -> str | None:
        """The parameter that ``key`` is loaded into, None if there is none."""
        name, _ = rename_source_key(
            key, self._renamings, self._converters, self._prefix, self._known
        )
        if name not in self._known:
            name = key
        return name if name in self._known else None


def install_factored(model: PreTrainedModel, modules: Mapping[str, Mapping[str, Any]]) -> None:
    """Put empty factored linears into ``model`` for each of ``modules`` (names on disk).

    Raises ValueError naming the module that is not there, no linear, or of unknown form.
    """
    names = NameMap(model)
    for disk_name, spec in modules.items():
        parameter = names.parameter(f"{disk_name}.weight")
        if parameter is None:
            raise ValueError(f"streamcomp: {type(model).__name__} has no module {disk_name}")
        parent, _, leaf = parameter.removesuffix(".weight").rpartition(".")
        owner = model.get_submodule(parent)
        dense = getattr(owner, leaf)
        if not isinstance(dense, nn.Linear):
            raise ValueError(f"streamcomp: {disk_name} is a {type(dense).__name__}, no linear")
        setattr(owner, leaf, factored(dense, spec))


def _gather(output: Tensor, places: Tensor) -> Tensor:
    """``output`` (..., m) in the order of ``places`` (..., m).

    A CPU gathers half-precision numbers one by one, and integers of their size twice as fast.
    """
    if output.element_size() == 2 and not output.requires_grad:
        return output.view(torch.int16).gather(-1, places).view(output.dtype)
    return output.gather(-1, places)


def _wide(tensor: Tensor) -> Tensor:
    """``tensor`` in fp32, or as it is where it is wider."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()
