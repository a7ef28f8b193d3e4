"""Calibration texts that cannot be used: one line that says what is wrong, and its exit code."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.jobs import (
    SMALL,
    Notes,
    compress,
    run_cli,
    varied_text,
)
from tests.refusals import (
    SETTINGS,
    assert_refused,
    run_compress,
    write,
)


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("short.txt", "too short", "9 tokens, a window needs 16: give more text or a smaller"),
        ("empty.txt", "", "0 tokens, a window needs 16"),
        ("binary.txt", b"\xff\xfe\x00" * 99, "is no UTF-8 text"),
        ("plain.jsonl", "no json\n", 'every line must be {"text": "..."}'),
        ("other.jsonl", '{"body": "x"}\n', 'every line must be {"text": "..."}'),
        ("list.jsonl", '["x"]\n', 'every line must be {"text": "..."}'),
    ],
)
def test_a_text_that_cannot_be_used_is_refused_and_another_one_may_follow(
    name: str,
    data: str | bytes,
    message: str,
    pico: Callable[..., Path],
    text: Path,
    tmp_path: Path,
) -> None:
    bad, out = write(tmp_path / name, data), tmp_path / "out"

    assert_refused(run_compress(pico("llama"), out, bad), 9, message)
    assert not list(out.glob("*.safetensors"))
    assert run_compress(pico("llama"), out, text).code == 0


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("no-such.txt", "no-such.txt: no such file or folder"),
        ("/no/such.txt", "/no/such.txt: no such file or folder"),
        ("somebody/some-text", "somebody/some-text is no file here, and as a hub dataset"),
    ],
)
def test_a_text_that_is_not_there_is_missed(
    source: str, message: str, pico: Callable[..., Path], tmp_path: Path
) -> None:
    assert_refused(run_compress(pico("llama"), tmp_path / "out", source), 9, message)


@pytest.mark.parametrize("command", ["plan", "compress", "eval"])
def test_a_text_in_another_format_is_refused_before_the_model_is_looked_for(
    command: str, tmp_path: Path
) -> None:
    table = write(tmp_path / "a.csv", "instruction,output\na,b\n")
    out = [tmp_path / "out"] if command == "compress" else []
    option = "--text" if command == "eval" else "--calibration"

    done = run_cli(command, tmp_path / "nowhere", *out, option, table, "--quiet")

    assert_refused(done, 9, "a.csv: its header must name a column text; it has 'instruction'")


def test_a_folder_without_text_is_refused(pico: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()

    done = run_compress(pico("llama"), tmp_path / "out", tmp_path / "empty")

    assert_refused(done, 9, "empty holds no text file")


def test_a_text_a_bit_short_gives_the_windows_it_has_and_a_warning(
    pico: Callable[..., Path], tmp_path: Path
) -> None:
    short, out = varied_text(tmp_path / "short.txt", 5 * SMALL["seq_len"] + 3), tmp_path / "out"

    result = compress(pico("llama"), out, short, progress=(notes := Notes()))

    assert notes.texts == [f"{short} is short: 5 windows instead of {SMALL['samples']}"]
    assert result.report["windows"] == 5
    assert result.report["notes"] == notes.texts
    done = run_cli("compress", pico("llama"), tmp_path / "again", "--calibration", short, *SETTINGS)
    assert done.code == 0
    assert f"note: {short} is short: 5 windows instead of 8\n" in done.err
