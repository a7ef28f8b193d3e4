"""How much memory this process holds, has held at most, and may hold.

The kernel's own high-water mark (``VmHWM``) is read and, through
``/proc/self/clear_refs``, set back between steps: sampling would miss the short peaks inside
LAPACK. Where the kernel has no such file a thread samples instead.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path

import psutil
import torch

from streamcomp.errors import RecipeError
from streamcomp.machine.device import CONTEXT_BYTES
from streamcomp.units import parse_bytes

__all__ = [
    "LATE_BYTES",
    "PeakMeter",
    "budget_bytes",
    "is_memory_backed",
    "machine_bytes",
    "resident_bytes",
]

# Libraries that come after the baseline was measured, and gaps in the allocator's heap, which are
# not the same in two runs of one job: 40 to 81 MiB were seen.
LATE_BYTES = 112 * 2**20

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")
_DEFAULT_SHARE = 0.8  # of what is available, where no budget is given
_SAMPLE_SECONDS = 0.01


class PeakMeter:
    """Peak resident bytes since :meth:`restart`, file-backed pages counted; and those of a GPU."""

    def __init__(self, device: torch.device | None = None) -> None:
        self._gpu = device if device is not None and device.type == "cuda" else None
        self._exact = self.reset_mark()
        self._sampled = 0
        self._closed = threading.Event()
        if not self._exact:
            threading.Thread(target=self._sample, daemon=True).start()

    def close(self) -> None:
        """End the thread that samples, if there is one."""
        self._closed.set()

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
        return self.mark() if self._exact else max(self._sampled, resident_bytes())

    def device_peak(self) -> int:
        """Peak of torch's allocator on the GPU, plus ``CONTEXT_BYTES``; 0 without a GPU."""
        if self._gpu is None:
            return 0
        return CONTEXT_BYTES + torch.cuda.max_memory_reserved(self._gpu)

    @staticmethod
    def reset_mark() -> bool:
        """Set the kernel's own mark back; False where it has none."""
        try:
            _CLEAR.write_text("5")
            return PeakMeter.mark() > 0
        except OSError:
            return False

    @staticmethod
    def mark() -> int:
        """The kernel's own mark, in bytes; 0 where it has none."""
        return _status_bytes("VmHWM")

    def _sample(self) -> None:
        while not self._closed.wait(_SAMPLE_SECONDS):
            self._sampled = max(self._sampled, resident_bytes())


def resident_bytes() -> int:
    """Resident bytes of this process now."""
    return int(psutil.Process().memory_info().rss)


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


def is_memory_backed(folder: Path) -> bool:
    """Whether files in ``folder`` are in memory (tmpfs), and so count in the budget."""
    resolved = folder.resolve()
    while not resolved.exists():
        resolved = resolved.parent
    best = max(
        (p for p in psutil.disk_partitions(all=True) if resolved.is_relative_to(p.mountpoint)),
        key=lambda partition: len(partition.mountpoint),
        default=None,
    )
    return best is not None and best.fstype in ("tmpfs", "ramfs")


def _status_bytes(field: str) -> int:
    for line in _STATUS.read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    return 0


def _cgroups() -> list[tuple[int, int]]:
    """Memory limits of this process's cgroups and of those above them, and what each holds.

    Without the page cache, which makes way.
    """
    limits = []
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
                limits.append((limit, max(0, held)))
            folder = folder.parent
    return limits


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
