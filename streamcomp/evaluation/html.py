"""The report as one HTML file: tables and plots, no script, nothing fetched."""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import pairwise
from statistics import fmean, median
from typing import Any

from streamcomp.evaluation.health import Health, loss_of, numerical_health
from streamcomp.evaluation.markup import (
    Html,
    counted,
    details,
    listing,
    percent,
    section,
    table,
    tag,
    text,
)
from streamcomp.evaluation.plots import (
    Axis,
    bar,
    block_labels,
    cell_map,
    centres,
    key,
    line,
    linear_axis,
    loss_axis,
    plot,
    step_plot,
)
from streamcomp.units import format_bytes, format_seconds

__all__ = ["html_report"]

_Record = Mapping[str, Any]  # a part of the report: one linear, one step, the recipe

# Distances between ticks of an axis.
_BYTES = [2.0**power for power in range(60)]
_SECONDS = [0.1, 0.2, 0.5, *(n * unit for unit in (1, 60, 3600) for n in (1, 2, 5, 10, 20, 30))]

_BUDGET_SHOWN = 4  # a budget that many times above all peaks would flatten the bars
_BIG_DOTS = 60  # in a line
_LEAST_LIMIT = 0.05  # seconds of a stage below which its share is noise
_COLORS = 7  # of lines; after that, the next dash
_DASHES = ["none", "7 4", "2 4", "9 3 2 3"]  # pixels on and off
_WORST = 10  # linears in the table of the worst
_SHADES = (0.1, 0.4, 0.7, 1.0)  # in the legend of the ranks
_DENSE = "var(--c4)"

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
.plot{display:grid;grid-template:15rem 1.4rem/4.6rem 1fr;grid-auto-rows:1.4rem}
.map{grid-template-columns:minmax(0,max-content) 1fr} .map rect{stroke:var(--card);stroke-width:1;
vector-effect:non-scaling-stroke} .rows{display:flex;flex-direction:column;padding-right:.6rem}
.rows span{flex:1;display:flex;align-items:center;justify-content:flex-end;line-height:1;
color:var(--dim);font-size:.8rem;white-space:nowrap}
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
.second :nth-child(2){text-align:left}
details{margin-top:.8rem} summary{cursor:pointer;color:var(--dim)}
h3{font-size:.95rem;margin:.9rem 0 .2rem} ul{margin:.4rem 0 0;padding-left:1.2rem}
.alarm{border-color:var(--c1)} .warning::marker{content:"\\26a0\\00a0 ";color:var(--c1)}
"""


def html_report(report: dict[str, Any]) -> str:
    """``streamcomp_report.html`` of a finished job, from what ``job_report`` returns."""
    linears, steps = report.get("linears", []), report["steps"]
    budget, name = report["memory"]["budget_bytes"], report["model"]["source"]
    health = numerical_health(report)
    settings = (_settings(kind, report.get(kind, {})) for kind in ("recipe", "levers", "versions"))
    body = [
        tag("h1", text(f"{name}, compressed")),
        tag("p", text(_summary(report, linears)), class_="dim"),
        _figures(report),
        _warnings(health, steps, budget),
        _ranks(linears, report.get("dense", [])),
        _loss_plot(linears, health),
        _linears_table(linears, health),
        _health(health),
        _refinement(report.get("refined", [])),
        _memory_plot(steps, budget),
        _seconds_plot(steps),
        _roofline(report),
        _notes(report),
        _left_table(report.get("left", {})),
        tag("div", *settings, class_="columns"),
    ]
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width,initial-scale=1">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; style-src 'unsafe-inline'">
<title>{text(name)}: streamcomp report</title>
<style>{_STYLE}</style></head>
<body>{tag("main", *body)}</body></html>
"""


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


def _by_block(linears: Iterable[_Record]) -> dict[int, list[_Record]]:
    found: dict[int, list[_Record]] = defaultdict(list)
    for linear in linears:
        found[_block(linear["name"])].append(linear)
    return dict(sorted(found.items()))


def _losses(linears: Iterable[_Record]) -> list[tuple[float, str]]:
    """The losses that are numbers, and whose they are."""
    losses = [(linear.get("relative_loss", math.nan), linear["name"]) for linear in linears]
    return [(loss, name) for loss, name in losses if math.isfinite(loss)]


