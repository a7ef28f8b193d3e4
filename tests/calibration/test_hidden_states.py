from __future__ import annotations

import errno
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

import pytest
import torch
from torch import Tensor

from streamcomp.calibration import hidden_states
from streamcomp.calibration.hidden_states import HiddenStates, StreamShape
from streamcomp.errors import DamagedFileError, OutputError

WINDOWS, SEQ, HIDDEN = 7, 5, 6


def shape_of(dtype: torch.dtype) -> StreamShape:
    return StreamShape(WINDOWS, SEQ, HIDDEN, dtype)


def states_of(dtype: torch.dtype) -> Tensor:
    random = torch.Generator().manual_seed(0)
    return torch.randn(WINDOWS, SEQ, HIDDEN, generator=random).to(dtype)


@pytest.fixture
def stream(tmp_path: Path) -> Iterator[HiddenStates]:
    """An empty stream in fp32, open for writing."""
    stream = HiddenStates(tmp_path / "stream", shape_of(torch.float32))
    stream.create()
    yield stream
    stream.close()


def fill(stream: HiddenStates, states: Tensor, batch: int) -> None:
    for start in range(0, len(states), batch):
        stream.write(start, states[start : start + batch])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("written", [1, 3, 7])
@pytest.mark.parametrize("read", [1, 2, 7])
def test_states_come_back_however_they_are_split(
    tmp_path: Path, dtype: torch.dtype, written: int, read: int
) -> None:
    states, shape = states_of(dtype), shape_of(dtype)
    writer = HiddenStates(tmp_path / "stream", shape)
    writer.create()
    fill(writer, states, written)
    writer.close(durable=True)

    reader = HiddenStates(tmp_path / "stream", shape)
    reader.open()
    parts = [reader.read(s, min(s + read, WINDOWS)) for s in range(0, WINDOWS, read)]
    reader.close()

    assert (tmp_path / "stream").stat().st_size == shape.nbytes
    assert all(part.dtype == dtype for part in parts)
    assert torch.equal(torch.cat(parts), states)


def test_windows_are_written_in_any_order(stream: HiddenStates) -> None:
    states = states_of(torch.float32)

    for start in (4, 0, 6, 2, 5, 1, 3):
        stream.write(start, states[start : start + 1])

    assert torch.equal(stream.read(0, WINDOWS), states)


def test_a_window_may_be_written_again(stream: HiddenStates) -> None:
    states = states_of(torch.float32)
    fill(stream, states, 3)

    stream.write(2, states[:2])

    assert torch.equal(stream.read(2, 4), states[:2])
    assert torch.equal(stream.read(4, WINDOWS), states[4:])


def test_states_of_another_dtype_or_layout_are_stored_in_the_streams_own(
    stream: HiddenStates,
) -> None:
    states = states_of(torch.float32)
    turned = states.transpose(1, 2).contiguous().transpose(1, 2)
    assert not turned.is_contiguous()

    stream.write(0, turned.double().requires_grad_())

    assert torch.equal(stream.read(0, WINDOWS), states)


def test_what_is_flushed_on_the_way_is_the_same(
    stream: HiddenStates, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hidden_states, "DIRTY_BYTES", 1)
    states = states_of(torch.float32)

    fill(stream, states, 2)

    assert torch.equal(stream.read(0, WINDOWS), states)


@pytest.mark.parametrize("change", [-1, 1, -(SEQ * HIDDEN * 4)])
def test_a_file_of_another_size_is_refused(stream: HiddenStates, change: int) -> None:
    stream.close()
    os.truncate(stream.path, stream.shape.nbytes + change)

    with pytest.raises(DamagedFileError, match="bytes instead of 840"):
        stream.open()


def test_a_stream_of_another_shape_is_refused(stream: HiddenStates) -> None:
    stream.close()
    other = HiddenStates(stream.path, StreamShape(WINDOWS, SEQ, HIDDEN, torch.bfloat16))

    with pytest.raises(DamagedFileError, match="840 bytes instead of 420"):
        other.open()


def test_a_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DamagedFileError, match="cannot be opened"):
        HiddenStates(tmp_path / "none", shape_of(torch.float32)).open()


