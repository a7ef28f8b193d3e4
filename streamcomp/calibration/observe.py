"""Takes the moments of a block's linears while the block runs, forward or also backward."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from streamcomp.errors import NonFiniteError
from streamcomp.linalg.moments import ROWS_PER_UPDATE, SecondMoment
from streamcomp.methods.base import GradientMoment, Moment, Side
from streamcomp.modeling.linears import Linear

# Rows whose squares are added up at a time.
_FEW = 128
# How much longer an operation in fp64 takes than one of a moment.
_WIDE = 4

__all__ = ["MomentGroup", "Observer", "group_moments", "moment_dtype"]


@dataclass(frozen=True)
class MomentGroup:
    """One moment to take, and the linears that it serves.

    With ``gradients`` each linear also has one of its own: of the gradient of its output, or of
    its input where that is smaller.
    """

    side: Side
    size: int  # the moment is size x size
    linears: tuple[Linear, ...]
    gradients: bool = False

    def nbytes(self, dtype: torch.dtype) -> int:
        numbers = self.size * self.size
        if self.gradients:
            numbers += sum(min(m.rows, m.columns) ** 2 for m in self.linears)
        return numbers * moment_dtype(dtype).itemsize


def group_moments(
    linears: Sequence[Linear],
    shared: Sequence[Sequence[str]],
    *,
    gradients: bool = False,
    inputs_only: bool = False,
    tokens: int = 0,
) -> tuple[MomentGroup, ...]:
    """The moments that serve all ``linears`` with the fewest bytes.

    ``shared`` lists names that are fed the same tensor. They can share one moment of their
    inputs (n x n), or have one each of their outputs (m x m); the latter is only an option
    where m <= n, for a linear is decomposed on its smaller side, and where the method can do with
    it (not ``inputs_only``). With ``tokens``, the rows to be observed, they also take those of
    their outputs where that saves time: W H W^T in fp64 is spared then, at more rows to sum up. For
    models of half precision alone, whose outputs and eigenvectors are as coarse as that.

    Groups of outputs come first: theirs is the least workspace, while most moments are there.
    """
    by_name = {linear.name: linear for linear in linears}
    grouped = [[by_name.pop(name) for name in names if name in by_name] for names in shared]
    groups = []
    for members in [*grouped, *([linear] for linear in by_name.values())]:
        if not members:
            continue
        inputs = members[0].columns
        outputs = [member.rows for member in members]
        more = sum(m * m for m in outputs) - inputs * inputs
        spared = sum(2 * m * inputs**2 + m * m * inputs for m in outputs) if tokens else 0
        better = more < 0 or tokens * more < _WIDE * spared
        if better and max(outputs) <= inputs and not inputs_only:
            groups += [MomentGroup("outputs", m.rows, (m,), gradients) for m in members]
        else:
            groups.append(MomentGroup("inputs", inputs, tuple(members), gradients))
    return tuple(sorted(groups, key=lambda group: group.side == "inputs"))


def moment_dtype(dtype: torch.dtype) -> torch.dtype:
    """Moments are kept in fp32; in fp64 for a model that is."""
    return torch.float64 if dtype == torch.float64 else torch.float32


class Observer:
    """While open, every forward of ``block`` adds to the moments of ``groups``.

    A context manager. Holds the moments, ``sum(group.nbytes(dtype))``, until they are taken.
    An output is observed without its bias: it is W x whose energy is to be kept. Groups with
    gradients observe every backward too, through hooks on the linears' outputs.
    """

    def __init__(
        self,
        block: nn.Module,
        block_name: str,
        groups: Sequence[MomentGroup],
        device: torch.device,
    ) -> None:
        self._block, self._block_name, self._groups = block, block_name, groups
        self._device = device
        self._watched: dict[MomentGroup, _Watched] = {}
        self._gradients: dict[Linear, _GradientSum] = {}
        self._hooks: list[Any] = []

    def __enter__(self) -> Observer:
        for group in self._groups:
            module = self._module(group.linears[0])
            dtype = moment_dtype(module.weight.dtype)
            watched = _Watched(SecondMoment(group.size, dtype=dtype, device=self._device))
            self._watched[group] = watched
            self._hooks.append(_watch(module, group.side, watched, recorded=group.gradients))
            for linear in group.linears if group.gradients else ():
                size = min(linear.rows, linear.columns)
                summed = _GradientSum(SecondMoment(size, dtype=dtype, device=self._device))
                self._gradients[linear] = summed
                self._hooks.append(_watch_gradient(self._module(linear), summed))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def take(self, group: MomentGroup) -> Moment:
        """Hand over the moment of ``group`` and forget it; NonFiniteError if it overflowed."""
        watched = self._watched.pop(group)
        _check(f"{self._block_name}.{group.linears[0].name}", group.side, watched.moment.value)
        return Moment(group.side, watched.moment.value, watched.rows)

    def take_gradient(self, linear: Linear) -> GradientMoment:
        """Hand over the gradients' moment of ``linear`` and forget it; NonFiniteError as above."""
        summed = self._gradients.pop(linear)
        _check(f"{self._block_name}.{linear.name}", "gradients", summed.moment.value)
        return GradientMoment(summed.moment.value, summed.energy)

    def _module(self, linear: Linear) -> nn.Linear:
        module = self._block.get_submodule(linear.name)
        assert isinstance(module, nn.Linear)
        return module


@dataclass
class _Watched:
    """A moment, and the number of its rows."""

    moment: SecondMoment
    rows: int = 0

    def update(self, rows: Tensor, shift: Tensor | None = None) -> None:
        self.moment.update(rows, shift)
        self.rows += rows.numel() // rows.shape[-1]


@dataclass
class _GradientSum:
    """The moment of g, or of W^T g, and the sum of ||g||^2."""

    moment: SecondMoment
    energy: float = 0.0

    def update(self, gradient: Tensor, weight: Tensor) -> None:
        """Add g (..., m) of a linear's output; ``weight`` is (m, n)."""
        flat = gradient.detach().reshape(-1, weight.shape[0])  # (T, m)
        for rows in flat.split(ROWS_PER_UPDATE):
            for few in rows.split(_FEW):
                self.energy += float(few.double().square().sum())
            self.moment.update(rows @ weight if weight.shape[0] > weight.shape[1] else rows)


def _watch(module: nn.Linear, side: Side, watched: _Watched, *, recorded: bool) -> Any:
    """With ``recorded``, forwards that autograd does not record are not seen: they come twice."""

    def counts() -> bool:
        return torch.is_grad_enabled() or not recorded

    if side == "inputs":

        def before(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            if counts():
                watched.update(args[0])

        return module.register_forward_pre_hook(before)

    def after(linear: nn.Module, _: tuple[Tensor, ...], output: Tensor) -> None:
        if not counts():
            return
        bias = linear.bias
        watched.update(output, shift=bias if isinstance(bias, Tensor) else None)

    return module.register_forward_hook(after)


def _watch_gradient(module: nn.Linear, summed: _GradientSum) -> Any:
    weight = module.weight.detach()

    def after(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        if output.requires_grad:
            output.register_hook(lambda gradient: summed.update(gradient, weight))

    return module.register_forward_hook(after)


def _check(name: str, what: str, value: Tensor) -> None:
    if not bool(value.diagonal().sum().isfinite()):
        raise NonFiniteError(
            f"{name}: its {what} are NaN or infinite on the calibration text; is the dtype of the "
            "model too narrow?"
        )
