"""The dtypes that computations take, given a model's."""

from __future__ import annotations

import torch

__all__ = ["gradient_dtype", "moment_dtype", "solve_dtype"]


def gradient_dtype(dtype: torch.dtype) -> torch.dtype:
    """A backward of a model in ``dtype`` runs in this: fp16 is too narrow, it takes fp32."""
    return torch.float32 if dtype == torch.float16 else dtype


def moment_dtype(dtype: torch.dtype) -> torch.dtype:
    """Moments are kept in fp32; in fp64 for a model that is."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def solve_dtype(dtype: torch.dtype) -> torch.dtype:
    """A model of half precision is decomposed in fp32, others in fp64."""
    return torch.float32 if dtype in (torch.bfloat16, torch.float16) else torch.float64
