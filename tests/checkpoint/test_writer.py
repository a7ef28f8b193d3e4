from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from streamcomp.checkpoint import reader, writer
from streamcomp.checkpoint.index import DTYPES, SINGLE_FILE, read_index
from streamcomp.checkpoint.writer import Computed, Entry, write_shard
from streamcomp.errors import CorruptShardError

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def mixed() -> dict[str, Tensor]:
    """Tensors of many dtypes and odd sizes, so that alignment is not a matter of luck."""
    random = torch.Generator().manual_seed(0)
    tensors = {f"{d}".rpartition(".")[2]: torch.randn(3, 5, generator=random).to(d) for d in FLOATS}
    return {
        **tensors,
        "pivots": torch.randperm(7, generator=random).to(torch.int32),
        "bytes": torch.arange(3, dtype=torch.uint8),
        "flags": torch.tensor([True, False, True]),
        "scalar": torch.tensor(2.5),
        "empty": torch.zeros(0, 4),
        "turned": torch.randn(4, 6, generator=random).T,
        "one of a row": torch.randn(1, 6, generator=random)[:, 2:3].as_strided((1, 1), (6, 6)),
    }


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize("chunk", [5, 2**23])
def test_safetensors_loads_what_was_written(
    tmp_path: Path, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reader, "COPY_BYTES", chunk)
    monkeypatch.setattr(writer, "DIRTY_BYTES", 16)

    write_shard(tmp_path / "a.safetensors", [Entry(*item) for item in mixed().items()])

    assert_same(load_file(tmp_path / "a.safetensors"), mixed())


