"""SWSC: channels that share weights, and a low-rank correction (arXiv 2501.08631)."""

from __future__ import annotations

import torch
from torch import Tensor

from streamcomp.errors import RecipeError
from streamcomp.linalg.channel_sharing import SharedChannels, share_channels
from streamcomp.methods.base import Moment

__all__ = ["Swsc"]


class Swsc:
    """Clusters rows or columns and adds back the SVD of the error, in the metric of the inputs.

    Needs the moment H (n, n) of the *inputs*, or none at all, which is the method as published.
    The moment K = W H W^T (m, m) of the outputs tells how far rows lie apart, but neither
    columns nor the rounding of the codebook can be weighed with it.
    """

    name = "swsc"
    source = "SWSC (arXiv 2501.08631)"

    def share(
        self,
        weight: Tensor,
        moment: Moment | None,
        numbers: int,
        *,
        clusters: int = 0,
        axis: str = "auto",
        seed: int = 0,
        dtype: torch.dtype,
    ) -> SharedChannels:
        """``weight`` (m, n) in at most ``numbers`` numbers (:func:`share_channels`)."""
        if moment is not None and moment.side != "inputs":
            raise RecipeError(f"{self.name} needs the moment of the inputs, not of the outputs")
        value = None if moment is None else moment.value
        return share_channels(
            weight, value, numbers, axis=axis, clusters=clusters, seed=seed, dtype=dtype
        )
