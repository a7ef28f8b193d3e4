"""The experts of one block, run one by one over all tokens of a stream.

A block whose experts do not fit runs in parts. First everything before the experts runs, and what
they are given is kept in a file. Then each expert runs on its tokens, and adds its share to what
they give together. At last the block runs again with that, and goes on behind the experts. A
backward does the same with gradients. Files have no name and are gone when the process ends.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor

from streamcomp.calibration.hidden_states import StreamShape
from streamcomp.calibration.observe import GradientSum, MomentGroup, check_moment
from streamcomp.checkpoint.atomic import output_errors
from streamcomp.checkpoint.reader import COPY_BYTES
from streamcomp.errors import OutputError
from streamcomp.linalg.dtypes import moment_dtype
from streamcomp.linalg.moments import ROWS_PER_UPDATE, SecondMoment
from streamcomp.methods.base import GradientMoment, Moment
from streamcomp.model.experts import ExpertBank, answering
from streamcomp.model.sites import ExpertSite
from streamcomp.model.streamer import LoadedBlock, LoadedExperts
from streamcomp.model.taps import LayerInputs, Stop, hidden_of

__all__ = [
    "Routing",
    "RowFile",
    "expert_activations",
    "replay_bytes",
    "routing_bytes",
    "scratch_bytes",
]

# Bytes of the rows that one expert runs at a time, and the fewest and the most rows.
_AT_ONCE_BYTES = 256 * 2**20
_FEWEST_ROWS = 128

# Weight of the prior of an expert's moments, in tokens for each channel.
_PRIOR = 0.5


class RowFile:
    """A nameless file in ``folder`` of rows (rows, width), all zero at first.

    Plain file calls, so that it does not count in RSS.
    """

    def __init__(self, folder: Path, rows: int, width: int, dtype: torch.dtype) -> None:
        self.dtype, self._width, self._row_bytes = dtype, width, width * dtype.itemsize
        self._rows, self._folder = rows, folder
        with output_errors(folder), ExitStack() as stack:
            self._file = stack.enter_context(tempfile.TemporaryFile(dir=folder, buffering=0))
            os.posix_fallocate(self._file.fileno(), 0, max(1, rows * self._row_bytes))
            stack.pop_all()  # open until it is closed

    def read(self, rows: Tensor) -> Tensor:
        """The rows of these numbers (k,), ascending, as (k, width)."""
        buffer = torch.empty(len(rows), self._width, dtype=self.dtype)
        view = memoryview(buffer.view(torch.uint8).numpy().data).cast("B")
        for at, offset, length in self._pieces(rows):
            piece, done = view[at : at + length], 0
            while done < length:
                try:
                    count = os.preadv(self._file.fileno(), [piece[done:]], offset + done)
                except OSError as error:
                    raise OutputError(
                        f"a file of {self._folder} cannot be read: {error.strerror}"
                    ) from None
                if count == 0:
                    raise OutputError(f"a file of {self._folder} was cut short while it was read")
                done += count
        return buffer

    def write(self, rows: Tensor, values: Tensor) -> None:
        """Put ``values`` (k, width) into the rows of these numbers (k,), ascending."""
        host = values.detach().to("cpu", self.dtype).contiguous()
        view = memoryview(host.view(torch.uint8).numpy().data).cast("B")
        with output_errors(self._folder):
            for at, offset, length in self._pieces(rows):
                piece, done = view[at : at + length], 0
                while done < length:
                    done += os.pwrite(self._file.fileno(), piece[done:], offset + done)

    def add(self, rows: Tensor, values: Tensor) -> None:
        """Add ``values`` (k, width) to the rows of these numbers (k,), ascending."""
        self.write(rows, self.read(rows) + values.detach().to("cpu", self.dtype))

    def parts(self) -> Iterator[Tensor]:
        """All rows in order, ``COPY_BYTES`` at a time at most."""
        each = max(1, COPY_BYTES // self._row_bytes)
        for start in range(0, self._rows, each):
            yield self.read(torch.arange(start, min(start + each, self._rows)))

    def close(self) -> None:
        self._file.close()

    def _pieces(self, rows: Tensor) -> Iterator[tuple[int, int, int]]:
        """Place in memory, place in the file and length of each run of rows, in bytes."""
        numbers = rows.numpy()
        begins = numpy.flatnonzero(numpy.diff(numbers, prepend=-2) != 1)
        ends = numpy.append(begins[1:], len(numbers))
        for begin, end in zip(begins.tolist(), ends.tolist(), strict=True):
            offset = int(numbers[begin]) * self._row_bytes
            yield begin * self._row_bytes, offset, (end - begin) * self._row_bytes


@dataclass
class _Sums:
    """Sums of squares of what all experts of a block see, at each matrix, and how many rows."""

    inputs: list[float]
    gradients: list[float]
    rows: int = 0


class Routing:
    """What the experts of ``bank`` are given and give, for each token of a stream.

    Runs in ``dtype``. Holds :func:`routing_bytes`, and its files take :func:`scratch_bytes`.
    """

    def __init__(
        self, bank: ExpertBank, stream: StreamShape, dtype: torch.dtype, folder: Path
    ) -> None:
        self.bank, self._stream, self._dtype, self._folder = bank, stream, dtype, folder
        self._wide = moment_dtype(dtype)
        self._chosen = torch.full((stream.tokens, bank.chosen), bank.count, dtype=torch.int32)
        self._weights = torch.zeros(stream.tokens, bank.chosen, dtype=self._wide)
        self._weight_gradients: Tensor | None = None
        self._files: list[RowFile] = []
        self._given, self._outputs = self._file(dtype), self._file(self._wide)
        self._above: RowFile | None = None  # gradient of the loss at what the experts give
        self._below: RowFile | None = None  # and at what they are given
        self._sums = _Sums([0.0, 0.0], [0.0, 0.0])

    def __enter__(self) -> Routing:
        return self

    def __exit__(self, *_: object) -> None:
        for file in self._files:
            file.close()

    # -- the block without its experts -----------------------------------------------------

    def capture(self, block: LoadedBlock, start: int, hidden: Tensor, inputs: LayerInputs) -> None:
        """Keep what the experts are given for windows from ``start`` on, (batch, seq, hidden)."""
        rows = self._rows(start, len(hidden))

        def take(tokens: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
            self._given.write(rows, tokens)
            self._chosen[rows], self._weights[rows] = (
                chosen.int().cpu(),
                weights.cpu().to(self._wide),
            )
            raise Stop

        with suppress(Stop), self._answered_by(block, take):
            block.run(hidden, inputs)

    @contextmanager
    def replayed(self, block: LoadedBlock, start: int, windows: int) -> Iterator[None]:
        """Run ``block`` within the ``with`` on what its experts gave for these windows.

        A backward goes on with the gradients of :meth:`differentiate`.
        """
        rows = self._rows(start, windows)

        def give(tokens: Tensor, _: Tensor, weights: Tensor) -> Tensor:
            outputs = self._outputs.read(rows).to(tokens.device, tokens.dtype)
            if not torch.is_grad_enabled() or self._below is None:
                return outputs
            assert self._weight_gradients is not None
            below = self._below.read(rows).to(tokens.device, tokens.dtype)
            sent = self._weight_gradients[rows].to(weights.device, weights.dtype)
            stored: Any = _Stored
            output: Tensor = stored.apply(tokens, weights, outputs, below, sent)
            return output

        with self._answered_by(block, give):
            yield

    @torch.enable_grad()
    def descend(
        self, block: LoadedBlock, start: int, hidden: Tensor, inputs: LayerInputs, gradient: Tensor
    ) -> None:
        """Keep the gradient at what the experts gave, from the one at the block's output.

        For windows from ``start`` on; both are (batch, seq, hidden).
        """
        rows = self._rows(start, len(hidden))
        leaves: list[Tensor] = []

        def give(tokens: Tensor, _: Tensor, __: Tensor) -> Tensor:
            leaves.append(self._outputs.read(rows).to(tokens.device, tokens.dtype).requires_grad_())
            return leaves[-1].clone()  # what is behind the experts may change it in place

        with self._answered_by(block, give):
            output = hidden_of(block.module(hidden, *inputs.args, **inputs.kwargs))
        if self._above is None:
            self._above = self._file(self._dtype)
        if leaves:
            (above,) = torch.autograd.grad(output, leaves, gradient, allow_unused=True)
            self._above.write(rows, torch.zeros_like(leaves[0]) if above is None else above)

    def _answered_by(self, block: LoadedBlock, answer: Callable[..., Tensor]) -> Any:
        return answering(block.running(self.bank.name), answer)

    # -- one expert ------------------------------------------------------------------------

    def forward(self, experts: LoadedExperts, number: int) -> None:
        """Add what one expert gives."""
        one = _Expert(experts, self.bank, number, self._dtype)
        for tokens, places in self._reaching(number):
            given = self._read(self._given, tokens, one)
            _, inner, output = one.run(given)
            self._sums.rows += len(tokens)
            self._sums.inputs[0] += _squares(given)
            self._sums.inputs[1] += _squares(inner)
            weights = self._weights[tokens, places, None].to(output.device, output.dtype)
            self._outputs.add(tokens, output * weights)

    def differentiate(self, experts: LoadedExperts, number: int) -> None:
        """Add one expert's share of the gradients at what the experts are given."""
        if self._below is None:
            self._below = self._file(self._wide)
            self._weight_gradients = torch.zeros_like(self._weights)
        assert self._weight_gradients is not None
        one = _Expert(experts, self.bank, number, self._dtype)
        for tokens, places in self._reaching(number):
            back = self._backward(one, tokens, places)
            self._below.add(tokens, back.below)
            self._weight_gradients[tokens, places] = back.weights.cpu().to(self._wide)
            self._sums.gradients[0] += _squares(back.first)
            self._sums.gradients[1] += _squares(back.second)

    def moments(
        self, experts: LoadedExperts, number: int, groups: Sequence[MomentGroup[ExpertSite]]
    ) -> dict[ExpertSite, Moment]:
        """The moments of ``groups``, each of one matrix of one expert, over its tokens.

        With a prior, so that they tell directions apart that few tokens or none run through: as if
        half as many tokens more as it has channels had been seen, all channels alike and as large
        as the mean over all experts of the block. An expert that no token reached is decomposed as
        if nothing were known of it. Moments of gradients are scaled to the tokens of the stream,
        so that losses compare with those of linears that every token runs through. The prior has
        no part in that weight: an expert counts for the tokens that reached it, and for one more.
        """
        one = _Expert(experts, self.bank, number, self._dtype)
        sums = [_ExpertSums(group, one, self._place(group)) for group in groups]
        seen: tuple[tuple[Tensor, Tensor | None], ...]
        for tokens, places in self._reaching(number):
            if any(group.gradients for group in groups):
                back = self._backward(one, tokens, places)
                seen = (back.given, back.first), (back.inner, back.second)
            else:
                given = self._read(self._given, tokens, one)
                seen = (given, None), (one.run(given)[1], None)
            for each in sums:
                each.update(*seen[each.place])
        return {
            each.group.sites[0]: each.moment(
                self._mean(self._sums.inputs[each.place], each.columns),
                self._mean(self._sums.gradients[each.place], each.rows),
                self._stream.tokens,
            )
            for each in sums
        }

    def _place(self, group: MomentGroup[ExpertSite]) -> int:
        names = [name for name, _, _ in self.bank.matrices]
        return names.index(group.sites[0].leaf)

    def _mean(self, squares: float, channels: int) -> float:
        """Mean square of one number of a row; 1 where no token reached any expert."""
        mean = squares / max(1, self._sums.rows * channels)
        return mean or 1.0

    def _backward(self, one: _Expert, tokens: Tensor, places: Tensor) -> _Back:
        assert self._above is not None
        given = self._read(self._given, tokens, one).requires_grad_()
        above = self._read(self._above, tokens, one)
        weights = self._weights[tokens, places, None].to(given.device, given.dtype)
        with torch.enable_grad():
            first, inner, output = one.run(given)
        second = above * weights
        below, gradient = torch.autograd.grad(output, (given, first), second)
        sent = (output.detach().to(self._wide) * above.to(self._wide)).sum(-1)
        return _Back(given.detach(), inner.detach(), below, gradient, second, sent)

    def _read(self, file: RowFile, tokens: Tensor, one: _Expert) -> Tensor:
        return file.read(tokens).to(one.device, self._dtype)

    def _reaching(self, number: int) -> Iterator[tuple[Tensor, Tensor]]:
        """The tokens that are sent to an expert, and at which place of their choice, in pieces."""
        tokens, places = torch.where(self._chosen == number)
        yield from (
            zip(tokens.split(ROWS_PER_UPDATE), places.split(ROWS_PER_UPDATE), strict=True)
            if len(tokens)
            else ()
        )

    def reached(self, number: int) -> int:
        """How many tokens are sent to an expert."""
        return int((self._chosen == number).sum())

    def _rows(self, start: int, windows: int) -> Tensor:
        seq = self._stream.seq_len
        return torch.arange(start * seq, (start + windows) * seq)

    def _file(self, dtype: torch.dtype) -> RowFile:
        file = RowFile(self._folder, self._stream.tokens, self.bank.inputs, dtype)
        self._files.append(file)
        return file


