"""A site without a model."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Place:
    """What forms and methods read of a weight's place."""

    rows: int
    columns: int
    dtype: torch.dtype = torch.float32
    disk_name: str = "linear"
    rank_step: int = 1
