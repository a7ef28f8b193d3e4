"""The heap of this process: freed memory is returned, so that RSS follows actual use."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

__all__ = ["release", "settled"]

# Options of glibc's mallopt: (value while open, value afterwards). Blocks of at least the first
# threshold are mapped one by one and returned when freed; each has fresh pages. Smaller ones come
# from a heap that keeps up to the second threshold of freed bytes until ``release`` is called, so
# that a phase reuses its pages. With a first threshold of 32 MiB the heap had gaps of up to 40 MiB,
# which differed from run to run. The values afterwards are the largest that glibc reaches by itself
# while it adapts them; its initial ones would have it map every tensor anew from then on.
_M_MMAP_THRESHOLD, _M_TRIM_THRESHOLD, _M_ARENA_MAX = -3, -1, -8
_OPTIONS = {
    _M_MMAP_THRESHOLD: (8 * 2**20, 32 * 2**20),
    _M_TRIM_THRESHOLD: (256 * 2**20, 64 * 2**20),
    _M_ARENA_MAX: (2, 0),
}

# Read by torch and oneDNN at the first tensor or product. Tensors of 2 MiB or more get large pages:
# a 512th of the page faults. The caches hold a CPU kernel for each shape of a product, a quarter of
# a megabyte each, and 1024 by default: experts of a mixture see a new number of tokens each time.
_ENVIRONMENT = {
    "THP_MEM_ALLOC_ENABLE": "1",
    "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "32",
    "LRU_CACHE_CAPACITY": "32",
}


_open = 0  # nesting depth of ``settled``; the outermost one restores everything


@contextmanager
def settled() -> Iterator[None]:
    """While open, large blocks are mapped one by one, and few kernels are cached.

    Afterwards the environment is restored, and glibc has the thresholds that it reaches by itself,
    but no longer adapts them; torch and oneDNN keep the settings that they have read. With another
    C library the heap is left alone.
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
    """Return free pages of the heap to the system; called between phases."""
    if (libc := _glibc()) is not None:
        libc.malloc_trim(0)


@cache
def _glibc() -> ctypes.CDLL | None:
    try:
        libc = ctypes.CDLL("libc.so.6")
    except OSError:
        return None
    return libc if hasattr(libc, "malloc_trim") else None
