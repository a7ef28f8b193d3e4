"""Takes the moments of a block's linears while the block runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from streamcomp.errors import NonFiniteError
from streamcomp.linalg.moments import SecondMoment
from streamcomp.methods.base import Moment, Side
from streamcomp.modeling.linears import Linear

__all__ = ["MomentGroup", "Observer", "group_moments", "moment_dtype"]


@dataclass(frozen=True)
class MomentGroup:
    """One moment to take, and the linears that it serves."""

    side: Side
    size: int  # the moment is size x size
    linears: tuple[Linear, ...]

    def nbytes(self, dtype: torch.dtype) -> int:
        return self.size * self.size * moment_dtype(dtype).itemsize


def group_moments(
    linears: Sequence[Linear], shared: Sequence[Sequence[str]]
) -> tuple[MomentGroup, ...]:
    """The moments that serve all ``linears`` with the fewest bytes.

    ``shared`` lists names that are fed the same tensor. They can share one moment of their
    inputs (n x n), or have one each of their outputs (m x m); the latter is only an option
    where m <= n, for a linear is decomposed on its smaller side.
    """
    by_name = {linear.name: linear for linear in linears}
    grouped = [[by_name.pop(name) for name in names if name in by_name] for names in shared]
    groups = []
    for members in [*grouped, *([linear] for linear in by_name.values())]:
        if not members:
            continue
        inputs = members[0].columns
        outputs = [member.rows for member in members]
        if max(outputs) <= inputs and sum(m * m for m in outputs) < inputs * inputs:
            groups += [MomentGroup("outputs", m.rows, (m,)) for m in members]
        else:
            groups.append(MomentGroup("inputs", inputs, tuple(members)))
    return tuple(groups)


def moment_dtype(dtype: torch.dtype) -> torch.dtype:
    """Moments are kept in fp32; in fp64 for a model that is."""
    return torch.float64 if dtype == torch.float64 else torch.float32


class Observer:
    """While open, every forward of ``block`` adds to the moments of ``groups``.

    A context manager. Holds the moments, ``sum(group.nbytes(dtype))``, until they are taken.
    An output is observed without its bias: it is W x whose energy is to be kept.
    """

    def __init__(
        self, block: nn.Module, block_name: str, groups: Sequence[MomentGroup], device: torch.device
    ) -> None:
        self._block, self._block_name, self._groups = block, block_name, groups
        self._device = device
        self._moments: dict[MomentGroup, SecondMoment] = {}
        self._hooks: list[Any] = []

    def __enter__(self) -> Observer:
        for group in self._groups:
            module = self._block.get_submodule(group.linears[0].name)
            assert isinstance(module, nn.Linear)
            moment = SecondMoment(
                group.size, dtype=moment_dtype(module.weight.dtype), device=self._device
            )
            self._moments[group] = moment
            self._hooks.append(_watch(module, group.side, moment))
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
        value = self._moments.pop(group).value
        if not bool(value.diagonal().sum().isfinite()):
            raise NonFiniteError(
                f"{self._block_name}.{group.linears[0].name}: its {group.side} are NaN or "
                "infinite on the calibration text; is the dtype of the model too narrow?"
            )
        return Moment(group.side, value)


def _watch(module: nn.Linear, side: Side, moment: SecondMoment) -> Any:
    if side == "inputs":

        def before(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            moment.update(args[0])

        return module.register_forward_pre_hook(before)

    def after(linear: nn.Module, _: tuple[Tensor, ...], output: Tensor) -> None:
        bias = linear.bias
        moment.update(output, shift=bias if isinstance(bias, Tensor) else None)

    return module.register_forward_hook(after)
