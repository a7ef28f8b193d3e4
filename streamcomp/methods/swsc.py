"""SWSC: channels that share weights, and a low-rank correction (arXiv 2501.08631)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from streamcomp.errors import RecipeError
from streamcomp.methods.base import Factors, Figures, Method, Moment, Settings, Side, Site

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from streamcomp.forms import Allowance

__all__ = ["Swsc"]


class Swsc(Method):
    """Clusters rows or columns and adds back the SVD of the error, in the metric of the inputs.

    Needs the moment H (n, n) of the *inputs*, or none at all, which is the method as published.
    The moment K = W H W^T (m, m) of the outputs gives the distances of rows, but can weigh neither
    columns nor the rounding of the codebook.
    """

    name = "swsc"
    source = "SWSC (arXiv 2501.08631)"
    forms = ("shared",)
    statistics = ("dense", "compressed", "none")
    settings = ("clusters", "axis")
    needs_inputs = True
    has_spectra = False
    can_follow = False
    factors_experts = False

    def check(self, weight: Site, settings: Settings) -> None:
        channels = {"rows": weight.rows, "columns": weight.columns}
        count = channels.get(settings.axis, max(weight.rows, weight.columns))
        if settings.clusters > count:
            raise RecipeError(
                f"clusters {settings.clusters}: {weight.disk_name} ({weight.rows} x "
                f"{weight.columns}) has {count} channels along {settings.axis}: ask for fewer, or "
                "--exclude it"
            )

    def compress(
        self,
        site: Site,
        weight: Tensor,
        moment: Moment | None,
        allowance: Allowance,
        settings: Settings,
    ) -> Factors:
        """The best of several splits between codebook and rank, each within ``allowance``."""
        from streamcomp.forms.shared import Shared
        from streamcomp.forms.storage import storage_of
        from streamcomp.linalg.channel_sharing import average_bits, share_channels, shared_numbers

        if moment is not None and moment.side != "inputs":
            raise RecipeError(f"{self.name} needs the moment of the inputs, not of the outputs")
        shared = share_channels(
            weight,
            None if moment is None else moment.value,
            allowance.numbers,
            axis=settings.axis,
            clusters=settings.clusters,
            seed=settings.seed,
            dtype=site.dtype,
        )
        rank, clusters = shared.left.shape[1], int(shared.labels.max()) + 1
        split = (site.rows, site.columns, shared.axis, clusters, rank)
        figures = Figures(
            name=site.disk_name,
            rows=site.rows,
            columns=site.columns,
            damping=shared.damping,
            condition=None,
            fallback="",
            rank=rank,
            relative_loss=shared.relative_loss,
            numbers=shared_numbers(*split),
            bits_per_weight=average_bits(*split),
        )
        form = Shared(storage_of(settings))
        spec = form.spec(rank, clusters=clusters, axis=shared.axis)
        return Factors(form.encode_channels(shared, site.dtype), spec, figures)

    def working_bytes(
        self, site: Site, side: Side, tokens: int, dtype: torch.dtype, settings: Settings
    ) -> int:
        from streamcomp.linalg.channel_sharing import sharing_bytes

        return sharing_bytes(site.rows, site.columns, metric=settings.statistics != "none")
