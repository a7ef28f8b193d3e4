"""Measured speed of this machine, from which plans predict seconds."""

from __future__ import annotations

import math
import os
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from streamcomp.linalg.dtypes import moment_dtype, solve_dtype
from streamcomp.linalg.symmetric import SMALL, exact_products

__all__ = ["MachineRates", "measure_disk", "measure_rates"]

_PRODUCT, _SMALL_EIGH, _EIGH = 1024, 512, 1024  # sizes that are timed
_RUNS, _SECONDS = 3, 0.05  # minimum runs, and minimum time, of each measurement
_FILE_BYTES = 16 * 2**20
_DISK = 500e6  # bytes per second, where no folder can be measured


@dataclass(frozen=True)
class MachineRates:
    """Measured speed of this machine, operations (or bytes) per second."""

    model_flops: float  # products in the model's dtype
    moment_flops: float  # products of moments
    solve_flops: float  # products in the dtype that factors are solved in
    wide_flops: float  # products in fp64
    small_eigh_flops: float  # eigh in fp64, counted as 9 n^3
    eigh_flops: float  # eigh of a large matrix, in the dtype of decompositions
    disk_bytes: float = _DISK

    def seconds(self, operations: Mapping[str, float]) -> float:
        """Seconds that ``operations`` take, given by the names of the rates that they run at."""
        return sum(count / float(getattr(self, name)) for name, count in operations.items())

    def eigh_seconds(self, size: int) -> float:
        """Seconds that one n x n eigendecomposition takes."""
        return 9.0 * size**3 / (self.eigh_flops if size >= SMALL else self.small_eigh_flops)


def measure_rates(device: torch.device, dtype: torch.dtype) -> MachineRates:
    """Time small products and two eigh; takes about a second."""

    def product(kind: torch.dtype, cast_from: torch.dtype = torch.float32) -> float:
        # as linears compute it: on a CPU a plain product in fp16 takes twenty times as long
        left = torch.ones(_PRODUCT, _PRODUCT, dtype=kind, device=device)
        run = torch.nn.functional.linear
        with exact_products(cast_from):
            return 2.0 * _PRODUCT**3 / _best_seconds(lambda: run(left, left), device)

    def eigenvectors(kind: torch.dtype, size: int) -> float:
        random = torch.Generator().manual_seed(0)
        rows = torch.randn(size, size, generator=random, dtype=kind).to(device)
        matrix = rows @ rows.T  # an easier matrix would be solved several times as fast
        return 9.0 * size**3 / _best_seconds(lambda: torch.linalg.eigh(matrix), device)

    return MachineRates(
        product(dtype),
        product(moment_dtype(dtype), dtype),
        product(solve_dtype(dtype)),
        product(torch.float64),
        eigenvectors(torch.float64, _SMALL_EIGH),
        eigenvectors(solve_dtype(dtype), _EIGH),
    )


def measure_disk(folder: Path) -> float:
    """Bytes per second at which a file is durably written in ``folder`` or its nearest parent.

    A typical rate where the folder cannot be written: if that is an error, it shows later.
    """
    while not folder.exists():
        folder = folder.parent
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            start = time.perf_counter()
            file.write(bytes(_FILE_BYTES))
            file.flush()
            os.fsync(file.fileno())
            return _FILE_BYTES / (time.perf_counter() - start)
    except OSError:
        return _DISK


def _best_seconds(work: Callable[[], Any], device: torch.device) -> float:
    """Seconds of the fastest run, since caches and threads are cold at first."""
    best, begin, runs = math.inf, time.perf_counter(), 0
    while runs < _RUNS or time.perf_counter() - begin < _SECONDS:
        start = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - start)
        runs += 1
    return best