def test_transformers_is_told_the_framework(tmp_path: Path) -> None:
    write_shard(tmp_path / "a.safetensors", [Entry("a", torch.zeros(2))])

    with safe_open(tmp_path / "a.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}


@pytest.mark.parametrize("chunk", [5, 2**23])
def test_tensors_are_copied_from_other_shards(
    tmp_path: Path, chunk: int, monkeypatch: pytest.MonkeyPatch, pico: Callable[..., Path]
) -> None:
    monkeypatch.setattr(reader, "COPY_BYTES", chunk)
    index = read_index(pico("llama", dtype=torch.bfloat16))
    assert len(index.shards) > 1

    write_shard(
        tmp_path / "a.safetensors",
        [*(Entry(f"copy.{name}", info) for name, info in index.tensors.items())]
        + [Entry(*item) for item in mixed().items()],
    )

    copied = {f"copy.{k}": v for shard in index.shards for k, v in load_file(shard).items()}
    assert_same(load_file(tmp_path / "a.safetensors"), {**copied, **mixed()})


def test_a_dtype_unknown_to_torch_is_copied_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    save_file({"a": torch.arange(6, dtype=torch.int32)}, tmp_path / SINGLE_FILE)
    data = (tmp_path / SINGLE_FILE).read_bytes().replace(b'"I32"', b'"U32"')
    (tmp_path / SINGLE_FILE).write_bytes(data)

    write_shard(tmp_path / "b.safetensors", [Entry("a", read_index(tmp_path).tensors["a"])])

    copied = load_file(tmp_path / "b.safetensors")["a"]
    assert copied.dtype == torch.uint32
    assert copied.tolist() == list(range(6))


def test_the_same_tensors_give_the_same_bytes_in_any_order(tmp_path: Path) -> None:
    entries = [Entry(*item) for item in mixed().items()]

    write_shard(tmp_path / "a.safetensors", entries)
    write_shard(tmp_path / "b.safetensors", entries[::-1])

    first = (tmp_path / "a.safetensors").read_bytes()
    assert first == (tmp_path / "b.safetensors").read_bytes()


def test_tensors_of_one_dtype_give_the_bytes_that_safetensors_writes(tmp_path: Path) -> None:
    tensors = {name: torch.randn(3, 5).bfloat16() for name in ("b", "a.weight", "a.bias", "c")}

    write_shard(tmp_path / "a.safetensors", [Entry(*item) for item in tensors.items()])
    save_file(tensors, tmp_path / "b.safetensors", metadata={"format": "pt"})

    first = (tmp_path / "a.safetensors").read_bytes()
    assert first == (tmp_path / "b.safetensors").read_bytes()


def test_each_tensor_is_aligned_to_its_item(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    write_shard(tmp_path / SINGLE_FILE, [Entry(*item) for item in mixed().items()])

    for info in read_index(tmp_path).tensors.values():
        assert not info.nbytes or info.start % DTYPES[info.dtype].itemsize == 0, info.name


@pytest.mark.parametrize("name", ["a" * length for length in range(1, 9)], ids=len)
def test_the_data_begins_at_a_multiple_of_eight(tmp_path: Path, name: str) -> None:
    (tmp_path / "config.json").write_text("{}")
    write_shard(tmp_path / SINGLE_FILE, [Entry(name, torch.zeros(3, dtype=torch.int64))])

    assert read_index(tmp_path).tensors[name].start % 8 == 0
    assert not load_file(tmp_path / SINGLE_FILE)[name].any()


def test_the_index_reads_what_was_written(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    write_shard(tmp_path / SINGLE_FILE, [Entry(*item) for item in mixed().items()])

    tensors = read_index(tmp_path).tensors

    assert {name: info.torch_dtype for name, info in tensors.items()} == {
        name: tensor.dtype for name, tensor in mixed().items()
    }


def test_a_failed_copy_leaves_no_shard(tmp_path: Path, pico: Callable[..., Path]) -> None:
    info = next(iter(read_index(pico("llama")).tensors.values()))
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(info.shard.read_bytes()[: info.start + 1])
    moved = type(info)(info.name, info.dtype, info.shape, cut, info.start, info.stop)

    with pytest.raises(CorruptShardError):
        write_shard(tmp_path / "a.safetensors", [Entry("a", moved)])

    assert [path.name for path in tmp_path.iterdir()] == ["cut.safetensors"]


def test_a_tensor_may_be_computed_when_its_turn_comes(tmp_path: Path) -> None:
    made: list[str] = []

    def lazily(name: str, tensor: Tensor) -> Entry:
        def make() -> Tensor:
            made.append(name)
            return tensor

        return Entry(name, Computed(tensor.dtype, tuple(tensor.shape), make))

    entries = [lazily(*item) for item in mixed().items()]
    assert made == []
    write_shard(tmp_path / "a.safetensors", entries)
    write_shard(tmp_path / "b.safetensors", [Entry(*item) for item in mixed().items()])

    assert sorted(made) == sorted(mixed())
    first = (tmp_path / "a.safetensors").read_bytes()
    assert first == (tmp_path / "b.safetensors").read_bytes()


@pytest.mark.parametrize("tensor", [torch.zeros(3), torch.zeros(2, 2), torch.zeros(4).half()])
def test_a_computed_tensor_must_be_what_the_header_says(tmp_path: Path, tensor: Tensor) -> None:
    entry = Entry("a", Computed(torch.float32, (4,), lambda: tensor))

    with pytest.raises(ValueError, match="a: made"):
        write_shard(tmp_path / "a.safetensors", [entry])

    assert list(tmp_path.iterdir()) == []


def test_a_tensor_may_be_computed_in_parts(tmp_path: Path) -> None:
    whole = torch.arange(12.0).view(6, 2)
    entries = [
        Entry("a", Computed(whole.dtype, (6, 2), lambda: iter(whole.split([1, 3, 2])))),
        Entry("b", whole),
    ]
    write_shard(tmp_path / "a.safetensors", entries)

    tensors = load_file(tmp_path / "a.safetensors")
    assert torch.equal(tensors["a"], whole) and torch.equal(tensors["b"], whole)


@pytest.mark.parametrize(
    "parts",
    [[torch.zeros(3, 2)], [torch.zeros(4, 3)], [torch.zeros(2, 2), torch.zeros(2, 2).half()]],
)
def test_parts_must_be_what_the_header_says(tmp_path: Path, parts: list[Tensor]) -> None:
    entry = Entry("a", Computed(torch.float32, (4, 2), lambda: iter(parts)))

    with pytest.raises(ValueError, match="a: made"):
        write_shard(tmp_path / "a.safetensors", [entry])

    assert list(tmp_path.iterdir()) == []


def test_an_entry_knows_its_header(tmp_path: Path) -> None:
    entry = Entry("a", torch.zeros(2, 3, dtype=torch.bfloat16))
    write_shard(tmp_path / "a.safetensors", [entry])

    data = (tmp_path / "a.safetensors").read_bytes()
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])

    assert header["a"] == {"dtype": "BF16", "shape": [2, 3], "data_offsets": [0, 12]}
    assert (entry.dtype, entry.shape, entry.nbytes, entry.item_bytes) == ("BF16", (2, 3), 12, 2)
