"""SVD-LLM: truncation-aware whitening (arXiv 2403.07378, section 3.1)."""

from __future__ import annotations

from torch import Tensor

from streamcomp.linalg.low_rank import (
    FIRST_DAMPING,
    Decomposition,
    decompose_inputs,
    decompose_outputs,
)
from streamcomp.methods.base import Moment

__all__ = ["SvdLlm"]


class SvdLlm:
    """Minimises ||W X - W' X||_F, on the smaller side of W (:mod:`streamcomp.linalg.low_rank`)."""

    name = "svd-llm"
    source = "SVD-LLM (arXiv 2403.07378)"

    def decompose(
        self, weight: Tensor, moment: Moment, damping: float, rank: int | None = None
    ) -> Decomposition:
        rows, columns = weight.shape
        if rows <= columns and moment.leaves_open(rows):
            damping = damping or FIRST_DAMPING
        if moment.side == "inputs":
            return decompose_inputs(weight, moment.value, damping, least=moment.least, rank=rank)
        return decompose_outputs(weight, moment.value, damping)
