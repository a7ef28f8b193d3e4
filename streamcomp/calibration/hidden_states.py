"""Hidden states on disk, between two blocks.

A stream is one file per block boundary: the states of all windows, (windows, seq, hidden),
back to back. It is read and written window by window with plain file calls, and does not count in
RSS. Both overlap with what computes the states: the kernel is asked for the windows to come, and
what is written goes to disk in a thread of its own.
"""

from __future__ import annotations

import os
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from streamcomp.checkpoint.atomic import output_errors, sync_folder
from streamcomp.errors import SourceError

__all__ = ["HiddenStates", "StreamShape"]

# Written states are flushed to disk and dropped from the page cache this often; as much again is
# written meanwhile, and no more.
DIRTY_BYTES = 16 * 2**20


@dataclass(frozen=True)
class StreamShape:
    """Windows x tokens x hidden size, in the model's dtype."""

    windows: int
    seq_len: int
    hidden: int
    dtype: torch.dtype

    @property
    def tokens(self) -> int:
        return self.windows * self.seq_len

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
        self._flusher: ThreadPoolExecutor | None = None
        self._flushing: Future[None] | None = None

    def create(self) -> None:
        """Open for writing, with the whole length reserved: a full disk shows now."""
        with output_errors(self.path):
            self._descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o644)
            os.posix_fallocate(self._descriptor, 0, self.shape.nbytes)
        self._flusher = ThreadPoolExecutor(1)

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
        """Windows ``start`` to ``stop`` (exclusive), (stop - start, seq, hidden), on the CPU.

        As many behind them are read ahead into the page cache.
        """
        shape = self.shape
        buffer = torch.empty(stop - start, shape.seq_len, shape.hidden, dtype=shape.dtype)
        view = memoryview(buffer.view(torch.uint8).numpy().data).cast("B")
        offset, done = start * shape.window_bytes, 0
        while done < len(view):
            count = os.preadv(self._descriptor, [view[done:]], offset + done)
            if count == 0:
                raise SourceError(f"{self.path} was cut short while it was read")
            done += count
        os.posix_fadvise(self._descriptor, offset + done, done, os.POSIX_FADV_WILLNEED)
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
                    self._flushed()
                    sync_folder(self.path.parent)
        finally:
            if self._flusher is not None:
                self._flusher.shutdown()
            self._flusher = self._flushing = None
            os.close(self._descriptor)
            self._descriptor = -1

    def remove(self) -> None:
        """Delete the file, if it is there."""
        self.path.unlink(missing_ok=True)

    def _flush(self) -> None:
        """Begin to bring what was written to disk, once the flush before is through."""
        self._flushed()
        assert self._flusher is not None
        self._flushing = self._flusher.submit(_to_disk, self._descriptor)
        self._dirty = 0

    def _flushed(self) -> None:
        """Wait for the flush that was begun; raises what it raised."""
        flushing, self._flushing = self._flushing, None
        if flushing is not None:
            flushing.result()


def _to_disk(descriptor: int) -> None:
    os.fdatasync(descriptor)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
