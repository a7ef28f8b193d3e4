"""Watches what a process does to a disk, and lets one operation fail.

The calls of ``os`` and the files that ``open`` returns are replaced, so it is for a process that
ends afterwards. What C code writes by itself is not seen.
"""

from __future__ import annotations

import builtins
import errno
import io
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

__all__ = ["FAULTS", "Operations"]

# Name -> the error (0: SIGKILL), and whether all later operations fail too.
FAULTS: dict[str, tuple[int, bool]] = {
    "kill": (0, False),
    "no space": (errno.ENOSPC, False),
    "broken": (errno.EIO, False),
    "no space for good": (errno.ENOSPC, True),
    "broken for good": (errno.EIO, True),
}
_CALLS = ("fsync", "fdatasync", "posix_fallocate", "ftruncate", "truncate", "replace", "rename",
          "link", "symlink", "unlink", "remove", "rmdir", "mkdir")  # fmt: skip


class Operations:
    """The durable operations of this process below ``folder``: counts them, and lets one fail."""

    def __init__(
        self, folder: Path, at: int = -1, fault: str = "kill", names: Path | None = None
    ) -> None:
        """Without ``at`` none fails, and their names are written to ``names``."""
        self.folder, self.at, self.number = str(folder), at, 0
        self.error, self.stays = FAULTS[fault]
        flags = os.O_WRONLY | os.O_CREAT
        self._log = -1 if names is None else os.open(names, flags, 0o644)
        self._write = os.write

    def install(self) -> None:
        """Watch this process from now on."""
        system: Any = os
        for name in _CALLS:
            setattr(system, name, self._watched(name, getattr(os, name)))
        system.open = self._watched_open(os.open)
        system.write = self._watched_write("write", os.write)
        system.pwrite = self._watched_write("pwrite", os.pwrite)
        opened = self._watched_file(io.open)
        for module in (io, builtins):
            module.open = opened  # type: ignore[attr-defined]

    def is_inside(self, place: Any, folder: int | None = None) -> bool:
        """Whether a path or descriptor is of a file below the folder that is watched."""
        if isinstance(place, int):
            return os.readlink(f"/proc/self/fd/{place}").startswith(self.folder)
        path = os.fsdecode(place)
        if folder is not None:
            path = os.path.join(os.readlink(f"/proc/self/fd/{folder}"), path)
        return os.path.abspath(path).startswith(self.folder)

    def happen(self, name: str, half: Callable[[], Any] | None = None) -> None:
        """An operation is about to begin; ``half`` does a part of it."""
        number, self.number = self.number, self.number + 1
        if self._log >= 0:
            self._write(self._log, f"{name}\n".encode())
        if number == self.at or (self.stays and 0 <= self.at < number):
            if self.error:
                raise OSError(self.error, os.strerror(self.error))
            if half is not None:
                half()
            os.kill(os.getpid(), signal.SIGKILL)

    def _watched(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def watched(place: Any, *args: Any, **kwargs: Any) -> Any:
            folder = kwargs.get("dir_fd", kwargs.get("src_dir_fd"))
            if self.is_inside(place, folder):
                self.happen(name)
            return call(place, *args, **kwargs)

        return watched

    def _watched_open(self, call: Callable[..., int]) -> Callable[..., int]:
        def opened(place: Any, flags: int, *args: Any, **kwargs: Any) -> int:
            writes = flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
            if writes and self.is_inside(place, kwargs.get("dir_fd")):
                self.happen("open")
            return call(place, flags, *args, **kwargs)

        return opened

    def _watched_write(self, name: str, call: Callable[..., int]) -> Callable[..., int]:
        def written(descriptor: int, data: Any, *args: int) -> int:
            if self.is_inside(descriptor):
                half = len(data) // 2
                self.happen(name, lambda: call(descriptor, data[:half], *args))
            return call(descriptor, data, *args)

        return written

    def _watched_file(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def opened(place: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
            if not set(mode) & set("wax+") or not self.is_inside(place):
                return call(place, mode, *args, **kwargs)
            if not isinstance(place, int):
                self.happen("open")
            return WatchedFile(call(place, mode, *args, **kwargs), self)

        return opened


class WatchedFile:
    """A file open for writing, whose writes, flushes and closing are durable operations."""

    def __init__(self, file: Any, operations: Operations) -> None:
        self._file, self._operations = file, operations

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def __enter__(self) -> WatchedFile:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def __iter__(self) -> Iterator[Any]:
        return iter(self._file)

    def write(self, data: Any) -> int:
        self._operations.happen("write", lambda: self._write_half(data))
        return int(self._file.write(data))

    def _write_half(self, data: Any) -> None:
        self._file.write(data[: len(data) // 2])
        self._file.flush()

    def flush(self) -> None:
        self._operations.happen("flush")
        self._file.flush()

    def close(self) -> None:
        """Close the file, also where that fails: its descriptor is gone then."""
        if self._file.closed:
            return
        try:
            self._operations.happen("close")
        finally:
            self._file.close()
