"""Bytes that products take on this machine in addition to their operands, measured."""

from __future__ import annotations

from functools import cache

import torch

from streamcomp.linalg.symmetric import exact_products
from streamcomp.machine.memory import PeakMeter, resident_bytes

__all__ = ["warm_up"]

# Products that make the buffers of a BLAS as large as jobs do, in 34 MiB and some 50 ms: a tall
# one (rows, inner, columns), and the moment of so many rows and columns.
_TALL, _MOMENT = (16384, 256, 16), (1024, 2048)
_MiB = 2**20


def warm_up(
    device: torch.device, dtype: torch.dtype, *, gradients: bool = False, training: bool = False
) -> int:
    """Touch the kernels that a job uses, so that their code and buffers are resident.

    ``gradients`` are those of the loss in a reverse sweep, ``training`` is a refinement's. Returns
    the bytes that products take in addition to their operands and give back, as measured here.
    """
    square = torch.eye(64, dtype=dtype, device=device)
    torch.nn.functional.linear(square, square)
    wide = torch.eye(64, dtype=torch.float64, device=device)
    for solve in (
        torch.linalg.eigh,
        torch.linalg.cholesky,
        torch.linalg.lu_factor,
        torch.linalg.qr,
    ):
        solve(wide)
    wide.float() @ wide.float()
    torch.linalg.solve_triangular(wide, wide, upper=False)
    torch.cholesky_solve(wide, wide)
    if gradients or training:
        _warm_up_gradients(square.detach().clone().requires_grad_(), training)
    return _product_bytes(device, dtype, torch.get_num_threads())


@cache
def _product_bytes(device: torch.device, dtype: torch.dtype, threads: int) -> int:
    """Have BLAS make the buffers that it keeps; whole MiB that a product takes and gives back.

    Seen on x86: MKL packs operands into up to 10 MiB a thread, full after one tall product in
    fp64, and keeps them for every dtype. oneDNN takes 0.6 MiB a thread where a bf16 operand is
    transposed, and gives them back. LAPACK's workspaces are counted by the formulas of ``linalg``.
    """
    rows, inner, columns = _TALL
    torch.ones(rows, inner, dtype=torch.float64, device=device).mm(
        torch.ones(inner, columns, dtype=torch.float64, device=device)
    )
    left = torch.ones(_MOMENT, dtype=torch.float32, device=device)
    result = torch.ones(_MOMENT[1], _MOMENT[1], dtype=torch.float32, device=device)
    taken = 0
    for _ in range(2):  # what the first one keeps does not count
        if not PeakMeter.reset_mark():
            return 0
        before = resident_bytes()
        with exact_products(dtype):
            torch.mm(left.T, left, out=result)
        taken = max(0, PeakMeter.mark() - before)
    return -(-taken // _MiB) * _MiB


def _warm_up_gradients(start: torch.Tensor, training: bool) -> None:
    """A backward through what a block and the loss are made of, and a step of the optimizer."""
    functional = torch.nn.functional
    with torch.enable_grad():
        heads = start.view(1, 4, 16, -1)
        mixed = functional.scaled_dot_product_attention(heads, heads, heads, is_causal=True)
        output = functional.silu(functional.linear(mixed.reshape(start.shape), start.detach()))
        loss = functional.cross_entropy(
            output.float(), torch.zeros(64, dtype=torch.int64).to(start.device)
        )
        loss.backward()
    if training:
        torch.optim.Muon([start], lr=0.0).step()
