"""Shards of a hub model that are fetched when they are needed, and dropped again.

A job on a disk smaller than its model opens shards through :class:`FetchedShards`. It drops those
that were not used for longest before it fetches the next one, so that never more than
``most_bytes`` of them are on disk.
"""

from __future__ import annotations

import hashlib
import shutil
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

from huggingface_hub import constants, hf_hub_download, try_to_load_from_cache
from huggingface_hub.utils import (
    are_progress_bars_disabled,
    disable_progress_bars,
    enable_progress_bars,
)

from streamcomp.checkpoint.atomic import is_full, make_folder, output_errors
from streamcomp.checkpoint.files import open_regular, pieces
from streamcomp.checkpoint.hub import HubModel, companions_folder, stand_ins
from streamcomp.checkpoint.index import CheckpointIndex, TensorInfo, read_header, read_index
from streamcomp.errors import CorruptShardError, MissingShardError, OutputError, SourceError
from streamcomp.units import format_bytes

__all__ = ["FETCH_BYTES", "FETCHED_FOLDER", "FetchedShards", "streamed_index"]

FETCHED_FOLDER = ".streamcomp-shards"  # in a work folder; everything in it is a job's
FETCH_BYTES = 48 * 2**20  # of memory that fetching takes; 40 MiB were measured


class FetchedShards:
    """Fetches shards of ``model`` into the folder ``work``, at most ``most_bytes`` at a time.

    Each is checked against the hub's digest. Shards that the user's own cache holds are read from
    there. Only what is in ``FETCHED_FOLDER`` is ever deleted. Used by one job at a time.
    """

    def __init__(self, model: HubModel, work: Path, headers: CheckpointIndex) -> None:
        """``headers`` are those of all shards, read from files without contents."""
        self.model = model
        self._root = work / FETCHED_FOLDER
        self._folder = self._root / model.commit
        self.most_bytes = sum(file.size for file in model.files.values())
        self.fetches_ahead = False
        self.tell: Callable[[str], None] = lambda text: None
        self._names = {
            self._folder / f"{number:05d}" / name: name
            for number, name in enumerate(_shard_names(headers))
        }
        self._shards = {name: shard for shard, name in self._names.items()}
        self.tensors = {key: self._place(info, headers) for key, info in headers.tensors.items()}
        self._fetched: dict[str, int] = {}  # bytes by shard, since they were last asked for
        self._used: dict[str, int] = {}  # shards that are whole -> number of the last use
        self._uses = 0
        self._lock = threading.Lock()  # guards what is on disk; held for moments
        self._fetching = threading.Lock()  # held by the thread that fetches and drops

    def name_of(self, shard: Path) -> str:
        """The name of ``shard`` on the hub."""
        return self._names[shard]

    def open(self, shard: Path) -> int:
        """A descriptor for reading ``shard``, which is fetched if it is not there."""
        name = self._names[shard]
        if name not in self._used:
            with suppress(OSError):
                return open_regular(Path(self._cached(name)))
        with self._lock:
            if name in self._used:
                return self._open(name)
        with self._fetching:
            if name not in self._used:
                self._fetch(name)
            with self._lock:
                return self._open(name)

    def fetch_ahead(self, shards: Iterable[Path]) -> None:
        """Fetch shards that are not there in the background, if ``fetches_ahead``."""
        names = [self._names[shard] for shard in dict.fromkeys(shards)]
        missing = [name for name in names if name not in self._used and not self._cached(name)]
        if self.fetches_ahead and missing and not self._fetching.locked():
            threading.Thread(
                target=self._fetch_all, args=(missing,), name="fetching", daemon=True
            ).start()

    def take_fetched(self) -> dict[str, int]:
        """Bytes of the shards that were fetched since the last call, by name."""
        fetched, self._fetched = self._fetched, {}
        return fetched

    def clear(self) -> None:
        """Delete all shards that were fetched."""
        with self._fetching, self._lock:
            self._used.clear()
            if self._root.is_dir() and not self._root.is_symlink():
                shutil.rmtree(self._root, ignore_errors=True)

    def _place(self, info: TensorInfo, headers: CheckpointIndex) -> TensorInfo:
        """The tensor where it will be in the fetched shard, as far from the end as in its header.

        The stand-in's header may have another length than the shard's.
        """
        name = str(info.shard.relative_to(headers.folder))
        if name not in self.model.files:
            raise MissingShardError(f"{self.model.name} has no {name} on the hub")
        shift = self.model.files[name].size - info.shard.stat().st_size
        encoding = info.encoding
        if encoding is not None:
            codes, scales = (self._place(part, headers) for part in info.stored)
            encoding = replace(encoding, codes=codes, scales=scales)
        return replace(
            info,
            shard=self._shards[name],
            start=info.start + shift,
            stop=info.stop + shift,
            store=self,
            encoding=encoding,
        )

    def _cached(self, name: str) -> str:
        """The shard's path in the user's cache; "" if it is not there."""
        path = try_to_load_from_cache(self.model.name, name, revision=self.model.commit)
        return path if isinstance(path, str) else ""

    def _open(self, name: str) -> int:
        self._use(name)
        return open_regular(self._shards[name])

    def _use(self, name: str) -> None:
        self._uses += 1
        self._used[name] = self._uses

    def _own_folder(self, name: str) -> Path:
        return self._folder / self._shards[name].relative_to(self._folder).parts[0]

    def _fetch_all(self, names: list[str]) -> None:
        """Fetch shards; whatever is wrong is told when they are opened."""
        with suppress(SourceError, OutputError):
            for name in names:
                with self._fetching:
                    if name not in self._used:
                        self._fetch(name)

    def _fetch(self, name: str) -> None:
        file, shard = self.model.files[name], self._shards[name]
        folder = self._own_folder(name)
        self._make_room(folder, file.size)
        if not shard.is_file() or self._fault(name):  # else an earlier run left it
            self._remove(folder)
            self._check_space(file.size)
            self.tell(f"fetching {name} ({format_bytes(file.size)})")
            with _one_line(self.model, name, folder), _quiet_and_plain(file.size):
                hf_hub_download(
                    self.model.name, name, revision=self.model.commit, local_dir=str(folder)
                )
            self._remove(folder / ".cache")
            if fault := self._fault(name):
                self._remove(folder)
                raise CorruptShardError(
                    f"{name} of {self.model.name} {fault}: it was damaged on its way; run the same "
                    "command again"
                )
            self._fetched[name] = self._fetched.get(name, 0) + file.size
        with self._lock:
            self._use(name)

    def _make_room(self, folder: Path, size: int) -> None:
        """Drop the shards that were not used for longest, until ``folder`` may have ``size`` bytes.

        What earlier runs left, and this one has not used, goes first.
        """
        for path in (self._root, self._folder):
            if path.is_symlink():
                raise OutputError(
                    f"{path} is a link, through which a job would write elsewhere: remove it"
                )
        make_folder(self._folder)
        for path in self._root.iterdir():
            if path != self._folder:  # of another commit
                self._remove(path)
        names = {self._own_folder(name): name for name in self._used}
        held = {path: _size(path) for path in self._folder.iterdir() if path != folder}
        for path in sorted(held, key=lambda path: self._used.get(names.get(path, ""), 0)):
            if sum(held.values()) + size <= self.most_bytes:
                break
            with self._lock:
                self._used.pop(names.get(path, ""), None)
                self._remove(path)
            del held[path]

    def _remove(self, path: Path) -> None:
        with output_errors(path):
            if path.exists():
                shutil.rmtree(path)

    def _check_space(self, size: int) -> None:
        free = shutil.disk_usage(self._folder).free
        if free < size:
            raise OutputError(
                f"{self._folder} needs {format_bytes(size)} for the next shard and its disk has "
                f"{format_bytes(free)} free: free some space and run the same command again, what "
                "a job has finished is kept"
            )

    def _fault(self, name: str) -> str:
        """What is wrong with the shard on disk; "" if it is the one that the hub has."""
        file, shard = self.model.files[name], self._shards[name]
        size = shard.stat().st_size
        if size != file.size:
            return f"has {size} bytes, on the hub {file.size}"
        is_git = len(file.digest) == 40
        digest = hashlib.sha1(f"blob {size}\0".encode()) if is_git else hashlib.sha256()
        for piece in pieces(shard):
            digest.update(piece)
        if digest.hexdigest() != file.digest:
            return f"has the digest {digest.hexdigest()}, on the hub {file.digest}"
        tensors = read_header(shard)
        if any(
            tensors.get(key) != info for key, info in self.tensors.items() if info.shard == shard
        ):
            return "has another header than the one that was fetched first"
        return ""


