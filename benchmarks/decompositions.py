"""Ways to the eigenvectors of a moment: seconds, memory, and what is lost by them.

    python benchmarks/decompositions.py --sizes 576 1536 4096

The matrix has the energies of a language model's: four massive directions, the others fall over
five orders of magnitude. *Excess* is ||X - U U^T X||^2 over the least there is, less 1, at a fifth,
half and four fifths of the rank. Drivers of LAPACK that torch does not call are tried through scipy
where that is installed. Prints the table of ``decompositions.md``.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from streamcomp.linalg.symmetric import eigh
from streamcomp.machine.allocator import release, settled
from streamcomp.machine.memory import PeakMeter, resident_bytes

try:
    from scipy.linalg import eigh as scipy_eigh
except ImportError:
    scipy_eigh = None

Solver = Callable[[Tensor], Tensor]  # eigenvectors, the largest energies first
SHARES = (0.2, 0.5, 0.8)


def solvers() -> dict[str, Solver]:
    found: dict[str, Solver] = {
        "torch, fp64 (syevd)": lambda matrix: torch.linalg.eigh(matrix)[1].flip(1),
        "torch, fp32 (syevd)": lambda matrix: torch.linalg.eigh(matrix.float())[1].flip(1),
        "in place, fp64": lambda matrix: eigh(matrix.clone(), torch.float64)[1],
        "deflated, fp32 (used for bf16 and fp16)": lambda m: eigh(m.clone(), torch.float32)[1],
    }
    if scipy_eigh is not None:
        for driver in ("evr", "ev"):
            for dtype in (torch.float64, torch.float32):
                name = f"scipy, {str(dtype)[6:]} (sy{driver})"
                found[name] = partial(_by_scipy, driver=driver, dtype=dtype)
    return found


def _by_scipy(matrix: Tensor, driver: str, dtype: torch.dtype) -> Tensor:
    vectors = scipy_eigh(matrix.to(dtype).numpy(), driver=driver)[1]
    return torch.from_numpy(vectors[:, ::-1].copy())


def graded(size: int) -> tuple[Tensor, Tensor]:
    """A symmetric matrix (n, n) fp64 and its energies, descending."""
    random = torch.Generator().manual_seed(0)
    energies = torch.logspace(0, -5, size, dtype=torch.float64)
    energies[:4] *= torch.tensor([1e3, 1e2, 30.0, 10.0], dtype=torch.float64)
    basis = torch.linalg.qr(torch.randn(size, size, generator=random, dtype=torch.float64)).Q
    return (basis * energies) @ basis.T, energies


def excess(matrix: Tensor, energies: Tensor, vectors: Tensor, rank: int) -> float:
    """What projecting on the first ``rank`` vectors loses over the least, relative to that."""
    kept = vectors[:, :rank].double()
    rest = torch.eye(len(matrix), dtype=torch.float64) - kept @ kept.T
    return float(((rest @ matrix) * rest).sum() / energies[rank:].sum()) - 1


@settled()
def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--sizes", type=int, nargs="+", default=[576, 1536, 4096])
    parser.add_argument("--repeats", type=int, default=2)
    options = parser.parse_args()
    meter = PeakMeter()
    print("| size | solver | seconds | over fp64 | bytes an entry | excess at 1/5, 1/2, 4/5 |")
    print("|---|---|---|---|---|---|")
    for size in options.sizes:
        matrix, energies = graded(size)
        base = math.nan
        for name, solve in solvers().items():
            best, peak = math.inf, 0
            for _ in range(options.repeats):
                release()
                meter.restart()
                before, start = resident_bytes(), time.perf_counter()
                vectors = solve(matrix)
                best = min(best, time.perf_counter() - start)
                peak = meter.peak() - before
            base = best if math.isnan(base) else base
            lost = ", ".join(
                f"{excess(matrix, energies, vectors, int(share * size)):.0e}" for share in SHARES
            )
            print(
                f"| {size} | {name} | {best:.2f} | {best / base:.2f} | {peak / size**2:.0f} "
                f"| {lost} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
