"""Puts factored modules into a model, as its config lists them. Needs torch and transformers alone.

Names in the config are those on disk. What the config or the headers of the shards say is refused
where a module could not run as it was compressed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
from transformers.pytorch_utils import Conv1D

from streamcomp.forms.expert_module import FactoredExperts, factored_experts
from streamcomp.forms.experts import EXPERT_LEAVES, FIRST_MATRICES, has_experts
from streamcomp.forms.runtime import (
    FLOATS,
    FORMAT_VERSION,
    MODULES,
    FactoredLinear,
    factored,
    refuse_unknown,
    shown,
)

__all__ = ["FACTORED", "NameMap", "check_stored", "install_factored", "modules_of", "place_of"]

# Modules that run factors.
FACTORED = (FactoredLinear, FactoredExperts)

# A tensor's dtype and shape, as the header of a safetensors file has them.
Stored = tuple[str, Sequence[int]]

_INDICES = {torch.int32: "I32", torch.int16: "I16"}
_CONFIG_KEYS = {"quant_method", "version", "modules"}


def modules_of(quantization: object) -> dict[str, dict[str, Any]]:
    """``modules`` of a config's ``quantization_config``: entries by the names of modules on disk.

    A key that is not known is refused, here and in each entry, for a reader that skips what it
    does not know returns a wrong model. Raises ValueError.
    """
    if not isinstance(quantization, dict):
        raise ValueError(f"streamcomp: quantization_config is {shown(quantization)}, no object")
    version, modules = quantization.get("version"), quantization.get("modules")
    if type(version) is not int or version != FORMAT_VERSION:
        raise ValueError(
            f"streamcomp: format version {shown(version)}, this reader knows {FORMAT_VERSION}"
        )
    if quantization.get("quant_method") != "streamcomp":
        raise ValueError("streamcomp: quantization_config is another method's")
    refuse_unknown(set(quantization) - _CONFIG_KEYS, "in quantization_config")
    if not isinstance(modules, dict):
        raise ValueError(f"streamcomp: modules of quantization_config is {shown(modules)}")
    for name, spec in modules.items():
        if not isinstance(spec, dict):
            raise ValueError(f"streamcomp: the entry of {shown(name)} is {shown(spec)}")
    return modules


class NameMap:
    """Maps names on disk to the parameters of ``model`` that transformers loads them into.

    ``others`` are parameters that the model would have, were it dense.
    """

    def __init__(self, model: PreTrainedModel, others: Iterable[str] = ()) -> None:
        mapping = get_model_conversion_mapping(model)
        self._renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
        self._converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
        self._prefix = model.base_model_prefix
        self._known = {**model.state_dict(), **dict.fromkeys(others, torch.empty(0))}

    def parameter(self, key: str) -> str | None:
        """The parameter that ``key`` is loaded into, None if there is none."""
        name, _ = rename_source_key(
            key, self._renamings, self._converters, self._prefix, self._known
        )
        if name not in self._known:
            name = key
        return name if name in self._known else None


def install_factored(model: PreTrainedModel, modules: Mapping[str, Mapping[str, Any]]) -> None:
    """Put empty factored linears and experts into ``model`` for each of ``modules``, by its name.

    Raises ValueError naming the module that is not there, of another kind, or of unknown form.
    """
    names, head = NameMap(model), model.get_output_embeddings()
    for disk_name, spec in modules.items():
        name, show = place_of(names, disk_name), shown(disk_name, quoted=False)
        if name is None:
            raise ValueError(f"streamcomp: {type(model).__name__} has no module {show}")
        parent, _, leaf = name.rpartition(".")
        owner = model.get_submodule(parent)
        dense = getattr(owner, leaf)
        if dense is head or isinstance(dense, FACTORED):
            why = "the head, which stays dense" if dense is head else "listed by two names"
            raise ValueError(f"streamcomp: {show} is {why}")
        if not isinstance(dense, nn.Linear | Conv1D) and not has_experts(dense):
            raise ValueError(f"streamcomp: {show} is a {type(dense).__name__}, no linear")
        kind = "linear" if isinstance(dense, nn.Linear | Conv1D) else "experts"
        try:
            made = factored(dense, spec) if kind == "linear" else factored_experts(dense, spec)
        except ValueError as error:
            raise ValueError(f"{error} ({kind} {show})") from None
        setattr(owner, leaf, made)


def place_of(names: NameMap, disk_name: str) -> str | None:
    """The name in the model of the module called ``disk_name`` on disk; None without one."""
    parameters = (names.parameter(f"{disk_name}.{leaf}") for leaf in ("weight", *FIRST_MATRICES))
    parameter = next(filter(None, parameters), None)
    return parameter and parameter.rpartition(".")[0]


def check_stored(model: PreTrainedModel, tensors: Mapping[str, Stored]) -> None:
    """Compare the factored modules of ``model`` with the headers of its shards.

    ``tensors`` are dtype and shape of each tensor by its name on disk, as safetensors says them.
    Raises ValueError naming the first tensor that is missing, of another dtype or shape, or a
    factor of a module that the config does not list.
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
        if isinstance(module, FACTORED):
            _check_module(name, module, stored)


def _check_module(
    name: str, module: FactoredLinear | FactoredExperts, stored: Mapping[str, list[Stored]]
) -> None:
    """Compare one factored module with the tensors that are ``stored`` for each parameter."""
    for leaf, tensor in module.tensors().items():
        entries = stored.get(f"{name}.{leaf}", [])
        if len(entries) != 1 and not (entries and leaf in module.converted):
            why = "is in the checkpoint twice" if entries else "is missing from the checkpoint"
            raise ValueError(f"streamcomp: {name}.{leaf} {why}")
        if leaf not in module.converted:
            _check_tensor(f"{name}.{leaf}", tensor, entries[0])
    dtypes = {stored[f"{name}.{leaf}"][0][0] for leaf in module.factors}
    if len(dtypes & set(FLOATS)) > 1:
        raise ValueError(f"streamcomp: the factors of {name} are {' and '.join(sorted(dtypes))}")


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
    """ValueError where ``key``, which no parameter takes, is a factor of some module."""
    owner, _, leaf = key.rpartition(".")
    dense = next((dense for dense, leaves in EXPERT_LEAVES.items() if leaf in leaves), None)
    if dense is None and any(leaf in kind.leaves for kind in MODULES.values()):
        dense = "weight"
    parameter = dense and names.parameter(f"{owner}.{dense}")
    if not parameter:
        return
    module = model.get_submodule(parameter.rpartition(".")[0])
    if isinstance(module, nn.Linear | Conv1D | FactoredExperts) or has_experts(module):
        raise ValueError(
            f"streamcomp: {shown(key, quoted=False)} is a factor that the config does not list"
        )
