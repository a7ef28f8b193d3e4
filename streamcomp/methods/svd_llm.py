"""SVD-LLM: truncation-aware whitening (arXiv 2403.07378, section 3.1)."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from streamcomp.methods.base import Moment
from streamcomp.methods.low_rank import LowRank

if TYPE_CHECKING:
    from torch import Tensor

    from streamcomp.linalg.low_rank import Decomposition

__all__ = ["SvdLlm"]


class SvdLlm(LowRank):
    """Minimises ||W X - W' X||_F, on the smaller side of W (:mod:`streamcomp.linalg.low_rank`)."""

    name = "svd-llm"
    source = "SVD-LLM (arXiv 2403.07378)"
    statistics: ClassVar[tuple[str, ...]] = ("dense", "compressed", "none")

    def decompose(
        self, weight: Tensor, moment: Moment, damping: float, rank: int | None = None
    ) -> Decomposition:
        from streamcomp.linalg.low_rank import FIRST_DAMPING, decompose_inputs, decompose_outputs

        rows, columns = weight.shape
        if rows <= columns and moment.leaves_open(rows):
            damping = damping or FIRST_DAMPING
        if moment.side == "inputs":
            return decompose_inputs(
                weight, moment.value, damping, min_damping=moment.min_damping, rank=rank
            )
        return decompose_outputs(weight, moment.value, damping)
