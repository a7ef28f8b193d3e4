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
    "FORMAT_VERSION",
    "FORMS",
    "FactoredLinear",
    "LowRankLinear",
    "NameMap",
    "PivotLinear",
    "factored",
    "install_factored",
]

FORMAT_VERSION = 1


class FactoredLinear(nn.Linear):
    """A linear of ``rank`` r below both its sides: n inputs, m outputs."""

    form = ""
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
        rest = nn.functional.linear(pivot, self.coef)  # (..., m - r)
        output = torch.cat((pivot, rest), dim=-1).index_select(-1, self.pivots)  # (..., m)
        return output if self.bias is None else output + self.bias

    def left_factor(self) -> Tensor:
        coef = _wide(self.coef)
        identity = torch.eye(self.rank, dtype=coef.dtype, device=coef.device)
        return torch.cat((identity, coef)).index_select(0, self.pivots)


FORMS: dict[str, type[FactoredLinear]] = {
    module.form: module for module in (LowRankLinear, PivotLinear)
}


def factored(dense: nn.Linear, spec: Mapping[str, Any]) -> FactoredLinear:
    """An empty factored linear in the place of ``dense``, as ``spec`` of the config says.

    ``spec`` holds ``form``, ``rank`` and ``dtype``; anything else is refused, for a reader
    that skips what it does not know returns a wrong model. Raises ValueError.
    """
    unknown = sorted(set(spec) - {"form", "rank", "dtype"})
    if unknown:
        raise ValueError(f"streamcomp: unknown key {unknown[0]!r}: written by a newer version?")
    form, rank = spec.get("form"), spec.get("rank")
    if form not in FORMS:
        raise ValueError(f"streamcomp: unknown form {form!r}: written by a newer version?")
    rows, columns = dense.out_features, dense.in_features
    if not isinstance(rank, int) or not 0 < rank < min(rows, columns):
        raise ValueError(f"streamcomp: rank {rank!r} is impossible for {rows} x {columns}")
    place = {"device": dense.weight.device, "dtype": dense.weight.dtype}
    return FORMS[form](columns, rows, rank, dense.bias is not None, **place)


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


def _wide(tensor: Tensor) -> Tensor:
    """``tensor`` in fp32, or as it is where it is wider."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()
