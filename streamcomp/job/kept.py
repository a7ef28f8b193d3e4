"""Decompositions and moments in the work folder, from the sweep that makes them to the last use."""

from __future__ import annotations

from collections.abc import Container, Mapping
from pathlib import Path

import torch
from torch import Tensor

from streamcomp.calibration.observe import MomentGroup
from streamcomp.checkpoint.index import TensorInfo, read_header
from streamcomp.checkpoint.reader import TensorReader
from streamcomp.checkpoint.writer import Entry, write_shard
from streamcomp.errors import SourceError
from streamcomp.job.files import Analysis, Moments, StepFile
from streamcomp.job.rows import AnalysisRow
from streamcomp.linalg.low_rank import Decomposition
from streamcomp.methods import GradientMoment, Moment
from streamcomp.model.sites import Site

__all__ = [
    "figures",
    "read_decomposition",
    "read_moment",
    "read_output_gradient",
    "read_spectrum",
    "write_decomposition",
    "write_moment",
    "write_output_gradient",
]

_OUTPUT_GRADIENT = "output_gradient"


def figures(site: Site, decomposition: Decomposition) -> AnalysisRow:
    """How the decomposition of ``site`` went."""
    return AnalysisRow(
        name=site.disk_name, rows=site.rows, columns=site.columns, **decomposition.figures
    )


def write_decomposition(folder: Path, block: int, site: Site, decomposition: Decomposition) -> None:
    """Keep the spectrum and the bases."""
    decomposition = decomposition.rounded(site.dtype)
    entries = [
        Entry("spectrum", decomposition.spectrum.cpu()),
        Entry("left", decomposition.left.cpu()),
    ]
    if decomposition.right is not None:
        entries.append(Entry("right", decomposition.right.cpu()))
    write_shard(_path(folder, Analysis(block), site.name), entries)


def read_decomposition(
    folder: Path, block: int, site: Site, row: AnalysisRow, device: torch.device
) -> Decomposition:
    """The decomposition that :func:`write_decomposition` kept; ``row`` is the journal's on it."""
    tensors = _read(_path(folder, Analysis(block), site.name), device)
    return Decomposition(
        tensors["spectrum"],
        tensors["left"],
        tensors.get("right"),
        site.rows > site.columns,
        row.damping,
        float("inf") if row.condition is None else row.condition,
        row.fallback,
    )


def read_spectrum(folder: Path, block: int, site: Site) -> Tensor:
    """Energies alone, (k,) fp64."""
    path = _path(folder, Analysis(block), site.name)
    with TensorReader() as reader:
        return reader.read(_header(path)["spectrum"])


def write_output_gradient(folder: Path, block: int, value: Tensor) -> None:
    """Keep the moment of the gradient of a block's output, (hidden, hidden)."""
    path = _path(folder, Analysis(block), _OUTPUT_GRADIENT)
    write_shard(path, [Entry("value", value.cpu())])


def read_output_gradient(folder: Path, block: int, device: torch.device) -> Tensor:
    return _read(_path(folder, Analysis(block), _OUTPUT_GRADIENT), device)["value"]


def write_moment(
    folder: Path,
    block: int,
    group: MomentGroup,
    moment: Moment,
    gradients: Mapping[Site, GradientMoment],
) -> None:
    """Keep the moments of a group, for a later decomposition with other settings."""
    entries = [Entry("value", moment.value.cpu())]
    entries.append(Entry("rows", torch.tensor(moment.rows)))
    for site, gradient in gradients.items():
        entries.append(Entry(f"gradient.{site.name}", gradient.value.cpu()))
        energy = torch.tensor(gradient.energy, dtype=torch.float64)
        entries.append(Entry(f"energy.{site.name}", energy))
    write_shard(_path(folder, Moments(block), group.sites[0].name), entries)


def read_moment(
    folder: Path, block: int, group: MomentGroup, site: Site, device: torch.device
) -> Moment:
    """The moment of ``site``, one of ``group``; SourceError where it was not kept."""
    names = {"value", "rows", f"gradient.{site.name}", f"energy.{site.name}"}
    tensors = _read(_path(folder, Moments(block), group.sites[0].name), device, names)
    gradient = None
    if f"gradient.{site.name}" in tensors:
        energy = float(tensors[f"energy.{site.name}"])
        gradient = GradientMoment(tensors[f"gradient.{site.name}"], energy)
    return Moment(group.side, tensors["value"], int(tensors["rows"]), gradient)


def _path(folder: Path, file: StepFile, name: str) -> Path:
    return folder / f"{file.key}.{name}.safetensors"


def _header(path: Path) -> dict[str, TensorInfo]:
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
