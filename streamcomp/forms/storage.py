"""Storage of one matrix of a form: today as floats of one dtype."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from streamcomp.errors import RecipeError

__all__ = ["Floats", "Storage", "storage_of"]


class Storage(ABC):
    """Converts one matrix to the tensors that are stored for it, and back.

    Tensors are named after their matrix: ``weight``, ``U``, ``coef``. A storage that needs several
    tensors for one matrix adds further names.
    """

    @abstractmethod
    def nbytes(self, rows: int, columns: int) -> int:
        """Bytes on disk of a rows x columns matrix."""

    @abstractmethod
    def encode(self, name: str, matrix: Tensor) -> dict[str, Tensor]:
        """The tensors of the matrix ``name``, by their names on disk."""

    @abstractmethod
    def decode(self, name: str, tensors: Mapping[str, Tensor]) -> Tensor:
        """The rounded matrix ``name`` that ``tensors`` hold."""

    @abstractmethod
    def multiply(self, inputs: Tensor, name: str, tensors: Mapping[str, Tensor]) -> Tensor:
        """``inputs`` (..., columns) times the transposed matrix: (..., rows)."""


@dataclass(frozen=True)
class Floats(Storage):
    """One float of ``dtype`` for each number."""

    dtype: torch.dtype

    def nbytes(self, rows: int, columns: int) -> int:
        return self.dtype.itemsize * rows * columns

    def encode(self, name: str, matrix: Tensor) -> dict[str, Tensor]:
        return {name: matrix.to(self.dtype)}

    def decode(self, name: str, tensors: Mapping[str, Tensor]) -> Tensor:
        return tensors[name]

    def multiply(self, inputs: Tensor, name: str, tensors: Mapping[str, Tensor]) -> Tensor:
        return nn.functional.linear(inputs, tensors[name])


def storage_of(dtype: torch.dtype) -> Storage:
    """The storage for factors of a dense weight in ``dtype``; RecipeError if there is none."""
    if not dtype.is_floating_point:
        raise RecipeError(f"no storage for numbers of {dtype}: factors are stored as floats")
    return Floats(dtype)
