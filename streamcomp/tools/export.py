"""Writes a compressed model for tools that do not support factored linears."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Set
from pathlib import Path
from typing import Any

from torch import Tensor

from streamcomp.checkpoint.atomic import make_folder, write_json, write_text
from streamcomp.checkpoint.files import companion_digests
from streamcomp.checkpoint.index import CheckpointIndex, TensorInfo, read_json
from streamcomp.checkpoint.reader import TensorReader, check_finite_on_disk
from streamcomp.checkpoint.writer import Computed, Entry, write_shard
from streamcomp.errors import CorruptShardError, OutputError, RecipeError, UnsupportedModelError
from streamcomp.forms import find_form
from streamcomp.forms.runtime import FactoredLinear
from streamcomp.forms.uv import Uv
from streamcomp.job.progress import JobProgress
from streamcomp.job.publish import copy_companions, quantization_config, write_index
from streamcomp.model.sites import empty_factored
from streamcomp.model.skeleton import Skeleton
from streamcomp.tools.export_experts import StoredExperts, stored_experts

__all__ = ["export_checkpoint"]

# What linears may be exported as; None: one dense matrix.
_FORMS: dict[str, Uv | None] = {"dense": None, Uv.name: Uv()}
_MARKER = ".streamcomp-export.json"


def export_checkpoint(
    index: CheckpointIndex,
    destination: Path,
    form: str,
    extra: dict[str, str],
    auto_map: dict[str, str],
    progress: JobProgress,
) -> Path:
    """Write ``index``, a compressed model, to ``destination`` in ``form``.

    ``dense`` multiplies the factors out; ``uv`` turns pivots into a plain left factor, and refuses
    channels that share weights. One linear, or one expert's matrix, is in memory at a time.
    ``extra`` are small files that only ``uv`` needs, and ``auto_map`` the config's way to them. A
    run that was interrupted goes on after its last whole shard.
    """
    if form not in _FORMS:
        raise RecipeError(f"form {form!r} unknown; one of: {', '.join(_FORMS)}")
    skeleton = Skeleton(index)
    if skeleton.modules is None:
        raise UnsupportedModelError(f"{index.folder} is not compressed: there is nothing to export")
    if destination.resolve() == index.folder.resolve():
        raise OutputError(f"{destination} is the model's own folder: give another DEST")
    modules, experts = skeleton.modules, stored_experts(skeleton)
    linears = {name: spec for name, spec in modules.items() if "ranks" not in spec}
    factors, transposed = _FORMS[form], _transposed(skeleton)
    if factors is not None:
        _check_products(linears)
    _check_names(index, linears)
    skeleton.check_tensors(head=True)
    _claim(index, destination, form)
    shards = []
    progress.begin("export", [1.0] * len(index.shards), 0, 0)
    try:
        for number, shard in enumerate(index.shards):
            started = time.perf_counter()
            target = destination / shard.name
            if not target.exists():
                progress.stage(number, shard.name, "writing", 0.0)
                entries = _entries(index, shard, linears, experts, factors, transposed)
                write_shard(target, entries)
            shards.append(target)
            progress.finish_step(number, shard.name, time.perf_counter() - started, "")
    finally:
        progress.end()
    copy_companions(index.folder, destination, companion_digests(index.folder))
    config = {k: v for k, v in index.config.items() if k != "quantization_config"}
    config.pop("auto_map", None)
    if factors is not None:
        for name, text in extra.items():
            write_text(destination / name, text)
        specs = {name: spec | {"form": form} for name, spec in modules.items()}
        dtypes = {name: info.dtype for name, info in index.tensors.items()}
        dtypes |= {f"{stored.disk_name}.weight": stored.dtype for stored in experts.values()}
        config["quantization_config"] = quantization_config(specs, dtypes)
        config["auto_map"] = auto_map
    write_index(destination, shards)
    write_json(destination / "config.json", config)
    (destination / _MARKER).unlink(missing_ok=True)
    return destination


def _check_names(index: CheckpointIndex, modules: Mapping[str, Any]) -> None:
    """UnsupportedModelError where a factored linear has no tensor of its name on disk."""
    missing = [name for name in modules if f"{name}.weight" not in index.tensors]
    if missing:
        raise UnsupportedModelError(
            f"{index.folder} stores {missing[0]} by another name (it was saved by another class "
            "than it was compressed as): export the folder that streamcomp wrote"
        )


def _transposed(skeleton: Skeleton) -> frozenset[str]:
    """Names on disk of the factored linears whose dense weight is stored (n, m)."""
    return frozenset(
        skeleton.source_of(f"{name}.weight").name.removesuffix(".weight")
        for name, module in skeleton.model.named_modules()
        if isinstance(module, FactoredLinear) and module.transposed
    )


def _check_products(modules: dict[str, dict[str, Any]]) -> None:
    """Refuse a form that two factors cannot express, naming its first linear."""
    for name, spec in modules.items():
        if not find_form(spec["form"]).is_product:
            raise RecipeError(
                f"{name} has channels that share weights, no two factors hold them: "
                "export it with --form dense"
            )


def _claim(index: CheckpointIndex, destination: Path, form: str) -> None:
    """Mark an empty ``destination`` as an export, or recognise an unfinished export."""
    marks = [[s.name, s.stat().st_size, s.stat().st_mtime_ns] for s in index.shards]
    marker = {"source": str(index.folder.resolve()), "form": form, "shards": marks}
    path = destination / _MARKER
    if path.is_file():
        if read_json(path) == marker:
            return
        raise OutputError(f"{destination} holds another unfinished export: give another DEST")
    if destination.exists() and (not destination.is_dir() or any(destination.iterdir())):
        raise OutputError(f"{destination} is not an empty folder: give another DEST")
    make_folder(destination)
    write_json(path, marker)


def _entries(
    index: CheckpointIndex,
    shard: Path,
    modules: dict[str, dict[str, Any]],
    experts: Mapping[str, StoredExperts],
    factors: Uv | None,
    transposed: Set[str],
) -> Iterator[Entry]:
    """The tensors to write instead of those in ``shard``.

    ``modules`` are linears, ``experts`` by the names of their tensors.
    """
    for name, info in index.tensors.items():
        owner, _, leaf = name.rpartition(".")
        if info.shard != shard:
            continue
        if name in experts:
            yield from experts[name].entries(info, factors)
        elif owner not in modules or leaf == "bias":
            with TensorReader() as reader:
                check_finite_on_disk(info, reader)
            yield Entry(name, info)
        elif leaf == "weight":
            if factors is None:
                yield _dense_entry(index, owner, modules[owner], info, owner in transposed)
            else:
                yield from _factored_entries(index, owner, modules[owner], info, factors)


def _dense_entry(
    index: CheckpointIndex, owner: str, spec: dict[str, Any], weight: TensorInfo, transposed: bool
) -> Entry:
    """The product of one linear's factors, computed when its turn comes."""
    shape, dtype = _shape(index, owner, spec), weight.torch_dtype

    def product() -> Tensor:
        dense = _load(index, owner, spec).dense_weight().to(dtype)
        return dense.T if transposed else dense

    shape = shape[::-1] if transposed else shape
    return Entry(f"{owner}.weight", Computed(dtype, shape, product))


