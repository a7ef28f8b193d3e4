"""How fast this machine is, measured: what seconds are planned from and measured against."""

from __future__ import annotations

import math
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from streamcomp.calibration.observe import moment_dtype
from streamcomp.linalg.symmetric import solve_dtype

__all__ = ["MachineRates", "measure_disk", "measure_rates"]

_PRODUCT, _EIGH = 1024, 512  # sizes that are timed
_FILE_BYTES = 16 * 2**20
_DISK = 500e6  # bytes per second, where no folder is known


@dataclass(frozen=True)
class MachineRates:
    """Measured speed of this machine, operations (or bytes) per second."""

    model_flops: float  # products in the model's dtype
    moment_flops: float  # products in the moments' dtype
    wide_flops: float  # products in fp64
    eigh_flops: float  # eigh in the dtype that decompositions take, counted as 9 n^3
    disk_bytes: float = _DISK


def measure_rates(device: torch.device, dtype: torch.dtype) -> MachineRates:
    """Time small products and one eigh; takes about a second."""

    def product(kind: torch.dtype) -> float:
        # as a linear does it: a plain product in fp16 takes the CPU twenty times as long
        left = torch.ones(_PRODUCT, _PRODUCT, dtype=kind, device=device)
        run = torch.nn.functional.linear
        return 2.0 * _PRODUCT**3 / _best_seconds(lambda: run(left, left), device)

    solve = torch.eye(_EIGH, dtype=solve_dtype(dtype), device=device)
    return MachineRates(
        product(dtype),
        product(moment_dtype(dtype)),
        product(torch.float64),
        9.0 * _EIGH**3 / _best_seconds(lambda: torch.linalg.eigh(solve), device),
    )


def measure_disk(folder: Path) -> float:
    """Bytes per second that a file is written and made durable at, in ``folder`` or above it.

    A usual rate where nothing can be written yet: whether that is an error shows later.
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


def _best_seconds(work: Callable[[], Any], device: torch.device, repeats: int = 3) -> float:
    best = math.inf
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - start)
    return best
