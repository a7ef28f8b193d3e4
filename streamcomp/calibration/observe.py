"""Sums up the moments of a block's sites while the block runs, forward or also backward."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import Generic, TypeVar

import torch
from torch import Tensor

from streamcomp.calibration.hidden_states import StreamShape
from streamcomp.errors import NonFiniteError
from streamcomp.linalg.dtypes import moment_dtype
from streamcomp.linalg.moments import ROWS_PER_UPDATE, SecondMoment, moment_flops
from streamcomp.methods.base import GradientMoment, Moment, Side
from streamcomp.model.sites import LinearSite, Site
from streamcomp.model.streamer import LoadedBlock

# Rows whose squares are summed at a time.
_FEW = 128
# Time of an operation in fp64, relative to one of a moment.
_WIDE = 4

__all__ = [
    "GradientSum",
    "MomentGroup",
    "Observer",
    "check_moment",
    "group_moments",
    "observing_bytes",
    "observing_flops",
]


S = TypeVar("S", bound=Site)


@dataclass(frozen=True)
class MomentGroup(Generic[S]):
    """One moment to compute, and the sites that use it.

    With ``gradients`` each site also has a moment of the gradient of its output, or of its input
    where that is smaller.
    """

    side: Side
    size: int  # the moment is size x size
    sites: tuple[S, ...]
    gradients: bool = False

    def nbytes(self, dtype: torch.dtype) -> int:
        numbers = self.size * self.size
        if self.gradients:
            numbers += sum(min(site.rows, site.columns) ** 2 for site in self.sites)
        return numbers * moment_dtype(dtype).itemsize

    def tokens(self, stream: int) -> int:
        """Expected number of a stream's tokens that its moments sum up."""
        return self.sites[0].tokens(stream)


def group_moments(
    sites: Sequence[S],
    shared: Sequence[Sequence[str]],
    *,
    gradients: bool = False,
    inputs_only: bool = False,
    tokens: int = 0,
) -> tuple[MomentGroup[S], ...]:
    """The moments that all ``sites`` need, in the fewest bytes.

    ``shared`` lists names of linears with one input tensor. They can share one moment of their
    inputs (n x n), or have one each of their outputs (m x m). The latter is only possible where
    m <= n, since a weight is decomposed on its smaller side, and where the method does not need
    ``inputs_only``. With ``tokens``, the length of the observed stream, outputs are also chosen
    where that saves time: it avoids W H W^T in fp64, but sums more rows. Give it only for models in
    half precision, whose outputs are no less precise than their eigenvectors.

    Groups of outputs come first: they need the smallest workspace, while most moments are held.
    """
    by_name = {site.name: site for site in sites}
    grouped = [[by_name.pop(name) for name in names if name in by_name] for names in shared]
    groups: list[MomentGroup[S]] = []
    for members in [*grouped, *([site] for site in by_name.values())]:
        if not members:
            continue
        inputs = members[0].columns
        outputs = [member.rows for member in members]
        more = sum(m * m for m in outputs) - inputs * inputs
        spared = sum(2 * m * inputs**2 + m * m * inputs for m in outputs) if tokens else 0
        better = more < 0 or members[0].tokens(tokens) * more < _WIDE * spared
        if better and max(outputs) <= inputs and not inputs_only:
            groups += [MomentGroup("outputs", m.rows, (m,), gradients) for m in members]
        else:
            groups.append(MomentGroup("inputs", inputs, tuple(members), gradients))
    return tuple(sorted(groups, key=lambda group: group.side == "inputs"))


def observing_bytes(groups: Sequence[MomentGroup[S]], stream: StreamShape, batch: int) -> int:
    """Bytes of the rows that a moment casts and multiplies at a time, for ``batch`` windows."""
    widest = max((group.size for group in groups), default=0)
    rows = min(ROWS_PER_UPDATE, batch * stream.seq_len)
    return 2 * rows * widest * moment_dtype(stream.dtype).itemsize


