"""Reads files of a model folder that anybody may have made.

Nothing here waits for a pipe or reads a device, follows a link out of the folder, or takes more
memory than a model needs.
"""

from __future__ import annotations

import errno
import os
import re
import stat
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path

from streamcomp.checkpoint.digests import Digester
from streamcomp.errors import SourceError
from streamcomp.units import format_bytes

__all__ = ["COMPANIONS", "check_link", "companion_digests", "companions", "open_regular", "pieces"]

# Files next to the weights that belong to the model. Never code, never weights.
COMPANIONS = (
    "*.json",
    "*.jinja",
    "*.model",
    "*.txt",
    "*.tiktoken",
    "LICENSE*",
    "NOTICE*",
    "USE_POLICY*",
)
# Written anew for each model: its config, its indexes, and the report of streamcomp.
_NOT_COPIED = ("config.json", "*.index.json", "streamcomp_report.json")
_MOST_COMPANION_BYTES = 2**30  # of one model in all; large tokenizers have 40 MB
_PIECE_BYTES = 2**20
_SHARED = re.compile("[0-9a-f]{64}")


def open_regular(path: Path, *, follow: bool = True) -> int:
    """A descriptor for reading the regular file ``path``; OSError where it is none.

    Never waits, and never opens a device. Without ``follow`` a link is no regular file.
    """
    flags = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | (0 if follow else os.O_NOFOLLOW)
    _check_regular(os.stat(path, follow_symlinks=follow))
    descriptor = os.open(path, flags)
    try:
        _check_regular(os.fstat(descriptor))
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def _check_regular(status: os.stat_result) -> None:
    if not stat.S_ISREG(status.st_mode):
        raise OSError(errno.EINVAL, "it is no regular file")


def check_link(folder: Path, path: Path) -> None:
    """SourceError where a link makes ``path`` a file outside of the model in ``folder``.

    A model folder in the hub's cache has links to its ``blobs``, which may be links to what all
    models of the cache share, ``blobs/ab/ab01...``; both belong to it.
    """
    try:
        target, home = path.resolve(), folder.resolve()
    except (OSError, RuntimeError) as error:  # RuntimeError: links in a circle
        raise SourceError(f"{path} cannot be read: {error}") from None
    homes = [home]
    if home.parent.name == "snapshots" and home.parent.parent.name.startswith("models--"):
        homes.append(home.parent.parent / "blobs")
        if _SHARED.fullmatch(target.name):
            homes.append(home.parent.parent.parent / "blobs" / target.name[:2])
    if not any(target.is_relative_to(place) for place in homes):
        raise SourceError(
            f"{path} is a link to {target}, outside of the model's folder: refused; "
            f"copy the model without links (cp -rL) and give the copy"
        )


def companions(folder: Path) -> list[Path]:
    """Tokenizer, generation settings and licence in ``folder``, by name; all can be read.

    SourceError where one is a link out of the folder, no regular file, or far too large.
    """
    try:
        entries = sorted(folder.iterdir())
    except OSError as error:
        raise SourceError(f"{folder} cannot be read: {error.strerror}") from None
    paths = [
        path
        for path in entries
        if any(fnmatchcase(path.name, pattern) for pattern in COMPANIONS)
        and not any(fnmatchcase(path.name, pattern) for pattern in _NOT_COPIED)
        and not path.is_dir()
    ]
    left = _MOST_COMPANION_BYTES
    for path in paths:
        check_link(folder, path)
        try:
            status = path.stat()
            _check_regular(status)
        except OSError as error:
            raise SourceError(f"{path} cannot be read: {error.strerror}") from None
        left -= status.st_size
        if left < 0:
            raise SourceError(
                f"{path} has {format_bytes(status.st_size)}: no tokenizer or licence is that "
                "large; move it out of the model's folder"
            )
    return paths


def pieces(path: Path) -> Iterator[bytes]:
    """The bytes of a file, a megabyte at a time; SourceError where it cannot be read."""
    try:
        with open(open_regular(path), "rb", buffering=0) as file:
            while piece := file.read(_PIECE_BYTES):
                yield piece
    except OSError as error:
        raise SourceError(f"{path} cannot be read: {error.strerror}") from None


def companion_digests(folder: Path) -> dict[str, str]:
    """BLAKE2b of each companion in ``folder``, by name."""
    digests = {}
    for path in companions(folder):
        digester = Digester()
        for piece in pieces(path):
            digester.update(piece)
        digests[path.name] = digester.total.digest
    return digests
