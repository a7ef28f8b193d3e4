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
# glibc's default, which is put back.
_M_MMAP_THRESHOLD, _M_TRIM_THRESHOLD, _M_ARENA_MAX = -3, -1, -8
_OPTIONS = {
    _M_MMAP_THRESHOLD: (8 * 2**20, 128 * 2**10),
    _M_TRIM_THRESHOLD: (256 * 2**20, 128 * 2**10),
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


@contextmanager
def settled() -> Iterator[None]:
    """While open, large blocks are mapped one by one, and few kernels are remembered.

    Afterwards glibc has its default thresholds again, except that it no longer adapts them to the
    blocks that a program frees, and the environment is as before; torch and oneDNN keep the
    settings that they have read. With another C library the heap is left alone.
    """
    ours = {name: value for name, value in _ENVIRONMENT.items() if name not in os.environ}
    os.environ.update(ours)
    libc = _glibc()
    if libc is not None:
        for option, (value, _) in _OPTIONS.items():
            libc.mallopt(option, value)
        libc.malloc_trim(0)
    try:
        yield
    finally:
        for name in ours:
            os.environ.pop(name, None)
        if libc is not None:
            for option, (_, default) in _OPTIONS.items():
                libc.mallopt(option, default)


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
