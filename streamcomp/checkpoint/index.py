"""What a checkpoint folder holds, read from its headers alone.

A safetensors file is an 8-byte little-endian header length, a JSON header naming each
tensor's dtype, shape and byte range, and the bytes. Reading headers is enough to plan a job
and to find every fault that a later read could stumble over: a missing shard, a truncated
file, ranges that overlap the end, an index that points out of its folder.
"""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import torch

from streamcomp.errors import CorruptShardError, MissingShardError, SourceError
from streamcomp.units import format_bytes

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
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_ITEM_BYTES = {"U16": 2, "U32": 4, "U64": 8, "C64": 8}
_LONGEST_HEADER = 100_000_000  # bytes; the limit of the safetensors format

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"


@dataclass(frozen=True)
class TensorInfo:
    """One tensor on disk: bytes ``start`` to ``stop`` of ``shard``."""

    name: str
    dtype: str  # as safetensors names it, e.g. "BF16"
    shape: tuple[int, ...]
    shard: Path
    start: int
    stop: int

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


@dataclass(frozen=True)
class CheckpointIndex:
    """A checkpoint folder: its config and the place of every tensor."""

    folder: Path
    config: dict[str, Any]
    tensors: dict[str, TensorInfo] = field(repr=False)

    @property
    def shards(self) -> list[Path]:
        return sorted({info.shard for info in self.tensors.values()})

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(info.nbytes for info in self.tensors.values())

    @property
    def numel(self) -> int:
        """Parameters: the numbers in all tensors of floats."""
        return sum(info.numel for info in self.tensors.values() if info.is_float)


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in ``path``; SourceError if there is none."""
    try:
        value = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise SourceError(f"{path} is missing: not a model folder, or a partial download") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise SourceError(f"{path} cannot be read as JSON: {error}") from None
    if not isinstance(value, dict):
        raise SourceError(f"{path} holds {type(value).__name__}, not a JSON object")
    return value


def read_index(folder: Path | str) -> CheckpointIndex:
    """Read the config and all safetensors headers of ``folder``; no weight is touched."""
    folder = Path(folder)
    if not folder.is_dir():
        raise SourceError(f"{folder} is not a folder")
    config = read_json(folder / "config.json")
    if (folder / SINGLE_FILE).exists():
        return CheckpointIndex(folder, config, read_header(folder / SINGLE_FILE))
    if (folder / INDEX_FILE).exists():
        return CheckpointIndex(folder, config, _read_sharded(folder))
    pickled = sorted(p.name for p in folder.glob("*.bin")) + sorted(
        p.name for p in folder.glob("*.pt*")
    )
    if pickled:
        raise SourceError(
            f"{folder} holds only pickled weights ({pickled[0]}); unpickling runs code, so they "
            "are not read: convert them to safetensors first"
        )
    raise MissingShardError(f"{folder} holds neither {SINGLE_FILE} nor {INDEX_FILE}")


def _read_sharded(folder: Path) -> dict[str, TensorInfo]:
    weight_map = read_json(folder / INDEX_FILE).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise SourceError(f"{folder / INDEX_FILE} has no weight_map")
    for name, shard in weight_map.items():
        check_inside(folder, name, shard)
    names = sorted(set(weight_map.values()))
    missing = [name for name in names if not (folder / name).is_file()]
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
    if not isinstance(shard, str):
        raise SourceError(f"{INDEX_FILE}: shard of {name} is no string")
    path = PurePosixPath(shard)
    long = any(len(part.encode()) > 255 for part in path.parts)
    if (
        long
        or path.is_absolute()
        or ".." in path.parts
        or "\\" in shard
        or "\0" in shard
        or not path.parts
    ):
        raise SourceError(f"{INDEX_FILE} places {name} in {shard!r}, outside of {folder}: refused")


def read_header(path: Path) -> dict[str, TensorInfo]:
    """The tensors that one safetensors file says it holds, checked against its length."""
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            prefix = file.read(8)
            length = int.from_bytes(prefix, "little")
            if len(prefix) < 8 or length > min(_LONGEST_HEADER, size - 8):
                raise CorruptShardError(
                    f"{path} is no safetensors file, or was cut short: "
                    f"{size} bytes, header of {length}"
                )
            header = json.loads(file.read(length))
    except OSError as error:
        raise SourceError(f"{path} cannot be read: {error.strerror}") from None
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError):
        raise CorruptShardError(f"{path}: header is no JSON, the file is damaged") from None
    if not isinstance(header, dict):
        raise CorruptShardError(f"{path}: header is no JSON object, the file is damaged")
    header.pop("__metadata__", None)
    return {name: _tensor(path, name, entry, 8 + length, size) for name, entry in header.items()}


def _tensor(path: Path, name: str, entry: Any, data: int, size: int) -> TensorInfo:
    try:
        dtype, shape = str(entry["dtype"]), tuple(int(n) for n in entry["shape"])
        start, stop = (data + int(n) for n in entry["data_offsets"])
    except (KeyError, TypeError, ValueError, OverflowError):
        raise CorruptShardError(f"{path}: header entry of {name} is damaged") from None
    if stop > size:
        raise CorruptShardError(
            f"{path} was cut short: {name} ends at byte {stop}, the file has {size} "
            f"({format_bytes(stop - size)} missing): fetch it again"
        )
    item = DTYPES[dtype].itemsize if dtype in DTYPES else _ITEM_BYTES.get(dtype)
    expected = None if item is None else item * math.prod(shape)
    if (
        min(shape, default=0) < 0
        or start < data
        or stop < start
        or (expected is not None and stop - start != expected)
    ):
        raise CorruptShardError(
            f"{path}: {name} {dtype} {list(shape)} does not match its {stop - start} bytes"
        )
    return TensorInfo(name, dtype, shape, path, start, stop)
