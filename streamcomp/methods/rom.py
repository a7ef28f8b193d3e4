"""LLM-ROM: a reduced-order model of each linear's features (arXiv 2312.07046, section 3).

The principal components U_r of the outputs Y = W X give W' = U_r U_r^T W. About the origin this
is SVD-LLM's optimum (:mod:`streamcomp.linalg.low_rank`); about the mean, which is what a
principal component analysis does, the part of the mean that is cut off becomes a bias.
"""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from streamcomp.linalg.low_rank import Decomposition, centred, times
from streamcomp.methods.base import Moment
from streamcomp.methods.svd_llm import SvdLlm

__all__ = ["Rom", "mean_bias"]


class Rom:
    """Principal components of the outputs; about their mean where the moment holds the sum."""

    name = "rom"
    source = "LLM-ROM (arXiv 2312.07046)"

    def decompose(
        self, weight: Tensor, moment: Moment, damping: float, rank: int | None = None
    ) -> Decomposition:
        if moment.total is not None:
            moment = replace(moment, value=centred(moment.value, moment.total, moment.rows))
        return SvdLlm().decompose(weight, moment, damping, rank)


def mean_bias(weight: Tensor, left: Tensor, right: Tensor, moment: Moment) -> Tensor:
    """The bias (m,) fp64 that keeps the mean output where W' = left right replaces ``weight``.

    (W - W') x for the mean input x; from the outputs' side, with W' = U U^T W, (I - U U^T) y.
    """
    assert moment.total is not None
    mean = moment.total.double()[:, None] / moment.rows
    if moment.side == "inputs":
        return (times(weight, mean) - times(left, times(right, mean)))[:, 0]
    return (mean - times(left, times(left.T, mean)))[:, 0]
