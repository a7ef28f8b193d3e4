"""Decompositions and moments in the work folder, from the sweep that makes them to the last use."""

from __future__ import annotations

from collections.abc import Container
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from streamcomp.calibration.observe import MomentGroup
from streamcomp.checkpoint.index import read_header
from streamcomp.checkpoint.reader import TensorReader
from streamcomp.checkpoint.writer import Entry, write_shard
from streamcomp.errors import SourceError
from streamcomp.linalg.low_rank import Decomposition
from streamcomp.methods.base import GradientMoment, Moment
from streamcomp.modeling.sites import Site
from streamcomp.planning.schedule import analysis_key

__all__ = [
    "as_kept",
    "health",
    "read_decomposition",
    "read_moment",
    "read_output_gradient",
    "read_spectrum",
    "write_decomposition",
    "write_moment",
    "write_output_gradient",
]

_OUTPUT_GRADIENT = "output_gradient"


def health(linear: Site, found: Decomposition) -> dict[str, Any]:
    """How the decomposition of a linear went, in plain values."""
    condition = found.condition
    return {
        "name": linear.disk_name,
        "rows": linear.rows,
        "columns": linear.columns,
        "energy": float(found.spectrum.sum()),
        "damping": found.damping,
        "condition": condition if condition < float("inf") else None,
        "fallback": found.fallback,
    }


def as_kept(linear: Site, found: Decomposition) -> Decomposition:
    """With the bases in fp32 (fp64 for a model that is); the spectrum stays in fp64.

    Factors are fitted anew to what is rounded when they are written, so fp32 loses nothing.
    """
    wide = linear.source.torch_dtype == torch.float64
    dtype = torch.float64 if wide else torch.float32
    right = None if found.right is None else found.right.to(dtype)
    return replace(found, left=found.left.to(dtype), right=right)


def write_decomposition(folder: Path, block: int, linear: Site, found: Decomposition) -> None:
    """Keep the spectrum and the bases."""
    found = as_kept(linear, found)
    entries = [Entry("spectrum", found.spectrum.cpu()), Entry("left", found.left.cpu())]
    if found.right is not None:
        entries.append(Entry("right", found.right.cpu()))
    write_shard(_path(folder, analysis_key(block), linear.name), entries)


def read_decomposition(
    folder: Path, block: int, linear: Site, known: dict[str, Any], device: torch.device
) -> Decomposition:
    """What :func:`write_decomposition` kept; ``known`` is its :func:`health` from the journal."""
    tensors = _read(_path(folder, analysis_key(block), linear.name), device)
    return Decomposition(
        tensors["spectrum"],
        tensors["left"],
        tensors.get("right"),
        linear.rows > linear.columns,
        known["damping"],
        float("inf") if known["condition"] is None else known["condition"],
        known["fallback"],
    )


def read_spectrum(folder: Path, block: int, linear: Site) -> Tensor:
    """Energies alone, (k,) fp64."""
    path = _path(folder, analysis_key(block), linear.name)
    with TensorReader() as reader:
        return reader.read(_header(path)["spectrum"])


def write_output_gradient(folder: Path, block: int, value: Tensor) -> None:
    """Keep the moment of the gradient of a block's output, (hidden, hidden)."""
    path = _path(folder, analysis_key(block), _OUTPUT_GRADIENT)
    write_shard(path, [Entry("value", value.cpu())])


def read_output_gradient(folder: Path, block: int, device: torch.device) -> Tensor:
    return _read(_path(folder, analysis_key(block), _OUTPUT_GRADIENT), device)["value"]


def write_moment(
    folder: Path,
    block: int,
    group: MomentGroup,
    moment: Moment,
    gradients: dict[str, GradientMoment],
) -> None:
    """Keep the moments of a group, for a later decomposition with other settings."""
    entries = [Entry("value", moment.value.cpu())]
    entries.append(Entry("rows", torch.tensor(moment.rows)))
    for name, gradient in gradients.items():
        entries.append(Entry(f"gradient.{name}", gradient.value.cpu()))
        energy = torch.tensor(gradient.energy, dtype=torch.float64)
        entries.append(Entry(f"energy.{name}", energy))
    write_shard(_path(folder, f"moments-{block:05d}", group.sites[0].name), entries)


def read_moment(
    folder: Path, block: int, group: MomentGroup, linear: Site, device: torch.device
) -> Moment:
    """The moment of ``linear``, one of ``group``; SourceError where it was not kept."""
    path = _path(folder, f"moments-{block:05d}", group.sites[0].name)
    own = {"value", "rows", f"gradient.{linear.name}", f"energy.{linear.name}"}
    tensors = _read(path, device, own)
    gradient = None
    if f"gradient.{linear.name}" in tensors:
        energy = float(tensors[f"energy.{linear.name}"])
        gradient = GradientMoment(tensors[f"gradient.{linear.name}"], energy)
    return Moment(group.side, tensors["value"], int(tensors["rows"]), None, gradient)


def _path(folder: Path, key: str, name: str) -> Path:
    return folder / f"{key}.{name}.safetensors"


def _header(path: Path) -> Any:
    if not path.is_file():
        raise SourceError(f"{path} is missing: remove the work folder and start again")
    return read_header(path)


def _read(
    path: Path, device: torch.device, names: Container[str] | None = None
) -> dict[str, Tensor]:
    """The tensors in a file, or those of ``names`` that it has."""
    with TensorReader() as reader:
        return {
            name: reader.read(info).to(device)
            for name, info in _header(path).items()
            if names is None or name in names
        }
