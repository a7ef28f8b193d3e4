"""Plots, 0..100 both ways: a template draws them as SVG, stretched to the page.

Labels are HTML around them, so that text has its size on a phone too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

__all__ = [
    "Axis",
    "Bar",
    "CellMap",
    "Key",
    "Line",
    "Plot",
    "bar",
    "block_labels",
    "centres",
    "linear_axis",
    "loss_axis",
    "percent",
    "step_plot",
]

# Distances between ticks; an axis takes the first that needs no more than five of them.
_SHARES = [digit * 10.0**power for power in range(-12, 3) for digit in (1, 2, 5)]
_BLOCKS = [digit * int(10**power) for power in range(6) for digit in (1, 2, 5)]

_MOST_LABELS = 8  # below a plot
_LABEL_WIDTH = 3.5  # of a block's number, percent of the plot
_LETTER_WIDTH = 1.8  # of a sweep's name, percent of the plot
_LOG_FROM = 30  # a log axis where the largest loss is that many times the least
_LOG_DECADES = 6  # losses further below the largest are on the floor of the plot
_ROW_REM = 1.35  # height of a row of cells


def percent(share: float) -> str:
    return f"{100 * share:.3g}%"


@dataclass(frozen=True)
class Axis:
    """The upright axis of a plot: called with a value, gives percent of the height from the top."""

    ticks: Sequence[float]  # the first and the last are its ends
    form: Callable[[float], str]  # writes a tick
    log: bool = False

    def __call__(self, value: float) -> float:
        low, high = self.ticks[0], self.ticks[-1]
        value = min(max(value, low), high)
        if self.log:
            return 100 * math.log(high / value) / math.log(high / low)
        return 100 * (high - value) / (high - low)


@dataclass(frozen=True)
class Line:
    """A path of ``width`` pixels, however the plot is stretched; ``M x yh0`` is a dot."""

    path: str
    color: str
    width: float
    tip: str = ""
    dash: str = "none"


@dataclass(frozen=True)
class Bar:
    """A rectangle, in percent of the plot from its upper left corner."""

    x: float
    y: float
    width: float
    height: float
    color: str
    tip: str = ""
    opacity: float = 1


@dataclass(frozen=True)
class Key:
    """An entry of a legend."""

    label: str
    color: str
    width: float
    dash: str = "none"
    opacity: float = 1


@dataclass(frozen=True)
class Plot:
    """``marks`` over a grid.

    ``below`` are labels by percent of the width, ``second`` a further row of them, ``title`` what
    they mean.
    """

    axis: Axis
    keys: Sequence[Key]
    marks: Sequence[Bar | Line]
    below: Mapping[float, str]
    title: str
    second: Mapping[float, str] = field(default_factory=dict)


@dataclass(frozen=True)
class CellMap:
    """Cells in named ``rows``, one over the other, each as high as a line of text."""

    keys: Sequence[Key]
    rows: Sequence[str]
    marks: Sequence[Bar]
    below: Mapping[float, str]

    @property
    def height(self) -> float:
        """In rem."""
        return _ROW_REM * len(self.rows)


def linear_axis(high: float, distances: Sequence[float], form: Callable[[float], str]) -> Axis:
    distance = next((d for d in distances if 5 * d >= high), high / 5)
    ticks = max(1, math.ceil(high / distance)) + 1
    return Axis([distance * tick for tick in range(ticks)], form)


def loss_axis(losses: Sequence[float], form: Callable[[float], str] = percent) -> Axis:
    """From zero up, or where the range asks for it a log axis."""
    high = max(losses) or 0.01
    low = max(_SHARES[0], min((loss for loss in losses if loss > 0), default=high))
    if high < _LOG_FROM * low:
        return linear_axis(high, _SHARES, form)
    first = math.floor(math.log10(max(low, high / 10**_LOG_DECADES)))
    last = math.ceil(math.log10(high))
    return Axis([10.0**power for power in range(first, last + 1)], form, log=True)


def bar(
    x: float, width: float, low: float, high: float, color: str, tip: str = "", opacity: float = 1
) -> Bar:
    """A bar around ``x`` from ``low`` up to ``high``, all in percent of the plot."""
    return Bar(x - width / 2, high, width, low - high, color, tip, opacity)


def step_plot(
    axis: Axis, keys: Sequence[Key], marks: Sequence[Bar | Line], names: Sequence[str]
) -> Plot:
    """A plot over steps, whose sweeps over the blocks are told apart by bands and by name.

    Where the steps are few all are named, else some of their blocks.
    """
    places, kinds = centres(len(names)), [_kind(name) for name in names]
    every = _every(len(names))
    labels: dict[float, str] = {}
    for name, place in zip(names, places, strict=True):
        number = name.rpartition(" ")[2]
        crowded = bool(labels) and place - max(labels) < _LABEL_WIDTH
        if number.isdecimal() and int(number) % every == 0 and not crowded:
            labels[place] = number
        elif every == 1:
            labels[place] = name.rpartition(": ")[2]
    bands: list[Bar] = []
    sweeps: dict[float, str] = {}
    start = 0
    for stop in (*(i for i in range(1, len(kinds)) if kinds[i] != kinds[i - 1]), len(kinds)):
        share, middle = 100 * (stop - start) / len(kinds), 50 * (start + stop) / len(kinds)
        if stop - start > 1 and share >= _LETTER_WIDTH * len(kinds[start]):
            sweeps[middle] = kinds[start]
            if len(sweeps) % 2:
                bands.append(bar(middle, share, 100, 0, "var(--line)", opacity=0.45))
        start = stop
    if len(sweeps) < 2:
        bands, sweeps = [], {}
    return Plot(axis, keys, [*bands, *marks], labels, "step (a number is a block)", sweeps)


def block_labels(blocks: Sequence[int]) -> tuple[dict[int, float], dict[float, str]]:
    """Position of each block in percent of the width, and the labels below some of them."""
    places = dict(zip(blocks, centres(len(blocks)), strict=True))
    every = _every(len(blocks))
    return places, {place: str(block) for block, place in places.items() if block % every == 0}


def centres(count: int) -> list[float]:
    """Middles of ``count`` equal slots, in percent of the width."""
    return [100 * (place + 0.5) / count for place in range(count)]


def _every(count: int) -> int:
    """Among ``count`` blocks, those that this number divides get a label."""
    return next(every for every in _BLOCKS if count <= _MOST_LABELS * every)


def _kind(name: str) -> str:
    """The words of a step's name, without its output and its block."""
    words, _, number = name.rpartition(": ")[2].rpartition(" ")
    return words if number.isdecimal() else name
