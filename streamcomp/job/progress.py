"""Progress of a job as a person sees it: a live bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Protocol

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
)
from rich.text import Text

from streamcomp.machine.memory import resident_bytes
from streamcomp.terminal import OpenConsole, drop
from streamcomp.units import format_bytes, format_seconds

__all__ = [
    "BarProgress",
    "JobProgress",
    "LineProgress",
    "SilentProgress",
    "UnheardProgress",
    "console_progress",
]


class JobProgress(Protocol):
    """Receives the events of a job and decides what to show."""

    def begin(self, title: str, seconds: list[float], done: int, budget_bytes: int) -> None:
        """A job of ``len(seconds)`` steps with their estimates, the first ``done`` finished.

        ``budget_bytes`` is 0 for a job that has no budget.
        """

    def stage(self, step: int, name: str, stage: str, share: float) -> None:
        """Step number ``step`` is in ``stage``, of which the ``share`` (0..1) is done."""

    def finish_step(self, step: int, name: str, seconds: float, detail: str) -> None:
        """A step is done and durable."""

    def note(self, text: str) -> None:
        """Something a person should know."""

    def end(self) -> None:
        """The job stops, finished or not."""


class SilentProgress:
    """Shows nothing."""

    def begin(self, title: str, seconds: list[float], done: int, budget_bytes: int) -> None: ...

    def stage(self, step: int, name: str, stage: str, share: float) -> None: ...

    def finish_step(self, step: int, name: str, seconds: float, detail: str) -> None: ...

    def note(self, text: str) -> None: ...

    def end(self) -> None: ...


class _Remaining:
    """Time left: the estimates of the open steps, scaled by how the finished ones went."""

    def __init__(self, estimates: list[float]) -> None:
        self.estimates = estimates
        self.expected = self.taken = 0.0

    def finished(self, step: int, seconds: float) -> None:
        self.expected += self.estimates[step]
        self.taken += seconds

    def after(self, step: int) -> float:
        """Seconds for the steps from ``step`` on."""
        scale = self.taken / self.expected if self.expected > 0 else 1.0
        return scale * sum(self.estimates[step:])


class LineProgress:
    """A line per finished step, on stderr."""

    def __init__(self) -> None:
        self._remaining = _Remaining([])
        self._budget = 0

    def begin(self, title: str, seconds: list[float], done: int, budget_bytes: int) -> None:
        self._remaining, self._budget = _Remaining(seconds), budget_bytes
        at = f", continued after step {done}" if done else ""
        print(f"{title}: {len(seconds)} steps{at}", file=sys.stderr)

    def stage(self, step: int, name: str, stage: str, share: float) -> None: ...

    def finish_step(self, step: int, name: str, seconds: float, detail: str) -> None:
        self._remaining.finished(step, seconds)
        total = len(self._remaining.estimates)
        left = format_seconds(self._remaining.after(step + 1))
        allowed = f" of {format_bytes(self._budget)}" if self._budget else ""
        print(
            f"[{step + 1}/{total}] {name} {format_seconds(seconds)}"
            f"{' · ' + detail if detail else ''} · RSS {format_bytes(resident_bytes())}{allowed}"
            f" · {left} left",
            file=sys.stderr,
        )

    def note(self, text: str) -> None:
        print(f"note: {text}", file=sys.stderr)

    def end(self) -> None: ...


class BarProgress:
    """One live line on a terminal: step, stage, bar, ETA, RSS against the budget."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._remaining = _Remaining([])
        self._budget = 0
        self._bar = Progress(
            TextColumn("{task.description}", style="bold", markup=False),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[stage]}"),
            TimeElapsedColumn(),
            TextColumn("ETA {task.fields[eta]}"),
            TextColumn("RSS {task.fields[rss]}"),
            console=console,
            transient=True,
        )
        self._task: TaskID | None = None
        self._step_started = time.monotonic()

    def begin(self, title: str, seconds: list[float], done: int, budget_bytes: int) -> None:
        self._remaining, self._budget = _Remaining(seconds), budget_bytes
        if done:
            self._console.print(Text(f"{title}: continued after step {done} of {len(seconds)}"))
        if self._task is not None:  # a job that goes back begins again
            self._bar.remove_task(self._task)
        self._bar.start()
        self._task = self._bar.add_task(
            title, total=len(seconds), completed=done, stage="", eta="", rss=self._rss()
        )

    def stage(self, step: int, name: str, stage: str, share: float) -> None:
        if self._task is None:
            return
        spent = time.monotonic() - self._step_started
        left = max(0.0, self._remaining.after(step) - spent)
        text = f"{name}: {stage}" + (f" {share:4.0%}" if 0 < share < 1 else "")
        self._bar.update(
            self._task,
            stage=f"{text:<38.38}",
            eta=format_seconds(left),
            rss=self._rss(),
        )

    def finish_step(self, step: int, name: str, seconds: float, detail: str) -> None:
        self._remaining.finished(step, seconds)
        self._step_started = time.monotonic()
        if self._task is not None:
            self._bar.update(self._task, completed=step + 1, rss=self._rss())

    def note(self, text: str) -> None:
        self._console.print(Text.assemble(("note:", "yellow"), f" {text}"))

    def end(self) -> None:
        self._bar.stop()

    def _rss(self) -> str:
        used = resident_bytes()
        share = used / self._budget if self._budget else 0.0
        colour = "green" if share < 0.8 else "yellow" if share < 1 else "red"
        allowed = f" / {format_bytes(self._budget)}" if self._budget else ""
        return f"[{colour}]{format_bytes(used)}[/]{allowed}"


class UnheardProgress:
    """Shows what ``shown`` shows until stderr cannot be written any more, then nothing.

    A job outlives the reader of its progress: a pipe that was closed, a disk that is full.
    """

    def __init__(self, shown: JobProgress) -> None:
        self._shown: JobProgress = shown

    def begin(self, title: str, seconds: list[float], done: int, budget_bytes: int) -> None:
        self._tell(self._shown.begin, title, seconds, done, budget_bytes)

    def stage(self, step: int, name: str, stage: str, share: float) -> None:
        self._tell(self._shown.stage, step, name, stage, share)

    def finish_step(self, step: int, name: str, seconds: float, detail: str) -> None:
        self._tell(self._shown.finish_step, step, name, seconds, detail)

    def note(self, text: str) -> None:
        self._tell(self._shown.note, text)

    def end(self) -> None:
        self._tell(self._shown.end)

    def _tell(self, call: Callable[..., None], *arguments: Any) -> None:
        try:
            call(*arguments)
        except OSError:
            drop(sys.stderr)
            with suppress(OSError):
                self._shown.end()  # a bar's thread
            self._shown = SilentProgress()


def console_progress(quiet: bool) -> JobProgress:
    """A bar where stderr is a terminal, lines where it is not, nothing when ``quiet``."""
    if quiet:
        return SilentProgress()
    console = OpenConsole(stderr=True)
    return UnheardProgress(BarProgress(console) if console.is_terminal else LineProgress())
