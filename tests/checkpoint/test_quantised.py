"""Tensors in fp8 and mxfp4 read as those of the bf16 model, and what is refused of them."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, FineGrainedFP8Config, Mxfp4Config
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from streamcomp.checkpoint import quantised
from streamcomp.checkpoint import reader as reader_module
from streamcomp.checkpoint.index import SINGLE_FILE, CheckpointIndex, TensorInfo, read_index
from streamcomp.checkpoint.reader import TensorReader, check_finite_on_disk, read_ahead
from streamcomp.errors import (
    CorruptShardError,
    MissingShardError,
    NonFiniteError,
    StreamcompError,
    UnsupportedModelError,
)
from tests.pico import pico_config
from tests.quantised import (
    deepseek_config,
    from_fp8,
    from_mxfp4,
    random_mxfp4,
    save_fp8,
    save_mxfp4,
    to_fp8,
)

FP8 = {"quant_method": "fp8", "weight_block_size": [16, 16]}
MXFP4 = {"quant_method": "mxfp4"}


def opened(folder: Path, quantization: Any, **tensors: Tensor) -> CheckpointIndex:
    """A folder with ``tensors`` whose config says ``quantization``."""
    config = {"model_type": "llama", "quantization_config": quantization}
    (folder / "config.json").write_text(json.dumps(config))
    save_file({name: value.contiguous() for name, value in tensors.items()}, folder / SINGLE_FILE)
    return read_index(folder)


def read(info: TensorInfo) -> Tensor:
    with TensorReader() as reader:
        return reader.read(info)


def digest(info: TensorInfo, take: Callable[[TensorReader, TensorInfo], Any]) -> str:
    with TensorReader() as reader:
        take(reader, info)
        return reader.digest()


def fp8_index(folder: Path, shape: tuple[int, ...] = (40, 33)) -> tuple[CheckpointIndex, Tensor]:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    matrices = [to_fp8(matrix, (16, 16)) for matrix in weight.view(-1, *shape[-2:])]
    codes = torch.stack([codes for codes, _ in matrices])
    scales = torch.stack([scales for _, scales in matrices])
    expected = torch.stack([from_fp8(*matrix, (16, 16)) for matrix in matrices]).view(shape)
    stored = {
        "a.weight": codes.view(shape),
        "a.weight_scale_inv": scales.view(*shape[:-2], *scales.shape[1:]),
    }
    return opened(folder, FP8, **stored), expected


def mxfp4_index(folder: Path) -> tuple[CheckpointIndex, Tensor]:
    blocks, scales = random_mxfp4(5, 64, 24)
    index = opened(folder, MXFP4, **{"a.weight_blocks": blocks, "a.weight_scales": scales})
    return index, from_mxfp4(blocks, scales)


MAKERS: dict[str, Callable[[Path], tuple[CheckpointIndex, Tensor]]] = {
    "fp8": fp8_index,
    "fp8 matrices": lambda folder: fp8_index(folder, (5, 24, 40)),
    "mxfp4": mxfp4_index,
}


@pytest.fixture(params=MAKERS)
def encoded(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[TensorInfo, Tensor]:
    """A tensor on disk, and what it decodes to."""
    index, expected = MAKERS[request.param](tmp_path)
    assert list(index.tensors) == ["a.weight"]
    return index.tensors["a.weight"], expected


# -- what is read


@pytest.mark.parametrize("numbers", [1, 100, 2**20])
def test_it_is_read_as_in_bf16_however_much_is_decoded_at_a_time(
    numbers: int, encoded: tuple[TensorInfo, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quantised, "_PIECE_NUMBERS", numbers)
    info, expected = encoded

    tensor = read(info)

    assert (info.dtype, info.shape, info.nbytes) == ("BF16", expected.shape, expected.nbytes)
    assert tensor.dtype == torch.bfloat16
    assert torch.equal(tensor, expected)


@pytest.mark.parametrize("size", [7, 64, 10**6])
def test_its_chunks_are_its_bytes(
    size: int, encoded: tuple[TensorInfo, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reader_module, "COPY_BYTES", size)
    monkeypatch.setattr(quantised, "_PIECE_NUMBERS", 100)
    info, expected = encoded

    with TensorReader() as reader:
        chunks = [bytes(chunk) for chunk in reader.chunks(info)]

    assert b"".join(chunks) == expected.view(torch.uint8).numpy().tobytes()
    assert max(map(len, chunks)) <= size


@pytest.mark.parametrize(("first", "last"), [(0, 2), (2, 5), (3, 3), (0, 5)])
def test_a_part_is_decoded_alone(
    first: int,
    last: int,
    encoded: tuple[TensorInfo, Tensor],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    info, expected = encoded
    part, taken = info.part(first, last), []
    whole = os.preadv

    def counted(file: int, views: list[memoryview], offset: int) -> int:
        taken.append(sum(map(len, views)))
        return whole(file, views, offset)

    monkeypatch.setattr(os, "preadv", counted)
    assert torch.equal(read(part), expected[first:last])

    assert part.nbytes == expected[first:last].nbytes
    assert sum(taken) < sum(stored.nbytes for stored in info.stored) or (first, last) == (0, 5)
    assert part.part(0, last - first) == part


def test_rows_are_decoded_alone(tmp_path: Path) -> None:
    index, expected = fp8_index(tmp_path)
    rows = torch.tensor([39, 0, 17, 17])

    with TensorReader() as reader:
        taken = reader.read_rows(index.tensors["a.weight"], rows)
        assert reader.digests == {}

    assert torch.equal(taken, expected[rows])


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16", "F8_E8M0", "U8"])
def test_scales_may_be_of_any_float_or_powers_of_two(dtype: str, tmp_path: Path) -> None:
    powers = torch.tensor([[-3, 2, 0], [1, -7, 4]])
    scales = (2.0**powers).to(
        {
            "F32": torch.float32,
            "F16": torch.float16,
            "BF16": torch.bfloat16,
            "F8_E8M0": torch.float8_e8m0fnu,
        }.get(dtype, torch.float32)
    )
    if dtype == "U8":
        scales = (powers + 127).to(torch.uint8)
    codes = torch.randn(20, 40, generator=torch.Generator().manual_seed(0)).to(torch.float8_e4m3fn)

    index = opened(tmp_path, FP8, **{"a.weight": codes, "a.weight_scale_inv": scales})

    expected = from_fp8(codes, 2.0**powers, (16, 16))
    assert torch.equal(read(index.tensors["a.weight"]), expected)


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
@pytest.mark.parametrize("block", [None, [16, 16]])
def test_a_matrix_may_have_one_scale(shape: tuple[int, ...], block: Any, tmp_path: Path) -> None:
    codes = torch.randn(20, 40, generator=torch.Generator().manual_seed(0)).to(torch.float8_e4m3fn)
    tensors = {
        "a.weight": codes,
        "a.weight_scale_inv": torch.full(shape, 0.3),
        "a.activation_scale": torch.tensor(0.5),
        "b.activation_scale": torch.tensor(0.5),
    }

    index = opened(tmp_path, FP8 | {"weight_block_size": block}, **tensors)

    assert sorted(index.tensors) == ["a.weight", "b.activation_scale"]
    assert torch.equal(
        read(index.tensors["a.weight"]), (codes.float() * torch.tensor(0.3)).bfloat16()
    )


def test_blocks_are_128_x_128_where_the_config_names_none(tmp_path: Path) -> None:
    weight = torch.randn(130, 200, generator=torch.Generator().manual_seed(0))
    codes, scales = to_fp8(weight, (128, 128))
    tensors = {"a.weight": codes, "a.weight_scale_inv": scales}

    index = opened(tmp_path, {"quant_method": "fp8"}, **tensors)

    assert torch.equal(read(index.tensors["a.weight"]), from_fp8(codes, scales, (128, 128)))


@pytest.mark.parametrize("kind", ["llama", "deepseek_v3", "gpt_oss"])
def test_transformers_decodes_the_same_numbers(kind: str, tmp_path: Path) -> None:
    """Of blocks that are whole: transformers refuses others."""
    if kind == "gpt_oss":
        folder = save_mxfp4(tmp_path / "model", tmp_path / "plain")
        settings: Any = Mxfp4Config(dequantize=True)
    else:
        config = pico_config("llama") if kind == "llama" else deepseek_config()
        folder = save_fp8(tmp_path / "model", tmp_path / "plain", config, (8, 8))
        settings = FineGrainedFP8Config(dequantize=True, weight_block_size=(8, 8))

    theirs = AutoModelForCausalLM.from_pretrained(
        folder, dtype="auto", quantization_config=settings
    ).state_dict()
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", dtype="auto").state_dict()

    assert theirs.keys() == ours.keys()
    for name, value in ours.items():
        assert torch.equal(theirs[name], value), name
    for name, info in read_index(folder).tensors.items():
        assert torch.equal(read(info), read(read_index(tmp_path / "plain").tensors[name])), name


def test_transformers_decodes_each_code_and_power_to_the_same_bits(tmp_path: Path) -> None:
    """All bytes with all powers up to the largest that bf16 can hold six times."""
    codes = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    blocks = codes.expand(1, 253, 16, 16).contiguous()
    scales = torch.arange(253, dtype=torch.uint8).view(1, -1, 1).expand(1, 253, 16).contiguous()

    index = opened(tmp_path, MXFP4, a_blocks=blocks, a_scales=scales)

    theirs = convert_moe_packed_tensors(blocks, scales)
    assert torch.equal(read(index.tensors["a"]).view(torch.int16), theirs.view(torch.int16))


# -- the index


@pytest.mark.parametrize("kind", ["fp8", "mxfp4"])
def test_the_index_is_that_of_the_decoded_model(kind: str, tmp_path: Path) -> None:
    save = {"fp8": save_fp8, "mxfp4": save_mxfp4}[kind]
    folder = save(tmp_path / "model", tmp_path / "plain")
    index, plain = read_index(folder), read_index(tmp_path / "plain")

    def shapes(index: CheckpointIndex) -> dict[str, tuple[str, tuple[int, ...], int]]:
        return {n: (i.dtype, i.shape, i.nbytes) for n, i in index.tensors.items()}

    assert shapes(index) == shapes(plain)
    assert index.config == plain.config
    assert index.numel == plain.numel
    assert index.decoded_bytes == plain.decoded_bytes == plain.nbytes
    assert index.shards == sorted(folder.glob("*.safetensors"))
    assert index.nbytes == sum(
        tensor.nbytes for shard in index.shards for tensor in load_file(shard).values()
    )
    assert index.quantization["quant_method"] == kind
    assert plain.quantization == {}
    assert index.decoding_bytes > 0 and plain.decoding_bytes == 0


def test_a_config_may_say_it_of_a_part_of_the_model(tmp_path: Path) -> None:
    folder = save_fp8(tmp_path / "model", tmp_path / "plain")
    config = json.loads((folder / "config.json").read_text())
    nested = {"text_config": {"quantization_config": config.pop("quantization_config")}}
    (folder / "config.json").write_text(json.dumps(config | nested))

    index = read_index(folder)

    assert {info.dtype for info in index.tensors.values()} == {"BF16"}
    assert "quantization_config" not in json.dumps(index.config)


def test_weights_without_scales_stay_as_they_are(tmp_path: Path) -> None:
    weight = torch.randn(16, 16)

    index = opened(tmp_path, FP8 | {"modules_to_not_convert": []}, **{"a.weight": weight})

    assert index.tensors["a.weight"].encoding is None
    assert torch.equal(read(index.tensors["a.weight"]), weight)


def test_the_kernel_is_asked_for_what_is_stored(
    encoded: tuple[TensorInfo, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    info, _ = encoded
    asked = []
    monkeypatch.setattr(os, "posix_fadvise", lambda file, *advice: asked.append(advice))

    read_ahead([info])

    advice = os.POSIX_FADV_WILLNEED
    assert asked == [(part.start, part.nbytes, advice) for part in info.stored]


# -- digests and damage


def test_the_digest_is_of_what_is_stored_and_the_same_for_all_ways_to_read(
    encoded: tuple[TensorInfo, Tensor],
) -> None:
    info, _ = encoded
    before = digest(info, TensorReader.read)
    assert before == digest(info, lambda reader, info: list(reader.chunks(info)))
    assert before != digest(info.part(0, 2), TensorReader.read)

    for part in info.stored:
        data = bytearray(part.shard.read_bytes())
        data[part.start] ^= 1
        part.shard.write_bytes(data)

        assert digest(info, TensorReader.read) != before
        data[part.start] ^= 1
        part.shard.write_bytes(data)

    assert digest(info, TensorReader.read) == before


@pytest.mark.parametrize("take", [TensorReader.read, lambda r, i: check_finite_on_disk(i, r)])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 3e38])
def test_a_scale_that_is_no_number_is_refused(
    value: float, take: Callable[[TensorReader, TensorInfo], Any], tmp_path: Path
) -> None:
    codes = torch.full((32, 32), 2.0).to(torch.float8_e4m3fn)
    scales = torch.ones(2, 2)
    scales[1, 0] = value
    index = opened(tmp_path, FP8, **{"a.weight": codes, "a.weight_scale_inv": scales})

    with TensorReader() as reader, pytest.raises(NonFiniteError, match=r"a\.weight_scale_inv in "):
        take(reader, index.tensors["a.weight"])


def test_a_power_of_two_that_is_no_number_is_refused(tmp_path: Path) -> None:
    blocks, scales = random_mxfp4(2, 32, 4)
    scales[1, 2, 0] = 255
    index = opened(tmp_path, MXFP4, a_blocks=blocks, a_scales=scales)
    info = index.tensors["a"]

    assert torch.equal(read(info.part(0, 1)), from_mxfp4(blocks[:1], scales[:1]))
    with pytest.raises(NonFiniteError, match=r"a\[1:2\] in .*a_scales in .* damaged"):
        read(info.part(1, 2))


# -- what is refused

CODES = torch.zeros(20, 40).to(torch.float8_e4m3fn)
GRID = torch.ones(2, 3)
BLOCKS, POWERS = random_mxfp4(2, 64, 8)

REFUSED: dict[str, tuple[Any, dict[str, Tensor], type[StreamcompError], str]] = {
    "fp8 without scales": (
        FP8,
        {"a.weight": CODES},
        UnsupportedModelError,
        r"a\.weight is F8_E4M3 and no tensor a\.weight_scale_inv .*original",
    ),
    "scales without fp8": (
        FP8,
        {"a.weight_scale_inv": GRID},
        MissingShardError,
        r"a\.weight, which belongs to a\.weight_scale_inv, is in no shard",
    ),
    "scales of a float": (
        FP8,
        {"a.weight": torch.ones(20, 40), "a.weight_scale_inv": GRID},
        UnsupportedModelError,
        r"a\.weight is F32 \[20, 40\] and has scales",
    ),
    "packed in bytes": (
        FP8,
        {"a.weight": torch.ones(20, 20, dtype=torch.int8), "a.weight_scale_inv": GRID},
        UnsupportedModelError,
        r"a\.weight is I8 \[20, 20\] and has scales",
    ),
    "a vector": (
        FP8,
        {"a.weight": CODES[0], "a.weight_scale_inv": GRID},
        UnsupportedModelError,
        r"a\.weight is F8_E4M3 \[40\] and has scales",
    ),
    "another grid": (
        FP8,
        {"a.weight": CODES, "a.weight_scale_inv": GRID.T},
        CorruptShardError,
        r"is F32 \[3, 2\], for blocks of 16 x 16 in a\.weight \[20, 40\] .* \[2, 3\]",
    ),
    "a grid of other blocks": (
        FP8,
        {"a.weight": CODES, "a.weight_scale_inv": torch.ones(3, 5)},
        CorruptShardError,
        r"is F32 \[3, 5\]",
    ),
    "scales that are integers": (
        FP8,
        {"a.weight": CODES, "a.weight_scale_inv": GRID.int()},
        UnsupportedModelError,
        r"a\.weight_scale_inv is I32, scales have to be F32",
    ),
    "no block size": (
        FP8 | {"weight_block_size": [16, 0]},
        {"a.weight": CODES, "a.weight_scale_inv": GRID},
        UnsupportedModelError,
        r"weight_block_size is \[16, 0\]",
    ),
    "no blocks": (MXFP4, {"a_scales": POWERS}, MissingShardError, "a_blocks, which belongs to"),
    "no powers": (MXFP4, {"a_blocks": BLOCKS}, MissingShardError, "a_scales, which belongs to"),
    "both": (
        MXFP4,
        {"a": torch.ones(2), "a_blocks": BLOCKS, "a_scales": POWERS},
        CorruptShardError,
        "both a_blocks and a$",
    ),
    "flat blocks": (
        MXFP4,
        {"a_blocks": BLOCKS.flatten(2), "a_scales": POWERS},
        CorruptShardError,
        r"a_blocks is \[2, 8, 32\], mxfp4 is",
    ),
    "other powers": (
        MXFP4,
        {"a_blocks": BLOCKS, "a_scales": POWERS[:1]},
        CorruptShardError,
        r"a_scales is U8 \[1, 8, 2\], for groups of 32 .* \[2, 8, 2\]",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_together_is_refused(case: str, tmp_path: Path) -> None:
    quantization, tensors, error, message = REFUSED[case]

    with pytest.raises(error, match=message):
        opened(tmp_path, quantization, **tensors)
