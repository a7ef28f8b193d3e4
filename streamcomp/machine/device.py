"""The GPU of a job: its choice, its budget, and the error when that is not enough."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from streamcomp.errors import BudgetError, RecipeError
from streamcomp.units import parse_bytes

__all__ = [
    "CONTEXT_BYTES",
    "WORKSPACE_BYTES",
    "choose_device",
    "device_budget_bytes",
    "limit_device",
    "within_device",
]

# GPU memory of the driver and CUDA's libraries, in addition to torch's allocator.
CONTEXT_BYTES = 2**30
# Workspace of cuBLAS and cuSOLVER in torch's allocator: up to 32 MiB for each thread and library.
WORKSPACE_BYTES = 128 * 2**20

_DEFAULT_SHARE = 0.9  # of what is free on the GPU, where no budget is given


def choose_device(name: str) -> torch.device:
    """The device called ``name``; ``auto`` is the first GPU, or the CPU where there is none.

    A GPU is always returned with its number, which some of torch's calls require.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(name)
    if device.type != "cuda":
        return device
    if not torch.cuda.is_available():
        raise RecipeError(f"--device {name}: torch finds no CUDA GPU here; use --device cpu")
    number = torch.cuda.current_device() if device.index is None else device.index
    if number >= torch.cuda.device_count():
        count = torch.cuda.device_count()
        raise RecipeError(f"--device {name}: torch finds {count} GPUs, from cuda:0 on")
    return torch.device("cuda", number)


def device_budget_bytes(device: torch.device, max_vram: str | None) -> int:
    """Bytes of the GPU meant by ``max_vram``, 0 where the job runs on the CPU.

    It is a size, a share of the GPU, or by default 90% of its free memory. RecipeError where it is
    more than the GPU has, or where there is no GPU.
    """
    if device.type != "cuda":
        if max_vram is not None:
            raise RecipeError(
                f"--max-vram {max_vram}: the job runs on the CPU; leave it out, "
                "or use --device cuda"
            )
        return 0
    free, whole = torch.cuda.mem_get_info(device)
    if max_vram is None:
        budget = int(_DEFAULT_SHARE * (free + torch.cuda.memory_reserved(device)))
    else:
        budget = parse_bytes(max_vram, whole=whole)
        if budget > whole:
            raise RecipeError(
                f"--max-vram {max_vram} is more than the {whole / 2**30:.1f} GiB of {device}"
            )
    return budget


def limit_device(device: torch.device, budget: int) -> Callable[[], None]:
    """Limit torch's allocator on the GPU to ``budget`` minus the driver's memory.

    Returns a function that restores the former limit. On the CPU neither does anything.
    """
    if device.type != "cuda":
        return lambda: None
    torch.cuda.empty_cache()
    _, whole = torch.cuda.mem_get_info(device)
    before = torch.cuda.get_per_process_memory_fraction(device)
    share = max(0, budget - CONTEXT_BYTES) / whole
    torch.cuda.set_per_process_memory_fraction(share, device)
    return lambda: torch.cuda.set_per_process_memory_fraction(before, device)


@contextmanager
def within_device(what: str, budget: int) -> Iterator[None]:
    """Raise BudgetError instead of torch's error where the GPU has no room for ``what``."""
    try:
        yield
    except torch.OutOfMemoryError as error:  # of a GPU: the host's memory never gets that far
        raise BudgetError(
            f"{what} needs more of the GPU than it has free, or than --max-vram allows "
            f"({budget / 2**30:.1f} GiB); what is done is kept: free the GPU, allow more, or use "
            "--device cpu",
            budget_bytes=budget,
            minimum_bytes=budget + 1,
        ) from error
