"""The contents of a checkpoint folder, read from its headers alone.

A safetensors file is an 8-byte little-endian header length, a JSON header naming each
tensor's dtype, shape and byte range, and the bytes. Reading headers is enough to plan a job
and to detect every fault that would make a later read fail: a missing shard, a truncated file,
ranges beyond the end, an index that points out of its folder.
"""

from __future__ import annotations

import itertools
import json
import math
import os
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open

from streamcomp.checkpoint.files import check_link, companions, open_regular
from streamcomp.checkpoint.quantised import (
    DECODED,
    Encoding,
    decoded,
    quantization_of,
    without_quantization,
)
from streamcomp.errors import CorruptShardError, MissingShardError, SourceError
from streamcomp.units import format_bytes

if TYPE_CHECKING:
    from streamcomp.checkpoint.fetched import FetchedShards
    from streamcomp.checkpoint.hub import HubModel

__all__ = [
    "DTYPES",
    "CheckpointIndex",
    "TensorInfo",
    "check_inside",
    "read_header",
    "read_index",
    "read_json",
]

# safetensors' names of the dtypes that torch knows
DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "C64": torch.complex64,
}
_BITS = {"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6}  # per number, of dtypes that are only copied

# The largest index of 2025, of a trillion parameters in 8 bits, has 14 MB and 140,000 tensors.
_MOST_JSON_BYTES = 28 * 2**20
_MOST_JSON_VALUES = 2**21
_MOST_JSON_LEVELS = 64
_MOST_HEADER_BYTES = 16 * 2**20  # more than 100,000 tensors in one shard
_MOST_NAME_CHARS = 1024

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"


@dataclass(frozen=True)
class TensorInfo:
    """One tensor on disk, or rows of one: bytes ``start`` to ``stop`` of ``shard``.

    With an ``encoding`` it is decoded as it is read: dtype, shape and bytes are the result's.
    """

    name: str
    dtype: str  # as safetensors names it, e.g. "BF16"
    shape: tuple[int, ...]
    shard: Path
    start: int
    stop: int
    # Fetches the shard when it is opened; None: the shard is there.
    store: FetchedShards | None = field(default=None, compare=False, repr=False)
    rows: tuple[int, int] | None = None  # along the first axis, where it is not the whole tensor
    encoding: Encoding | None = field(default=None, repr=False)

    @property
    def stored(self) -> tuple[TensorInfo, ...]:
        """The tensors on disk that it is made of, as rows: itself, or codes and scales."""
        if self.encoding is None:
            return (self,)
        return self.encoding.codes, self.encoding.scales

    @property
    def key(self) -> str:
        """The name under which its digest is kept; parts of a tensor have one each."""
        return self.name if self.rows is None else f"{self.name}[{self.rows[0]}:{self.rows[1]}]"

    def part(self, first: int, last: int) -> TensorInfo:
        """Rows ``first`` to ``last`` of the first axis, e.g. some experts of a fused tensor."""
        count = self.shape[0]
        if not 0 <= first <= last <= count:
            raise ValueError(f"rows {first} to {last} of {self.key}, which has {count}")
        before = self.rows[0] if self.rows else 0
        return replace(
            self,
            shape=(last - first, *self.shape[1:]),
            start=self.start + first * self.nbytes // max(1, count),
            stop=self.start + last * self.nbytes // max(1, count),
            rows=(before + first, before + last),
        )

    @property
    def nbytes(self) -> int:
        return self.stop - self.start

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def is_float(self) -> bool:
        return self.dtype.startswith(("F", "BF"))

    @property
    def torch_dtype(self) -> torch.dtype:
        if self.dtype not in DTYPES:
            raise SourceError(f"{self.name}: dtype {self.dtype} of {self.shard} is not supported")
        return DTYPES[self.dtype]

    def open(self) -> int:
        """A descriptor for reading the shard; OSError where it is no regular file."""
        return self.store.open(self.shard) if self.store else open_regular(self.shard)


@dataclass(frozen=True)
class CheckpointIndex:
    """A checkpoint folder: its config and the place of every tensor."""

    folder: Path
    config: dict[str, Any]
    tensors: dict[str, TensorInfo] = field(repr=False)
    # what its config said of weights that are decoded as they are read
    quantization: dict[str, Any] = field(default_factory=dict)
    hub: HubModel | None = None  # what it was fetched from
    store: FetchedShards | None = None  # fetches its shards as they are needed

    @property
    def shards(self) -> list[Path]:
        return sorted({part.shard for info in self.tensors.values() for part in info.stored})

    def stamp(self, shard: Path) -> tuple[str, int, int | str]:
        """Name and size of a shard, and the hub's digest of it or else its time of change."""
        if self.hub is not None:
            name = self.store.name_of(shard) if self.store else str(shard.relative_to(self.folder))
            if file := self.hub.files.get(name):
                return shard.name, file.size, file.digest
        status = shard.stat()
        return shard.name, status.st_size, status.st_mtime_ns

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors on disk."""
        return sum(part.nbytes for info in self.tensors.values() for part in info.stored)

    @property
    def decoded_bytes(self) -> int:
        """Bytes of all tensors as they are read."""
        return sum(info.nbytes for info in self.tensors.values())

    @property
    def decoding_bytes(self) -> int:
        """The most that is held while a tensor is decoded, next to the result."""
        encodings = [info.encoding for info in self.tensors.values() if info.encoding]
        return max((encoding.working_bytes for encoding in encodings), default=0)

    @property
    def numel(self) -> int:
        """Parameters: the numbers in all tensors of floats."""
        return sum(info.numel for info in self.tensors.values() if info.is_float)


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in ``path``; SourceError if there is none, or one beyond any model's."""
    try:
        with open(open_regular(path), "rb") as file:
            data = file.read(_MOST_JSON_BYTES + 1)
        _check_json_size(data)
        value = json.loads(data.decode("utf-8"))
    except FileNotFoundError:
        raise SourceError(f"{path} is missing: not a model folder, or a partial download") from None
    except (OSError, ValueError, RecursionError) as error:  # ValueError also for overlong integers
        told = error.strerror if isinstance(error, OSError) else error
        raise SourceError(f"{path} cannot be read as JSON: {told}") from None
    if not isinstance(value, dict):
        raise SourceError(f"{path} holds {type(value).__name__}, not a JSON object")
    if _is_deep(value):
        raise SourceError(f"{path} is nested in more than {_MOST_JSON_LEVELS} levels")
    return value


def _check_json_size(data: bytes) -> None:
    """ValueError before JSON is parsed that would take much more memory than any model's."""
    if len(data) > _MOST_JSON_BYTES:
        raise ValueError(f"more than {format_bytes(_MOST_JSON_BYTES)}")
    if sum(map(data.count, (b",", b":", b"[", b"{"))) > _MOST_JSON_VALUES:  # one for each value
        raise ValueError(f"more than {_MOST_JSON_VALUES:,} values")


def _is_deep(value: Any) -> bool:
    """Whether ``value`` is nested in more than ``_MOST_JSON_LEVELS`` levels."""
    level = [value]
    for _ in range(_MOST_JSON_LEVELS):
        groups = (item.values() if isinstance(item, dict) else item for item in level)
        inner = (child for group in groups for child in group)
        level = [child for child in inner if isinstance(child, dict | list)]
    return bool(level)


def read_index(folder: Path | str) -> CheckpointIndex:
    """Read the config and all safetensors headers of ``folder``; no weight is touched.

    Weights that are quantised in a way that is decoded appear as those of the bf16 model.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise SourceError(f"{folder} is not a folder")
    companions(folder)  # refuses what could not be copied
    for name in ("config.json", SINGLE_FILE, INDEX_FILE):
        check_link(folder, folder / name)
    config = read_json(folder / "config.json")
    if (folder / SINGLE_FILE).exists():
        return _as_decoded(CheckpointIndex(folder, config, read_header(folder / SINGLE_FILE)))
    if (folder / INDEX_FILE).exists():
        return _as_decoded(CheckpointIndex(folder, config, _read_sharded(folder)))
    pickled = sorted(p.name for p in folder.glob("*.bin")) + sorted(
        p.name for p in folder.glob("*.pt*")
    )
    if pickled:
        raise SourceError(
            f"{folder} holds only pickled weights ({pickled[0]}); unpickling runs code, so they "
            "are not read: convert them to safetensors first"
        )
    raise MissingShardError(f"{folder} holds neither {SINGLE_FILE} nor {INDEX_FILE}")


def _as_decoded(index: CheckpointIndex) -> CheckpointIndex:
    quantization = quantization_of(index.config)
    method = quantization.get("quant_method") if isinstance(quantization, dict) else None
    if not isinstance(method, str) or method not in DECODED:
        return index
    tensors = decoded(index.tensors, quantization)
    return CheckpointIndex(index.folder, without_quantization(index.config), tensors, quantization)


def _read_sharded(folder: Path) -> dict[str, TensorInfo]:
    weight_map = read_json(folder / INDEX_FILE).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise SourceError(f"{folder / INDEX_FILE} has no weight_map")
    for name, shard in weight_map.items():
        check_inside(folder, name, shard)
    names = sorted(set(weight_map.values()))
    for name in names:
        check_link(folder, folder / name)
    missing = [name for name in names if not (folder / name).exists()]
    if missing:
        raise MissingShardError(
            f"{len(missing)} of {len(names)} shards are missing from {folder}, first {missing[0]}: "
            "fetch the model again"
        )
    headers = {name: read_header(folder / name) for name in names}
    tensors = {}
    for name, shard in weight_map.items():
        if name not in headers[shard]:
            raise MissingShardError(
                f"{INDEX_FILE} places {name} in {shard}, which does not hold it"
            )
        tensors[name] = headers[shard][name]
    return tensors


def check_inside(folder: Path, name: str, shard: object) -> None:
    """SourceError where ``shard``, which is to hold the tensor ``name``, leaves ``folder``."""
    _check_name(folder / INDEX_FILE, name)
    if not isinstance(shard, str):
        raise SourceError(f"{INDEX_FILE}: shard of {name} is no string")
    path = PurePosixPath(shard)
    if (
        not shard.isprintable()  # surrogates, which no file name has, are not
        or len(shard) > _MOST_NAME_CHARS
        or any(len(part.encode()) > 255 for part in path.parts)
        or path.is_absolute()
        or ".." in path.parts
        or "\\" in shard
        or not path.parts
    ):
        shown = repr(shard[:_MOST_NAME_CHARS])
        raise SourceError(f"{INDEX_FILE} places {name} in {shown}, outside of {folder}: refused")


def _check_name(path: Path, name: str) -> None:
    """SourceError unless ``name`` may be that of a tensor: it is printed, sorted and matched."""
    if len(name) > _MOST_NAME_CHARS or not (name.isascii() and name.isprintable()):
        raise SourceError(
            f"{path} has a tensor called {name[:40]!r}...: a name has at most {_MOST_NAME_CHARS:,} "
            "characters, all of them printable ASCII"
        )


def read_header(path: Path) -> dict[str, TensorInfo]:
    """The tensors listed in the header of one safetensors file.

    The safetensors library reads the header and checks it against the file's length. It accepts
    only files whose tensors follow each other without gap or overlap up to the last byte, so that
    their sizes determine their positions. A header that would take much more memory than any
    model's is refused before.
    """
    try:
        size = _check_header_size(path)
        with safe_open(path, "pt", backend="pread") as file:
            heads = {name: file.get_slice(name) for name in file.offset_keys()}
    except OSError as error:
        raise SourceError(f"{path} cannot be read: {error.strerror or error}") from None
    except SafetensorError as error:
        raise CorruptShardError(
            f"{path}, {size} bytes, was cut short or is damaged ({error}): fetch it again"
        ) from None
    for name in heads:
        _check_name(path, name)
    entries = {name: (head.get_dtype(), tuple(head.get_shape())) for name, head in heads.items()}
    sizes = {name: _nbytes(path, name, *entry) for name, entry in entries.items()}
    stops = itertools.accumulate(sizes.values(), initial=size - sum(sizes.values()))
    return {
        name: TensorInfo(name, *entries[name], path, start, stop)
        for name, (start, stop) in zip(entries, itertools.pairwise(stops), strict=True)
    }


def _check_header_size(path: Path) -> int:
    """The file's size; CorruptShardError where its header cannot be that of a model.

    Each tensor takes some ten marks of JSON and more than 50 bytes; a parser takes far more memory
    for each mark.
    """
    descriptor = open_regular(path)
    try:
        size = os.fstat(descriptor).st_size
        length = int.from_bytes(os.pread(descriptor, 8, 0), "little")
        if length > size - 8:
            return size  # the library says what is wrong
        text = os.pread(descriptor, min(length, _MOST_HEADER_BYTES), 8)
    finally:
        os.close(descriptor)
    marks = sum(map(text.count, (b",", b"[", b"{")))
    if length > _MOST_HEADER_BYTES or marks > 2**18 + length // 4:
        raise CorruptShardError(
            f"{path}: its header is damaged, {length} bytes with {marks} commas and brackets "
            f"(at most {format_bytes(_MOST_HEADER_BYTES)} are read): fetch it again"
        )
    return size


def _nbytes(path: Path, name: str, dtype: str, shape: tuple[int, ...]) -> int:
    if dtype not in DTYPES and dtype not in _BITS:
        raise SourceError(f"{name}: dtype {dtype} of {path} is not supported")
    bits = _BITS[dtype] if dtype in _BITS else 8 * DTYPES[dtype].itemsize
    return bits * math.prod(shape) // 8