def streamed_index(
    name: str, revision: str | None, work: Path, pinned: str = ""
) -> CheckpointIndex:
    """The model ``name`` on the hub, from its headers; shards are fetched as they are opened.

    Files besides the weights are in the hub's cache. Nothing is written below ``work`` yet.
    """
    model = HubModel.ask(name, revision, pinned)
    small = companions_folder(name, model.commit)
    with stand_ins(name, model.commit, small) as folder:
        headers = read_index(folder)
        store = FetchedShards(model, work, headers)
    return replace(headers, folder=small, tensors=store.tensors, hub=model, store=store)


def _shard_names(headers: CheckpointIndex) -> list[str]:
    return [str(shard.relative_to(headers.folder)) for shard in headers.shards]


def _size(folder: Path) -> int:
    """Bytes of all files in ``folder``."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


@contextmanager
def _one_line(model: HubModel, name: str, folder: Path) -> Iterator[None]:
    """Turn what the hub's client raises while it fetches ``name`` into one error."""
    try:
        yield
    except Exception as error:  # the hub's client raises many kinds of exceptions
        if is_full(error):
            raise OutputError(
                f"no space left for {name} in {folder}: free some and run the same command again, "
                "what a job has finished is kept"
            ) from None
        raise SourceError(
            f"{name} of {model.name} could not be fetched ({type(error).__name__}): the finished "
            "steps are kept, the same command goes on"
        ) from None


@contextmanager
def _quiet_and_plain(size: int) -> Iterator[None]:
    """Fetch without a bar of its own, and without hf_xet, whose buffers no budget counts.

    Files of more than the 50 GB that the hub hands out by HTTP still come through hf_xet.
    """
    bars, without = not are_progress_bars_disabled(), constants.HF_HUB_DISABLE_XET
    disable_progress_bars()
    constants.HF_HUB_DISABLE_XET = without or size <= constants.MAX_HTTP_DOWNLOAD_SIZE
    try:
        yield
    finally:
        constants.HF_HUB_DISABLE_XET = without
        if bars:
            enable_progress_bars()
