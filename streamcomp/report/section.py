"""Parts of the page before they are HTML: text and numbers, nothing escaped yet."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from streamcomp.report.plots import CellMap, Plot

__all__ = ["Section", "Table", "counted"]


@dataclass(frozen=True)
class Table:
    """Rows under a head; with a ``summary``, shown once that is clicked."""

    head: Sequence[str]
    rows: Sequence[Sequence[object]]
    style: str = ""  # its class in the style sheet
    summary: str = ""
    title: str = ""


@dataclass(frozen=True)
class Section:
    """One card of the page, its parts in the order in which they are shown."""

    title: str
    explanation: str = ""
    plot: Plot | None = None
    cells: CellMap | None = None
    items: Sequence[str] = ()
    tables: Sequence[Table] = ()
    style: str = ""


def counted(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"
