"""A model given as a folder, or by its name on the Hugging Face hub."""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, constants, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    NotASafetensorsRepoError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
    SafetensorsParsingError,
)

from streamcomp.checkpoint.atomic import is_full
from streamcomp.checkpoint.files import COMPANIONS, check_link, companions
from streamcomp.checkpoint.index import INDEX_FILE, CheckpointIndex, check_inside, read_index
from streamcomp.errors import OutputError, SourceError
from streamcomp.units import format_bytes

__all__ = [
    "HubFile",
    "HubModel",
    "cached_index",
    "companions_folder",
    "headers_folder",
    "hub_errors",
    "stand_ins",
]

_SHARDS = "*.safetensors"
_DIGEST = re.compile("[0-9a-f]{40}|[0-9a-f]{64}")
_ROOM = (
    "--stream-download keeps a few shards at a time, HF_HOME puts the cache on another disk, "
    "or free some space"
)


@dataclass(frozen=True)
class HubFile:
    """A file on the hub: its size, and the SHA-256 of its bytes.

    Small files that the hub keeps in git itself have git's SHA-1 instead.
    """

    size: int
    digest: str


@dataclass(frozen=True)
class HubModel:
    """One revision of a model on the hub, pinned by its commit."""

    name: str
    revision: str  # as it was asked for
    commit: str
    files: Mapping[str, HubFile] = field(repr=False)  # by name, as far as they are known

    @classmethod
    def ask(cls, name: str, revision: str | None, pinned: str = "") -> HubModel:
        """Ask the hub; ``pinned`` is the commit to take instead of what ``revision`` is now."""
        with hub_errors(name, revision):
            info = HfApi().model_info(name, revision=pinned or revision, files_metadata=True)
        files = {
            each.rfilename: HubFile(
                each.size or 0, each.lfs.sha256 if each.lfs else each.blob_id or ""
            )
            for each in info.siblings or ()
        }
        return cls(name, revision or constants.DEFAULT_REVISION, info.sha or "", files)

    @classmethod
    def cached(cls, name: str, revision: str | None, folder: Path) -> HubModel:
        """The model whose snapshot ``folder`` of the hub's cache holds.

        A file there is a link to one that has its digest for a name.
        """
        files = {
            str(path.relative_to(folder)): HubFile(path.stat().st_size, path.readlink().name)
            for path in folder.rglob(_SHARDS)
            if path.is_symlink() and path.exists() and _DIGEST.fullmatch(path.readlink().name)
        }
        return cls(name, revision or constants.DEFAULT_REVISION, folder.name, files)

    @property
    def record(self) -> dict[str, str]:
        """What a job writes down, to go on with the same commit."""
        return {"model": self.name, "revision": self.revision, "commit": self.commit}


def cached_index(name: str, revision: str | None, pinned: str = "") -> CheckpointIndex:
    """The model ``name``, all of which is fetched into the hub's cache, as far as it is not there.

    Never fetches code or pickled weights. OutputError where the cache's disk has too little space,
    before anything is fetched.
    """
    patterns = [*COMPANIONS, _SHARDS]
    _check_space(name, pinned or revision, patterns)
    folder = _fetch(name, pinned or revision, patterns)
    index = read_index(folder)
    return replace(index, hub=HubModel.cached(name, revision, folder))


def companions_folder(name: str, revision: str | None) -> Path:
    """A folder of the hub's cache with the model's files, at least those besides the weights."""
    return _fetch(name, revision, [*COMPANIONS])


@contextmanager
def headers_folder(model: str | Path, revision: str | None = None) -> Iterator[Path]:
    """A folder to plan from: for a hub model its config and the headers of its shards.

    Shards have their true length and header, and companions their length, but no other contents
    (sparse files). The folder is deleted at the end.
    """
    if Path(model).is_dir():
        yield Path(model)
        return
    with stand_ins(str(model), revision, companions_folder(str(model), revision)) as folder:
        yield folder


