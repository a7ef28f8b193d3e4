"""Digests by which damage is noticed: BLAKE2b of 16 bytes, as ``b2sum -l 128`` prints it."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Digester", "FileDigest", "combined", "digest_of", "digest_of_file"]

_DIGEST_BYTES = 16
_PIECE_BYTES = 8 * 2**20


@dataclass(frozen=True)
class FileDigest:
    """What a file, or a part of one, has to be: its size and the digest of its bytes."""

    bytes: int
    digest: str


class Digester:
    """Digests bytes as they come."""

    def __init__(self) -> None:
        self._hash, self._bytes = hashlib.blake2b(digest_size=_DIGEST_BYTES), 0

    def update(self, data: bytes | memoryview) -> None:
        self._hash.update(data)
        self._bytes += len(data)

    @property
    def total(self) -> FileDigest:
        """Size and digest of everything so far."""
        return FileDigest(self._bytes, self._hash.hexdigest())


def digest_of(data: bytes | memoryview) -> FileDigest:
    """The digest of a file that holds ``data``."""
    digester = Digester()
    digester.update(data)
    return digester.total


def combined(digests: Mapping[str, str]) -> str:
    """One digest of named parts, in any order."""
    named = (f"{name}\0{digests[name]}\n" for name in sorted(digests))
    return digest_of("".join(named).encode()).digest


def digest_of_file(path: Path) -> FileDigest:
    """Read ``path`` through once; OSError where it cannot be read. Holds 8 MiB."""
    digester, buffer = Digester(), memoryview(bytearray(_PIECE_BYTES))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digester.update(buffer[:count])
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return digester.total
