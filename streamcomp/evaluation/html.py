"""The report as one HTML file: tables and plots, no script, nothing fetched.

Plots are SVG, 0..100 both ways, stretched to the page while lines keep their width; labels are
HTML around it, so that text has its size on a phone too.
"""

from __future__ import annotations

import html
import math
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any, NewType

from streamcomp.units import format_bytes, format_seconds

__all__ = ["html_report"]

# Markup, told from text by its type: mypy refuses a name that was not escaped on its way in.
_Html = NewType("_Html", str)
_Record = Mapping[str, Any]  # a part of the report: one linear, one step, the recipe

# Distances between ticks; an axis takes the first that needs no more than five of them.
_BYTES = [2.0**power for power in range(60)]
_SECONDS = [0.1, 0.2, 0.5, *(n * unit for unit in (1, 60, 3600) for n in (1, 2, 5, 10, 20, 30))]
_SHARES = [digit * 10.0**power for power in range(-12, 3) for digit in (1, 2, 5)]
_BLOCKS = [digit * 10**power for power in range(6) for digit in (1, 2, 5)]

_MOST_LABELS = 8  # below a plot
_LOG_FROM = 30  # a log axis where the largest loss is that many times the least
_LOG_DECADES = 6  # losses further below the largest lie on the floor of the plot
_BUDGET_SHOWN = 4  # a budget that many times above all peaks would flatten the bars
_BIG_DOTS = 60  # in a line
_COLORS = 7  # of lines; after that, the next dash
_DASHES = ["none", "7 4", "2 4", "9 3 2 3"]  # pixels on and off

# Okabe and Ito's colours, told apart by colour-blind people too; grey for what is left over.
_STYLE = """
:root{color-scheme:light dark;--page:#f6f7f9;--card:#fff;--ink:#1b1f24;--dim:#59636e;--line:#dfe3e8;
--c0:#0072b2;--c1:#d55e00;--c2:#009e73;--c3:#cc79a7;--c4:#e69f00;--c5:#56b4e9;--c6:#1b1f24;--c7:#999}
@media(prefers-color-scheme:dark){:root{--page:#0f1216;--card:#181c22;--ink:#e6e9ed;--dim:#9aa4af;
--line:#2c333b;--c0:#2e95d3;--c6:#f0e442}}
*{box-sizing:border-box;overflow-wrap:anywhere}
body{margin:0;background:var(--page);color:var(--ink);font:15px/1.5 system-ui,sans-serif}
main{max-width:1120px;margin:auto;padding:1.5rem 1rem}
h1{font-size:1.7rem;line-height:1.2;margin:0} h2{font-size:1.1rem;margin:0} p{margin:.1rem 0 .6rem}
section,.cards>div{background:var(--card);border:1px solid var(--line);border-radius:10px}
section{padding:1rem 1.1rem;margin-top:1rem} .cards>div{padding:.7rem .9rem}
.cards,.columns{display:grid;grid-template-columns:repeat(auto-fit,minmax(150px,1fr));gap:.8rem}
.cards b{display:block;font-size:1.2rem;line-height:1.35}
.columns{grid-template-columns:repeat(auto-fit,minmax(270px,1fr));gap:0 1rem;align-items:start}
.dim,th,.y,.x,.legend{color:var(--dim);font-size:.85rem}
.legend{display:flex;flex-wrap:wrap;gap:.1rem 1.1rem;margin-bottom:1rem}
.legend svg{width:24px;height:10px;margin-right:.4rem}
.plot{display:grid;grid-template:15rem 1.4rem/4.6rem 1fr}
.plot>svg{width:100%;height:100%;overflow:visible}
.plot p{grid-column:2;text-align:center;margin:0}
path{fill:none;vector-effect:non-scaling-stroke} path[d$=h0]{stroke-linecap:round}
.y,.x{position:relative} .x{grid-column:2} .y span,.x span{position:absolute;white-space:nowrap}
.y span{right:.6rem;transform:translateY(-50%)} .x span{top:.2rem;transform:translateX(-50%)}
.scroll{overflow-x:auto}
table{border-collapse:collapse;width:100%;font-size:.92rem;font-variant-numeric:tabular-nums}
th,td{padding:.3rem 0 .3rem .9rem;text-align:right;vertical-align:top;white-space:nowrap}
td{border-top:1px solid var(--line)} th{font-weight:500}
th:first-child,td:first-child{text-align:left;padding-left:0}
.words td{text-align:left} .words td+td{white-space:normal} .words td:first-child{color:var(--dim)}
ul{margin:.4rem 0 0;padding-left:1.2rem} .warning::marker{content:"\\26a0\\00a0 ";color:var(--c1)}
"""


