"""What a person sees of a job: a live bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import io
import os
import sys

import pytest
from rich.console import Console

from streamcomp.job.progress import (
    BarProgress,
    JobProgress,
    LineProgress,
    SilentProgress,
    UnheardProgress,
    console_progress,
)
from streamcomp.terminal import OpenConsole


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def work(progress: JobProgress, budget_bytes: int = 2**40, title: str = "out") -> None:
    """A job of three steps of a minute each, of which one was done before."""
    progress.note("a note")
    progress.begin(title, [60.0, 60.0, 60.0], 1, budget_bytes)
    progress.stage(1, "block 0", "observing", 0.5)
    progress.finish_step(1, "block 0", 120.0, "loss 3%")
    progress.stage(2, "block 1", "factorizing q_proj", 0.0)
    progress.finish_step(2, "block 1", 120.0, "")
    progress.end()


def test_lines_tell_step_time_memory_and_what_is_left(capsys: pytest.CaptureFixture[str]) -> None:
    work(LineProgress())

    out, err = capsys.readouterr()
    lines = err.splitlines()
    assert out == ""
    assert lines[:2] == ["note: a note", "out: 3 steps, continued after step 1"]
    assert lines[2].startswith("[2/3] block 0 2m00s · loss 3% · RSS ")
    assert lines[2].endswith(" of 1.00 TiB · 2m00s left")  # twice as slow as was estimated
    assert lines[3].startswith("[3/3] block 1 2m00s · RSS ")
    assert lines[3].endswith(" of 1.00 TiB · 0.0s left")


def test_where_there_is_no_budget_none_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    work(LineProgress(), budget_bytes=0)

    assert "0 B" not in capsys.readouterr().err


def test_a_terminal_gets_a_bar_with_stage_time_left_and_memory() -> None:
    file = Terminal()

    work(BarProgress(Console(file=file, width=200, force_terminal=True, color_system=None)))

    told = file.getvalue()
    assert "note: a note\n" in told
    assert "out: continued after step 1 of 3" in told
    assert "block 1: factorizing q_proj" in told
    assert "ETA 2m00s" in told
    assert "/ 1.00 TiB" in told


@pytest.mark.parametrize("budget_bytes", [0, 1, 2**40])
def test_a_bar_shows_any_name_and_any_budget(budget_bytes: int) -> None:
    file = Terminal()

    work(BarProgress(Console(file=file, width=200, force_terminal=True)), budget_bytes, "[/red]:x:")

    assert "[/red]:x:" in file.getvalue()


def test_silence_is_silent(capsys: pytest.CaptureFixture[str]) -> None:
    work(SilentProgress())

    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("stderr", "quiet", "kind"),
    [
        (Terminal(), False, BarProgress),
        (io.StringIO(), False, LineProgress),
        (Terminal(), True, SilentProgress),
        (io.StringIO(), True, SilentProgress),
    ],
    ids=["terminal", "file", "quiet terminal", "quiet file"],
)
def test_the_place_decides_what_is_shown(
    stderr: io.StringIO, quiet: bool, kind: type, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stderr", stderr)
    for name in ("FORCE_COLOR", "NO_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm")

    progress = console_progress(quiet)
    assert type(getattr(progress, "_shown", progress)) is kind


@pytest.mark.parametrize("bar", [False, True])
def test_what_nobody_can_read_ends_no_job(bar: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w", buffering=1) as closed:
        monkeypatch.setattr(sys, "stderr", closed)
        shown = (
            BarProgress(OpenConsole(stderr=True, force_terminal=True)) if bar else LineProgress()
        )

        work(UnheardProgress(shown))

        print("written to nowhere from now on", file=closed)  # or closing it would fail