def test_a_file_cut_short_while_it_is_read_is_found(stream: HiddenStates) -> None:
    fill(stream, states_of(torch.float32), 7)
    os.truncate(stream.path, 100)

    with pytest.raises(DamagedFileError, match="cut short while it was read"):
        stream.read(0, 1)


@pytest.mark.parametrize("call", ["pwrite", "fdatasync"])
def test_a_full_disk_is_an_output_error(
    stream: HiddenStates, call: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> NoReturn:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, call, full)

    with pytest.raises(OutputError, match="no space left"):
        stream.write(0, states_of(torch.float32))
        stream.close(durable=True)


def test_a_disk_that_fills_up_behind_the_back_is_told_at_the_next_write(
    stream: HiddenStates, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> NoReturn:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(hidden_states, "DIRTY_BYTES", 1)
    monkeypatch.setattr(os, "fdatasync", full)
    states = states_of(torch.float32)

    stream.write(0, states[:1])
    with pytest.raises(OutputError, match="no space left"):
        stream.write(1, states[1:2])


def test_writing_goes_on_while_the_disk_is_busy_with_what_was_written(
    stream: HiddenStates, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hidden_states, "DIRTY_BYTES", 1)
    written, flushed = threading.Event(), []

    def busy(_: int) -> None:
        assert written.wait(60)
        flushed.append(True)

    monkeypatch.setattr(os, "fdatasync", busy)

    stream.write(0, states_of(torch.float32))
    assert not flushed
    written.set()
    stream.close()

    assert flushed


def test_windows_to_come_are_read_ahead(
    stream: HiddenStates, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[int, ...]] = []
    monkeypatch.setattr(os, "posix_fadvise", lambda _, *rest: asked.append(rest))
    window = stream.shape.window_bytes

    stream.read(2, 4)

    assert asked == [(4 * window, 2 * window, os.POSIX_FADV_WILLNEED)]


def test_the_space_is_taken_before_the_first_window(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> NoReturn:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    stream = HiddenStates(tmp_path / "stream", shape_of(torch.float32))
    stream.create()
    assert stream.path.stat().st_size == stream.shape.nbytes
    stream.close()
    monkeypatch.setattr(os, "posix_fallocate", full)

    with pytest.raises(OutputError, match="no space left"):
        stream.create()
    stream.close()


def test_closing_and_removing_twice_is_harmless(stream: HiddenStates) -> None:
    for _ in range(2):
        stream.close()
        stream.remove()

    assert not stream.path.exists()


# -- digests -----------------------------------------------------------------------------


@pytest.mark.parametrize("piece", [1, 7, 2**20])
def test_a_digest_does_not_depend_on_how_states_are_split(
    stream: HiddenStates, piece: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hidden_states, "_PIECE_BYTES", piece)
    fill(stream, states_of(torch.float32), 3)
    written = stream.digest
    stream.close(durable=True)

    for batch in (1, 2, 7):
        stream.open()
        for start in range(0, WINDOWS, batch):
            stream.read(start, min(start + batch, WINDOWS))
        assert stream.digest == written
        stream.verify(written)
        stream.close()


@pytest.mark.parametrize("read", [[], [3], [5, 1, 5], list(range(WINDOWS))])
def test_a_changed_byte_is_noticed_also_in_a_window_that_nobody_read(
    stream: HiddenStates, read: list[int]
) -> None:
    fill(stream, states_of(torch.float32), 7)
    written = stream.digest
    stream.close(durable=True)
    data = bytearray(stream.path.read_bytes())
    data[4 * stream.shape.window_bytes + 5] ^= 1
    stream.path.write_bytes(data)

    stream.open()
    for window in read:
        stream.read(window, window + 1)
    with pytest.raises(DamagedFileError, match="has other bytes than when it was written"):
        stream.verify(written)


def test_windows_that_change_places_are_noticed(stream: HiddenStates) -> None:
    states = states_of(torch.float32)
    fill(stream, states, 7)
    written = stream.digest
    stream.close(durable=True)
    stream.path.write_bytes(states.flip(0).numpy().tobytes())

    stream.open()
    with pytest.raises(DamagedFileError):
        stream.verify(written)
