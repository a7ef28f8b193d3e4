"""Factored experts written out as the fused or single matrices of a dense model, or in two factors.

One expert's matrix is in memory at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor
from transformers.core_model_loading import revert_weight_conversion

from streamcomp.checkpoint.index import TensorInfo
from streamcomp.checkpoint.reader import TensorReader, check_finite_on_disk
from streamcomp.checkpoint.writer import Computed, Entry
from streamcomp.errors import CorruptShardError, UnsupportedModelError
from streamcomp.forms.expert_module import FactoredExperts
from streamcomp.forms.experts import ExpertMatrices, names_of
from streamcomp.forms.install import NameMap, place_of
from streamcomp.forms.runtime import check_finite
from streamcomp.forms.uv import Uv
from streamcomp.model.skeleton import Skeleton

__all__ = ["StoredExperts", "stored_experts"]


@dataclass(frozen=True)
class StoredExperts:
    """The factored experts ``name`` of a model, and where their tensors are on disk."""

    skeleton: Skeleton
    name: str
    disk_name: str  # as the config lists them
    module: FactoredExperts

    @property
    def dtype(self) -> str:
        """The dtype of the factors on disk, as safetensors names it."""
        return self._sources(self.module.factors[0])[0].dtype

    def entries(self, info: TensorInfo, factors: Uv | None) -> Iterator[Entry]:
        """The tensors to write instead of ``info``: in ``factors``, or dense where it is None."""
        leaf = next(leaf for leaf in self.module.tensors() if info in self._sources(leaf))
        matrices = next((m for m in self.module.matrices.values() if leaf in m.shapes()), None)
        if matrices is None or (factors is not None and self.module.form == factors.name):
            if factors is None and leaf == names_of(self.module)[0]:
                return  # the guard of factored experts
            with TensorReader() as reader:
                check_finite_on_disk(info, reader)
            yield Entry(info.name, info)
        elif leaf == matrices.right:  # the other tensors are made where this one is
            yield from (
                self._dense_entries(matrices, info)
                if factors is None
                else self._factor_entries(matrices, factors)
            )

    def _sources(self, leaf: str) -> list[TensorInfo]:
        return self.skeleton.sources.get(f"{self.name}.{leaf}", [])

    def _pieces(self, matrices: ExpertMatrices, expert: int) -> dict[str, Tensor]:
        """One expert's parts of the stored tensors, read from disk."""
        pieces = {}
        with TensorReader() as reader:
            for leaf, place in matrices.slices(expert).items():
                pieces[leaf] = reader.read(_cut(self._sources(leaf)[0], place))
        try:
            check_finite(self.name, pieces)
        except ValueError as error:
            folder = self.skeleton.index.folder
            raise CorruptShardError(f"{folder}: {error}; the checkpoint is damaged") from None
        return pieces

    # -- in two factors ------------------------------------------------------------------------

    def _factor_entries(self, matrices: ExpertMatrices, factors: Uv) -> Iterator[Entry]:
        target = replace(matrices, form=factors.name)
        source = self._sources(matrices.right)[0]
        owner, dtype = source.name.removesuffix(matrices.right), source.torch_dtype

        def parts(leaf: str) -> Iterator[Tensor]:
            for expert in target.order:
                tensors = matrices.tensors(expert, self._pieces(matrices, expert))
                if matrices.ranks[expert] < matrices.rows:
                    left = matrices.linear(tensors).left_factor().to(dtype)
                    tensors = {"weight": tensors["weight"], factors.rows_tensor: left}
                pieces = target.pieces(expert, tensors)
                if leaf in pieces:
                    yield pieces[leaf]

        for leaf, shape in target.shapes().items():
            yield Entry(owner + leaf, Computed(dtype, shape, partial(parts, leaf)))

    # -- dense ---------------------------------------------------------------------------------

    def _dense_entries(self, matrices: ExpertMatrices, info: TensorInfo) -> Iterator[Entry]:
        """The dense matrices, by the names that transformers gives them on disk."""
        owner, count = info.name.removesuffix(f".{matrices.right}"), len(matrices.ranks)
        shape = (matrices.rows, matrices.columns)
        stack = torch.empty(2, *(reversed(shape) if self._is_transposed else shape), device="meta")
        two = self._reverted(matrices, stack)
        names = NameMap(self.skeleton.model, [f"{self.name}.{matrices.name}"])
        for name, like in self._reverted(matrices, stack[:1]).items():
            make = partial(self._dense, matrices, name, info.torch_dtype)
            if name in two and len(two[name]) == 2 * len(like):  # all experts in one tensor
                shape = (count * len(like), *like.shape[1:])
                fused = Computed(info.torch_dtype, shape, partial(map, make, range(count)))
                yield Entry(self._disk_name(names, owner, name, matrices), fused)
                continue
            for expert in range(count):
                single = Computed(info.torch_dtype, tuple(like.shape), partial(make, expert))
                numbered = _numbered(name, two, expert)
                yield Entry(self._disk_name(names, owner, numbered, matrices), single)

    def _dense(
        self, matrices: ExpertMatrices, name: str, dtype: torch.dtype, expert: int
    ) -> Tensor:
        """The tensor ``name`` on disk of one expert."""
        weight = matrices.dense_weight(expert, self._pieces(matrices, expert)).to(dtype)
        weight = weight.T if self._is_transposed else weight
        return self._reverted(matrices, weight[None])[name]

    @property
    def _is_transposed(self) -> bool:
        return bool(self.module.is_transposed)

    def _reverted(self, matrices: ExpertMatrices, stack: Tensor) -> dict[str, Tensor]:
        """``stack`` (experts, ...) of the dense parameter as transformers would save it."""
        vars(self.skeleton.model).pop("_weight_conversions", None)  # only those of a loading before
        dense = {f"{self.name}.{matrices.name}": stack}
        reverted: dict[str, Tensor] = revert_weight_conversion(self.skeleton.model, dense)
        return reverted

    def _disk_name(self, names: NameMap, owner: str, name: str, matrices: ExpertMatrices) -> str:
        """``name``, as transformers saves it, behind the prefix of the folder's names, ``owner``.

        UnsupportedModelError where transformers would not load it into the dense parameter.
        """
        parameter, parts = f"{self.name}.{matrices.name}", owner.split(".")
        suffixes = (".".join(parts[start:]) + "." for start in range(len(parts)))
        suffix = next((suffix for suffix in suffixes if suffix in name), None)
        candidates = [name] if suffix is None else [f"{owner}.{name.partition(suffix)[2]}", name]
        for candidate in candidates:
            if names.parameter(candidate) == parameter:
                return candidate
        raise UnsupportedModelError(
            f"{self.skeleton.index.folder}: no name on disk is loaded into {parameter}: it cannot "
            "be exported dense"
        )