@contextmanager
def stand_ins(name: str, revision: str | None, small: Path) -> Iterator[Path]:
    """The folder that ``headers_folder`` gives; ``small`` holds the files besides the weights."""
    try:
        metadata = HfApi().get_safetensors_metadata(name, revision=revision)
    except NotASafetensorsRepoError:
        raise SourceError(f"{name} has no safetensors weights on the hub") from None
    except SafetensorsParsingError as error:
        raise SourceError(f"{name}: {str(error).splitlines()[0][:200]}") from None
    except Exception as error:  # the hub's client raises many kinds of exceptions
        raise _unreachable(name, error) from None
    with tempfile.TemporaryDirectory(prefix="streamcomp-headers-") as temporary:
        folder = Path(temporary)
        for path in (small / "config.json", small / INDEX_FILE):
            check_link(small, path)
            if path.exists():
                shutil.copyfile(path, folder / path.name)
        for path in companions(small):
            (folder / path.name).touch()
            os.truncate(folder / path.name, path.stat().st_size)
        for shard, entry in metadata.files_metadata.items():
            check_inside(folder, next(iter(entry.tensors), "nothing"), shard)
            try:
                _write_header(folder / shard, entry.tensors)
            except (OSError, OverflowError, TypeError, ValueError) as error:
                raise SourceError(f"{name}: {shard} has no valid header ({error})") from None
        yield folder


@contextmanager
def hub_errors(name: str, revision: str | None) -> Iterator[None]:
    """Turn what the hub's client raises into one error with a remedy."""
    try:
        yield
    except HFValidationError:
        raise SourceError(f"{name} is no folder here, and no name on the hub") from None
    except GatedRepoError:
        raise SourceError(
            f"{name} is gated: accept its licence on the hub and log in (hf auth login)"
        ) from None
    except RevisionNotFoundError:
        raise SourceError(f"{name} has no revision {revision!r} on the hub") from None
    except RepositoryNotFoundError:
        raise SourceError(f"{name} is no folder here, and not on the hub") from None
    except Exception as error:  # the hub's client raises many kinds of exceptions
        if is_full(error):
            raise OutputError(
                f"no space left for {name} in {constants.HF_HUB_CACHE}: {_ROOM}"
            ) from None
        raise _unreachable(name, error) from None


def _fetch(name: str, revision: str | None, patterns: list[str]) -> Path:
    with hub_errors(name, revision):
        return Path(snapshot_download(name, revision=revision, allow_patterns=patterns))


def _check_space(name: str, revision: str | None, patterns: list[str]) -> None:
    """OutputError where the cache's disk cannot hold the files of ``patterns`` that it lacks."""
    cache = Path(constants.HF_HUB_CACHE)
    blobs = cache / f"models--{name.replace('/', '--')}" / "blobs"
    try:
        files = HubModel.ask(name, revision).files
    except SourceError:
        return  # all of it may be in the cache; if not, what fetches it says why it cannot
    wanted = {
        file.digest: file.size
        for path, file in files.items()
        if any(fnmatchcase(path, pattern) for pattern in patterns)
    }
    needed = sum(size for digest, size in wanted.items() if not (blobs / digest).exists())
    there = next(path for path in (cache, *cache.parents) if path.exists())
    free = shutil.disk_usage(there).free
    if needed > free:
        raise OutputError(
            f"{name} has {format_bytes(sum(wanted.values()))}, of which {format_bytes(needed)} are "
            f"not in {cache} yet, and its disk has {format_bytes(free)} free: {_ROOM}"
        )


def _unreachable(name: str, error: Exception) -> SourceError:
    return SourceError(
        f"{name} is no folder here, and the hub cannot be reached ({type(error).__name__}): "
        "give a model folder, or go online"
    )


def _write_header(path: Path, tensors: dict[str, Any]) -> None:
    header = {
        name: {
            "dtype": info.dtype,
            "shape": list(info.shape),
            "data_offsets": list(info.data_offsets),
        }
        for name, info in tensors.items()
    }
    text = json.dumps(header).encode()
    length = max((info.data_offsets[1] for info in tensors.values()), default=0)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("xb") as file:  # fails on an existing file or link
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + length)
