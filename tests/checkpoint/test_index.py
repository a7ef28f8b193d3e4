from __future__ import annotations

import json
import os
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from streamcomp.checkpoint.index import (
    INDEX_FILE,
    SINGLE_FILE,
    TensorInfo,
    read_header,
    read_index,
)
from streamcomp.errors import CorruptShardError, MissingShardError, SourceError
from tests.checkpoint.safetensors_bytes import FOUR_FLOATS, write_parts
from tests.pico import save_pico


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with a config and no weights yet."""
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    return tmp_path


def edit_index(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    path = folder / INDEX_FILE
    index = json.loads(path.read_text())
    change(index["weight_map"])
    path.write_text(json.dumps(index))


# -- what is there


def test_every_tensor_of_a_sharded_model_is_found_where_it_lies(
    pico: Callable[..., Path],
) -> None:
    folder = pico("llama")

    index = read_index(folder)

    assert len(index.shards) > 3
    count = 0
    for shard in index.shards:
        for name, tensor in load_file(shard).items():
            info = index.tensors[name]
            assert (info.name, info.shard) == (name, shard)
            assert info.shape == tuple(tensor.shape)
            assert info.torch_dtype == tensor.dtype
            assert shard.read_bytes()[info.start : info.stop] == tensor.numpy().tobytes()
            count += 1
    assert count == len(index.tensors)
    assert index.config["model_type"] == "llama"


def test_a_block_of_a_pico_model_spreads_over_several_shards(pico: Callable[..., Path]) -> None:
    index = read_index(pico("llama"))

    shards = {i.shard for name, i in index.tensors.items() if ".layers.0." in name}

    assert len(shards) > 1


def test_a_single_file_holds_the_same_tensors(pico: Callable[..., Path]) -> None:
    sharded, single = read_index(pico("llama")), read_index(pico("llama", shard_size="1GB"))

    assert len(single.shards) == 1
    assert single.tensors.keys() == sharded.tensors.keys()
    assert single.nbytes == sharded.nbytes
    assert single.numel == sharded.numel == single.nbytes // 4


def test_tensors_of_no_size_and_of_no_dimension_are_found(folder: Path) -> None:
    tensors = {"empty": torch.zeros(0, 3), "scalar": torch.tensor(2.5)}
    save_file(tensors, folder / SINGLE_FILE)

    index = read_index(folder)

    assert (index.tensors["empty"].shape, index.tensors["empty"].nbytes) == ((0, 3), 0)
    assert (index.tensors["scalar"].shape, index.tensors["scalar"].numel) == ((), 1)


def test_a_dtype_torch_does_not_know_is_refused_when_it_is_needed(folder: Path) -> None:
    entry = {"dtype": "F6_E2M3", "shape": [4, 4], "data_offsets": [0, 12]}
    write_parts(folder / SINGLE_FILE, {"a": entry}, bytes(12))

    info = read_index(folder).tensors["a"]

    assert info.nbytes == 12
    with pytest.raises(SourceError, match="a: dtype F6_E2M3"):
        _ = info.torch_dtype


def test_a_dtype_safetensors_does_not_know_is_refused(folder: Path) -> None:
    entry = {"dtype": "F4_NEW", "shape": [2, 2], "data_offsets": [0, 16]}
    write_parts(folder / SINGLE_FILE, {"a": entry})

    with pytest.raises(CorruptShardError, match="F4_NEW"):
        read_index(folder)


# -- folders that are no checkpoint


def test_a_path_that_is_no_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="not a folder"):
        read_index(tmp_path / "nothing")
    (tmp_path / "file").touch()
    with pytest.raises(SourceError, match="not a folder"):
        read_index(tmp_path / "file")


def test_a_folder_without_config_is_refused(tmp_path: Path) -> None:
    write_parts(tmp_path / SINGLE_FILE, {"a": FOUR_FLOATS})

    with pytest.raises(SourceError, match=r"config\.json is missing"):
        read_index(tmp_path)


@pytest.mark.parametrize("config", [b"{", b"", b"\xff\xfe", b"[1]", b'"llama"'])
def test_a_config_that_is_no_json_object_is_refused(folder: Path, config: bytes) -> None:
    write_parts(folder / SINGLE_FILE, {"a": FOUR_FLOATS})
    (folder / "config.json").write_bytes(config)

    with pytest.raises(SourceError, match=r"config\.json"):
        read_index(folder)


def test_a_folder_without_weights_is_refused(folder: Path) -> None:
    with pytest.raises(MissingShardError, match="holds neither"):
        read_index(folder)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth"])
def test_pickled_weights_are_never_read(folder: Path, name: str) -> None:
    (folder / name).write_bytes(b"cos\nsystem\n")

    with pytest.raises(SourceError, match=f"only pickled weights .{name}.*convert them"):
        read_index(folder)


# -- indexes that lie


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    folder = save_pico(tmp_path)
    shard = sorted(folder.glob("*.safetensors"))[1]
    shard.unlink()

    with pytest.raises(MissingShardError, match=f"1 of .* first {shard.name}"):
        read_index(folder)


def test_a_tensor_that_is_not_in_its_shard_is_named(tmp_path: Path) -> None:
    folder = save_pico(tmp_path)
    edit_index(folder, lambda shards: shards.update(ghost=next(iter(shards.values()))))

    with pytest.raises(MissingShardError, match="places ghost in .* does not hold it"):
        read_index(folder)


@pytest.mark.parametrize(
    "shard",
    [
        "../other.safetensors",
        "sub/../../other.safetensors",
        "/etc/passwd",
        "..\\other.safetensors",
        "C:\\other.safetensors",
        "a\0b",
        "..",
        ".",
        "",
        None,
        3,
        ["model.safetensors"],
    ],
)
def test_a_shard_outside_of_the_folder_is_refused(folder: Path, shard: object) -> None:
    inside = folder / "model"
    inside.mkdir()
    (inside / "config.json").write_text("{}")
    write_parts(folder / "other.safetensors", {"a": FOUR_FLOATS})
    (inside / INDEX_FILE).write_text(json.dumps({"weight_map": {"a": shard}}))

    with pytest.raises(SourceError, match="refused|is no string"):
        read_index(inside)


@pytest.mark.parametrize("index", [{}, {"weight_map": {}}, {"weight_map": ["a"]}])
def test_an_index_without_weight_map_is_refused(folder: Path, index: object) -> None:
    (folder / INDEX_FILE).write_text(json.dumps(index))

    with pytest.raises(SourceError, match="no weight_map"):
        read_index(folder)


# -- shards that are damaged


@pytest.mark.parametrize("kept", [0, 7, 8, 100, -1])
def test_a_shard_cut_short_is_refused_wherever_it_ends(
    folder: Path, kept: int, pico: Callable[..., Path]
) -> None:
    whole = (pico("llama", shard_size="1GB") / SINGLE_FILE).read_bytes()
    (folder / SINGLE_FILE).write_bytes(whole[:kept])

    with pytest.raises(CorruptShardError, match="cut short"):
        read_index(folder)


@pytest.mark.parametrize(
    "header",
    [
        b"not json at all!",
        b"\xff\xfe\xff\xfe",
        b"[]",
        b'"text"',
        b"17",
        b'{"a": ',
        b"[" * 100_000,
    ],
    ids=lambda header: header[:12].decode(errors="replace"),
)
def test_a_header_of_garbage_is_refused(folder: Path, header: bytes) -> None:
    write_parts(folder / SINGLE_FILE, header)

    with pytest.raises(CorruptShardError, match="damaged"):
        read_index(folder)


@pytest.mark.parametrize("length", [10_000, 2**40, 2**63, 2**64 - 1])
def test_a_header_longer_than_the_file_is_refused(folder: Path, length: int) -> None:
    write_parts(folder / SINGLE_FILE, {"a": FOUR_FLOATS}, length=length)

    with pytest.raises(CorruptShardError, match="invalid header length|header too large"):
        read_index(folder)


def test_a_header_longer_than_the_format_allows_is_not_read(folder: Path) -> None:
    path = folder / SINGLE_FILE
    path.write_bytes((200_000_000).to_bytes(8, "little"))
    os.truncate(path, 300_000_000)  # a hole: takes no space

    with pytest.raises(CorruptShardError, match="200000000 bytes .*at most 16.0 MiB are read"):
        read_index(folder)


@pytest.mark.parametrize(
    "entry",
    [
        {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 20]},
        {"dtype": "F32", "shape": [2, 2], "data_offsets": [4, 20]},
        {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 10**30]},
    ],
)
def test_offsets_beyond_the_end_are_refused(folder: Path, entry: object) -> None:
    write_parts(folder / SINGLE_FILE, {"a": entry})

    with pytest.raises(CorruptShardError, match="cut short"):
        read_index(folder)


@pytest.mark.parametrize(
    "entry",
    [
        {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 16]},
        {"dtype": "F16", "shape": [2, 2], "data_offsets": [0, 16]},
        {"dtype": "U32", "shape": [2], "data_offsets": [0, 16]},
        {"dtype": "F32", "shape": [2, 2], "data_offsets": [-16, 0]},
        {"dtype": "F32", "shape": [2, 2], "data_offsets": [16, 0]},
        {"dtype": "F32", "shape": [2, -2], "data_offsets": [0, 16]},
        {"dtype": "F32", "shape": [-2, -2], "data_offsets": [0, 16]},
    ],
    ids=lambda entry: f"{entry['dtype']} {entry['shape']} {entry['data_offsets']}",
)
def test_a_shape_that_does_not_match_its_bytes_is_refused(folder: Path, entry: object) -> None:
    write_parts(folder / SINGLE_FILE, {"a": entry})

    with pytest.raises(CorruptShardError, match="is damaged"):
        read_index(folder)


@pytest.mark.parametrize(
    "entry",
    [
        {},
        {"dtype": "F32", "shape": [2, 2]},
        {"shape": [2, 2], "data_offsets": [0, 16]},
        {"dtype": "F32", "shape": 4, "data_offsets": [0, 16]},
        {"dtype": "F32", "shape": [None], "data_offsets": [0, 16]},
        {"dtype": "F32", "shape": [2, 2], "data_offsets": [0]},
        {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 8, 16]},
        {"dtype": "F32", "shape": [2, 2], "data_offsets": ["a", "b"]},
        {"dtype": "F32", "shape": [float("nan")], "data_offsets": [0, 16]},
        {"dtype": "F32", "shape": [float("inf")], "data_offsets": [0, 16]},
        [],
        "F32",
        None,
        7,
    ],
    ids=str,
)
def test_a_damaged_header_entry_is_refused(folder: Path, entry: object) -> None:
    write_parts(folder / SINGLE_FILE, {"a": entry})

    with pytest.raises(CorruptShardError, match="is damaged"):
        read_index(folder)


@pytest.mark.parametrize(
    "header",
    [
        {"a": FOUR_FLOATS, "b": FOUR_FLOATS},
        {"a": {"dtype": "F32", "shape": [2], "data_offsets": [8, 16]}},
        {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}},
    ],
    ids=["overlap", "hole", "bytes behind the last"],
)
def test_tensors_that_do_not_follow_each_other_are_refused(folder: Path, header: object) -> None:
    write_parts(folder / SINGLE_FILE, header)

    with pytest.raises(CorruptShardError, match="is damaged"):
        read_index(folder)


@pytest.mark.parametrize("name", ["config.json", SINGLE_FILE, INDEX_FILE, "tokenizer.json"])
def test_a_pipe_is_not_waited_for(folder: Path, name: str) -> None:
    (folder / name).unlink(missing_ok=True)
    os.mkfifo(folder / name)

    with pytest.raises(SourceError, match=f"{name} cannot be read.*it is no regular file"):
        read_index(folder)


def test_a_pipe_in_the_place_of_one_shard_is_named(tmp_path: Path) -> None:
    folder = save_pico(tmp_path)
    shard = sorted(folder.glob("*.safetensors"))[1]
    shard.unlink()
    os.mkfifo(shard)

    with pytest.raises(SourceError, match=f"{shard.name} cannot be read: it is no regular file"):
        read_index(folder)


@pytest.mark.parametrize("name", ["config.json", SINGLE_FILE, INDEX_FILE, "LICENSE"])
def test_a_link_out_of_the_folder_is_refused(folder: Path, name: str) -> None:
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to("/dev/zero")

    with pytest.raises(SourceError, match=f"{name} is a link to /dev/zero, outside"):
        read_index(folder)


def test_a_shard_that_is_a_link_must_stay_in_the_folder(tmp_path: Path) -> None:
    folder = save_pico(tmp_path / "model")
    shard = sorted(folder.glob("*.safetensors"))[1]
    (folder / "sub").mkdir()
    shard.rename(folder / "sub" / "x")
    shard.symlink_to("sub/x")
    assert shard in read_index(folder).shards

    (folder / "sub" / "x").rename(tmp_path / "x")
    shard.unlink()
    shard.symlink_to(tmp_path / "x")
    with pytest.raises(SourceError, match=f"{shard.name} is a link to .*outside.*cp -rL"):
        read_index(folder)


def test_a_shard_that_is_gone_is_named(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=f"{SINGLE_FILE} cannot be read: No such file"):
        read_header(tmp_path / SINGLE_FILE)


def test_a_damaged_shard_of_several_is_named(tmp_path: Path) -> None:
    folder = save_pico(tmp_path)
    shard = sorted(folder.glob("*.safetensors"))[2]
    os.truncate(shard, shard.stat().st_size - 1)

    with pytest.raises(CorruptShardError, match=shard.name):
        read_index(folder)


def test_an_info_counts_its_numbers_and_bytes() -> None:
    info = TensorInfo("a", "BF16", (3, 4), Path("x"), 100, 124)

    assert (info.numel, info.nbytes, info.torch_dtype) == (12, 24, torch.bfloat16)


# -- JSON and headers beyond any model's


LONG = b"9" * 5000


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (b'{"a":' * 100_000, "cannot be read as JSON"),
        (b'{"a":' + b"[" * 80 + b"]" * 80 + b"}", "nested in more than 64 levels"),
        (b'{"a":' + LONG + b"}", "cannot be read as JSON.*4300 digits"),
        (b'{"a":[' + b"0," * 2**21 + b"0]}", "more than 2,097,152 values"),
        (b'{"a":"' + b"x" * 2**25 + b'"}', "more than 28.0 MiB"),
    ],
    ids=["deep", "less deep", "digits", "values", "bytes"],
)
@pytest.mark.parametrize("name", ["config.json", INDEX_FILE])
def test_json_beyond_any_model_s_is_refused(
    folder: Path, name: str, config: bytes, message: str
) -> None:
    (folder / name).write_bytes(config)

    with pytest.raises(SourceError, match=f"{name} .*{message}"):
        read_index(folder)


def test_numbers_that_json_does_not_know_are_read(folder: Path) -> None:
    write_parts(folder / SINGLE_FILE, {"a": FOUR_FLOATS})
    (folder / "config.json").write_text('{"a": NaN, "b": [0.0, Infinity]}')

    assert read_index(folder).config["b"][1] == float("inf")


@pytest.mark.parametrize("place", ["{}", "a/{}", "{}/b"])
@pytest.mark.parametrize("name", ["\ud800", "\udcff", "a\nb", "\x1b[2J", "x" * 300, "y/" * 600])
def test_a_shard_that_no_file_can_be_called_is_refused(folder: Path, place: str, name: str) -> None:
    shard = place.format(name)
    (folder / INDEX_FILE).write_text(json.dumps({"weight_map": {"a": shard}}))

    with pytest.raises(SourceError, match="outside of .*refused") as caught:
        read_index(folder)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    "name", [f"layers.{'1' * 5000}.x", "layers.\u00b2.x", "a\x1b[2J", "\ud800", "a\nb"]
)
@pytest.mark.parametrize("single", [True, False])
def test_a_tensor_with_a_name_of_no_tensor_is_refused(
    folder: Path, name: str, single: bool
) -> None:
    if single and name == "\ud800":
        pytest.skip("the library refuses such a header")
    write_parts(folder / ("x" if not single else SINGLE_FILE), {name: FOUR_FLOATS})
    if not single:
        (folder / INDEX_FILE).write_text(json.dumps({"weight_map": {name: "x"}}))

    with pytest.raises(SourceError, match="printable ASCII") as caught:
        read_index(folder)
    assert str(caught.value).isprintable() and len(str(caught.value)) < 1000


@pytest.mark.parametrize("offset", [10**400, int(LONG[:4300]), 2**64, 2**63])
def test_an_offset_of_any_length_is_refused(folder: Path, offset: int) -> None:
    entry = {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, offset]}
    write_parts(folder / SINGLE_FILE, {"a": entry})

    with pytest.raises(CorruptShardError, match="is damaged"):
        read_index(folder)


def test_an_integer_of_5000_digits_in_a_header_is_refused(folder: Path) -> None:
    header = b'{"a":{"dtype":"F32","shape":[2,2],"data_offsets":[0,' + LONG + b"]}}"
    write_parts(folder / SINGLE_FILE, header)

    with pytest.raises(CorruptShardError, match="is damaged"):
        read_index(folder)


def test_a_header_of_90_megabytes_is_not_read(folder: Path) -> None:
    path = folder / SINGLE_FILE
    path.write_bytes((90_000_000).to_bytes(8, "little") + b'{"a":[[],[],[]')
    os.truncate(path, 90_001_000)  # a hole: takes no space

    with pytest.raises(CorruptShardError, match="90000000 bytes.*at most 16.0 MiB are read"):
        read_index(folder)


@pytest.mark.parametrize(
    "header",
    [
        b'{"a":[' + b"[]," * 400_000 + b"[]]}",
        b'{"a":{"dtype":"F32","shape":[' + b"0," * 2**20 + b'0],"data_offsets":[0,0]}}',
    ],
    ids=["brackets", "numbers"],
)
def test_a_header_of_little_but_marks_is_not_parsed(folder: Path, header: bytes) -> None:
    write_parts(folder / SINGLE_FILE, header)

    with pytest.raises(CorruptShardError, match="bytes with [0-9]+ commas and brackets"):
        read_index(folder)


def test_the_shortest_entries_that_a_header_may_have_are_read(folder: Path) -> None:
    entry = {"dtype": "U8", "shape": [], "data_offsets": [0, 1]}
    header = {}
    for number in range(1000):
        header[f"{number}"] = {**entry, "data_offsets": [number, number + 1]}
    text = json.dumps(header, separators=(",", ":")).encode()
    write_parts(folder / SINGLE_FILE, text, bytes(1000))

    assert len(read_index(folder).tensors) == 1000


# -- as strict as the library


def mutated(header: bytes, draw: random.Random) -> bytes:
    """``header`` with a few bytes changed, taken out, put in, or a number replaced."""
    text = bytearray(header)
    for _ in range(draw.randint(1, 3)):
        place = draw.randrange(len(text))
        match draw.randrange(5):
            case 0:
                text[place] = draw.choice(b'0123456789,:[]{}" aF-')
            case 1:
                del text[place]
            case 2:
                text[place:place] = bytes([draw.choice(b'0123456789,:[]{}"-')])
            case 3:
                stop = draw.randrange(place, min(len(text), place + 40) + 1)
                text[place:place] = text[place:stop]
            case _:
                numbers = list(re.finditer(rb"\d+", bytes(text)))
                chosen = draw.choice(numbers)
                other = draw.choice([b"0", b"1", b"8", b"16", b"24", b"-1", b"4294967296"])
                text[chosen.start() : chosen.end()] = other
    return bytes(text)


@pytest.mark.parametrize("sharded", [False, True])
def test_no_header_is_accepted_that_the_library_refuses(folder: Path, sharded: bool) -> None:
    header = json.dumps(
        {
            "a": {"dtype": "F32", "shape": [2, 1], "data_offsets": [0, 8]},
            "b": {"dtype": "F16", "shape": [4], "data_offsets": [8, 16]},
            "c": {"dtype": "F32", "shape": [], "data_offsets": [16, 20]},
        }
    ).encode()
    draw, path = random.Random(0), folder / ("x" if sharded else SINGLE_FILE)
    if sharded:
        (folder / INDEX_FILE).write_text(json.dumps({"weight_map": dict.fromkeys("abc", "x")}))
    accepted = 0
    for _ in range(400):
        data = bytes(20 + draw.choice([0, 0, 0, 1, -1]))
        write_parts(path, mutated(header, draw), data)
        try:
            index = read_index(folder)
        except SourceError:
            continue
        tensors = load_file(path)  # raises where the library refuses it
        for name, info in index.tensors.items():
            assert info.shape == tuple(tensors[name].shape)
            assert info.nbytes == tensors[name].nbytes
        accepted += 1
    assert accepted
