"""How much memory this process holds, has held at most, and may hold.

The kernel's own high-water mark (``VmHWM``) is read and, through
``/proc/self/clear_refs``, set back between steps: sampling would miss the short peaks inside
LAPACK. Where the kernel has no such file a thread samples instead.
"""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import psutil
import torch

from streamcomp.errors import BudgetError, RecipeError
from streamcomp.linalg.symmetric import exact_products
from streamcomp.units import parse_bytes

__all__ = [
    "CONTEXT_BYTES",
    "WORKSPACE_BYTES",
    "PeakMeter",
    "budget_bytes",
    "device_budget_bytes",
    "is_memory_backed",
    "limit_device",
    "machine_bytes",
    "release",
    "resident_bytes",
    "settle",
    "warm_up",
    "within_device",
]

# What the driver and CUDA's libraries take of a GPU beside torch's allocator.
CONTEXT_BYTES = 2**30
# What cuBLAS and cuSOLVER take through torch's allocator: up to 32 MiB for each thread and library.
WORKSPACE_BYTES = 128 * 2**20

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")
_DEFAULT_SHARE = 0.8  # of what is available, where no budget is given
_DEFAULT_DEVICE_SHARE = 0.9  # the same of a GPU
_SAMPLE_SECONDS = 0.01
_MiB = 2**20

# Products that make the buffers of a BLAS as large as jobs do, in 34 MiB and some 50 ms: a tall
# one (rows, inner, columns), and the moment of so many rows and columns.
_TALL, _MOMENT = (16384, 256, 16), (1024, 2048)

# glibc's mallopt: blocks from this size on are mapped one by one and returned when freed, their
# pages made anew each time. Smaller ones come from a heap, which keeps as much as this of what is
# freed until ``release`` is called: within a stage the pages are used again. Larger blocks there
# would leave gaps as large, other ones in each run: from 32 MiB on, up to 40 MiB of them.
_M_MMAP_THRESHOLD, _M_TRIM_THRESHOLD, _M_ARENA_MAX = -3, -1, -8
_MAPPED_FROM = 8 * 2**20
_HEAP_KEEPS = 256 * 2**20

# torch then asks for pages of 2 MiB where a tensor fills them: a 512th of the page faults.
_HUGE_PAGES = ("THP_MEM_ALLOC_ENABLE", "1")

# A CPU kernel is kept for each shape of a product, a quarter of a megabyte in either cache, and
# 1024 by default: the experts of a mixture meet another number of tokens each time.
_KERNEL_CACHES = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")
_MOST_KERNELS = "32"


class PeakMeter:
    """Peak resident bytes since :meth:`restart`, file-backed pages counted; and those of a GPU."""

    def __init__(self, device: torch.device | None = None) -> None:
        self._gpu = device if device is not None and device.type == "cuda" else None
        self._exact = self.reset_mark()
        self._sampled = 0
        if not self._exact:
            threading.Thread(target=self._sample, daemon=True).start()

    def restart(self) -> None:
        """Forget the peak so far."""
        if self._gpu is not None:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self._gpu)
        if self._exact:
            self.reset_mark()
        else:
            self._sampled = resident_bytes()

    def peak(self) -> int:
        return _status_bytes("VmHWM") if self._exact else max(self._sampled, resident_bytes())

    def device_peak(self) -> int:
        """What torch's allocator took of the GPU at most, and ``CONTEXT_BYTES``; 0 without one."""
        if self._gpu is None:
            return 0
        return CONTEXT_BYTES + torch.cuda.max_memory_reserved(self._gpu)

    @staticmethod
    def reset_mark() -> bool:
        """Set the kernel's own mark back; False where it has none."""
        try:
            _CLEAR.write_text("5")
            return _status_bytes("VmHWM") > 0
        except OSError:
            return False

    def _sample(self) -> None:
        pause = threading.Event()
        while not pause.wait(_SAMPLE_SECONDS):
            self._sampled = max(self._sampled, resident_bytes())


def resident_bytes() -> int:
    """Resident bytes of this process now."""
    return int(psutil.Process().memory_info().rss)


def settle() -> None:
    """Make freed memory go back to the system, so that RSS follows what is held.

    Tells glibc to map large blocks one by one, and to keep few arenas; elsewhere nothing. What its
    heap keeps goes with :func:`release`. And tells oneDNN and torch, which read it at the first
    product or tensor, to remember few kernels and to take large pages.
    """
    os.environ.setdefault(*_HUGE_PAGES)
    for name in _KERNEL_CACHES:
        os.environ.setdefault(name, _MOST_KERNELS)
    if (libc := _glibc()) is not None:
        libc.mallopt(_M_MMAP_THRESHOLD, _MAPPED_FROM)
        libc.mallopt(_M_TRIM_THRESHOLD, _HEAP_KEEPS)
        libc.mallopt(_M_ARENA_MAX, 2)
        libc.malloc_trim(0)


def release() -> None:
    """Give free pages of the heap back; between stages, lest one's stay behind in the next."""
    if (libc := _glibc()) is not None:
        libc.malloc_trim(0)


