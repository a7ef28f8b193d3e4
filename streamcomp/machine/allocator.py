"""The heap of this process: freed memory goes back, so that RSS follows what is held."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

__all__ = ["release", "settled"]

# glibc's mallopt: blocks from this size on are mapped one by one and returned when freed, their
# pages made anew each time. Smaller ones come from a heap, which keeps as much as this of what is
# freed until ``release`` is called: within a phase the pages are used again. Larger blocks there
# would leave gaps as large, other ones in each run: from 32 MiB on, up to 40 MiB of them. Each with
# the value that is set afterwards: the largest that glibc itself comes to while it still adapts
# them, for its first ones would have it map every tensor anew for good.
_M_MMAP_THRESHOLD, _M_TRIM_THRESHOLD, _M_ARENA_MAX = -3, -1, -8
_OPTIONS = {
    _M_MMAP_THRESHOLD: (8 * 2**20, 32 * 2**20),
    _M_TRIM_THRESHOLD: (256 * 2**20, 64 * 2**20),
    _M_ARENA_MAX: (2, 0),
}

# Read by torch and oneDNN at the first tensor or product. Pages of 2 MiB where a tensor fills them:
# a 512th of the page faults. A CPU kernel is kept for each shape of a product, a quarter of a
# megabyte in either cache, and 1024 by default: the experts of a mixture meet another number of
# tokens each time.
_ENVIRONMENT = {
    "THP_MEM_ALLOC_ENABLE": "1",
    "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "32",
    "LRU_CACHE_CAPACITY": "32",
}


_open = 0  # how many of ``settled`` are; the outermost one puts everything back


@contextmanager
def settled() -> Iterator[None]:
    """While open, large blocks are mapped one by one, and few kernels are remembered.

    Afterwards the environment is as before, and glibc has the thresholds that it comes to by
    itself, which it no longer adapts; torch and oneDNN keep the settings that they have read. With
    another C library the heap is left alone.
    """
    global _open
    ours = {name: value for name, value in _ENVIRONMENT.items() if name not in os.environ}
    os.environ.update(ours)
    _set_options(inside=True)
    release()
    _open += 1
    try:
        yield
    finally:
        _open -= 1
        for name in ours:
            os.environ.pop(name, None)
        if not _open:
            _set_options(inside=False)


def _set_options(*, inside: bool) -> None:
    if (libc := _glibc()) is not None:
        for option, (value, afterwards) in _OPTIONS.items():
            libc.mallopt(option, value if inside else afterwards)


def release() -> None:
    """Give free pages of the heap back; between phases, lest one's stay behind in the next."""
    if (libc := _glibc()) is not None:
        libc.malloc_trim(0)


@cache
def _glibc() -> ctypes.CDLL | None:
    try:
        libc = ctypes.CDLL("libc.so.6")
    except OSError:
        return None
    return libc if hasattr(libc, "malloc_trim") else None