def observing_flops(groups: Sequence[MomentGroup[S]], tokens: int) -> tuple[float, float]:
    """Operations of the moments of ``groups``, and of products W^T g, for a stream's ``tokens``."""
    moments, products = 0.0, 0.0
    for group in groups:
        moments += moment_flops(group.size, group.tokens(tokens))
        for site in group.sites if group.gradients else ():
            rows = site.tokens(tokens)
            moments += moment_flops(min(site.rows, site.columns), rows)
            products += 2.0 * rows * site.numel if site.rows > site.columns else 0.0
    return moments, products


class Observer:
    """While open, every forward of ``block`` adds to the moments of ``groups``.

    A context manager. Holds the moments, ``sum(group.nbytes(dtype))``, until they are taken.
    Outputs are observed without their bias, since the weight determines only W x. Groups with
    gradients also observe every backward, and skip forwards that autograd does not record, because
    those are run twice.
    """

    def __init__(
        self,
        block: LoadedBlock,
        groups: Sequence[MomentGroup[LinearSite]],
        device: torch.device,
    ) -> None:
        self._block, self._groups, self._device = block, groups, device
        self._watched: dict[MomentGroup[LinearSite], _Watched] = {}
        self._gradients: dict[LinearSite, GradientSum] = {}
        self._handles = ExitStack()

    def __enter__(self) -> Observer:
        for group in self._groups:
            first = group.sites[0]
            watched = _Watched(self._moment(first, group.size), recorded=group.gradients)
            self._watched[group] = watched
            watch = first.watch_inputs if group.side == "inputs" else first.watch_outputs
            self._handles.callback(watch(self._block, watched.update).remove)
            for site in group.sites if group.gradients else ():
                summed = GradientSum(self._moment(site, min(site.rows, site.columns)))
                self._gradients[site] = summed
                see = partial(summed.update, weight=site.weight(self._block))
                self._handles.callback(site.watch_gradients(self._block, see).remove)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._handles.close()

    def take(self, group: MomentGroup[LinearSite]) -> Moment:
        """Return and forget the moment of ``group``; NonFiniteError if it overflowed."""
        watched = self._watched.pop(group)
        check_moment(f"{self._block.name}.{group.sites[0].name}", group.side, watched.moment.value)
        return Moment(group.side, watched.moment.value, watched.rows)

    def take_gradient(self, site: LinearSite) -> GradientMoment:
        """Return and forget the gradients' moment of ``site``; NonFiniteError if it overflowed."""
        summed = self._gradients.pop(site)
        check_moment(f"{self._block.name}.{site.name}", "gradients", summed.moment.value)
        return GradientMoment(summed.moment.value, summed.energy)

    def _moment(self, site: LinearSite, size: int) -> SecondMoment:
        dtype = moment_dtype(site.weight(self._block).dtype)
        return SecondMoment(size, dtype=dtype, device=self._device)


def check_moment(name: str, what: str, value: Tensor) -> None:
    """NonFiniteError where the moment of ``what`` of the site ``name`` overflowed."""
    if not bool(value.diagonal().sum().isfinite()):
        raise NonFiniteError(
            f"{name}: its {what} are NaN or infinite on the calibration text; is the dtype of the "
            "model too narrow?"
        )


@dataclass
class _Watched:
    """A moment, and the number of its rows."""

    moment: SecondMoment
    recorded: bool  # whether to skip forwards that autograd does not record
    rows: int = 0

    def update(self, rows: Tensor, shift: Tensor | None = None) -> None:
        if self.recorded and not torch.is_grad_enabled():
            return
        self.moment.update(rows, shift)
        self.rows += rows.numel() // rows.shape[-1]


@dataclass
class GradientSum:
    """The moment of g, or of W^T g, and the sum of ||g||^2."""

    moment: SecondMoment
    energy: float = 0.0

    def update(self, gradient: Tensor, weight: Tensor) -> None:
        """Add g (..., m) of a site's output; ``weight`` is (m, n)."""
        flat = gradient.detach().reshape(-1, weight.shape[0])  # (T, m)
        for rows in flat.split(ROWS_PER_UPDATE):
            for few in rows.split(_FEW):
                self.energy += float(few.double().square().sum())
            self.moment.update(rows @ weight if weight.shape[0] > weight.shape[1] else rows)
