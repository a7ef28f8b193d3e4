from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from streamcomp.checkpoint import reader as reader_module
from streamcomp.checkpoint.index import DTYPES, SINGLE_FILE, CheckpointIndex, read_index
from streamcomp.checkpoint.reader import TensorReader, read_ahead
from streamcomp.errors import CorruptShardError, SourceError


def raw(tensor: Tensor) -> bytes:
    return tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()


def random_tensor(dtype: torch.dtype, *shape: int) -> Tensor:
    """Random bits: NaN, infinity and all, which must come through unharmed."""
    random = torch.Generator().manual_seed(0)
    size = dtype.itemsize * torch.Size(shape).numel()
    most = 2 if dtype == torch.bool else 256
    data = torch.randint(0, most, (size,), generator=random, dtype=torch.uint8)
    return data.view(dtype).reshape(shape)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text("{}")
    save_file(
        {
            **{name: random_tensor(dtype, 7, 5) for name, dtype in DTYPES.items()},
            "scalar": torch.tensor(2.5),
            "empty": torch.zeros(0, 3),
            "vector": torch.arange(11.0),
        },
        tmp_path / SINGLE_FILE,
    )
    return tmp_path


@pytest.fixture
def index(folder: Path) -> CheckpointIndex:
    return read_index(folder)


@pytest.fixture
def reader() -> Iterator[TensorReader]:
    with TensorReader() as reader:
        yield reader


@pytest.mark.parametrize("name", [*DTYPES, "scalar", "empty", "vector"])
def test_a_tensor_read_is_the_one_safetensors_loads(
    name: str, index: CheckpointIndex, reader: TensorReader
) -> None:
    expected = load_file(index.folder / SINGLE_FILE)[name]

    tensor = reader.read(index.tensors[name])

    assert (tensor.dtype, tensor.shape) == (expected.dtype, expected.shape)
    assert raw(tensor) == raw(expected)


@pytest.mark.parametrize(("first", "last"), [(0, 7), (2, 5), (6, 7), (3, 3)])
@pytest.mark.parametrize("name", [*DTYPES, "vector"])
def test_a_part_holds_the_rows_of_the_whole(
    name: str, first: int, last: int, index: CheckpointIndex, reader: TensorReader
) -> None:
    info = index.tensors[name]
    expected = raw(reader.read(info)[first:last])

    part = info.part(first, last)

    assert part.shape == (last - first, *info.shape[1:])
    assert part.nbytes == len(expected)
    assert raw(reader.read(part)) == expected
    assert b"".join(map(bytes, reader.chunks(part))) == expected


def test_a_part_of_a_part_counts_from_its_first_row(
    index: CheckpointIndex, reader: TensorReader
) -> None:
    info = index.tensors["F32"]

    assert info.part(2, 6).part(1, 3) == info.part(3, 5)


def test_each_part_has_a_digest_of_its_own(index: CheckpointIndex, reader: TensorReader) -> None:
    info = index.tensors["F32"]
    for tensor in (info, info.part(0, 2), info.part(2, 7)):
        reader.read(tensor)

    assert sorted(reader.digests) == ["F32", "F32[0:2]", "F32[2:7]"]


@pytest.mark.parametrize(("first", "last"), [(-1, 2), (3, 2), (0, 8)])
def test_a_part_has_rows_of_its_tensor(first: int, last: int, index: CheckpointIndex) -> None:
    with pytest.raises(ValueError, match=r"of F32, which has 7"):
        index.tensors["F32"].part(first, last)


@pytest.mark.parametrize("name", ["F32", "BF16", "F16", "I64", "U8"])
@pytest.mark.parametrize("rows", [[0], [6, 0, 3, 3], list(range(7)), []])
def test_rows_read_are_the_rows_of_the_whole(
    name: str, rows: list[int], index: CheckpointIndex, reader: TensorReader
) -> None:
    whole = reader.read(index.tensors[name])

    part = reader.read_rows(index.tensors[name], torch.tensor(rows, dtype=torch.int64))

    assert part.shape == (len(rows), 5)
    assert raw(part) == raw(whole[rows])


