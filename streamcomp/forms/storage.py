"""Storage of one matrix of a form: today as floats of one dtype."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from streamcomp.errors import RecipeError

__all__ = ["Floats", "Storage", "StorageSettings", "storage_of"]


class StorageSettings(Protocol):
    """The settings of a recipe that choose the form and the storage of factors."""

    @property
    def form(self) -> str: ...


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


@dataclass(frozen=True)
class Floats(Storage):
    """One float of ``dtype`` for each number."""

    dtype: torch.dtype

    def __post_init__(self) -> None:
        if not self.dtype.is_floating_point:
            raise RecipeError(
                f"no storage for numbers of {self.dtype}: factors are stored as floats"
            )

    def nbytes(self, rows: int, columns: int) -> int:
        return self.dtype.itemsize * rows * columns

    def encode(self, name: str, matrix: Tensor) -> dict[str, Tensor]:
        return {name: matrix.to(self.dtype)}

    def decode(self, name: str, tensors: Mapping[str, Tensor]) -> Tensor:
        return tensors[name]


def storage_of(settings: StorageSettings) -> Callable[[torch.dtype], Storage]:
    """What gives the storage of factors by the dtype of the dense weight, as ``settings`` ask."""
    return Floats
