"""Journals and reports that somebody changed: one error or none, and never another result."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from streamcomp import OutputError, StreamcompError
from streamcomp.api import status
from streamcomp.job.journal import JOURNAL, Journal
from streamcomp.job.publish import REPORT, read_report
from tests.job.test_journal import sealed
from tests.jobs import Interrupt, Interrupted, Notes, compress, run_cli

# What takes the place of a value. Text is put into the file as it is.
VALUES = (
    "null", "true", "-1", "0", "1", "1.5", "1e30", "-1e30", "1e400", "NaN", "Infinity",
    "1" + 5000 * "0", '""', '"x"', r'"\ud800"', r'"\u0000"', '"../../x"', "[]", "{}", "[[]]",
    '{"x": 1}', 10_000 * "[" + 10_000 * "]", 400 * '{"x":' + "1" + 400 * "}",
)  # fmt: skip


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of every value in ``value``; of long lists the first two."""
    yield path
    items: Any = value.items() if isinstance(value, dict) else ()
    if isinstance(value, list):
        items = enumerate(value[:2])
    for key, item in items:
        yield from places(item, (*path, key))


def changed(value: Any, path: tuple[Any, ...], new: str | None) -> str:
    """JSON of ``value`` with the text ``new`` at ``path``; None: without that key."""
    value = json.loads(json.dumps(value))
    if not path:
        return new or ""
    *above, last = path
    holder = value
    for key in above:
        holder = holder[key]
    if new is None:
        del holder[last]
    else:
        holder[last] = "PUT IT HERE"
    return json.dumps(value).replace('"PUT IT HERE"', new or "")


