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

from streamcomp.checkpoint.digests import Digester, combined
from streamcomp.checkpoint.index import TensorInfo
from streamcomp.errors import CorruptShardError, NonFiniteError, SourceError

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["COPY_BYTES", "TensorReader", "check_finite_on_disk", "chunks_of", "read_ahead"]

# Bytes moved at a time where a tensor is copied from shard to shard.
COPY_BYTES = 8 * 2**20


class TensorReader:
    """Opens one shard at a time, so that the others may be dropped meanwhile.

    A context manager; one per block. ``digests`` keeps the BLAKE2b digest of every tensor read,
    or part of one, by its key, so that a later pass can prove that it read the same bytes.
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
        """The whole tensor, on the CPU. Holds its bytes, and a piece that is decoded."""
        if info.encoding is None:
            digester = Digester()
            tensor = self._stored(info, digester)
            self.digests[info.key] = digester.total.digest
            return tensor
        tensor, done = torch.empty(info.shape, dtype=info.torch_dtype), 0
        for piece in self._decoded(info):
            tensor.view(-1)[done : done + piece.numel()] = piece.view(-1)
            done += piece.numel()
        return tensor

    def read_rows(self, info: TensorInfo, rows: Tensor) -> Tensor:
        """Rows ``rows`` (k,) of a matrix (m, n), as (k, n). Holds only those rows."""
        if info.encoding is not None:
            return self._decoded_rows(info, rows)
        width = info.nbytes // info.shape[0]
        buffer = torch.empty(len(rows), width, dtype=torch.uint8)
        for row, view in zip(rows.tolist(), buffer.numpy(), strict=True):
            self._fill(info, view.data, info.start + row * width)
        self._forget(info)
        return buffer.view(info.torch_dtype)

    def chunks(self, info: TensorInfo) -> Iterator[memoryview]:
        """The tensor's bytes in order, at most ``COPY_BYTES`` at a time through one buffer."""
        if info.encoding is not None:
            for piece in self._decoded(info):
                yield from chunks_of(piece)
            return
        buffer, digester = memoryview(bytearray(min(COPY_BYTES, info.nbytes))), Digester()
        for start in range(info.start, info.stop, COPY_BYTES):
            view = buffer[: min(COPY_BYTES, info.stop - start)]
            self._fill(info, view, start)
            digester.update(view)
            yield view
        self.digests[info.key] = digester.total.digest
        self._forget(info)

    def ask_for(self, info: TensorInfo) -> None:
        """Ask the kernel to read the tensor into the page cache, without waiting."""
        for part in info.stored:
            advice = os.POSIX_FADV_WILLNEED
            os.posix_fadvise(self._descriptor(part), part.start, part.nbytes, advice)

    def digest(self) -> str:
        """One digest of all complete tensors read so far, in any order."""
        return combined(self.digests)

    def _stored(self, info: TensorInfo, digester: Digester) -> Tensor:
        """A tensor as it is on disk, or rows of it. Holds its bytes and nothing else."""
        buffer = torch.empty(info.nbytes, dtype=torch.uint8)
        view = memoryview(buffer.numpy().data)
        self._fill(info, view, info.start)
        digester.update(view)
        self._forget(info)
        return buffer.view(info.torch_dtype).reshape(info.shape)

    def _decoded(self, info: TensorInfo, *, complete: bool = True) -> Iterator[Tensor]:
        """A tensor that is decoded, as pieces in their order; digests what it is decoded from."""
        assert info.encoding is not None
        digester = Digester()
        first, last = info.rows or (0, info.shape[0])
        pieces = info.encoding.decode(first, last, lambda part: self._stored(part, digester))
        for piece in pieces:
            if not (bool(piece.sum().isfinite()) or bool(piece.isfinite().all())):
                scales = info.encoding.scales
                raise NonFiniteError(
                    f"{info.key} in {info.shard}, or {scales.name} in {scales.shard}, holds NaN or "
                    "numbers beyond bf16; the checkpoint is damaged"
                )
            yield piece
        if complete:
            self.digests[info.key] = digester.total.digest

    def _decoded_rows(self, info: TensorInfo, rows: Tensor) -> Tensor:
        result = torch.empty(len(rows), info.shape[1], dtype=info.torch_dtype)
        for place, row in enumerate(rows.tolist()):
            (result[place],) = self._decoded(info.part(row, row + 1), complete=False)
        return result

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


def chunks_of(tensor: Tensor) -> Iterator[memoryview]:
    """The bytes of a tensor in memory, at most ``COPY_BYTES`` at a time."""
    flat = tensor.detach().contiguous().cpu().view(-1)
    if flat.stride() != (1,):  # one number sliced from a row counts as contiguous
        flat = torch.empty(flat.shape, dtype=flat.dtype).copy_(flat)
    if not flat.numel():
        return
    data = flat.view(torch.uint8).numpy().data
    for start in range(0, len(data), COPY_BYTES):
        yield data[start : start + COPY_BYTES]


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
