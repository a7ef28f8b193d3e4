"""Reads tensors by byte range into newly allocated memory.

``pread`` into a new tensor is used instead of a memory map: a view of a map keeps the whole shard
mapped and counts in RSS in addition to its copy, and a file truncated under a map ends the process
(SIGBUS), whereas ``pread`` reports an error. The page cache is released after each read, so that a
job does not push other programs out of memory.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import suppress
from types import TracebackType
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from streamcomp.checkpoint.digests import Digester, digest_of
from streamcomp.checkpoint.index import TensorInfo
from streamcomp.errors import CorruptShardError, NonFiniteError, SourceError

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["COPY_BYTES", "TensorReader", "check_finite_on_disk", "read_ahead"]

# Bytes moved at a time where a tensor is copied from shard to shard.
COPY_BYTES = 8 * 2**20


class TensorReader:
    """Opens one shard at a time, so that the others may be dropped meanwhile.

    A context manager; one per block. ``digests`` keeps the BLAKE2b digest of every complete tensor
    read, so that a later pass can prove that it read the same bytes.
    """

    def __init__(self) -> None:
        self._shard: Path | None = None
        self._opened = -1  # its descriptor
        self.digests: dict[str, str] = {}

    def __enter__(self) -> TensorReader:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._close()

    def read(self, info: TensorInfo) -> Tensor:
        """The whole tensor, on the CPU. Holds its bytes and nothing else."""
        buffer = torch.empty(info.nbytes, dtype=torch.uint8)
        view = memoryview(buffer.numpy().data)
        self._fill(info, view, info.start)
        self.digests[info.name] = digest_of(view).digest
        self._forget(info)
        return buffer.view(info.torch_dtype).reshape(info.shape)

    def read_rows(self, info: TensorInfo, rows: Tensor) -> Tensor:
        """Rows ``rows`` (k,) of a matrix (m, n), as (k, n). Holds only those rows."""
        width = info.nbytes // info.shape[0]
        buffer = torch.empty(len(rows), width, dtype=torch.uint8)
        for row, view in zip(rows.tolist(), buffer.numpy(), strict=True):
            self._fill(info, view.data, info.start + row * width)
        self._forget(info)
        return buffer.view(info.torch_dtype)

    def chunks(self, info: TensorInfo) -> Iterator[memoryview]:
        """The tensor's bytes in order, ``COPY_BYTES`` at a time through one buffer."""
        buffer, digester = memoryview(bytearray(min(COPY_BYTES, info.nbytes))), Digester()
        for start in range(info.start, info.stop, COPY_BYTES):
            view = buffer[: min(COPY_BYTES, info.stop - start)]
            self._fill(info, view, start)
            digester.update(view)
            yield view
        self.digests[info.name] = digester.total.digest
        self._forget(info)

    def ask_for(self, info: TensorInfo) -> None:
        """Ask the kernel to read the tensor into the page cache, without waiting."""
        advice = os.POSIX_FADV_WILLNEED
        os.posix_fadvise(self._descriptor(info), info.start, info.nbytes, advice)

    def digest(self) -> str:
        """One digest of all complete tensors read so far, in any order."""
        named = (f"{name}\0{self.digests[name]}\n" for name in sorted(self.digests))
        return digest_of("".join(named).encode()).digest

    def _descriptor(self, info: TensorInfo) -> int:
        if info.shard != self._shard:
            self._close()
            try:
                self._opened = info.open()
            except OSError as error:
                raise SourceError(f"{info.shard} cannot be opened: {error.strerror}") from None
            self._shard = info.shard
        return self._opened

    def _close(self) -> None:
        if self._shard is not None:
            self._shard = None
            os.close(self._opened)

    def _fill(self, info: TensorInfo, view: memoryview, offset: int) -> None:
        descriptor, done = self._descriptor(info), 0
        while done < len(view):
            try:
                count = os.preadv(descriptor, [view[done:]], offset + done)
            except OSError as error:
                raise SourceError(f"{info.shard} cannot be read: {error.strerror}") from None
            if count == 0:
                raise CorruptShardError(
                    f"{info.shard} ends at byte {offset + done}, inside {info.name}: "
                    "it was cut short since the job began"
                )
            done += count

    def _forget(self, info: TensorInfo) -> None:
        os.posix_fadvise(self._descriptor(info), info.start, info.nbytes, os.POSIX_FADV_DONTNEED)


def read_ahead(infos: Iterable[TensorInfo]) -> None:
    """Have the kernel read tensors into its page cache while the process continues.

    Takes no memory of the process. A file that cannot be read is reported by the later read.
    Shards that are fetched from the hub are fetched meanwhile, and are not read yet.
    """
    infos = list(infos)
    if infos and infos[0].store:
        infos[0].store.fetch_ahead(info.shard for info in infos)
        return
    with TensorReader() as reader, suppress(SourceError, OSError):
        for info in infos:
            reader.ask_for(info)


def check_finite_on_disk(info: TensorInfo, reader: TensorReader) -> None:
    """NonFiniteError if a float tensor holds NaN or infinity; reads ``COPY_BYTES`` at a time."""
    if not info.is_float:
        return
    for chunk in reader.chunks(info):
        if not bool(torch.frombuffer(chunk, dtype=info.torch_dtype).isfinite().all()):
            raise NonFiniteError(
                f"{info.name} in {info.shard} holds NaN or infinite weights; the checkpoint is "
                "damaged"
            )