@cache
def _glibc() -> ctypes.CDLL | None:
    try:
        libc = ctypes.CDLL("libc.so.6")
    except OSError:
        return None
    return libc if hasattr(libc, "malloc_trim") else None


def machine_bytes() -> int:
    """Memory of this machine, or of the container (cgroup v1 or v2) where that is less."""
    return min([int(psutil.virtual_memory().total), *(limit for limit, _ in _cgroups())])


def budget_bytes(max_ram: str | None, *, elsewhere: bool = False) -> int:
    """Bytes meant by ``max_ram``: a size, a share of the machine, or 80% of what is free now.

    RecipeError where it is more than the machine has, unless the job is to run ``elsewhere``.
    """
    whole = machine_bytes()
    if max_ram is None:
        left = [limit - used for limit, used in _cgroups()]
        free = max(0, min([int(psutil.virtual_memory().available), *left]))
        return int(_DEFAULT_SHARE * min(free + resident_bytes(), whole))
    budget = parse_bytes(max_ram, whole=whole)
    if budget > whole and not elsewhere:
        raise RecipeError(
            f"--max-ram {max_ram} is more than the {whole / 2**30:.1f} GiB of this machine"
        )
    return budget


def device_budget_bytes(device: torch.device, max_vram: str | None) -> int:
    """Bytes of the GPU meant by ``max_vram``, 0 where the job runs on the CPU.

    A size, a share of the GPU, or 90% of what is free on it. RecipeError where it is more than the
    GPU has, or where there is none.
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
        budget = int(_DEFAULT_DEVICE_SHARE * (free + torch.cuda.memory_reserved(device)))
    else:
        budget = parse_bytes(max_vram, whole=whole)
        if budget > whole:
            raise RecipeError(
                f"--max-vram {max_vram} is more than the {whole / 2**30:.1f} GiB of {device}"
            )
    return budget


def limit_device(device: torch.device, budget: int) -> None:
    """Have torch's allocator give no more of the GPU than ``budget`` leaves beside the driver.

    Holds for the process until another budget is set. Nothing happens on the CPU.
    """
    if device.type == "cuda":
        torch.cuda.empty_cache()
        _, whole = torch.cuda.mem_get_info(device)
        share = max(0, budget - CONTEXT_BYTES) / whole
        torch.cuda.set_per_process_memory_fraction(share, device)


@contextmanager
def within_device(what: str, budget: int) -> Iterator[None]:
    """BudgetError in the place of torch's own where the GPU has no room for ``what``."""
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


def is_memory_backed(folder: Path) -> bool:
    """Whether files in ``folder`` lie in memory (tmpfs), and so count in the budget."""
    resolved = folder.resolve()
    while not resolved.exists():
        resolved = resolved.parent
    best = max(
        (p for p in psutil.disk_partitions(all=True) if resolved.is_relative_to(p.mountpoint)),
        key=lambda partition: len(partition.mountpoint),
        default=None,
    )
    return best is not None and best.fstype in ("tmpfs", "ramfs")


def warm_up(
    device: torch.device, dtype: torch.dtype, *, gradients: bool = False, training: bool = False
) -> int:
    """Touch the kernels that a job uses, so that their code and buffers are resident.

    ``gradients`` are those of the loss in a reverse sweep, ``training`` is a refinement's. Returns
    the bytes that products take beside their operands and give back, measured on this machine.
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
    transposed, and gives them back. LAPACK's workspaces are the formulas' of ``planning.cost``.
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
        taken = max(0, _status_bytes("VmHWM") - before)
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


def _status_bytes(field: str) -> int:
    for line in _STATUS.read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    return 0


def _cgroups() -> list[tuple[int, int]]:
    """Memory limits of this process's cgroups and of those above them, and what each holds.

    Without the page cache, which makes way.
    """
    found = []
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            root, name, usage = Path("/sys/fs/cgroup"), "memory.max", "memory.current"
            cached = ("active_file", "inactive_file")
        elif "memory" in controllers.split(","):
            root, name = Path("/sys/fs/cgroup/memory"), "memory.limit_in_bytes"
            usage, cached = "memory.usage_in_bytes", ("total_active_file", "total_inactive_file")
        else:
            continue
        folder = root / path.lstrip("/")
        while folder.is_relative_to(root):
            limit = _number_in(folder / name)
            if limit is not None:
                held = (_number_in(folder / usage) or 0) - _cached_bytes(folder, cached)
                found.append((limit, max(0, held)))
            folder = folder.parent
    return found


def _number_in(path: Path) -> int | None:
    try:
        text = path.read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None


def _cached_bytes(folder: Path, names: Sequence[str]) -> int:
    """The sum of those fields of a cgroup's ``memory.stat``."""
    try:
        lines = (folder / "memory.stat").read_text().splitlines()
    except OSError:
        return 0
    fields = (line.partition(" ") for line in lines)
    return sum(int(value) for name, _, value in fields if name in names and value.isdigit())