def stored_experts(skeleton: Skeleton) -> dict[str, StoredExperts]:
    """Factored experts by the names on disk of their tensors."""
    stored = {}
    names = NameMap(skeleton.model)
    for disk_name in skeleton.modules or {}:
        name = place_of(names, disk_name) or ""
        module = skeleton.model.get_submodule(name)
        if isinstance(module, FactoredExperts):
            experts = StoredExperts(skeleton, name, disk_name, module)
            for leaf in module.tensors():
                for info in skeleton.sources.get(f"{name}.{leaf}", []):
                    stored[info.name] = experts
    return stored


def _numbered(name: str, two: dict[str, Tensor], expert: int) -> str:
    """``name`` of expert 0 for another ``expert``; ``two`` are the names of two experts."""
    parts = name.split(".")
    for place, part in enumerate(parts):
        if part == "0":
            second = [*parts[:place], "1", *parts[place + 1 :]]
            if ".".join(second) in two:
                return ".".join([*parts[:place], str(expert), *parts[place + 1 :]])
    raise AssertionError(name)


def _cut(info: TensorInfo, place: slice) -> TensorInfo:
    """``place`` along the first axis of a tensor on disk."""
    width = info.nbytes // info.shape[0]
    start, stop = info.start + place.start * width, info.start + place.stop * width
    return replace(info, shape=(place.stop - place.start, *info.shape[1:]), start=start, stop=stop)
