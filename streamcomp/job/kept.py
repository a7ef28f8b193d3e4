"""Decompositions and moments in the work folder, from the sweep that makes them to the last use."""

from __future__ import annotations

from collections.abc import Container, Mapping

import torch
from torch import Tensor

from streamcomp.calibration.observe import MomentGroup
from streamcomp.checkpoint.writer import Entry
from streamcomp.errors import OutputError
from streamcomp.job.files import Analysis, Moments, StepFile
from streamcomp.job.ledger import Ledger
from streamcomp.job.rows import AnalysisRow
from streamcomp.linalg.low_rank import Decomposition
from streamcomp.methods import GradientMoment, Moment
from streamcomp.model.sites import LinearSite, Site

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


def write_decomposition(
    ledger: Ledger, block: int, site: Site, decomposition: Decomposition
) -> None:
    """Keep the spectrum and the bases."""
    decomposition = decomposition.rounded(site.dtype)
    entries = [
        Entry("spectrum", decomposition.spectrum.cpu()),
        Entry("left", decomposition.left.cpu()),
    ]
    if decomposition.right is not None:
        entries.append(Entry("right", decomposition.right.cpu()))
    ledger.write(_name(Analysis(block), site.name), entries)


def read_decomposition(
    ledger: Ledger, block: int, site: Site, row: AnalysisRow, device: torch.device
) -> Decomposition:
    """The decomposition that :func:`write_decomposition` kept; ``row`` is the journal's on it."""
    tensors = _read(ledger, _name(Analysis(block), site.name), device)
    of_inputs = site.rows > site.columns
    if not {"spectrum", "left"} <= tensors.keys() or (of_inputs and "right" not in tensors):
        raise OutputError(
            f"the journal lists no whole decomposition of {site.disk_name}: it was altered; remove "
            "the work folder and start again"
        )
    return Decomposition(
        tensors["spectrum"],
        tensors["left"],
        tensors.get("right"),
        of_inputs,
        row.damping,
        float("inf") if row.condition is None else row.condition,
        row.fallback,
    )


def read_spectrum(ledger: Ledger, block: int, site: Site) -> Tensor:
    """Energies alone, (k,) fp64."""
    return dict(ledger.read(_name(Analysis(block), site.name), {"spectrum"}))["spectrum"]


def write_output_gradient(ledger: Ledger, block: int, value: Tensor) -> None:
    """Keep the moment of the gradient of a block's output, (hidden, hidden)."""
    ledger.write(_name(Analysis(block), _OUTPUT_GRADIENT), [Entry("value", value.cpu())])


def read_output_gradient(ledger: Ledger, block: int, device: torch.device) -> Tensor:
    return _read(ledger, _name(Analysis(block), _OUTPUT_GRADIENT), device)["value"]


def write_moment(
    ledger: Ledger,
    block: int,
    group: MomentGroup[LinearSite],
    moment: Moment,
    gradients: Mapping[LinearSite, GradientMoment],
) -> None:
    """Keep the moments of a group, for a later decomposition with other settings."""
    entries = [Entry("value", moment.value.cpu())]
    entries.append(Entry("rows", torch.tensor(moment.rows)))
    for site, gradient in gradients.items():
        entries.append(Entry(f"gradient.{site.name}", gradient.value.cpu()))
        energy = torch.tensor(gradient.energy, dtype=torch.float64)
        entries.append(Entry(f"energy.{site.name}", energy))
    ledger.write(_name(Moments(block), group.sites[0].name), entries)


def read_moment(
    ledger: Ledger,
    block: int,
    group: MomentGroup[LinearSite],
    site: LinearSite,
    device: torch.device,
) -> Moment:
    """The moment of ``site``, one of ``group``; DamagedFileError where it was not kept."""
    names = {"value", "rows", f"gradient.{site.name}", f"energy.{site.name}"}
    tensors = _read(ledger, _name(Moments(block), group.sites[0].name), device, names)
    gradient = None
    if f"gradient.{site.name}" in tensors:
        energy = float(tensors[f"energy.{site.name}"])
        gradient = GradientMoment(tensors[f"gradient.{site.name}"], energy)
    return Moment(group.side, tensors["value"], int(tensors["rows"]), gradient)


def _name(file: StepFile, part: str) -> str:
    return f"{file.key}.{part}.safetensors"


def _read(
    ledger: Ledger, name: str, device: torch.device, names: Container[str] | None = None
) -> dict[str, Tensor]:
    """The tensors in a file, or those of ``names`` that it has."""
    return {tensor: value.to(device) for tensor, value in ledger.read(name, names)}
