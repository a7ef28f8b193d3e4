"""Sums for SVD-LLM's closed-form update, taken from both streams in lockstep.

With the right factor V of a weight W fixed, its left factor is fitted anew to the dense model's
outputs: U = argmin ||Y - U V X^||, where X^ are the compressed stream's inputs and Y = W X the
dense stream's outputs (:func:`streamcomp.linalg.fitting.refit_left`). With ``anchor`` a below 1
the target is a mixture a W X + (1 - a) W X^.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from streamcomp.linalg.dtypes import moment_dtype
from streamcomp.linalg.fitting import refit_left
from streamcomp.model.sites import LinearSite
from streamcomp.model.streamer import LoadedBlock

__all__ = ["Refit", "refit_bytes"]


class Refit:
    """Y Z^T (m, r) and Z Z^T (r, r) of each site, Z = V X^.

    Holds these sums, and the dense outputs of one micro-batch: run the dense block inside
    :meth:`dense`, then the compressed one inside :meth:`compressed`, micro-batch after
    micro-batch.
    """

    def __init__(self, block: LoadedBlock, sites: Sequence[LinearSite], anchor: float) -> None:
        self._block, self._sites, self._anchor = block, sites, anchor
        self._dense: dict[LinearSite, list[Tensor]] = {}  # one for each call in a forward
        self._sums: dict[LinearSite, tuple[Tensor, Tensor]] = {}
        for site in sites:
            right = site.factored(block).weight  # (r, n)
            rank, dtype, device = len(right), moment_dtype(right.dtype), right.device
            self._sums[site] = (
                torch.zeros(site.rows, rank, dtype=dtype, device=device),
                torch.zeros(rank, rank, dtype=dtype, device=device),
            )

    @contextmanager
    def dense(self) -> Iterator[None]:
        """Run the dense weights and record their outputs, while open."""
        with self._block.dense(), ExitStack() as handles:
            for site in self._sites:
                see = partial(self._keep, site)
                handles.callback(site.watch_outputs(self._block, see).remove)
            yield

    @contextmanager
    def compressed(self) -> Iterator[None]:
        """Add the compressed block's inputs and the recorded outputs to the sums, while open."""
        with ExitStack() as handles:
            for site in self._sites:
                handles.callback(site.watch_inputs(self._block, self._add(site)).remove)
            yield

    def factors(self, site: LinearSite) -> tuple[Tensor, Tensor]:
        """The refitted left factor (m, r), and the unchanged right one (r, n), fp64."""
        outputs, inner = self._sums.pop(site)
        module = site.factored(self._block)
        left = module.left_factor().detach()
        return refit_left(outputs, inner, towards=left), module.weight.detach().to(
            torch.float64, copy=True
        )

    def _keep(self, site: LinearSite, output: Tensor, bias: Tensor | None) -> None:
        outputs = self._dense.setdefault(site, [])
        outputs.append(output if bias is None else output - bias)

    def _add(self, site: LinearSite) -> Callable[[Tensor], None]:
        weight, right = site.weight(self._block), site.factored(self._block).weight.detach()
        outputs, inner = self._sums[site]

        def see(inputs: Tensor) -> None:
            inputs = inputs.detach()
            wanted = self._dense[site].pop(0)
            if self._anchor < 1:
                wanted = torch.lerp(nn.functional.linear(inputs, weight), wanted, self._anchor)
            low = nn.functional.linear(inputs, right).reshape(-1, right.shape[0]).to(inner.dtype)
            outputs.addmm_(wanted.reshape(-1, weight.shape[0]).to(inner.dtype).T, low)
            inner.addmm_(low.T, low)

        return see


def refit_bytes(
    ranks: Mapping[LinearSite, int], dtype: torch.dtype, tokens: int
) -> tuple[int, int]:
    """Bytes of the sums, and of the dense outputs for ``tokens`` with the largest of the fits.

    ``ranks`` are those of the sites that are fitted together. A fit is solved in fp64 and holds
    both sums three times.
    """
    numbers = [rank * rank + site.rows * rank for site, rank in ranks.items()]
    outputs = sum(site.rows * site.tokens(tokens) for site in ranks) * dtype.itemsize
    fit = 3 * torch.float64.itemsize * max(numbers, default=0)
    return sum(numbers) * moment_dtype(dtype).itemsize, outputs + fit
