"""Writes safetensors shards as a stream: memory does not depend on a shard's size."""

from __future__ import annotations

import json
import math
import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from streamcomp.checkpoint.atomic import atomic_file
from streamcomp.checkpoint.digests import Digester, FileDigest
from streamcomp.checkpoint.index import DTYPES, TensorInfo
from streamcomp.checkpoint.reader import TensorReader, chunks_of

__all__ = ["DIRTY_BYTES", "Computed", "Entry", "write_shard", "write_tensors"]

# Written bytes are flushed to disk and dropped from the page cache this often, so that no
# more than this is dirty at any time.
DIRTY_BYTES = 32 * 2**20

_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Computed:
    """A tensor of given dtype and shape that is computed when it is written.

    ``make`` returns it, or its parts along the first axis, one after the other.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    make: Callable[[], Tensor | Iterator[Tensor]]


@dataclass(frozen=True)
class Entry:
    """A tensor to be written: held in memory, copied from another shard, or computed."""

    name: str
    source: Tensor | TensorInfo | Computed

    @property
    def dtype(self) -> str:
        return (
            self.source.dtype if isinstance(self.source, TensorInfo) else _NAMES[self.source.dtype]
        )

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.source.shape)

    @property
    def nbytes(self) -> int:
        if isinstance(self.source, TensorInfo):
            return self.source.nbytes
        return math.prod(self.shape) * self.source.dtype.itemsize

    @property
    def item_bytes(self) -> int:
        return self.nbytes // max(1, math.prod(self.shape))


def write_shard(
    path: Path, entries: Iterable[Entry], reader: TensorReader | None = None
) -> FileDigest:
    """Write ``entries`` to ``path``, durably, in the safetensors format; return its digest.

    Tensors are ordered by falling item size, then name, so that each is aligned and equal tensors
    always give equal files. Those in other shards are read through ``reader``, if there is one.
    Holds ``COPY_BYTES`` in addition to the caller's memory.
    """
    digester = Digester()
    with reader or TensorReader() as reader:
        _write(path, entries, reader, lambda _: digester)
    return digester.total


def write_tensors(path: Path, entries: Iterable[Entry]) -> dict[str, FileDigest]:
    """Write ``entries`` as :func:`write_shard` does; return the digest of each by its name."""
    digesters: defaultdict[str, Digester] = defaultdict(Digester)
    with TensorReader() as reader:
        _write(path, entries, reader, digesters.__getitem__)
    return {name: digester.total for name, digester in digesters.items()}


def _write(
    path: Path,
    entries: Iterable[Entry],
    reader: TensorReader,
    digester: Callable[[str], Digester],
) -> None:
    """Write ``entries``; ``digester`` says what digests an entry, or the header, named ""."""
    ordered = sorted(entries, key=lambda entry: (-entry.item_bytes, entry.name))
    header = _header(ordered)
    with atomic_file(path) as file:
        write = _Write(file)
        write.digester = digester("")
        write(header)
        for entry in ordered:
            write.digester = digester(entry.name)
            for chunk in _chunks(entry, reader):
                write(chunk)


def _header(entries: Iterable[Entry]) -> bytes:
    """Length and JSON of a safetensors header for ``entries`` stored back to back."""
    table: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for entry in entries:
        table[entry.name] = {
            "dtype": entry.dtype,
            "shape": list(entry.shape),
            "data_offsets": [offset, offset + entry.nbytes],
        }
        offset += entry.nbytes
    text = json.dumps(table, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _chunks(entry: Entry, reader: TensorReader) -> Iterator[memoryview]:
    if isinstance(entry.source, TensorInfo):
        yield from reader.chunks(entry.source)
    elif isinstance(entry.source, Computed):
        made, rows = entry.source.make(), 0
        if isinstance(made, Tensor):
            _check_made(entry, made, entry.shape)
            yield from chunks_of(made)
            return
        for tensor in made:
            rows += len(tensor)
            _check_made(entry, tensor, (len(tensor), *entry.shape[1:]))
            yield from chunks_of(tensor)
        if rows != entry.shape[0]:
            raise ValueError(f"{entry.name}: made {rows} rows, not {entry.shape[0]}")
    else:
        yield from chunks_of(entry.source)


def _check_made(entry: Entry, tensor: Tensor, shape: tuple[int, ...]) -> None:
    if DTYPES[entry.dtype] != tensor.dtype or tuple(tensor.shape) != shape:
        raise ValueError(f"{entry.name}: made {tensor.dtype} {list(tensor.shape)}")


class _Write:
    """Appends bytes to a file, digests them and limits the file's dirty pages."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._dirty = 0
        self.digester = Digester()

    def __call__(self, data: bytes | memoryview) -> None:
        self._file.write(data)
        self.digester.update(data)
        self._dirty += len(data)
        if self._dirty >= DIRTY_BYTES:
            self._file.flush()
            os.fdatasync(self._file.fileno())
            os.posix_fadvise(self._file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            self._dirty = 0
