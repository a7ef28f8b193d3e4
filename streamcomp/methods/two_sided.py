"""Two-sided whitening: the inputs' moment and the loss's gradients weigh an error together.

Published as OBD-LLM (arXiv 2604.00821) and, with an output side from the most likely tokens alone,
as IO-SVD (arXiv 2605.15626). Both need an m x m and an n x n matrix for each linear; on the smaller
side one of the two cancels (:mod:`streamcomp.linalg.low_rank`).
"""

from __future__ import annotations

from torch import Tensor

from streamcomp.linalg.low_rank import (
    FIRST_DAMPING,
    GRADIENT_DAMPING,
    Decomposition,
    damped_outputs,
    decompose_two_sided_inputs,
    decompose_two_sided_outputs,
    output_moment,
)
from streamcomp.methods.base import Moment

__all__ = ["TwoSided"]


class TwoSided:
    """Minimises ||Gamma^1/2 (W - W') H^1/2||_F; its cut energies compare across linears."""

    name = "two-sided"
    source = "OBD-LLM (arXiv 2604.00821), IO-SVD (arXiv 2605.15626)"

    def decompose(
        self, weight: Tensor, moment: Moment, damping: float, rank: int | None = None
    ) -> Decomposition:
        damping, gradient = damping or GRADIENT_DAMPING, moment.gradient
        assert gradient is not None
        if weight.shape[0] > weight.shape[1]:
            return decompose_two_sided_inputs(
                weight,
                moment.value,
                gradient.value,
                gradient.energy,
                damping,
                least=moment.least,
                rank=rank,
            )
        outputs = moment.value
        if moment.side == "inputs":
            outputs = output_moment(weight, outputs)
        if moment.leaves_open(weight.shape[0]):
            outputs = damped_outputs(outputs, weight, FIRST_DAMPING)
        return decompose_two_sided_outputs(
            weight, outputs, gradient.value, damping, spend=outputs is not moment.value
        )
