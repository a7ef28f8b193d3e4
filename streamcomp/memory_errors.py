"""Tells exceptions by which the system refuses memory from all others.

Python raises MemoryError, torch and C++ a RuntimeError, the system calls ENOMEM; a thread whose
stack finds no room is a RuntimeError too. Models and tokenizers may raise one of them anywhere.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator

__all__ = ["chained", "lacks_memory"]

_TEXTS = (
    "allocate memory",  # "DefaultCPUAllocator: can't allocate memory", "Cannot allocate memory"
    "bad_alloc",
    "can't start new thread",
    "failed to map segment",  # of a library, while it is imported
    "Resource temporarily unavailable",  # a thread, in a panic of the tokenizers library
)


def lacks_memory(error: BaseException) -> bool:
    """Whether ``error``, or one that led to it, says that the system gave no memory."""
    return any(map(_says_so, chained(error)))


def chained(error: BaseException | None) -> Iterator[BaseException]:
    """``error``, and the errors that it was raised for."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


def _says_so(error: BaseException) -> bool:
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    of_others = isinstance(error, RuntimeError | ImportError) or not isinstance(error, Exception)
    return isinstance(error, MemoryError) or (
        of_others and any(text in str(error) for text in _TEXTS)
    )
