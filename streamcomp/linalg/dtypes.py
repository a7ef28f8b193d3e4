"""The dtypes of computations, given the model's dtype."""

from __future__ import annotations

import torch

__all__ = ["gradient_dtype", "moment_dtype", "solve_dtype"]


def gradient_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of the backward pass: the model's, but fp32 for fp16, which is too narrow."""
    return torch.float32 if dtype == torch.float16 else dtype


def moment_dtype(dtype: torch.dtype) -> torch.dtype:
    """Moments are kept in fp32, or in fp64 for a model in fp64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def solve_dtype(dtype: torch.dtype) -> torch.dtype:
    """A model in half precision is decomposed in fp32, any other in fp64."""
    return torch.float32 if dtype in (torch.bfloat16, torch.float16) else torch.float64
