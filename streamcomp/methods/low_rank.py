"""Methods that decompose a weight: one decomposition serves every rank."""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING

from streamcomp.methods.base import Factors, Figures, Method, Moment, Settings, Side, Site

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from streamcomp.forms import Allowance
    from streamcomp.linalg.low_rank import Decomposition

__all__ = ["LowRank"]


class LowRank(Method):
    """Decomposes a weight into directions with energies, and keeps as many as the rank allows."""

    forms = ("pivot", "uv")

    @abstractmethod
    def decompose(
        self, weight: Tensor, moment: Moment, damping: float, rank: int | None = None
    ) -> Decomposition:
        """Directions and energies of ``weight`` (m, n), for every rank at once, or up to ``rank``.

        ``damping`` is relative to the mean of a moment's diagonal; 0 is the method's default.
        """

    def analyse(
        self, weight: Tensor, moment: Moment | None, settings: Settings, rank: int | None = None
    ) -> Decomposition:
        from streamcomp.linalg.low_rank import decompose_weight

        if moment is None:
            return decompose_weight(weight)
        return self.decompose(weight, moment, settings.damping, rank)

    def compress(
        self,
        site: Site,
        weight: Tensor,
        moment: Moment | None,
        allowance: Allowance,
        settings: Settings,
    ) -> Factors:
        analysis = self.analyse(weight, moment, settings, allowance.rank)
        if self.can_be_analysed(settings):  # equal bytes with and without a kept analysis
            analysis = analysis.rounded(site.dtype)
        return self.factors(site, weight, analysis, allowance, settings)

    def factors(
        self,
        site: Site,
        weight: Tensor,
        analysis: Decomposition,
        allowance: Allowance,
        settings: Settings,
    ) -> Factors:
        from streamcomp.forms import form_of

        form, rank = form_of(settings), allowance.rank
        left, right = analysis.factors(weight, rank)
        tensors = form.encode(left, right, site.dtype)
        figures = Figures(
            name=site.disk_name,
            rows=site.rows,
            columns=site.columns,
            **analysis.figures,
            rank=rank,
            relative_loss=analysis.relative_loss(rank),
            loss=float(analysis.spectrum[rank:].sum()),
        )
        return Factors(tensors, form.spec(rank), figures, analysis.min_damping)

    def working_bytes(
        self, site: Site, side: Side, tokens: int, dtype: torch.dtype, settings: Settings
    ) -> int:
        from streamcomp.linalg.low_rank import decomposition_bytes

        # gradients are damped instead of the moment, unless that has too few rows
        damped = settings.damping > 0 and not self.needs_gradients
        return decomposition_bytes(
            site.rows,
            site.columns,
            side,
            dtype,
            gradients=self.needs_gradients,
            damped=damped or tokens < site.rows,
        )
