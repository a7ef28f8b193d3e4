"""Sums for SVD-LLM's closed-form update, taken from both streams in lockstep.

With the right factor V of a linear fixed, its left factor is fitted anew to what the dense model
puts out: U = argmin ||Y - U V X^||, where X^ are the compressed stream's inputs and Y = W X the
dense stream's outputs (:func:`streamcomp.linalg.fitting.refit_left`). With ``anchor`` a below 1
the target is a mixture a W X + (1 - a) W X^.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from streamcomp.forms.runtime import FactoredLinear
from streamcomp.linalg.dtypes import moment_dtype
from streamcomp.linalg.fitting import refit_left
from streamcomp.modeling.streamer import LoadedBlock

__all__ = ["Refit", "refit_bytes"]


class Refit:
    """Y Z^T (m, r) and Z Z^T (r, r) of each linear, Z = V X^.

    Holds these sums, and the dense outputs of one micro-batch: run the dense block inside
    :meth:`dense`, then the compressed one inside :meth:`compressed`, micro-batch after
    micro-batch.
    """

    def __init__(
        self, loaded: LoadedBlock, factored: Mapping[str, FactoredLinear], anchor: float
    ) -> None:
        self._loaded, self._factored, self._anchor = loaded, factored, anchor
        self._dense: dict[str, Tensor] = {}
        self._sums: dict[str, tuple[Tensor, Tensor]] = {}
        for name, module in factored.items():
            dtype, device = moment_dtype(module.weight.dtype), module.weight.device
            self._sums[name] = (
                torch.zeros(module.out_features, module.rank, dtype=dtype, device=device),
                torch.zeros(module.rank, module.rank, dtype=dtype, device=device),
            )

    @contextmanager
    def dense(self) -> Iterator[None]:
        """The dense block, its outputs watched."""
        with self._loaded.dense(), ExitStack() as hooks:
            for name in self._factored:
                module = self._loaded.module.get_submodule(name)
                hook = module.register_forward_hook(self._keep(name))
                hooks.callback(hook.remove)
            yield

    @contextmanager
    def compressed(self) -> Iterator[None]:
        """The compressed block, its inputs watched; what the dense one put out is used up."""
        with ExitStack() as hooks:
            for name, module in self._factored.items():
                hook = module.register_forward_pre_hook(self._add(name))
                hooks.callback(hook.remove)
            yield

    def factors(self, name: str) -> tuple[Tensor, Tensor]:
        """The refitted left factor (m, r), and the right one (r, n) as it was, fp64."""
        outputs, inner = self._sums.pop(name)
        module = self._factored[name]
        left = module.left_factor().detach()
        return refit_left(outputs, inner, towards=left), module.weight.detach().to(
            torch.float64, copy=True
        )

    def _keep(self, name: str) -> Any:
        def hook(module: nn.Linear, _: tuple[Tensor, ...], output: Tensor) -> None:
            bias = module.bias
            self._dense[name] = output if bias is None else output - bias

        return hook

    def _add(self, name: str) -> Any:
        weight = self._loaded.weight(name)
        right = self._factored[name].weight.detach()
        outputs, inner = self._sums[name]

        def hook(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            inputs = args[0].detach()
            wanted = self._dense.pop(name)
            if self._anchor < 1:
                wanted = torch.lerp(nn.functional.linear(inputs, weight), wanted, self._anchor)
            low = nn.functional.linear(inputs, right).reshape(-1, right.shape[0]).to(inner.dtype)
            outputs.addmm_(wanted.reshape(-1, weight.shape[0]).to(inner.dtype).T, low)
            inner.addmm_(low.T, low)

        return hook


def refit_bytes(ranks: Mapping[Linear, int], dtype: torch.dtype, rows: int) -> tuple[int, int]:
    """Bytes of the sums, and of the dense outputs of ``rows`` tokens with the largest of the fits.

    ``ranks`` are those of the linears that are fitted at a time. A fit is solved in fp64 and holds
    both sums three times.
    """
    numbers = [rank * rank + linear.rows * rank for linear, rank in ranks.items()]
    outputs = sum(linear.rows for linear in ranks) * dtype.itemsize * rows
    fit = 3 * torch.float64.itemsize * max(numbers, default=0)
    return sum(numbers) * moment_dtype(dtype).itemsize, outputs + fit