def test_no_report_ends_in_a_traceback(
    pico: Callable[..., Path], text: Path, tmp_path: Path
) -> None:
    out, choose = tmp_path / "out", random.Random(0)
    compress(pico("llama"), out, text, include="k_proj")
    report = json.loads((out / REPORT).read_text())
    del report["checksum"]  # it would refuse each of them, before types are looked at
    cases = [(path, new) for path in places(report) for new in (*VALUES, None)]

    for path, new in choose.sample(cases, len(cases) // 3):
        (out / REPORT).write_text(changed(report, path, new))
        for read in (read_report, status):
            try:
                read(out)
            except StreamcompError as error:
                assert "\n" not in str(error) and len(str(error)) < 1000, (path, new)
    settings = ("--samples", "8", "--seq-len", "16", "--calibration", text, "--include", "k_proj")
    for path, new in choose.sample(cases, 20):
        (out / REPORT).write_text(changed(report, path, new))
        for command in (("status", out), ("compress", pico("llama"), out, *settings)):
            done = run_cli(*command, "--threads", "1") if len(command) > 2 else run_cli(*command)
            assert done.code in (0, 6, 7), (path, new, done.err)


def test_no_journal_ends_in_a_traceback_even_with_checksums_that_are_right(
    pico: Callable[..., Path], text: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    with pytest.raises(Interrupted):
        compress(pico("llama"), out, text, include="k_proj", progress=Interrupt(8))
    journal = out / ".streamcomp" / JOURNAL
    lines = journal.read_text().splitlines(keepends=True)

    for number in (0, 1, 2, 6, 8, 9):
        row = json.loads(lines[number])
        del row["checksum"]
        for path in places(row):
            for new in (*VALUES, None):
                line = sealed(changed(row, path, new))
                journal.write_text("".join([*lines[:number], line, *lines[number + 1 :]]))
                try:
                    status(out)
                except StreamcompError as error:
                    assert "\n" not in str(error), (path, new)


@pytest.mark.parametrize(
    "change",
    [
        {"output": 0},
        {"output": 7},
        {"files": {f"layers.{300 * '9'}": {"bytes": 1, "digest": ""}}},
        {"files": {f"analysis-00000.{300 * 'x'}.safetensors": {"bytes": 1, "digest": ""}}},
        {"files": {"analysis-00000.x/../../y.safetensors": {"bytes": 1, "digest": ""}}},
        {"files": {"../y": {"bytes": 1, "digest": ""}}},
        {"step": "ranks"},
    ],
    ids=str,
)
@pytest.mark.parametrize("line", [1, 8, 10])
def test_a_line_that_is_not_of_its_step_is_done_again(
    line: int, change: dict[str, Any], pico: Callable[..., Path], text: Path, tmp_path: Path
) -> None:
    dense, out = pico("llama"), tmp_path / "out"
    compress(dense, tmp_path / "whole", text, include="k_proj")
    with pytest.raises(Interrupted):
        compress(dense, out, text, include="k_proj", progress=Interrupt(9))
    (tmp_path / "y").write_text("not the job's")
    journal = out / ".streamcomp" / JOURNAL
    lines = journal.read_text().splitlines(keepends=True)
    row = json.loads(lines[line])
    del row["checksum"]
    same = all(row.get(key) == value for key, value in change.items())
    lines[line] = sealed(json.dumps(row | change))
    journal.write_text("".join(lines))

    compress(dense, out, text, include="k_proj", progress=(notes := Notes()))

    assert same or f"{JOURNAL} is damaged: going back to" in notes.texts[0]
    assert (tmp_path / "y").read_text() == "not the job's"
    for shard in (tmp_path / "whole").glob("*.safetensors"):
        assert (out / shard.name).read_bytes() == shard.read_bytes()


@pytest.mark.parametrize("ranks", [[{}], [{}, {}, {}]], ids=["fewer", "more"])
def test_ranks_of_another_number_of_outputs_are_refused(
    ranks: list[Any], pico: Callable[..., Path], text: Path, tmp_path: Path
) -> None:
    dense, out, ratio = pico("llama"), tmp_path / "out", (0.2, 0.5)
    with pytest.raises(Interrupted):
        compress(dense, out, text, include="k_proj", ratio=ratio, progress=Interrupt(8))
    journal = out / ".streamcomp" / JOURNAL
    lines = journal.read_text().splitlines(keepends=True)
    number = next(number for number, line in enumerate(lines) if '"step": "ranks"' in line)
    row = json.loads(lines[number]) | {"ranks": ranks}
    del row["checksum"]
    lines[number] = sealed(json.dumps(row))
    journal.write_text("".join(lines))

    with pytest.raises(OutputError, match=f"ranks of {len(ranks)} outputs instead of 2: remove"):
        compress(dense, out, text, include="k_proj", ratio=ratio)


def test_a_journal_with_any_byte_changed_leads_to_the_same_result(
    pico: Callable[..., Path], text: Path, tmp_path: Path
) -> None:
    dense, begun, choose = pico("llama"), tmp_path / "begun", random.Random(0)
    compress(dense, tmp_path / "whole", text, include="k_proj")
    with pytest.raises(Interrupted):
        compress(dense, begun, text, include="k_proj", progress=Interrupt(8))
    data = (begun / ".streamcomp" / JOURNAL).read_bytes()
    header = data.index(b"\n")

    for number in range(12):
        out, altered = tmp_path / f"out-{number}", bytearray(data)
        shutil.copytree(begun, out)
        altered[choose.randrange(header, len(data))] = choose.randrange(256)
        (out / ".streamcomp" / JOURNAL).write_bytes(altered)
        compress(dense, out, text, include="k_proj")
        for shard in (tmp_path / "whole").glob("*.safetensors"):
            assert (out / shard.name).read_bytes() == shard.read_bytes()


def test_any_byte_changed_is_noticed(pico: Callable[..., Path], text: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(Interrupted):
        compress(pico("llama"), out, text, progress=Interrupt(3))
    path, choose = out / ".streamcomp" / JOURNAL, random.Random(0)
    data = path.read_bytes()
    steps = Journal.read(path.parent).steps  # type: ignore[union-attr]

    for _ in range(300):
        at = choose.randrange(data.index(b"\n") + 1, len(data))
        path.write_bytes(data[:at] + bytes([data[at] ^ 1 << choose.randrange(8)]) + data[at + 1 :])
        read = Journal.read(path.parent)
        line = data[:at].count(b"\n") - 1
        assert read is not None and read.steps == steps[:line]