def _summary(report: _Record, linears: Sequence[_Record]) -> str:
    recipe = report.get("recipe", {})
    words = [
        f"{word} {recipe[word]}" for word in ("method", "form", "allocation") if word in recipe
    ]
    words += [word for word in ("update", "refine") if recipe.get(word)]
    blocks = len({_block(linear["name"]) for linear in linears})
    factored = f"{counted(len(linears), 'linear')} factored in {counted(blocks, 'block')}"
    return " · ".join([f"{report['model'].get('type') or 'unknown'} model", *words, factored])


def _figures(report: _Record) -> Html:
    """The row of key figures."""
    model, memory, steps = report["model"], report["memory"], report["steps"]
    asked = f"asked {report['asked']:.1%}; " if "asked" in report else ""
    whole = f"{model['model_ratio']:.1%} of the whole model"
    kept = f"{model['bytes_kept'] / model['bytes']:.1%} of the original"
    linears = _change(model, "linear_parameters", _large)
    windows = f", {report['windows']} windows" if "windows" in report else ""
    figures = [
        ("ratio reached", f"{model['ratio']:.1%}", f"{asked}{whole}"),
        ("parameters", _change(model, "parameters", _large), f"in linears {linears}"),
        ("bytes of weights", _change(model, "bytes", format_bytes), kept),
        *_sharing(report.get("linears", [])),
        *_dense_perplexity(steps),
        *_peaks(memory),
        ("time", format_seconds(report["seconds"]), f"{counted(len(steps), 'step')}{windows}"),
    ]
    cards = (
        tag("div", text(what), tag("b", text(value)), tag("span", text(more), class_="dim"))
        for what, value, more in figures
    )
    return tag("div", *cards, class_="cards")


def _peaks(memory: Mapping[str, int]) -> list[tuple[str, str, str]]:
    """Peak, prediction and budget of the host's memory, and of the GPU's where there is one."""
    found = []
    for what, prefix in (("peak memory", ""), ("peak GPU memory", "device_")):
        if f"{prefix}budget_bytes" in memory:
            peak, predicted, budget = (
                format_bytes(memory[f"{prefix}{which}_bytes"])
                for which in ("peak", "predicted", "budget")
            )
            found.append((what, peak, f"predicted {predicted}, budget {budget}"))
    return found


def _sharing(linears: Iterable[_Record]) -> list[tuple[str, str, str]]:
    """Bits per weight of shared channels, as SWSC's paper counts them, and the clusters."""
    shared = [linear for linear in linears if "bits_per_weight" in linear]
    if not shared:
        return []
    axes = Counter(linear["spec"]["axis"] for linear in shared)
    clusters = _span(linear["spec"]["clusters"] for linear in shared)
    what = " and ".join(f"{axis} ({count})" for axis, count in axes.most_common())
    bits = fmean(linear["bits_per_weight"] for linear in shared)
    return [("bits per weight", f"{bits:.3g}", f"{clusters} clusters of {what}")]


def _dense_perplexity(steps: Iterable[_Record]) -> list[tuple[str, str, str]]:
    nll = next((step["nll"] for step in steps if "nll" in step), None)
    if nll is None:
        return []
    perplexity = f"{math.exp(min(nll, 700)):.4g}"
    return [("perplexity before", perplexity, "of the dense model on the calibration text")]


def _change(values: _Record, name: str, form: Callable[[float], str]) -> str:
    """Before -> after, which may only break before the arrow."""
    before, after = (form(values[n]).replace(" ", "\xa0") for n in (name, f"{name}_kept"))
    return f"{before} \N{RIGHTWARDS ARROW}\xa0{after}"


def _large(count: float) -> str:
    return f"{count / 1e6:.4g} M" if count < 1e9 else f"{count / 1e9:.4g} B"


def _span(numbers: Iterable[int]) -> str:
    """``4`` or ``4–9``."""
    found = sorted(set(numbers))
    return "–".join(str(number) for number in sorted({*found[:1], *found[-1:]}))


