"""Durable files: readers see either the old or the new content, even after a power cut."""

from __future__ import annotations

import errno
import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from streamcomp.errors import OutputError

__all__ = [
    "atomic_file",
    "is_full",
    "make_folder",
    "output_errors",
    "sync_folder",
    "write_json",
    "write_text",
]

_NEW = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_FULL = (errno.ENOSPC, errno.EDQUOT)


@contextmanager
def output_errors(path: Path) -> Iterator[None]:
    """Turn the system's refusal to write below ``path`` into an OutputError with a remedy."""
    try:
        yield
    except OSError as error:
        if is_full(error):
            raise OutputError(
                f"no space left for {path}: free some and run the same command again, "
                "what a job has finished is kept"
            ) from error
        raise OutputError(f"{path} cannot be written: {error.strerror or error}") from error


def is_full(error: BaseException) -> bool:
    """Whether ``error`` says that a disk is full."""
    return isinstance(error, OSError) and error.errno in _FULL


def make_folder(path: Path) -> None:
    """Make ``path`` and its parents, and check that it can be written."""
    with output_errors(path):
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):  # unnamed: nothing remains after a kill
            pass


def sync_folder(path: Path) -> None:
    """Make the names in ``path`` durable."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """A binary file that takes the name ``path`` when the block ends, and is then durable.

    Written under a temporary name in the same folder; removed if the block fails. What a killed
    process left under that name is removed first, and so is a link: it is never followed.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    with output_errors(path):
        try:
            temporary.unlink(missing_ok=True)
            with open(os.open(temporary, _NEW, 0o666), "wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        sync_folder(path.parent)


def write_text(path: Path, text: str) -> None:
    """Replace ``path`` by ``text`` in UTF-8, durably."""
    with atomic_file(path) as file:
        file.write(text.encode("utf-8", "backslashreplace"))  # file names may not be UTF-8


def write_json(path: Path, value: Any) -> None:
    """Replace ``path`` by ``value`` as indented JSON, durably."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")
