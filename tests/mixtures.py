"""Compressed mixtures, made without a job: every expert of a model factored by truncated SVD."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from streamcomp.forms import find_form
from streamcomp.forms.experts import (
    ExpertMatrices,
    expert_parts,
    guard_of,
    has_experts,
    matrices_of,
)
from streamcomp.forms.install import NameMap
from streamcomp.integrations.transformers import AUTO_MAP, PLUGIN, plugin_source
from tests.jobs import config_of, stored_tensors

# The rank of one expert's matrix, by the expert's number, the rows m and the columns n.
Ranks = Callable[[int, int, int], int]


def ragged(expert: int, rows: int, columns: int) -> int:
    """Ranks that differ, some of them equal, and a dense matrix among them."""
    return (2, 5, rows, 5, 1)[expert % 5]


def experts_of(model: nn.Module) -> dict[str, nn.Module]:
    """Fused experts of ``model``, by their names there."""
    return {name: module for name, module in model.named_modules() if has_experts(module)}


def factor_experts(
    experts: nn.Module, form: str, ranks: Ranks, dtype: torch.dtype
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The stored tensors of ``experts`` and their entry in the config; they get the products."""
    parts, encode = expert_parts(experts), find_form(form)().encode
    tensors, chosen = dict([guard_of(experts, dtype)]), {}
    for name, (rows, columns) in matrices_of(experts).items():
        count = len(experts.get_parameter(name))
        chosen[name] = [ranks(expert, rows, columns) for expert in range(count)]
        matrices = ExpertMatrices(form, name, rows, columns, tuple(chosen[name]))
        pieces = {}
        for expert in range(count):
            weight = parts.matrix(name, expert).detach()
            encoded = {"weight": weight.clone().to(dtype)}
            if (rank := chosen[name][expert]) < rows:
                left, values, right = torch.linalg.svd(weight.double(), full_matrices=False)
                encoded = encode(left[:, :rank] * values[:rank], right[:rank].clone(), dtype)
                weight.copy_(product(form, encoded))
            pieces[expert] = matrices.pieces(expert, encoded)
        for leaf in matrices.shapes():
            order = range(count) if leaf == matrices.pivots else matrices.order
            tensors[leaf] = torch.cat([pieces[e][leaf] for e in order if leaf in pieces[e]])
        assert {leaf: tuple(tensors[leaf].shape) for leaf in matrices.shapes()} == matrices.shapes()
        if (bias := experts._parameters.get(f"{name}_bias")) is not None:
            tensors[f"{name}_bias"] = bias.detach().clone().to(dtype)
    dtypes = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float64: "F64"}
    return tensors, {"form": form, "ranks": chosen, "dtype": dtypes[dtype]}


def product(form: str, tensors: dict[str, Tensor]) -> Tensor:
    """W' of one matrix's tensors, without the package's code."""
    wide = {name: value.double() for name, value in tensors.items() if value.is_floating_point()}
    if "U" in wide:
        return wide["U"] @ wide["weight"]
    stacked = torch.cat((wide["weight"], wide["coef"] @ wide["weight"]))
    return stacked[tensors["pivots"].long()]


@torch.no_grad()
def save_mixture(
    dense: Path,
    folder: Path,
    form: str = "uv",
    ranks: Ranks = ragged,
    dtype: torch.dtype = torch.float32,
) -> PreTrainedModel:
    """Write the model in ``dense`` with all experts factored; return it with the products."""
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(dense, dtype=dtype).eval()
    model.set_experts_implementation("eager")
    names = NameMap(model)
    state = stored_tensors(dense)
    modules, tensors = {}, dict(state)
    for name, experts in experts_of(model).items():
        on_disk = {k for k in state if (names.parameter(k) or "").rpartition(".")[0] == name}
        disk_name = disk_name_of(names, name, on_disk)
        stored, modules[disk_name] = factor_experts(experts, form, ranks, dtype)
        tensors = {k: v for k, v in tensors.items() if k not in on_disk}
        tensors |= {f"{disk_name}.{leaf}": value for leaf, value in stored.items()}
    folder.mkdir(parents=True)
    for file in dense.iterdir():
        if file.suffix == ".json" and "index" not in file.name:
            (folder / file.name).write_bytes(file.read_bytes())
    floats = {k: v.to(dtype) if v.is_floating_point() else v for k, v in tensors.items()}
    save_file(
        {k: v.contiguous() for k, v in floats.items()},
        folder / "model.safetensors",
        {"format": "pt"},
    )
    (folder / PLUGIN).write_text(plugin_source())
    config = config_of(dense) | {"auto_map": AUTO_MAP}
    config["quantization_config"] = {"quant_method": "streamcomp", "version": 1, "modules": modules}
    (folder / "config.json").write_text(json.dumps(config))
    return model


def disk_name_of(names: NameMap, name: str, on_disk: set[str]) -> str:
    """The prefix on disk of the experts ``name``: the source's, or the model's."""
    prefix = re.sub(r"\.experts\..*", ".experts", min(on_disk))
    for candidate in (prefix, name):
        if any(names.parameter(f"{candidate}.{leaf}") for leaf in ("gate_up_proj", "up_proj")):
            return candidate
    raise AssertionError(name)