def _runs(numbers: Iterable[int]) -> str:
    """``0, 3–7``: neighbours as one."""
    found = sorted(set(numbers))
    starts = [found[0], *(b for a, b in pairwise(found) if b > a + 1)]
    stops = [*(a for a, b in pairwise(found) if b > a + 1), found[-1]]
    return ", ".join(_span(pair) for pair in zip(starts, stops, strict=True))


# -- warnings and notes ------------------------------------------------------------------


def _warnings(health: Health, steps: Sequence[_Record], budget: float) -> Html:
    """What in the job's numbers deserves a second look; nothing where all is well."""
    over = [(step["peak_bytes"] - budget, step["step"]) for step in steps]
    missed = [(step["peak_bytes"] - step["predicted_bytes"], step["step"]) for step in steps]
    found = [
        _above("steps peaked above the budget", over),
        _above("steps peaked above their prediction", missed),
        *health.warnings(),
    ]
    found = [warning for warning in found if warning]
    if not found:
        return Html("")
    return tag("section", tag("h2", text("Warnings")), listing(found, "warning"), class_="alarm")


def _above(what: str, amounts: Sequence[tuple[float, str]]) -> str:
    """How many bytes lie above zero, and the most with their name; empty where none does."""
    above = [(amount, name) for amount, name in amounts if amount > 0]
    if not above:
        return ""
    most, name = max(above)
    return f"{len(above)} of {len(amounts)} {what}; most of all {name}, by {format_bytes(most)}."


def _notes(report: _Record) -> Html:
    """What the job said."""
    notes = report.get("notes", [])
    return section("Notes", "" if notes else "None.", listing(notes))


# -- linears -----------------------------------------------------------------------------


def _ranks(linears: Sequence[_Record], dense: Sequence[_Record]) -> Html:
    """The share of the full rank that each linear keeps, as a map of families and blocks."""
    ranked = [linear for linear in linears if linear.get("rank") is not None]
    if not ranked:
        return Html("")
    kept = {linear["name"]: linear for linear in dense}
    families = _families([*ranked, *dense])
    places, below = block_labels([*_by_block([*ranked, *dense])])
    marks, width, height = [], 100 / len(places), 100 / len(families)
    for number, members in enumerate(families.values()):
        for block, found in _by_block(members).items():
            share = fmean(1.0 if m["name"] in kept else _rank_share(m) for m in found)
            whole = all(member["name"] in kept for member in found)
            color, opacity = (_DENSE, 1.0) if whole else ("var(--c0)", _shade(share))
            ends = (number + 1) * height, number * height
            tip = f"{found[0]['name']}{_others(len(found))}: {_rank_told(found[0], whole, share)}"
            marks.append(bar(places[block], width, *ends, color, tip, opacity))
    keys = [key(percent(share), "var(--c0)", 10, opacity=_shade(share)) for share in _SHADES]
    what = "Rank as a share of the full one, the smaller side of the linear"
    if dense:
        keys.append(key("stays dense", _DENSE, 10))
        what += f"; {counted(len(dense), 'linear')} that could be factored "
        what += f"{'stays' if len(dense) == 1 else 'stay'} dense"
    rows = [
        (family, _runs(_block(member["name"]) for member in members))
        for family, members in _families(dense).items()
    ]
    named = [details("which stay dense", table(("family", "in blocks"), rows, "words"))]
    shown = cell_map(keys, list(families), marks, below)
    return section("Ranks", f"{what}.", shown, *(named if dense else []))


def _rank_share(linear: _Record) -> float:
    share: float = linear["rank"] / min(linear["rows"], linear["columns"])
    return share


def _rank_told(linear: _Record, whole: bool, share: float) -> str:
    sides = f"{linear['rows']} × {linear['columns']}"
    return f"dense, {sides}" if whole else f"rank {linear['rank']} of {sides}, {percent(share)}"


def _shade(share: float) -> float:
    """Opacity of a cell: one of rank 1 is still seen."""
    return 0.08 + 0.92 * share


def _others(count: int) -> str:
    return f" and {count - 1} more, on average" if count > 1 else ""