def _factored_entries(
    index: CheckpointIndex, owner: str, spec: dict[str, Any], weight: TensorInfo, factors: Uv
) -> Iterator[Entry]:
    """One linear's factors, computed when their turn comes."""
    yield Entry(f"{owner}.weight", weight)
    shape, dtype = (_shape(index, owner, spec)[0], weight.shape[0]), weight.torch_dtype
    factor = Computed(dtype, shape, lambda: _load(index, owner, spec).left_factor().to(dtype))
    yield Entry(f"{owner}.{factors.rows_tensor}", factor)


def _shape(index: CheckpointIndex, owner: str, spec: dict[str, Any]) -> tuple[int, int]:
    """Rows m and columns n of the linear ``owner``."""
    rows = index.tensors[f"{owner}.{find_form(spec['form']).rows_tensor}"].shape[0]
    return rows, index.tensors[f"{owner}.weight"].shape[1]


def _load(index: CheckpointIndex, owner: str, spec: dict[str, Any]) -> FactoredLinear:
    """The linear ``owner`` with its factors; holds them and nothing else."""
    module = empty_factored(*_shape(index, owner, spec), spec)
    with TensorReader() as reader:
        state = {leaf: reader.read(index.tensors[f"{owner}.{leaf}"]) for leaf in module.tensors()}
    module.load_state_dict(state, assign=True)
    try:
        module.check_values(owner)
    except ValueError as error:
        raise CorruptShardError(f"{index.folder}: {error}; the checkpoint is damaged") from None
    return module.requires_grad_(False)
