"""Hidden states on disk, between two blocks.

A stream is one file per block boundary: the states of all windows, (windows, seq, hidden),
back to back. It is read and written window by window with plain file calls, and does not count in
RSS. Both overlap with what computes the states: the kernel is asked for the windows to come, and
what is written goes to disk in a thread of its own.

Every window is digested when it is written, and when it is first read. A window is digested in
pieces, by as many threads as torch has, while nothing else runs: a thread next to what computes
would need the window to stay in memory, unchanged. The digest of a stream is that of its pieces'
CRC-32s, which take a fifth of BLAKE2b's time: they see damage, not an attack, and who can change a
stream can change the journal too.
"""

from __future__ import annotations

import os
import zlib
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from streamcomp.checkpoint.atomic import output_errors, sync_folder
from streamcomp.checkpoint.digests import FileDigest, digest_of
from streamcomp.errors import DamagedFileError

__all__ = ["HiddenStates", "StreamShape"]

# Written states are flushed to disk and dropped from the page cache this often; as much again is
# written meanwhile, and no more.
DIRTY_BYTES = 16 * 2**20

_PIECE_BYTES = 2**20  # digested by one thread at a time


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
        self._digests: dict[int, bytes] = {}  # CRC-32s of the pieces of each window
        self._digesters: ThreadPoolExecutor | None = None

    def create(self) -> None:
        """Open for writing, with the whole length reserved: a full disk shows now."""
        with output_errors(self.path):
            self._descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o644)
            os.posix_fallocate(self._descriptor, 0, self.shape.nbytes)
        self._flusher = ThreadPoolExecutor(1)
        self._digests.clear()

    def open(self) -> None:
        """Open for reading; DamagedFileError unless the file has the length it should have."""
        try:
            self._descriptor = os.open(self.path, os.O_RDONLY)
        except OSError as error:
            raise DamagedFileError(self.path, f"cannot be opened ({error.strerror})") from None
        size = os.fstat(self._descriptor).st_size
        if size != self.shape.nbytes:
            self.close()
            what = f"has {size} bytes instead of {self.shape.nbytes}"
            raise DamagedFileError(self.path, what)
        self._digests.clear()

    def read(self, start: int, stop: int) -> Tensor:
        """Windows ``start`` to ``stop`` (exclusive), (stop - start, seq, hidden), on the CPU.

        As many behind them are read ahead into the page cache.
        """
        shape = self.shape
        buffer = torch.empty(stop - start, shape.seq_len, shape.hidden, dtype=shape.dtype)
        view = memoryview(buffer.view(torch.uint8).numpy().data).cast("B")
        offset, done = start * shape.window_bytes, 0
        while done < len(view):
            try:
                count = os.preadv(self._descriptor, [view[done:]], offset + done)
            except OSError as error:
                raise DamagedFileError(self.path, f"cannot be read ({error.strerror})") from None
            if count == 0:
                raise DamagedFileError(self.path, "was cut short while it was read")
            done += count
        os.posix_fadvise(self._descriptor, offset + done, done, os.POSIX_FADV_WILLNEED)
        if not self._digests.keys() >= set(range(start, stop)):
            self._digest(start, view)
        return buffer

    @property
    def digest(self) -> FileDigest:
        """What a file with these windows, all written or read by now, has to be."""
        pieces = b"".join(self._digests[window] for window in range(self.shape.windows))
        return FileDigest(self.shape.nbytes, digest_of(pieces).digest)

    def verify(self, expected: FileDigest | None) -> None:
        """DamagedFileError unless the file is what was written; windows not read yet are read."""
        for window in range(self.shape.windows):
            if window not in self._digests:
                self.read(window, window + 1)
        if self.digest != expected:
            raise DamagedFileError(self.path, "has other bytes than when it was written")

    def write(self, start: int, states: Tensor) -> None:
        """Put ``states`` (batch, seq, hidden) at window ``start``."""
        host = states.detach().to("cpu", self.shape.dtype).contiguous()
        view = memoryview(host.view(torch.uint8).numpy().data).cast("B")
        offset, done = start * self.shape.window_bytes, 0
        self._digest(start, view)
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
            if self._digesters is not None:
                self._digesters.shutdown()
            self._flusher = self._flushing = self._digesters = None
            os.close(self._descriptor)
            self._descriptor = -1

    def remove(self) -> None:
        """Delete the file, if it is there."""
        self.path.unlink(missing_ok=True)

    def _digest(self, start: int, view: memoryview) -> None:
        """Digest the windows in ``view``, of which ``start`` is the first."""
        size = self.shape.window_bytes
        begins = range(0, len(view), size)
        pieces = [
            view[at : min(at + _PIECE_BYTES, begin + size)]
            for begin in begins
            for at in range(begin, begin + size, _PIECE_BYTES)
        ]
        if self._digesters is None:
            self._digesters = ThreadPoolExecutor(torch.get_num_threads())
        digests = b"".join(self._digesters.map(_crc, pieces))
        each = len(digests) // len(begins)
        for number in range(len(begins)):
            self._digests[start + number] = digests[number * each : (number + 1) * each]

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


def _crc(piece: memoryview) -> bytes:
    return zlib.crc32(piece).to_bytes(4, "little")


def _to_disk(descriptor: int) -> None:
    os.fdatasync(descriptor)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