@pytest.mark.parametrize("size", [1, 7, 16, 10**6])
@pytest.mark.parametrize("name", ["F32", "BF16", "scalar", "empty"])
def test_chunks_follow_each_other_without_gap(
    name: str,
    size: int,
    index: CheckpointIndex,
    reader: TensorReader,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(reader_module, "COPY_BYTES", size)
    info = index.tensors[name]

    chunks = [bytes(chunk) for chunk in reader.chunks(info)]

    assert b"".join(chunks) == raw(reader.read(info))
    assert all(len(chunk) == size for chunk in chunks[:-1])


def test_a_tensor_read_is_no_view_of_the_file(index: CheckpointIndex, reader: TensorReader) -> None:
    tensor = reader.read(index.tensors["vector"])
    tensor.zero_()

    assert torch.equal(reader.read(index.tensors["vector"]), torch.arange(11.0))


def test_short_reads_are_continued(
    index: CheckpointIndex, reader: TensorReader, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = raw(reader.read(index.tensors["F64"]))
    whole = os.preadv
    monkeypatch.setattr(
        os, "preadv", lambda file, views, offset: whole(file, [views[0][:3]], offset)
    )

    assert raw(reader.read(index.tensors["F64"])) == expected


def test_the_digest_does_not_depend_on_the_order_of_reading(index: CheckpointIndex) -> None:
    digests = set()
    for names in (["F32", "BF16", "I8"], ["I8", "F32", "BF16"], ["F32", "F32", "I8", "BF16"]):
        with TensorReader() as reader:
            for name in names:
                reader.read(index.tensors[name])
            digests.add(reader.digest())

    assert len(digests) == 1


def test_the_digest_depends_on_each_tensor_read(index: CheckpointIndex) -> None:
    digests = set()
    for names in ([], ["F32"], ["F32", "I8"], ["F32", "I16"]):
        with TensorReader() as reader:
            for name in names:
                reader.read(index.tensors[name])
            digests.add(reader.digest())

    assert len(digests) == 4


@pytest.mark.parametrize("place", [0, 70, 139])
def test_one_flipped_bit_changes_the_digest(index: CheckpointIndex, place: int) -> None:
    info = index.tensors["F32"]

    def digest() -> str:
        with TensorReader() as reader:
            reader.read(info)
            return reader.digest()

    before = digest()
    data = bytearray(info.shard.read_bytes())
    data[info.start + place] ^= 1
    info.shard.write_bytes(data)

    assert digest() != before


@pytest.mark.parametrize(
    "take",
    [
        lambda reader, info: reader.read(info),
        lambda reader, info: reader.read_rows(info, torch.arange(7)),
        lambda reader, info: list(reader.chunks(info)),
    ],
    ids=["read", "read_rows", "chunks"],
)
def test_a_shard_cut_short_since_its_header_was_read_is_found(
    take: Callable[..., object], index: CheckpointIndex, reader: TensorReader
) -> None:
    info = index.tensors["BF16"]
    os.truncate(info.shard, info.stop - 1)

    with pytest.raises(CorruptShardError, match="inside BF16.*since the job began"):
        take(reader, info)


def test_a_shard_removed_since_its_header_was_read_is_found(
    index: CheckpointIndex, reader: TensorReader
) -> None:
    (index.folder / SINGLE_FILE).unlink()

    with pytest.raises(SourceError, match="cannot be opened"):
        reader.read(index.tensors["BF16"])


def test_shards_are_closed_at_the_end(index: CheckpointIndex) -> None:
    open_files = len(os.listdir("/proc/self/fd"))
    with TensorReader() as reader:
        reader.read(index.tensors["F32"])
        reader.read(index.tensors["BF16"])
        assert len(os.listdir("/proc/self/fd")) == open_files + 1

    assert len(os.listdir("/proc/self/fd")) == open_files


def test_the_kernel_is_asked_for_the_bytes_of_the_tensors(
    index: CheckpointIndex, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[int, int]] = []

    def advise(_: int, offset: int, length: int, advice: int) -> None:
        assert advice == os.POSIX_FADV_WILLNEED
        asked.append((offset, offset + length))

    monkeypatch.setattr(os, "posix_fadvise", advise)
    infos = [index.tensors["F32"], index.tensors["vector"]]

    read_ahead(infos)

    assert asked == [(info.start, info.stop) for info in infos]


def test_a_shard_that_is_gone_is_not_read_ahead(index: CheckpointIndex) -> None:
    (index.folder / SINGLE_FILE).unlink()

    read_ahead([index.tensors["BF16"]])
