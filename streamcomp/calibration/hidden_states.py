"""Hidden states on disk, between two blocks.

A stream is one file per block boundary: the states of all windows, (windows, seq, hidden),
back to back. It is read and written window by window with plain file calls: where RAM is
free the page cache makes that as fast as memory, and it does not count in RSS.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from streamcomp.checkpoint.atomic import output_errors, sync_folder
from streamcomp.errors import SourceError

__all__ = ["HiddenStates", "StreamShape"]

# Written states are flushed to disk and dropped from the page cache this often.
DIRTY_BYTES = 32 * 2**20


@dataclass(frozen=True)
class StreamShape:
    """Windows x tokens x hidden size, in the model's dtype."""

    windows: int
    seq_len: int
    hidden: int
    dtype: torch.dtype

    @property
    def window_bytes(self) -> int:
        return self.seq_len * self.hidden * self.dtype.itemsize

    @property
    def nbytes(self) -> int:
        return self.windows * self.window_bytes


class HiddenStates:
    """The file ``path`` of shape ``shape``. Holds no more than the windows of one call."""

    def __init__(self, path: Path, shape: StreamShape) -> None:
        self.path, self.shape = path, shape
        self._descriptor = -1
        self._dirty = 0

    def create(self) -> None:
        """Open for writing, with the whole length reserved: a full disk shows now."""
        with output_errors(self.path):
            self._descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o644)
            os.posix_fallocate(self._descriptor, 0, self.shape.nbytes)

    def open(self) -> None:
        """Open for reading; SourceError unless the file has the length it should have."""
        try:
            self._descriptor = os.open(self.path, os.O_RDONLY)
        except OSError as error:
            raise SourceError(f"{self.path} cannot be opened: {error.strerror}") from None
        size = os.fstat(self._descriptor).st_size
        if size != self.shape.nbytes:
            self.close()
            raise SourceError(
                f"{self.path} has {size} bytes instead of {self.shape.nbytes}: remove the work "
                "folder and start again"
            )

    def read(self, start: int, stop: int) -> Tensor:
        """Windows ``start`` to ``stop`` (exclusive), (stop - start, seq, hidden), on the CPU."""
        shape = self.shape
        buffer = torch.empty(stop - start, shape.seq_len, shape.hidden, dtype=shape.dtype)
        view = memoryview(buffer.view(torch.uint8).numpy().data).cast("B")
        offset, done = start * shape.window_bytes, 0
        while done < len(view):
            count = os.preadv(self._descriptor, [view[done:]], offset + done)
            if count == 0:
                raise SourceError(f"{self.path} was cut short while it was read")
            done += count
        return buffer

    def write(self, start: int, states: Tensor) -> None:
        """Put ``states`` (batch, seq, hidden) at window ``start``."""
        host = states.detach().to("cpu", self.shape.dtype).contiguous()
        view = memoryview(host.view(torch.uint8).numpy().data).cast("B")
        offset, done = start * self.shape.window_bytes, 0
        with output_errors(self.path):
            while done < len(view):
                done += os.pwrite(self._descriptor, view[done:], offset + done)
            self._dirty += done
            if self._dirty >= DIRTY_BYTES:
                self._flush()

    def close(self, *, durable: bool = False) -> None:
        """Close the file; with ``durable`` its bytes and its name are on disk afterwards."""
        if self._descriptor < 0:
            return
        try:
            if durable:
                with output_errors(self.path):
                    self._flush()
                    sync_folder(self.path.parent)
        finally:
            os.close(self._descriptor)
            self._descriptor = -1

    def remove(self) -> None:
        """Delete the file, if it is there."""
        self.path.unlink(missing_ok=True)

    def _flush(self) -> None:
        os.fdatasync(self._descriptor)
        os.posix_fadvise(self._descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        self._dirty = 0