def _loss_plot(linears: Sequence[_Record], health: Health) -> Html:
    losses = _losses(linears)
    if not losses:
        return Html("")
    axis = loss_axis([loss for loss, _ in losses])
    places, below = block_labels(sorted({_block(name) for _, name in losses}))
    marks, keys = [], []
    for number, (family, members) in enumerate(_families(linears).items()):
        dash = _DASHES[number // _COLORS % len(_DASHES)]
        color = f"var(--c{number % _COLORS})"
        keys.append(key(family, color, 3, dash))
        marks += _family_line(members, axis, places, color, dash)
    what = "Share of the energy of a linear's outputs that its factors miss on the calibration text"
    if health.total_loss is not None:
        what += ", weighted by what an error there does to the model's loss"
    what += ", log scale with zeros on its floor." if axis.log else "."
    return section("Loss", what, plot(axis, keys, marks, below, "block"))


def _family_line(
    linears: Sequence[_Record], axis: Axis, places: Mapping[int, float], color: str, dash: str
) -> list[Html]:
    """A line through the mean loss of each block, and dots that tell the numbers."""
    found = {block: losses for block, m in _by_block(linears).items() if (losses := _losses(m))}
    stride = min((b - a for a, b in pairwise(found)), default=0)  # hybrids have gaps everywhere
    path, dots, size, before = "", [], 6 if len(places) <= _BIG_DOTS else 4, -math.inf
    for block, losses in found.items():
        mean = fmean(loss for loss, _ in losses)
        point = f"{places[block]:.2f} {axis(mean):.2f}"
        path += f"{'L' if block - before <= stride else 'M'}{point}"
        before = block
        tip = f"{losses[0][1]}{_others(len(losses))}: {percent(mean)}"
        dots.append(line(f"M{point}h0", color, size, tip))
    return [line(path, color, 2, dash=dash), *dots] if dots else []


def _linears_table(linears: Sequence[_Record], health: Health) -> Html:
    head = ["family", "count", "outputs × inputs", "rank", "mean loss", "max loss"]
    head += [*_health_head(health)]
    rows = [
        (
            family,
            len(members),
            ", ".join(
                f"{m} × {n}" for m, n in sorted({(m["rows"], m["columns"]) for m in members})
            ),
            _rank_span(members),
            _mean_loss(members),
            _max_loss(members),
            *_health_cells(members, health),
        )
        for family, members in _families(linears).items()
    ]
    return section(f"{counted(len(linears), 'linear')} factored", "", table(head, rows))


def _health(health: Health) -> Html:
    """Counts, the worst linears, and every family in every block."""
    if not health.linears:
        return Html("")
    counts = [
        (len(health.fallbacks), "took a fallback"),
        (len(health.damped), "needed far more damping than was asked for"),
        (len(health.singular), "had a singular moment"),
    ]
    total = len(health.linears)
    told = "; ".join(f"{count or 'none'} {what}" for count, what in counts)
    explanation = (
        f"Of {counted(total, 'linear')} {told}. Condition: largest over smallest eigenvalue of the "
        "moment that was decomposed. Damping: what was added to a moment, in shares of its mean."
    )
    head = ["rank", "relative loss", *_health_head(health), "fallback"]
    worst = [(linear["name"], *_one_row([linear], health)) for linear in health.worst(_WORST)]
    families = _families(health.linears)
    of_family = {family: _by_block(members) for family, members in families.items()}
    rows = [
        (block, family, *_one_row(of_family[family][block], health))
        for block in _by_block(health.linears)
        for family in families
        if block in of_family[family]
    ]
    every = details(
        "every linear by block and family", table(["block", "family", *head], rows, "second")
    )
    shown = tag("h3", text("The worst")), table(["linear", *head], worst)
    return section("Numerical health", explanation, *shown, every)


def _one_row(members: Sequence[_Record], health: Health) -> list[str]:
    """One linear, or the experts of one block."""
    fallbacks = sorted({m["fallback"] for m in members if m.get("fallback")})
    cells = [_rank_span(members), _mean_loss(members), *_health_cells(members, health)]
    return [*cells, ", ".join(fallbacks) or "–"]


def _health_head(health: Health) -> list[str]:
    share = ["share of all loss"] if health.total_loss else []
    return ["loss", *share, "condition", "damping"]


def _health_cells(members: Sequence[_Record], health: Health) -> list[str]:
    """Loss summed, with its share where losses compare; the worst condition; the most damping."""
    loss = math.fsum(map(loss_of, members)) if any("loss" in m for m in members) else math.nan
    cells = [f"{loss:.3g}" if math.isfinite(loss) else "–"]
    if health.total_loss:
        cells.append(percent(loss / health.total_loss) if math.isfinite(loss) else "–")
    names = {linear["name"] for linear in health.singular}
    singular = sum(member["name"] in names for member in members)
    known = [c for m in members if isinstance(c := m.get("condition"), int | float)]
    condition = f"{max(known):.1e}" if known else "–"
    if singular:
        condition = "singular" if len(members) == 1 else f"{singular} singular"
    return [*cells, condition, f"{max(member.get('damping', 0) for member in members):.2g}"]


def _rank_span(members: Iterable[_Record]) -> str:
    return _span(member["rank"] for member in members if member.get("rank") is not None)


def _mean_loss(members: Iterable[_Record]) -> str:
    losses = _losses(members)
    return percent(fmean(loss for loss, _ in losses)) if losses else "–"


def _max_loss(members: Iterable[_Record]) -> str:
    worst, name = max(_losses(members), default=(math.nan, ""))
    return f"{percent(worst)} in block {_block(name)}" if name else "–"


def _refinement(refined: Sequence[_Record]) -> Html:
    """The held-out loss of each block before and after its factors were trained together."""
    if not refined:
        return Html("")
    axis = loss_axis([item[when] for item in refined for when in ("before", "after")])
    places, below = block_labels([item["block"] for item in refined])
    marks, rows, size = [], [], 8 if len(places) <= _BIG_DOTS else 5
    for item in refined:
        at, before, after = places[item["block"]], axis(item["before"]), axis(item["after"])
        gain = 1 - item["after"] / item["before"] if item["before"] > 0 else 0.0
        told = f"{percent(item['before'])} \N{RIGHTWARDS ARROW} {percent(item['after'])}"
        tip = f"block {item['block']}: {told}, {counted(item['steps'], 'step')} kept"
        marks.append(line(f"M{at:.2f} {before:.2f}V{after:.2f}", "var(--c7)", 2, tip))
        marks.append(line(f"M{at:.2f} {before:.2f}h0", "var(--c1)", size, tip))
        marks.append(line(f"M{at:.2f} {after:.2f}h0", "var(--c0)", size, tip))
        steps = item["steps"] or "0, the closed form"
        rows.append((item["block"], told, f"{percent(gain)} less", steps))
    better = sum(item["after"] < item["before"] for item in refined)
    medians = [median(item[when] for item in refined) for when in ("before", "after")]
    others = "" if better == len(refined) else " The others stay as they were."
    what = (
        f"Relative error of a block's outputs on windows held out from the training: {better} of "
        f"{counted(len(refined), 'block')} improved, the median went from {percent(medians[0])} "
        f"to {percent(medians[1])}.{others}"
    )
    keys = key("closed form", "var(--c1)", 8), key("refined", "var(--c0)", 8)
    head = ("block", "held-out loss", "gain", "steps kept")
    every = details("every block", table(head, rows))
    return section("Refinement", what, plot(axis, keys, marks, below, "block"), every)


# -- steps -------------------------------------------------------------------------------


def _memory_plot(steps: Sequence[_Record], budget: float) -> Html:
    high = max(max(step["peak_bytes"], step["predicted_bytes"]) for step in steps)
    shown = budget <= _BUDGET_SHOWN * high
    axis = linear_axis(max(high, budget) if shown else high, _BYTES, format_bytes)
    slot, marks = 100 / len(steps), []
    for step, centre in zip(steps, centres(len(steps)), strict=True):
        peak, predicted = step["peak_bytes"], step["predicted_bytes"]
        tip = f"{step['step']}: {format_bytes(peak)}, predicted {format_bytes(predicted)}"
        path = f"M{centre - slot / 2:.2f} {axis(predicted):.2f}h{slot:.2f}"
        marks.append(bar(centre, 0.8 * slot, 100, axis(peak), "var(--c5)", tip))
        marks.append(line(path, "var(--c1)", 2.5, tip))
    if shown:
        marks.append(line(f"M0 {axis(budget):.2f}h100", "var(--ink)", 2, "budget", "6 4"))
    limit = f"budget {format_bytes(budget)}{'' if shown else ', above the plot'}"
    keys = (
        key("measured peak", "var(--c5)", 10),
        key("predicted peak", "var(--c1)", 2.5),
        key(limit, "var(--ink)", 2, "6 4"),
    )
    plot = step_plot(axis, keys, marks, [step["step"] for step in steps])
    return section("Memory", "Resident memory of the process at its peak.", plot)


def _seconds_plot(steps: Sequence[_Record]) -> Html:
    totals: Counter[str] = Counter()
    for step in steps:
        totals.update(step["stages"])
    stages = [stage for stage, _ in totals.most_common()]  # the longest lie at the bottom
    colors = {stage: f"var(--c{min(number, _COLORS)})" for number, stage in enumerate(stages)}
    longest = max(sum(step["stages"].values()) for step in steps)
    axis, marks = linear_axis(longest, _SECONDS, format_seconds), []
    for step, centre in zip(steps, centres(len(steps)), strict=True):
        below = 0.0
        for stage in sorted(step["stages"], key=stages.index):
            above = below + step["stages"][stage]
            tip = f"{step['step']}, {stage}: {format_seconds(above - below)}"
            ends = axis(below), axis(above)
            marks.append(bar(centre, 80 / len(steps), *ends, colors[stage], tip))
            below = above
    keys = (key(f"{s} {format_seconds(totals[s])}", colors[s], 10) for s in stages)
    plot = step_plot(axis, keys, marks, [step["step"] for step in steps])
    return section("Time", "Spent in the stages of each step.", plot)


def _roofline(report: _Record) -> Html:
    """Stages against what the machine can do; nothing where the journal is of an older version."""
    stages, limits, rates = (report.get(key, {}) for key in ("stages", "limits", "rates"))
    counted_ones = [name for name in stages if limits.get(name, 0.0) >= _LEAST_LIMIT]
    if not counted_ones or not rates:
        return Html("")
    rows = [
        (name, format_seconds(stages[name]), format_seconds(limits[name]),
         percent(limits[name] / stages[name]) if stages[name] else "")
        for name in sorted(counted_ones, key=lambda name: -stages[name])
    ]  # fmt: skip
    told = ", ".join(
        f"{rates[key] / 1e9:.3g} {unit}"
        for key, unit in (
            ("model_flops", "GFLOP/s in the model's dtype"),
            ("moment_flops", "for moments"),
            ("solve_flops", "in that of factors"),
            ("wide_flops", "in fp64"),
            ("small_eigh_flops", "for eigenvectors in fp64, counted as 9 n^3"),
            ("eigh_flops", "for those of large matrices"),
            ("disk_bytes", "GB/s to disk"),
        )
        if key in rates
    )
    explanation = (
        f"Operations and bytes as the plan counts them, at rates measured as the job began: {told}."
        " Rates of small matrices: a stage of large ones may come out above 100%."
    )
    head = ("stage", "took", "at these rates", "share")
    return section("Speed", explanation, table(head, rows))


# -- the rest ----------------------------------------------------------------------------


def _left_table(left: Mapping[str, str]) -> Html:
    """Modules that are as they were, by reason."""
    if not left:
        return Html("")
    by_reason: dict[str, list[_Record]] = defaultdict(list)
    for name, reason in left.items():
        by_reason[reason].append({"name": name})
    rows = (
        (reason, ", ".join(f"{family} ({len(n)})" for family, n in _families(names).items()))
        for reason, names in by_reason.items()
    )
    title = f"{counted(len(left), 'module')} left as they are"
    return section(title, "", table((), rows, "words"))


def _settings(title: str, settings: Mapping[str, Any]) -> Html:
    rows = (
        (key, ", ".join(map(str, value)) if isinstance(value, list | tuple) else value)
        for key, value in settings.items()
        if value not in ("", [], ())
    )
    return section(title.capitalize(), "", table((), rows, "words"))
