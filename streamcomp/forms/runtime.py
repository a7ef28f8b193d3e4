"""The linears of a compressed model at run time. Needs torch and transformers alone.

Each is an ``nn.Linear`` by inheritance, so that adapters and tools that look for linears
find them, and each names its r x n factor ``weight``: a program that does not know the
format meets a weight of the wrong shape and stops, instead of making up random ones.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
from transformers.pytorch_utils import Conv1D

__all__ = [
    "AXES",
    "FLOATS",
    "FORMAT_VERSION",
    "MODULES",
    "FactoredLinear",
    "LowRankLinear",
    "NameMap",
    "PivotLinear",
    "SharedLinear",
    "check_stored",
    "factored",
    "install_factored",
    "modules_of",
]

FORMAT_VERSION = 1

# Dtypes of factors, as safetensors names them.
FLOATS = ("F64", "F32", "F16", "BF16")

_INDICES = {torch.int32: "I32", torch.int16: "I16"}

# A tensor's dtype and shape, as the header of a safetensors file has them.
Stored = tuple[str, Sequence[int]]

# Which channels of a linear share weights: outputs (rows) or inputs (columns).
AXES = ("rows", "columns")


class FactoredLinear(nn.Linear):
    """A linear of ``rank`` r below both its sides: n inputs, m outputs."""

    form = ""
    leaves: frozenset[str] = frozenset()  # names of its tensors, without weight and bias
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

    def check_values(self, name: str) -> None:
        """ValueError where tensors of the linear ``name`` hold what no checkpoint may.

        Tensors on ``meta`` pass.
        """
        for leaf, tensor in self.tensors().items():
            if tensor.is_floating_point() and not tensor.is_meta and not _is_finite(tensor):
                raise ValueError(f"streamcomp: {name}.{leaf} holds NaN or infinity")
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
        output = _gather(output, self.pivots.long().expand(output.shape))
        return output if self.bias is None else output + self.bias

    def check_indices(self, name: str) -> None:
        if self.pivots.is_meta:
            return
        rows = torch.arange(len(self.pivots), dtype=torch.int32, device=self.pivots.device)
        if not torch.equal(self.pivots.sort().values, rows):
            raise ValueError(f"streamcomp: {name}.pivots is no permutation of 0 to {len(rows) - 1}")

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
            raise ValueError(f"streamcomp: axis {_shown(axis)} is impossible: {' or '.join(AXES)}")
        channels = rows if axis == "rows" else columns
        if type(clusters) is not int or not 0 < clusters <= channels:
            raise ValueError(
                f"streamcomp: clusters {_shown(clusters)} are impossible for {channels} {axis}"
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

_CONFIG_KEYS = {"quant_method", "version", "modules"}
_KEYS = {"form", "rank", "dtype"}


def modules_of(quantization: object) -> dict[str, dict[str, Any]]:
    """``modules`` of a config's ``quantization_config``: entries by the names of linears on disk.

    A key that is not known is refused, here and in each entry, for a reader that skips what it
    does not know returns a wrong model. Raises ValueError.
    """
    if not isinstance(quantization, dict):
        raise ValueError(f"streamcomp: quantization_config is {_shown(quantization)}, no object")
    version, modules = quantization.get("version"), quantization.get("modules")
    if type(version) is not int or version != FORMAT_VERSION:
        raise ValueError(
            f"streamcomp: format version {_shown(version)}, this reader knows {FORMAT_VERSION}"
        )
    if quantization.get("quant_method") != "streamcomp":
        raise ValueError("streamcomp: quantization_config is another method's")
    _refuse_unknown(set(quantization) - _CONFIG_KEYS, "in quantization_config")
    if not isinstance(modules, dict):
        raise ValueError(f"streamcomp: modules of quantization_config is {_shown(modules)}")
    for name, spec in modules.items():
        if not isinstance(spec, dict):
            raise ValueError(f"streamcomp: the entry of {_shown(name)} is {_shown(spec)}")
    return modules


def factored(dense: nn.Linear | Conv1D, spec: Mapping[str, Any]) -> FactoredLinear:
    """An empty factored linear instead of ``dense``, as ``spec`` of the config says.

    ``spec`` holds ``form``, ``rank`` and ``dtype``, and the keys of its form. Raises ValueError.
    """
    form, rank = spec.get("form"), spec.get("rank")
    kind = MODULES.get(form) if isinstance(form, str) else None
    _refuse_unknown(set(spec) - _KEYS - (kind.keys if kind else set()))
    if kind is None:
        raise ValueError(f"streamcomp: unknown form {_shown(form)}: written by a newer version?")
    if "dtype" in spec and spec["dtype"] not in FLOATS:
        raise ValueError(
            f"streamcomp: dtype {_shown(spec['dtype'])} is impossible: {', '.join(FLOATS)}"
        )
    transposed = isinstance(dense, Conv1D)  # GPT-2's linears
    rows, columns = dense.weight.shape[::-1] if transposed else dense.weight.shape  # (m, n)
    if type(rank) is not int or not 0 < rank < min(rows, columns):
        raise ValueError(f"streamcomp: rank {_shown(rank)} is impossible for {rows} x {columns}")
    place = {"device": dense.weight.device, "dtype": dense.weight.dtype}
    bias = dense.bias is not None
    module = kind(columns, rows, rank, bias, **kind.options(spec, rows, columns), **place)
    module.transposed = transposed
    return module


def _refuse_unknown(keys: set[str], where: str = "") -> None:
    if keys:
        place = f" {where}" if where else ""
        raise ValueError(
            f"streamcomp: unknown key {_shown(min(keys))}{place}: written by a newer version?"
        )


class NameMap:
    """Maps names on disk to the parameters of ``model`` that transformers loads them into."""

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
    names, head = NameMap(model), model.get_output_embeddings()
    for disk_name, spec in modules.items():
        parameter, shown = names.parameter(f"{disk_name}.weight"), _shown(disk_name, quoted=False)
        if parameter is None:
            raise ValueError(f"streamcomp: {type(model).__name__} has no module {shown}")
        parent, _, leaf = parameter.removesuffix(".weight").rpartition(".")
        owner = model.get_submodule(parent)
        dense = getattr(owner, leaf)
        if not isinstance(dense, nn.Linear | Conv1D):
            raise ValueError(f"streamcomp: {shown} is a {type(dense).__name__}, no linear")
        if dense is head or isinstance(dense, FactoredLinear):
            why = "the head, which stays dense" if dense is head else "listed by two names"
            raise ValueError(f"streamcomp: {shown} is {why}")
        try:
            setattr(owner, leaf, factored(dense, spec))
        except ValueError as error:
            raise ValueError(f"{error} (linear {shown})") from None


def check_stored(model: PreTrainedModel, tensors: Mapping[str, Stored]) -> None:
    """Compare the factored linears of ``model`` with the headers of its shards.

    ``tensors`` are dtype and shape of each tensor by its name on disk, as safetensors says them.
    Raises ValueError naming the first tensor that is missing, of another dtype or shape, or a
    factor of a linear that the config does not list.
    """
    names = NameMap(model)
    stored: dict[str, list[Stored]] = {}
    for key, entry in tensors.items():
        parameter = names.parameter(key)
        if parameter is not None:
            stored.setdefault(parameter, []).append(entry)
        else:
            _refuse_factor(model, names, key)
    for name, module in model.named_modules():
        if isinstance(module, FactoredLinear):
            for leaf, tensor in module.tensors().items():
                entries = stored.get(f"{name}.{leaf}", [])
                if len(entries) != 1:
                    why = (
                        "is in the checkpoint twice"
                        if entries
                        else "is missing from the checkpoint"
                    )
                    raise ValueError(f"streamcomp: {name}.{leaf} {why}")
                _check_tensor(f"{name}.{leaf}", tensor, entries[0])
            dtypes = {stored[f"{name}.{leaf}"][0][0] for leaf in ("weight", *module.leaves)}
            if len(dtypes & set(FLOATS)) > 1:
                raise ValueError(
                    f"streamcomp: the factors of {name} are {' and '.join(sorted(dtypes))}"
                )


def _check_tensor(name: str, tensor: Tensor, entry: Stored) -> None:
    dtype, shape = entry
    if tuple(shape) != tuple(tensor.shape):
        raise ValueError(
            f"streamcomp: {name} is {list(shape)[:8]} in the checkpoint, the config makes it "
            f"{list(tensor.shape)}"
        )
    allowed = FLOATS if tensor.is_floating_point() else (_INDICES[tensor.dtype],)
    if dtype not in allowed:
        raise ValueError(
            f"streamcomp: {name} is {dtype} in the checkpoint, it has to be {', '.join(allowed)}"
        )


def _refuse_factor(model: PreTrainedModel, names: NameMap, key: str) -> None:
    """ValueError where ``key``, which no parameter takes, is a factor of some linear."""
    owner, _, leaf = key.rpartition(".")
    if not any(leaf in kind.leaves for kind in MODULES.values()):
        return
    weight = names.parameter(f"{owner}.weight")
    if weight and isinstance(model.get_submodule(weight.rpartition(".")[0]), nn.Linear | Conv1D):
        raise ValueError(
            f"streamcomp: {_shown(key, quoted=False)} is a factor that the config does not list"
        )


def _is_finite(tensor: Tensor) -> bool:
    """Whether no number is NaN or infinite; the sum is one pass without memory of its own."""
    return bool(tensor.sum().isfinite()) or bool(tensor.isfinite().all())


def _shown(value: object, *, quoted: bool = True) -> str:
    """``value`` of a config as one short line; a plain name may go without quotes."""
    if isinstance(value, str) and value.isprintable() and not quoted:
        return value[:200]
    return f"{value!r:.80}"


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