class _Expert:
    """One expert in ``dtype``."""

    def __init__(
        self, experts: LoadedExperts, bank: ExpertBank, number: int, dtype: torch.dtype
    ) -> None:
        self._parts = experts.parts
        self.weights, self.biases = [], []
        for name, _, _ in bank.matrices:
            bias = experts.bias(number, name)
            self.weights.append(experts.weight(number, name).to(dtype))
            self.biases.append(None if bias is None else bias.to(dtype))
        self.device = self.weights[0].device

    def run(self, given: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Outputs of the first matrix, inputs of the second, and what the expert gives."""
        first = self._parts.first(given, self.weights[0], self.biases[0])
        inner = self._parts.gate(first)
        second = self._parts.second(inner, self.weights[1], self.biases[1])
        return first, inner, self._parts.last(second)


@dataclass(frozen=True)
class _Back:
    """A forward and backward of one expert on some tokens."""

    given: Tensor
    inner: Tensor  # inputs of the second matrix
    below: Tensor  # gradient at what it is given
    first: Tensor  # gradient at the outputs of the first matrix
    second: Tensor  # and of the second
    weights: Tensor  # gradient of each token's weight


class _ExpertSums:
    """The moments of one matrix of one expert."""

    def __init__(self, group: MomentGroup[ExpertSite], one: _Expert, place: int) -> None:
        self.group, self.place, self._weight, self._count = group, place, one.weights[place], 0
        self._bias = one.biases[place]
        self.rows, self.columns = self._weight.shape
        dtype = moment_dtype(self._weight.dtype)
        self._moment = SecondMoment(group.size, dtype=dtype, device=one.device)
        size = min(self.rows, self.columns)
        gradient = SecondMoment(size, dtype=dtype, device=one.device) if group.gradients else None
        self._gradient = None if gradient is None else GradientSum(gradient)

    def update(self, inputs: Tensor, gradient: Tensor | None) -> None:
        """Add inputs (T, n) of the matrix and the gradient (T, m) of its outputs."""
        self._count += len(inputs)
        rows = inputs if self.group.side == "inputs" else inputs @ self._weight.T
        self._moment.update(rows)
        if self._gradient is not None:
            assert gradient is not None
            self._gradient.update(gradient, self._weight)

    def moment(self, inputs: float, gradients: float, tokens: int) -> Moment:
        """With the prior, given the mean squares of a number in ``inputs`` and ``gradients``."""
        value, extra = self._moment.value, _PRIOR * self.columns
        name = self.group.sites[0].full_name
        check_moment(name, self.group.side, value)
        weight = self._weight.to(value.dtype)
        if self.group.side == "inputs":
            value.diagonal().add_(extra * inputs)
        else:
            value.addmm_(weight, weight.T, alpha=extra * inputs)
        gradient = None
        if self._gradient is not None:
            # means over count + extra rows, for the count + 1 tokens that it is expected to get
            scale = tokens * (self._count + 1) / (self._count + extra) ** 2
            back = self._gradient.moment.value
            check_moment(name, "gradients", back)
            if self.rows > self.columns:
                back.addmm_(weight.T, weight, alpha=extra * gradients)
            else:
                back.diagonal().add_(extra * gradients)
            energy = self._gradient.energy + extra * gradients * self.rows
            gradient = GradientMoment(back.mul_(scale), energy * scale)
        # with the prior no direction is without data
        return Moment(self.group.side, value, self._count + self.group.size, gradient)


class _Stored(torch.autograd.Function):
    """Outputs that were computed elsewhere, and gradients that were, too."""

    @staticmethod
    def forward(
        ctx: Any, tokens: Tensor, weights: Tensor, outputs: Tensor, below: Tensor, sent: Tensor
    ) -> Tensor:
        ctx.save_for_backward(below, sent)
        return outputs.clone()

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        below, sent = ctx.saved_tensors
        return below, sent, None, None, None


def _squares(rows: Tensor) -> float:
    return float(rows.detach().float().square().sum(dtype=torch.float64))


def routing_bytes(bank: ExpertBank, stream: StreamShape, *, gradients: bool) -> int:
    """What a :class:`Routing` holds: chosen experts, their weights, and the gradients of these."""
    wide = moment_dtype(stream.dtype).itemsize
    scan = 1 + 2 * 8  # of all choices for one expert: a mask, and in the worst case all places
    return stream.tokens * bank.chosen * (4 + wide * (2 if gradients else 1) + scan)


def scratch_bytes(
    bank: ExpertBank, stream: StreamShape, run_dtype: torch.dtype, *, gradients: bool
) -> int:
    """Bytes of the files of a :class:`Routing`."""
    each = run_dtype.itemsize + moment_dtype(stream.dtype).itemsize
    return stream.tokens * bank.inputs * each * (2 if gradients else 1)


def replay_bytes(
    bank: ExpertBank, stream: StreamShape, run_dtype: torch.dtype, *, gradients: bool
) -> int:
    """Rows of one window that a block runs on instead of its experts, as read and as it runs.

    With ``gradients`` also their copies for autograd, and the gradients that go on below.
    """
    wide, run = moment_dtype(stream.dtype).itemsize, run_dtype.itemsize
    number = 2 * wide + 4 * run if gradients else wide + run
    return stream.seq_len * bank.inputs * number


def rows_at_once(bank: ExpertBank, run_dtype: torch.dtype) -> int:
    """Rows that one expert runs at a time: fewer where its matrices are wide."""
    rows = _AT_ONCE_BYTES // _row_bytes(bank, run_dtype, gradients=True)
    return min(ROWS_PER_UPDATE, max(_FEWEST_ROWS, rows))


def expert_activations(
    bank: ExpertBank, stream: StreamShape, run_dtype: torch.dtype, *, gradients: bool
) -> int:
    """Most bytes that the rows of one expert take at a time, without its moments."""
    rows = min(rows_at_once(bank, run_dtype), stream.tokens)
    return rows * _row_bytes(bank, run_dtype, gradients=gradients)


def _row_bytes(bank: ExpertBank, run_dtype: torch.dtype, *, gradients: bool) -> int:
    """A row through both matrices; a backward holds as much again, and what is added is wider."""
    (_, first, given), (_, output, inner) = bank.matrices
    running = run_dtype.itemsize * (2 * given + 4 * first + 2 * inner + 2 * output)
    adding = 3 * moment_dtype(run_dtype).itemsize * max(given, first, output)
    return running * (3 if gradients else 1) + adding
