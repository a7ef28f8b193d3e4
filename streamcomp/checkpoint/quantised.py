"""Sources with weights in 8 or 4 bits, seen as the bf16 checkpoints that they stand for.

Two formats, as models are downloaded in them:

- ``fp8``: numbers in F8_E4M3 and one factor for each block of them, often 128 x 128, in the tensor
  ``NAME_scale_inv``; or one factor for a whole matrix.
- ``mxfp4``: experts as ``NAME_blocks``, two numbers in a byte, and ``NAME_scales``, a power of two
  for each 32 numbers.

A decoded tensor has the name, shape and dtype that it has in a bf16 checkpoint. It is decoded in
pieces while it is read, so that memory holds the result and a few MiB. The numbers are those that
transformers decodes, bit for bit. Its converters are not called: they refuse partial blocks, hold
several copies of a tensor and take up to 40 times longer.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from streamcomp.errors import CorruptShardError, MissingShardError, UnsupportedModelError

if TYPE_CHECKING:
    from streamcomp.checkpoint.index import TensorInfo

__all__ = ["DECODED", "Encoding", "decoded", "quantization_of", "without_quantization"]

Tensors = Mapping[str, "TensorInfo"]

# Settings of a config that tell how weights are quantised, the second in older models.
_KEYS = ("quantization_config", "compression_config")
# Numbers decoded at a time, and the bytes that each takes meanwhile: the code, its index into a
# table of values, the value and its scale in fp32, the result.
_PIECE_NUMBERS, _PIECE_BYTES = 2**19, 24
_FP4 = torch.tensor(
    [0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], dtype=torch.bfloat16
)
_BLOCK = (128, 128)  # of fp8 where the config names none
_SCALE_DTYPES = ("F32", "F16", "BF16", "F8_E8M0", "U8")


@dataclass(frozen=True)
class Encoding(ABC):
    """The two tensors on disk that a tensor is decoded from, each as rows below each other."""

    codes: TensorInfo
    scales: TensorInfo
    rows: int  # of ``codes`` for each item along the first axis of the decoded tensor

    @property
    @abstractmethod
    def working_bytes(self) -> int:
        """Bytes held next to the result while it is decoded."""

    @property
    def numel(self) -> int:
        return self.codes.shape[0] * self.width

    @property
    @abstractmethod
    def width(self) -> int:
        """Numbers in a row of ``codes``."""

    @abstractmethod
    def decode(
        self, first: int, last: int, read: Callable[[TensorInfo], Tensor]
    ) -> Iterator[Tensor]:
        """Items ``first`` to ``last`` along the first axis in bf16, as pieces in their order.

        Each is valid until the next is made.
        ``read`` gives rows of ``codes`` and of ``scales``.
        """

    def _piece_bytes(self, numbers: int, scales: int) -> int:
        """Bytes held for one piece of ``numbers``, and for their ``scales``, twice in fp32."""
        piece = min(numbers, max(_PIECE_NUMBERS, self.width))
        return _PIECE_BYTES * piece + 2 * torch.float32.itemsize * scales

    def _pieces(self, start: int, stop: int) -> Iterator[tuple[int, int]]:
        """Rows of ``codes`` to decode at a time."""
        step = max(1, _PIECE_NUMBERS // self.width)
        for first in range(start, stop, step):
            yield first, min(first + step, stop)


@dataclass(frozen=True)
class _Fp8(Encoding):
    """``w = code * scale`` in fp32, with a scale for each block of ``block`` rows and columns.

    Blocks at the lower and right edge of a matrix may be partial.
    """

    matrix: int  # rows of one matrix; several are below each other
    block: tuple[int, int]

    @property
    def width(self) -> int:
        return self.codes.shape[1]

    @property
    def working_bytes(self) -> int:
        return self._piece_bytes(self.numel, self.scales.numel)

    def decode(
        self, first: int, last: int, read: Callable[[TensorInfo], Tensor]
    ) -> Iterator[Tensor]:
        values = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
        begin, end = first * self.rows, last * self.rows
        if begin == end:
            return
        top, bottom = self._scale_rows(torch.tensor([begin, end - 1])).tolist()
        scales = _factors(read(self.scales.part(top, bottom + 1)))
        for start, stop in self._pieces(begin, end):
            weight = _looked_up(values, read(self.codes.part(start, stop)))
            each = scales[self._scale_rows(torch.arange(start, stop)) - top]
            wide = each.repeat_interleave(self.block[1], 1)[:, : self.width]
            yield weight.view_as(wide).mul_(wide).to(torch.bfloat16)

    def _scale_rows(self, rows: Tensor) -> Tensor:
        """The row of ``scales`` for each of ``rows`` of ``codes``."""
        each = math.ceil(self.matrix / self.block[0])
        return rows // self.matrix * each + rows % self.matrix // self.block[0]


@dataclass(frozen=True)
class _Mxfp4(Encoding):
    """Experts (experts, inputs, outputs); ``codes`` (experts * outputs, groups, 16 bytes).

    The lower half of a byte is the first of its two numbers.
    """

    @property
    def width(self) -> int:
        return 2 * math.prod(self.codes.shape[1:])

    @property
    def working_bytes(self) -> int:
        expert = self.rows * self.width
        return expert * torch.bfloat16.itemsize + self._piece_bytes(expert, expert // 32)

    def decode(
        self, first: int, last: int, read: Callable[[TensorInfo], Tensor]
    ) -> Iterator[Tensor]:
        halves = torch.arange(256)
        pairs = torch.stack([_FP4[halves % 16], _FP4[halves // 16]], 1).view(torch.int32).view(-1)
        expert = torch.empty(self.width, self.rows, dtype=torch.bfloat16)  # holds one at a time
        for item in range(first, last):
            before = item * self.rows
            scales = read(self.scales.part(before, before + self.rows))
            powers = _factors(scales).to(torch.bfloat16)[..., None]  # (outputs, groups, 1)
            for start, stop in self._pieces(0, self.rows):
                codes = read(self.codes.part(before + start, before + stop))
                weight = _looked_up(pairs, codes).view(torch.bfloat16).view(*codes.shape[:2], 32)
                weight.mul_(powers[start:stop])
                expert[:, start:stop] = weight.view(stop - start, self.width).T
            yield expert


def _looked_up(values: Tensor, codes: Tensor) -> Tensor:
    """The value of each byte of ``codes``, flat; much faster than a cast of fp8."""
    return values.index_select(0, codes.view(torch.uint8).view(-1).int())


def _factors(scales: Tensor) -> Tensor:
    """``scales`` in fp32; a byte is a power of two."""
    if scales.dtype == torch.uint8:
        scales = scales.view(torch.float8_e8m0fnu)
    return scales.float()


# -- which tensors are decoded ---------------------------------------------------------------


def quantization_of(config: Mapping[str, Any]) -> Any:
    """What a config says of quantised weights, at any depth; None where it says nothing."""
    for key in _KEYS:
        if config.get(key) is not None:
            return config[key]
    inner = (quantization_of(value) for value in config.values() if isinstance(value, dict))
    return next((value for value in inner if value is not None), None)


def without_quantization(config: Mapping[str, Any]) -> dict[str, Any]:
    """``config`` without what it says of quantised weights."""
    return {
        key: without_quantization(value) if isinstance(value, dict) else value
        for key, value in config.items()
        if key not in _KEYS
    }


def decoded(tensors: Tensors, quantization: Mapping[str, Any]) -> dict[str, TensorInfo]:
    """``tensors`` as in bf16, of a source with this ``quantization`` by a method of ``DECODED``.

    A weight with scales is decoded, whatever modules the config lists; the others stay as they are.
    """
    kept = DECODED[quantization["quant_method"]](tensors, quantization)
    for info in kept.values():
        if info.encoding is None and info.dtype.startswith("F8"):
            raise UnsupportedModelError(
                f"{info.name} is {info.dtype} and no tensor {info.name}_scale_inv holds its "
                "scales: start from the fp32, fp16 or bf16 original"
            )
    return kept


def _decoded_fp8(tensors: Tensors, quantization: Mapping[str, Any]) -> dict[str, TensorInfo]:
    block = _block_of(quantization)
    kept, dropped = dict(tensors), set[str]()
    for name, scales in tensors.items():
        target = name.removesuffix("_scale_inv")
        if target == name:
            continue
        kept[target] = _fp8(_needed(tensors, target, name), scales, block)
        owner = target.removesuffix("weight")
        dropped |= {name, f"{owner}activation_scale", f"{owner}input_scale"}
    return {name: info for name, info in kept.items() if name not in dropped}


def _block_of(quantization: Mapping[str, Any]) -> tuple[int, int] | None:
    """Rows and columns of the blocks that share a scale; None: whole matrices do."""
    block = quantization.get("weight_block_size", _BLOCK)
    if block is None:
        return None
    sizes = tuple(block) if isinstance(block, list | tuple) else ()
    if len(sizes) != 2 or not all(type(size) is int and 0 < size < 2**31 for size in sizes):
        raise UnsupportedModelError(
            f"config.json: weight_block_size is {block!r:.80}, it has to be two numbers above 0"
        )
    return sizes[0], sizes[1]


def _fp8(weight: TensorInfo, scales: TensorInfo, block: tuple[int, int] | None) -> TensorInfo:
    if weight.dtype != "F8_E4M3" or len(weight.shape) not in (2, 3) or not weight.numel:
        raise UnsupportedModelError(
            f"{weight.name} is {weight.dtype} {list(weight.shape)} and has scales: only F8_E4M3 "
            "matrices are decoded; start from the fp32, fp16 or bf16 original"
        )
    *leading, rows, columns = weight.shape
    count = math.prod(leading)
    if block is None or scales.numel == count:
        block = rows, columns
    grid = (*leading, math.ceil(rows / block[0]), math.ceil(columns / block[1]))
    if scales.numel != math.prod(grid) or (scales.numel != count and scales.shape != grid):
        raise _mismatch(weight, scales, f"blocks of {block[0]} x {block[1]}", grid)
    codes = replace(weight, shape=(count * rows, columns))
    grids = replace(scales, shape=(count * grid[-2], grid[-1]))
    encoding = _Fp8(codes, _checked(grids), rows if leading else 1, rows, block)
    return _decoded_info(weight.name, weight.shape, encoding)


def _decoded_mxfp4(tensors: Tensors, _: Mapping[str, Any]) -> dict[str, TensorInfo]:
    kept = {}
    for name, info in tensors.items():
        target = name.removesuffix("_blocks")
        if target != name and info.dtype == "U8":
            if target in tensors:
                raise CorruptShardError(f"the shards hold both {name} and {target}")
            scales = _needed(tensors, f"{target}_scales", name)
            kept[target] = _mxfp4(target, info, scales)
        elif name.endswith("_scales") and info.dtype == "U8":
            _needed(tensors, f"{name.removesuffix('_scales')}_blocks", name)
        else:
            kept[name] = info
    return kept


def _mxfp4(name: str, blocks: TensorInfo, scales: TensorInfo) -> TensorInfo:
    if len(blocks.shape) != 4 or blocks.shape[-1] != 16 or not blocks.numel:
        raise CorruptShardError(
            f"{blocks.name} is {list(blocks.shape)}, mxfp4 is [experts, outputs, groups, 16]"
        )
    experts, outputs, groups, _ = blocks.shape
    if scales.shape != blocks.shape[:-1] or scales.dtype != "U8":
        raise _mismatch(blocks, scales, "groups of 32", blocks.shape[:-1])
    codes = replace(blocks, shape=(experts * outputs, groups, 16))
    powers = replace(scales, shape=(experts * outputs, groups))
    encoding = _Mxfp4(codes, powers, outputs)
    return _decoded_info(name, (experts, 32 * groups, outputs), encoding)


def _decoded_info(name: str, shape: tuple[int, ...], encoding: Encoding) -> TensorInfo:
    """The decoded tensor; its range of bytes is within what is decoded."""
    nbytes = encoding.numel * torch.bfloat16.itemsize
    whole = replace(encoding.codes, name=name, dtype="BF16", shape=shape, encoding=encoding)
    return replace(whole, start=0, stop=nbytes)


def _needed(tensors: Tensors, name: str, other: str) -> TensorInfo:
    if name not in tensors:
        raise MissingShardError(
            f"{name}, which belongs to {other}, is in no shard: the checkpoint is incomplete"
        )
    return tensors[name]


def _checked(scales: TensorInfo) -> TensorInfo:
    if scales.dtype not in _SCALE_DTYPES:
        raise UnsupportedModelError(
            f"{scales.name} is {scales.dtype}, scales have to be {', '.join(_SCALE_DTYPES)}"
        )
    return scales


def _mismatch(
    codes: TensorInfo, scales: TensorInfo, blocks: str, expected: tuple[int, ...]
) -> CorruptShardError:
    return CorruptShardError(
        f"{scales.name} is {scales.dtype} {list(scales.shape)}, for {blocks} in {codes.name} "
        f"{list(codes.shape)} it has to be {list(expected)}"
    )


# By quant_method: what makes decoded tensors of those on disk.
DECODED: dict[str, Callable[[Tensors, Mapping[str, Any]], dict[str, TensorInfo]]] = {
    "fp8": _decoded_fp8,
    "mxfp4": _decoded_mxfp4,
}