def html_report(report: dict[str, Any]) -> str:
    """``streamcomp_report.html`` of a finished job, from what ``job_report`` returns."""
    linears, steps = report.get("linears", []), report["steps"]
    budget, name = report["memory"]["budget_bytes"], report["model"]["source"]
    settings = (_settings(key, report.get(key, {})) for key in ("recipe", "levers", "versions"))
    body = [
        _tag("h1", _text(f"{name}, compressed")),
        _tag("p", _text(_summary(report, linears)), class_="dim"),
        _figures(report),
        _memory_plot(steps, budget),
        _seconds_plot(steps),
        _loss_plot(linears),
        _linears_table(linears),
        _remarks(report.get("notes", []), steps, linears, budget),
        _left_table(report.get("left", {})),
        _tag("div", *settings, class_="columns"),
    ]
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width,initial-scale=1">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; style-src 'unsafe-inline'">
<title>{_text(name)}: streamcomp report</title>
<style>{_STYLE}</style></head>
<body>{_tag("main", *body)}</body></html>
"""


def _text(value: object) -> _Html:
    """``value`` as text or attribute: names come from untrusted checkpoints, in any encoding."""
    return _Html(html.escape(str(value).encode("utf-8", "replace").decode()))


def _tag(name: str, *children: _Html, **attributes: object) -> _Html:
    """``<name ...>children</name>``; attributes are spelled ``class_`` and ``stroke_width``."""
    pairs = (f' {key.rstrip("_").replace("_", "-")}="{_text(v)}"' for key, v in attributes.items())
    return _Html(f"<{name}{''.join(pairs)}>{''.join(children)}</{name}>\n")


def _section(title: str, explanation: str, *children: _Html) -> _Html:
    heading = (_tag("h2", _text(title)), _tag("p", _text(explanation), class_="dim"))
    return _tag("section", *heading, *children)


def _table(head: Sequence[str], rows: Iterable[Sequence[object]], class_: str = "") -> _Html:
    lines = [_tag("tr", *(_tag("th", _text(cell), scope="col") for cell in head))] if head else []
    lines += [_tag("tr", *(_tag("td", _text(cell)) for cell in row)) for row in rows]
    return _tag("div", _tag("table", *lines, class_=class_), class_="scroll")


def _counted(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def _percent(share: float) -> str:
    return f"{100 * share:.3g}%"


def _block(name: str) -> int:
    """Number of the block that a linear lies in: the first in its name."""
    number = re.search(r"\b\d{1,9}\b", name)
    return int(number[0]) if number else 0


def _families(linears: Iterable[_Record]) -> dict[str, list[_Record]]:
    """Linears by their name within a block, with ``*`` for the numbers of experts."""
    patterns: dict[str, list[_Record]] = defaultdict(list)
    for linear in linears:
        patterns[re.sub(r"\b\d+\b", "*", linear["name"])].append(linear)
    one_stack = len({pattern.partition("*.")[0] for pattern in patterns}) == 1
    return {
        (p.partition("*.")[2] if one_stack else "") or p: found for p, found in patterns.items()
    }


def _losses(linears: Iterable[_Record]) -> list[tuple[float, str]]:
    """The losses that are numbers, and whose they are."""
    losses = [(linear.get("relative_loss", math.nan), linear["name"]) for linear in linears]
    return [(loss, name) for loss, name in losses if math.isfinite(loss)]


def _summary(report: _Record, linears: Sequence[_Record]) -> str:
    recipe = report.get("recipe", {})
    words = [f"{key} {recipe[key]}" for key in ("method", "form", "allocation") if key in recipe]
    blocks = len({_block(linear["name"]) for linear in linears})
    factored = f"{_counted(len(linears), 'linear')} factored in {_counted(blocks, 'block')}"
    return " · ".join([f"{report['model'].get('type') or 'unknown'} model", *words, factored])


def _figures(report: _Record) -> _Html:
    """The row of key figures."""
    model, memory, steps = report["model"], report["memory"], report["steps"]
    asked = f"asked {report['asked']:.1%}; " if "asked" in report else ""
    whole = f"{model['model_ratio']:.1%} of the whole model"
    kept = f"{model['bytes_kept'] / model['bytes']:.1%} of the original"
    peak, predicted, budget = (
        format_bytes(memory[f"{which}_bytes"]) for which in ("peak", "predicted", "budget")
    )
    linears = _change(model, "linear_parameters", _large)
    windows = f", {report['windows']} windows" if "windows" in report else ""
    figures = [
        ("ratio reached", f"{model['ratio']:.1%}", f"{asked}{whole}"),
        ("parameters", _change(model, "parameters", _large), f"in linears {linears}"),
        ("bytes of weights", _change(model, "bytes", format_bytes), kept),
        ("peak memory", peak, f"predicted {predicted}, budget {budget}"),
        ("time", format_seconds(report["seconds"]), f"{_counted(len(steps), 'step')}{windows}"),
    ]
    cards = (
        _tag("div", _text(what), _tag("b", _text(value)), _tag("span", _text(more), class_="dim"))
        for what, value, more in figures
    )
    return _tag("div", *cards, class_="cards")


def _change(values: _Record, key: str, form: Callable[[float], str]) -> str:
    """Before -> after, which may only break before the arrow."""
    before, after = (form(values[name]).replace(" ", "\xa0") for name in (key, f"{key}_kept"))
    return f"{before} \N{RIGHTWARDS ARROW}\xa0{after}"


def _large(count: float) -> str:
    return f"{count / 1e6:.4g} M" if count < 1e9 else f"{count / 1e9:.4g} B"


@dataclass(frozen=True)
class _Axis:
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


def _linear_axis(high: float, distances: Sequence[float], form: Callable[[float], str]) -> _Axis:
    distance = next((d for d in distances if 5 * d >= high), distances[-1])
    ticks = max(1, math.ceil(high / distance)) + 1
    return _Axis([distance * tick for tick in range(ticks)], form)


def _loss_axis(losses: Sequence[float]) -> _Axis:
    high = max(losses) or 0.01
    low = max(_SHARES[0], min((loss for loss in losses if loss > 0), default=high))
    if high < _LOG_FROM * low:
        return _linear_axis(high, _SHARES, _percent)
    first = math.floor(math.log10(max(low, high / 10**_LOG_DECADES)))
    last = math.ceil(math.log10(high))
    return _Axis([10.0**power for power in range(first, last + 1)], _percent, log=True)


def _line(path: str, color: str, width: float, tip: str = "", dash: str = "none") -> _Html:
    """A path of ``width`` pixels, however the plot is stretched; ``M x yh0`` is a dot."""
    title = _tag("title", _text(tip)) if tip else _Html("")
    return _tag("path", title, d=path, stroke=color, stroke_width=width, stroke_dasharray=dash)


def _bar(x: float, width: float, low: float, high: float, color: str, tip: str) -> _Html:
    """A bar around ``x`` from ``low`` up to ``high``, all in percent of the plot."""
    place = {"x": f"{x - width / 2:.2f}", "y": f"{high:.2f}"}
    size = {"width": f"{width:.2f}", "height": f"{low - high:.2f}"}
    return _tag("rect", _tag("title", _text(tip)), fill=color, **place, **size)


def _key(text: str, color: str, width: float, dash: str = "none") -> _Html:
    """An entry of a legend."""
    swatch = _tag("svg", _line("M0 5h24", color, width, dash=dash), viewBox="0 0 24 10")
    return _tag("span", swatch, _text(text))


def _plot(
    axis: _Axis,
    keys: Iterable[_Html],
    marks: Iterable[_Html],
    below: Mapping[float, str],
    title: str,
) -> _Html:
    """``marks`` over a grid; ``below`` are labels by percent of the width, and their ``title``."""
    grid = (_line(f"M0 {axis(tick):.2f}h100", "var(--line)", 1) for tick in axis.ticks)
    svg = _tag("svg", *grid, *marks, viewBox="0 0 100 100", preserveAspectRatio="none")
    beside = {axis(tick): axis.form(tick) for tick in axis.ticks}
    upright, level = (
        [_tag("span", _text(label), style=f"{side}:{at:.2f}%") for at, label in labels.items()]
        for side, labels in (("top", beside), ("left", below))
    )
    sides = _tag("div", *upright, class_="y"), svg, _tag("div", *level, class_="x")
    plot = _tag("div", *sides, _tag("p", _text(title), class_="dim"), class_="plot")
    return _tag("div", _tag("div", *keys, class_="legend"), plot)


def _step_plot(
    axis: _Axis, keys: Iterable[_Html], marks: Iterable[_Html], steps: Sequence[_Record]
) -> _Html:
    """A plot over the steps, with all their names or, where they are many, some of the blocks."""
    every = next(every for every in _BLOCKS if len(steps) <= _MOST_LABELS * every)
    labels = {}
    for step, centre in zip(steps, _centres(len(steps)), strict=True):
        number = step["step"].rpartition(" ")[2]
        if number.isdecimal() and int(number) % every == 0:
            labels[centre] = number
        elif every == 1:
            labels[centre] = step["step"]
    return _plot(axis, keys, marks, labels, "step (a number is a block)")


def _centres(count: int) -> list[float]:
    return [100 * (place + 0.5) / count for place in range(count)]


def _memory_plot(steps: Sequence[_Record], budget: float) -> _Html:
    high = max(max(step["peak_bytes"], step["predicted_bytes"]) for step in steps)
    shown = budget <= _BUDGET_SHOWN * high
    axis = _linear_axis(max(high, budget) if shown else high, _BYTES, format_bytes)
    slot, marks = 100 / len(steps), []
    for step, centre in zip(steps, _centres(len(steps)), strict=True):
        peak, predicted = step["peak_bytes"], step["predicted_bytes"]
        tip = f"{step['step']}: {format_bytes(peak)}, predicted {format_bytes(predicted)}"
        path = f"M{centre - slot / 2:.2f} {axis(predicted):.2f}h{slot:.2f}"
        marks.append(_bar(centre, 0.8 * slot, 100, axis(peak), "var(--c5)", tip))
        marks.append(_line(path, "var(--c1)", 2.5, tip))
    if shown:
        marks.append(_line(f"M0 {axis(budget):.2f}h100", "var(--ink)", 2, "budget", "6 4"))
    limit = f"budget {format_bytes(budget)}{'' if shown else ', above the plot'}"
    keys = (
        _key("measured peak", "var(--c5)", 10),
        _key("predicted peak", "var(--c1)", 2.5),
        _key(limit, "var(--ink)", 2, "6 4"),
    )
    plot = _step_plot(axis, keys, marks, steps)
    return _section("Memory", "Resident memory of the process at its peak.", plot)


def _seconds_plot(steps: Sequence[_Record]) -> _Html:
    totals: Counter[str] = Counter()
    for step in steps:
        totals.update(step["stages"])
    stages = [stage for stage, _ in totals.most_common()]  # the longest lie at the bottom
    colors = {stage: f"var(--c{min(number, _COLORS)})" for number, stage in enumerate(stages)}
    longest = max(sum(step["stages"].values()) for step in steps)
    axis, marks = _linear_axis(longest, _SECONDS, format_seconds), []
    for step, centre in zip(steps, _centres(len(steps)), strict=True):
        below = 0.0
        for stage in sorted(step["stages"], key=stages.index):
            above = below + step["stages"][stage]
            tip = f"{step['step']}, {stage}: {format_seconds(above - below)}"
            ends = axis(below), axis(above)
            marks.append(_bar(centre, 80 / len(steps), *ends, colors[stage], tip))
            below = above
    keys = (_key(f"{s} {format_seconds(totals[s])}", colors[s], 10) for s in stages)
    plot = _step_plot(axis, keys, marks, steps)
    return _section("Time", "Spent in the stages of each step.", plot)


def _loss_plot(linears: Sequence[_Record]) -> _Html:
    losses = _losses(linears)
    if not losses:
        return _Html("")
    axis = _loss_axis([loss for loss, _ in losses])
    blocks = sorted({_block(name) for _, name in losses})
    places = dict(zip(blocks, _centres(len(blocks)), strict=True))
    every = next(every for every in _BLOCKS if len(blocks) <= _MOST_LABELS * every)
    below = {place: str(block) for block, place in places.items() if block % every == 0}
    marks, keys = [], []
    for number, (family, members) in enumerate(_families(linears).items()):
        dash = _DASHES[number // _COLORS % len(_DASHES)]
        color = f"var(--c{number % _COLORS})"
        keys.append(_key(family, color, 3, dash))
        marks += _family_line(members, axis, places, color, dash)
    what = "Share of the energy of a linear's outputs that its factors miss on the calibration text"
    plot = _plot(axis, keys, marks, below, "block")
    return _section(
        "Loss", what + (", log scale with zeros on its floor." if axis.log else "."), plot
    )


def _family_line(
    linears: Sequence[_Record], axis: _Axis, places: Mapping[int, float], color: str, dash: str
) -> list[_Html]:
    """A line through the mean loss of each block, and dots that tell the numbers."""
    by_block: dict[int, list[tuple[float, str]]] = defaultdict(list)
    for loss, name in _losses(linears):
        by_block[_block(name)].append((loss, name))
    points, dots, size = [], [], 6 if len(places) <= _BIG_DOTS else 4
    for block, members in sorted(by_block.items()):
        mean = fmean(loss for loss, _ in members)
        many = f" and {len(members) - 1} more, on average" if len(members) > 1 else ""
        points.append(f"{places[block]:.2f} {axis(mean):.2f}")
        tip = f"{members[0][1]}{many}: {_percent(mean)}"
        dots.append(_line(f"M{points[-1]}h0", color, size, tip))
    return [_line("M" + "L".join(points), color, 2, dash=dash), *dots] if points else []


def _linears_table(linears: Sequence[_Record]) -> _Html:
    head = ("family", "count", "outputs × inputs", "rank", "mean loss", "max loss", "max damping")
    rows = (_family_row(family, members) for family, members in _families(linears).items())
    return _section(f"{_counted(len(linears), 'linear')} factored", "", _table(head, rows))


def _family_row(family: str, linears: Sequence[_Record]) -> list[object]:
    shapes = sorted({(linear["rows"], linear["columns"]) for linear in linears})
    ranks = sorted({linear["rank"] for linear in linears if linear.get("rank") is not None})
    worst, name = max(_losses(linears), default=(math.nan, ""))
    return [
        family,
        len(linears),
        ", ".join(f"{rows} × {columns}" for rows, columns in shapes),
        "–".join(str(rank) for rank in sorted({*ranks[:1], *ranks[-1:]})),
        _percent(fmean(loss for loss, _ in _losses(linears))) if name else "–",
        f"{_percent(worst)} in block {_block(name)}" if name else "–",
        f"{max(linear.get('damping', 0) for linear in linears):.2g}",
    ]


def _remarks(
    notes: Iterable[str], steps: Sequence[_Record], linears: Sequence[_Record], budget: float
) -> _Html:
    """The job's notes, after what in its numbers deserves a second look."""
    over = [(step["peak_bytes"] - budget, step["step"]) for step in steps]
    missed = [(step["peak_bytes"] - step["predicted_bytes"], step["step"]) for step in steps]
    damping = [(linear.get("damping", 0), linear["name"]) for linear in linears]
    warnings = [
        _warning("steps peaked above the budget", over, format_bytes),
        _warning("steps peaked above their prediction", missed, format_bytes),
        _warning("linears needed damping (of a moment's mean)", damping, "{:.2g}".format),
    ]
    items = [_tag("li", _text(warning), class_="warning") for warning in warnings if warning]
    items += [_tag("li", _text(note)) for note in notes]
    return _section("Notes and warnings", "" if items else "None.", _tag("ul", *items))


def _warning(what: str, amounts: Sequence[tuple[float, str]], form: Callable[[float], str]) -> str:
    """How many amounts lie above zero, and the largest with its name; empty where none does."""
    above = [(amount, name) for amount, name in amounts if amount > 0]
    if not above:
        return ""
    most, name = max(above)
    return f"{len(above)} of {len(amounts)} {what}; most of all {name}, by {form(most)}."


def _left_table(left: Mapping[str, str]) -> _Html:
    """Modules that are as they were, by reason."""
    if not left:
        return _Html("")
    by_reason: dict[str, list[_Record]] = defaultdict(list)
    for name, reason in left.items():
        by_reason[reason].append({"name": name})
    rows = (
        (reason, ", ".join(f"{family} ({len(n)})" for family, n in _families(names).items()))
        for reason, names in by_reason.items()
    )
    title = f"{_counted(len(left), 'module')} left as they are"
    return _section(title, "", _table((), rows, "words"))


def _settings(title: str, settings: Mapping[str, Any]) -> _Html:
    rows = (
        (key, ", ".join(map(str, value)) if isinstance(value, list | tuple) else value)
        for key, value in settings.items()
        if value not in ("", [], ())
    )
    return _section(title.capitalize(), "", _table((), rows, "words"))
