"""Which exceptions say that the system gave no memory."""

from __future__ import annotations

import errno

import pytest
import torch

from streamcomp import JobLockedError, UnsupportedModelError
from streamcomp.memory_errors import chained, lacks_memory


class PanicException(BaseException):
    """As a library in Rust raises it."""


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        OSError(errno.ENOMEM, "Cannot allocate memory"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
        RuntimeError("can't start new thread"),
        RuntimeError("std::bad_alloc"),
        ImportError("libtorch_cpu.so: failed to map segment from shared object"),
        PanicException('ThreadPoolBuildError: "Resource temporarily unavailable"'),
    ],
    ids=repr,
)
def test_memory_is_refused_in_many_words(error: BaseException) -> None:
    assert lacks_memory(error)


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable"),
        ValueError("a setting that says: can't allocate memory"),
        RuntimeError("mat1 and mat2 shapes cannot be multiplied"),
        torch.OutOfMemoryError("CUDA out of memory. Of the allocated memory 2 GiB is reserved"),
        KeyError("memory"),
    ],
    ids=repr,
)
def test_other_errors_are_not_about_memory(error: BaseException) -> None:
    assert not lacks_memory(error)


def test_the_error_that_led_to_another_counts() -> None:
    with pytest.raises(UnsupportedModelError) as raised:
        try:
            raise MemoryError
        except MemoryError:
            raise UnsupportedModelError("transformers cannot build it") from None
    assert lacks_memory(raised.value)

    with pytest.raises(JobLockedError) as raised_other:
        try:
            raise BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable")
        except BlockingIOError:
            raise JobLockedError("another process works there") from None
    assert not lacks_memory(raised_other.value)


def test_errors_that_led_to_each_other_in_a_circle_end() -> None:
    one, other = ValueError("one"), ValueError("other")
    one.__context__, other.__context__ = other, one

    assert list(chained(one)) == [one, other]
