"""What the files that steps leave have to be: noted as they are written, checked at every read.

The notes of a step go into its line of the journal, which makes its files final. A stream and a
shard have one digest each. Other files have one for each tensor, because some reads take only some
of them; its name here is ``FILE:TENSOR``.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from streamcomp.checkpoint.digests import FileDigest
from streamcomp.checkpoint.index import TensorInfo, read_header
from streamcomp.checkpoint.reader import TensorReader
from streamcomp.checkpoint.writer import Entry, write_shard, write_tensors
from streamcomp.errors import DamagedFileError, SourceError
from streamcomp.job.journal import Journal

__all__ = ["Ledger", "file_of"]


class Ledger:
    """The files of a job in its work ``folder``, as the ``journal`` and the running step say."""

    def __init__(self, folder: Path, journal: Journal) -> None:
        self._folder, self._journal = folder, journal
        self.written: dict[str, FileDigest] = {}  # by the running step

    def expected(self, name: str) -> FileDigest | None:
        """What the step that wrote ``name`` last noted."""
        notes = (row.files for row in reversed(self._journal.steps))
        return next((note[name] for note in (self.written, *notes) if name in note), None)

    def _noted(self, file: str) -> dict[str, FileDigest]:
        """What the tensors of ``file`` have to be, by name."""
        notes = (row.files for row in reversed(self._journal.steps))
        for note in (self.written, *notes):
            held = {name.partition(":")[2]: note[name] for name in note if file_of(name) == file}
            if held:
                return held
        return {}

    def write_shard(self, path: Path, entries: Iterable[Entry], reader: TensorReader) -> None:
        """Write a shard of an output; ``reader`` reads the tensors that it copies."""
        self.written[path.name] = write_shard(path, entries, reader)

    def write(self, name: str, entries: Iterable[Entry]) -> None:
        """Write the file ``name`` of tensors into the work folder."""
        entries = list(entries)
        digests = write_tensors(self._folder / name, entries)
        for entry in entries:
            digest = _with_meaning(digests[entry.name], entry.dtype, entry.shape)
            self.written[f"{name}:{entry.name}"] = digest

    def read(self, name: str, names: Container[str] | None = None) -> Iterator[tuple[str, Tensor]]:
        """The tensors in the file ``name``, or those of ``names`` that it has.

        DamagedFileError where the file is missing, or a tensor is not the one that was written.
        """
        path, noted = self._folder / name, self._noted(name)
        if not noted:
            raise DamagedFileError(path, "is not in the journal")
        with _damage(path), TensorReader() as reader:
            infos = read_header(path)
            for tensor in noted:
                if names is not None and tensor not in names:
                    continue
                if tensor not in infos:
                    raise DamagedFileError(path, f"has no tensor {tensor}")
                value = reader.read(infos[tensor])
                if _read_digest(infos[tensor], reader) != noted[tensor]:
                    raise DamagedFileError(path, "has other bytes than when it was written")
                yield tensor, value


def file_of(name: str) -> str:
    """The file that a name in a step's notes is about."""
    return name.partition(":")[0]


def _with_meaning(digest: FileDigest, dtype: str, shape: Iterable[int]) -> FileDigest:
    """A digest that tells dtype and shape, too: they are in the header, not in the bytes."""
    return replace(digest, digest=f"{dtype}{list(shape)} {digest.digest}")


def _read_digest(info: TensorInfo, reader: TensorReader) -> FileDigest:
    """The digest of a tensor that ``reader`` has read."""
    digest = FileDigest(info.nbytes, reader.digests[info.key])
    return _with_meaning(digest, info.dtype, info.shape)


@contextmanager
def _damage(path: Path) -> Iterator[None]:
    """Turn what is wrong with a checkpoint's file into what is wrong with the job's own."""
    try:
        yield
    except SourceError as error:
        raise DamagedFileError(path, f"cannot be used ({error})") from None
