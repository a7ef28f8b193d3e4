"""Plots as SVG, 0..100 both ways, stretched to the page while lines keep their width.

Labels are HTML around them, so that text has its size on a phone too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from streamcomp.evaluation.markup import Html, percent, tag, text

__all__ = [
    "Axis",
    "bar",
    "block_labels",
    "cell_map",
    "centres",
    "key",
    "line",
    "linear_axis",
    "loss_axis",
    "plot",
    "step_plot",
]

# Distances between ticks; an axis takes the first that needs no more than five of them.
_SHARES = [digit * 10.0**power for power in range(-12, 3) for digit in (1, 2, 5)]
_BLOCKS = [digit * int(10**power) for power in range(6) for digit in (1, 2, 5)]

_MOST_LABELS = 8  # below a plot
_LABEL_WIDTH = 3.5  # of a block's number, percent of the plot
_LETTER_WIDTH = 1.8  # of a sweep's name, percent of the plot
_LOG_FROM = 30  # a log axis where the largest loss is that many times the least
_LOG_DECADES = 6  # losses further below the largest lie on the floor of the plot
_ROW_REM = 1.35  # height of a row of cells


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


def linear_axis(high: float, distances: Sequence[float], form: Callable[[float], str]) -> Axis:
    distance = next((d for d in distances if 5 * d >= high), distances[-1])
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


def line(path: str, color: str, width: float, tip: str = "", dash: str = "none") -> Html:
    """A path of ``width`` pixels, however the plot is stretched; ``M x yh0`` is a dot."""
    title = tag("title", text(tip)) if tip else Html("")
    return tag("path", title, d=path, stroke=color, stroke_width=width, stroke_dasharray=dash)


def bar(
    x: float, width: float, low: float, high: float, color: str, tip: str = "", opacity: float = 1
) -> Html:
    """A bar around ``x`` from ``low`` up to ``high``, all in percent of the plot."""
    place = {"x": f"{x - width / 2:.2f}", "y": f"{high:.2f}"}
    size = {"width": f"{width:.2f}", "height": f"{low - high:.2f}"}
    more = {"fill_opacity": f"{opacity:.2f}"} if opacity < 1 else {}
    title = tag("title", text(tip)) if tip else Html("")
    return tag("rect", title, fill=color, **place, **size, **more)


def key(label: str, color: str, width: float, dash: str = "none", opacity: float = 1) -> Html:
    """An entry of a legend."""
    mark = tag("g", line("M0 5h24", color, width, dash=dash), opacity=f"{opacity:.2f}")
    return tag("span", tag("svg", mark, viewBox="0 0 24 10"), text(label))


def plot(
    axis: Axis,
    keys: Iterable[Html],
    marks: Iterable[Html],
    below: Mapping[float, str],
    title: str,
    second: Mapping[float, str] | None = None,
) -> Html:
    """``marks`` over a grid.

    ``below`` are labels by percent of the width, ``second`` a further row of them, ``title`` what
    they mean.
    """
    grid = (line(f"M0 {axis(tick):.2f}h100", "var(--line)", 1) for tick in axis.ticks)
    svg = tag("svg", *grid, *marks, viewBox="0 0 100 100", preserveAspectRatio="none")
    upright = _labels("top", {axis(tick): axis.form(tick) for tick in axis.ticks})
    rows = [tag("div", *_labels("left", row), class_="x") for row in (below, second) if row]
    upper = tag("div", *upright, class_="y"), svg
    drawn = tag("div", *upper, *rows, tag("p", text(title), class_="dim"), class_="plot")
    return tag("div", tag("div", *keys, class_="legend"), drawn)


def step_plot(
    axis: Axis, keys: Iterable[Html], marks: Iterable[Html], names: Sequence[str]
) -> Html:
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
    bands: list[Html] = []
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
    return plot(axis, keys, [*bands, *marks], labels, "step (a number is a block)", sweeps)


def block_labels(blocks: Sequence[int]) -> tuple[dict[int, float], dict[float, str]]:
    """Where each block lies in percent of the width, and the labels below some of them."""
    places = dict(zip(blocks, centres(len(blocks)), strict=True))
    every = _every(len(blocks))
    return places, {place: str(block) for block, place in places.items() if block % every == 0}


def cell_map(
    keys: Iterable[Html], rows: Sequence[str], marks: Iterable[Html], below: Mapping[float, str]
) -> Html:
    """Cells in named ``rows``, one over the other, each as high as a line of text."""
    svg = tag("svg", *marks, viewBox="0 0 100 100", preserveAspectRatio="none")
    sides = tag("div", *(tag("span", text(row)) for row in rows), class_="rows"), svg
    drawn = tag(
        "div",
        *sides,
        tag("div", *_labels("left", below), class_="x"),
        tag("p", text("block"), class_="dim"),
        class_="plot map",
        style=f"grid-template-rows:{_ROW_REM * len(rows):.2f}rem 1.4rem",
    )
    return tag("div", tag("div", *keys, class_="legend"), drawn)


def centres(count: int) -> list[float]:
    return [100 * (place + 0.5) / count for place in range(count)]


def _every(count: int) -> int:
    """Of so many blocks, label each that this divides."""
    return next(every for every in _BLOCKS if count <= _MOST_LABELS * every)


def _kind(name: str) -> str:
    """What a step does, without its output and its block."""
    words, _, number = name.rpartition(": ")[2].rpartition(" ")
    return words if number.isdecimal() else name


def _labels(side: str, labels: Mapping[float, str]) -> list[Html]:
    return [tag("span", text(v), style=f"{side}:{at:.2f}%") for at, v in labels.items()]
