"""Sections of the page on linears: ranks, losses, numerical health, refinement."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from statistics import fmean, median
from typing import Protocol, TypeVar

from streamcomp.job.rows import DenseRow, LinearRow, RefinedBlock
from streamcomp.report.health import Health, loss_of
from streamcomp.report.plots import (
    Axis,
    CellMap,
    Key,
    Line,
    Plot,
    bar,
    block_labels,
    loss_axis,
    percent,
)
from streamcomp.report.section import Section, Table, counted

__all__ = [
    "block_of",
    "families",
    "health_section",
    "linears_table",
    "loss_plot",
    "rank_map",
    "refinement",
    "span",
]

_BIG_DOTS = 60  # in a line
_COLORS = 7  # of lines; after that, the next dash
_DASHES = ["none", "7 4", "2 4", "9 3 2 3"]  # pixels on and off
_WORST = 10  # linears in the table of the worst
_SHADES = (0.1, 0.4, 0.7, 1.0)  # in the legend of the ranks
_DENSE = "var(--c4)"


class _Named(Protocol):
    @property
    def name(self) -> str: ...


N = TypeVar("N", bound=_Named)


def block_of(name: str) -> int:
    """Number of the block that a linear is in: the first in its name."""
    number = re.search(r"\b\d{1,9}\b", name)
    return int(number[0]) if number else 0


def families(linears: Iterable[N]) -> dict[str, list[N]]:
    """Linears by their name within a block, with ``*`` for the numbers of experts."""
    patterns: dict[str, list[N]] = defaultdict(list)
    for linear in linears:
        patterns[re.sub(r"\b\d+\b", "*", linear.name)].append(linear)
    one_stack = len({pattern.partition("*.")[0] for pattern in patterns}) == 1
    return {
        (p.partition("*.")[2] if one_stack else "") or p: members for p, members in patterns.items()
    }


def _by_block(linears: Iterable[N]) -> dict[int, list[N]]:
    blocks: dict[int, list[N]] = defaultdict(list)
    for linear in linears:
        blocks[block_of(linear.name)].append(linear)
    return dict(sorted(blocks.items()))


def _losses(linears: Iterable[LinearRow]) -> list[tuple[float, str]]:
    """The losses that are finite, and their linears."""
    return [(row.relative_loss, row.name) for row in linears if math.isfinite(row.relative_loss)]


def span(numbers: Iterable[int]) -> str:
    """``4`` or ``4–9``."""
    ordered = sorted(set(numbers))
    return "–".join(str(number) for number in sorted({*ordered[:1], *ordered[-1:]}))


def _runs(numbers: Iterable[int]) -> str:
    """``0, 3–7``: neighbours as one."""
    ordered = sorted(set(numbers))
    starts = [ordered[0], *(b for a, b in pairwise(ordered) if b > a + 1)]
    stops = [*(a for a, b in pairwise(ordered) if b > a + 1), ordered[-1]]
    return ", ".join(span(pair) for pair in zip(starts, stops, strict=True))


# -- ranks -------------------------------------------------------------------------------


def rank_map(linears: Sequence[LinearRow], dense: Sequence[DenseRow]) -> Section | None:
    """The share of the full rank that each linear keeps, as a map of families and blocks."""
    if not linears:
        return None
    both: list[LinearRow | DenseRow] = [*linears, *dense]
    rows, (places, below) = families(both), block_labels([*_by_block(both)])
    marks, width, height = [], 100 / len(places), 100 / len(rows)
    for number, members in enumerate(rows.values()):
        for block, cell in _by_block(members).items():
            share = fmean(map(_rank_share, cell))
            whole = all(isinstance(member, DenseRow) for member in cell)
            color, opacity = (_DENSE, 1.0) if whole else ("var(--c0)", _shade(share))
            ends = (number + 1) * height, number * height
            tip = f"{cell[0].name}{_others(len(cell))}: {_rank_told(cell[0], whole, share)}"
            marks.append(bar(places[block], width, *ends, color, tip, opacity))
    keys = [Key(percent(share), "var(--c0)", 10, opacity=_shade(share)) for share in _SHADES]
    told = "Rank as a share of the full one, the smaller side of the linear"
    tables = []
    if dense:
        keys.append(Key("stays dense", _DENSE, 10))
        told += f"; {counted(len(dense), 'linear')} that could be factored "
        told += f"{'stays' if len(dense) == 1 else 'stay'} dense"
        blocks = [
            (family, _runs(block_of(member.name) for member in members))
            for family, members in families(dense).items()
        ]
        tables = [Table(("family", "in blocks"), blocks, "words", summary="which stay dense")]
    cells = CellMap(keys, list(rows), marks, below)
    return Section("Ranks", f"{told}.", cells=cells, tables=tables)


def _rank_share(linear: LinearRow | DenseRow) -> float:
    """Share of the full rank; 1 where it stays dense."""
    full = min(linear.rows, linear.columns)
    return linear.rank / full if isinstance(linear, LinearRow) else 1.0


def _rank_told(linear: LinearRow | DenseRow, whole: bool, share: float) -> str:
    sides = f"{linear.rows} × {linear.columns}"
    rank = linear.rank if isinstance(linear, LinearRow) else "full"
    return f"dense, {sides}" if whole else f"rank {rank} of {sides}, {percent(share)}"


def _shade(share: float) -> float:
    """Opacity of a cell; rank 1 is still visible."""
    return 0.08 + 0.92 * share


def _others(count: int) -> str:
    return f" and {count - 1} more, on average" if count > 1 else ""


# -- losses ------------------------------------------------------------------------------


def loss_plot(linears: Sequence[LinearRow], health: Health) -> Section | None:
    losses = _losses(linears)
    if not losses:
        return None
    axis = loss_axis([loss for loss, _ in losses])
    places, below = block_labels(sorted({block_of(name) for _, name in losses}))
    marks, keys = [], []
    for number, (family, members) in enumerate(families(linears).items()):
        dash = _DASHES[number // _COLORS % len(_DASHES)]
        color = f"var(--c{number % _COLORS})"
        keys.append(Key(family, color, 3, dash))
        marks += _family_line(members, axis, places, color, dash)
    told = "Share of the energy of a linear's outputs that its factors miss on the calibration text"
    if health.total_loss is not None:
        told += ", weighted by what an error there does to the model's loss"
    told += ", log scale with zeros on its floor." if axis.log else "."
    return Section("Loss", told, Plot(axis, keys, marks, below, "block"))


def _family_line(
    linears: Sequence[LinearRow], axis: Axis, places: Mapping[int, float], color: str, dash: str
) -> list[Line]:
    """A line through the mean loss of each block, with dots that show the numbers."""
    blocks = {block: losses for block, m in _by_block(linears).items() if (losses := _losses(m))}
    stride = min((b - a for a, b in pairwise(blocks)), default=0)  # hybrids have gaps everywhere
    path, dots, size, before = "", [], 6 if len(places) <= _BIG_DOTS else 4, -math.inf
    for block, losses in blocks.items():
        mean = fmean(loss for loss, _ in losses)
        point = f"{places[block]:.2f} {axis(mean):.2f}"
        path += f"{'L' if block - before <= stride else 'M'}{point}"
        before = block
        tip = f"{losses[0][1]}{_others(len(losses))}: {percent(mean)}"
        dots.append(Line(f"M{point}h0", color, size, tip))
    return [Line(path, color, 2, dash=dash), *dots] if dots else []


def linears_table(linears: Sequence[LinearRow], health: Health) -> Section:
    head = ["family", "count", "outputs × inputs", "rank", "mean loss", "max loss"]
    rows = [
        (
            family,
            len(members),
            ", ".join(f"{m} × {n}" for m, n in sorted({(m.rows, m.columns) for m in members})),
            span(member.rank for member in members),
            _mean_loss(members),
            _max_loss(members),
            *_health_cells(members, health),
        )
        for family, members in families(linears).items()
    ]
    title = f"{counted(len(linears), 'linear')} factored"
    return Section(title, tables=[Table([*head, *_health_head(health)], rows)])


# -- numerical health --------------------------------------------------------------------


def health_section(health: Health) -> Section | None:
    """Counts, the worst linears, and every family in every block."""
    if not health.linears:
        return None
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
    worst = [(linear.name, *_one_row([linear], health)) for linear in health.worst(_WORST)]
    blocks = {family: _by_block(members) for family, members in families(health.linears).items()}
    rows = [
        (block, family, *_one_row(members[block], health))
        for block in _by_block(health.linears)
        for family, members in blocks.items()
        if block in members
    ]
    tables = [
        Table(["linear", *head], worst, title="The worst"),
        Table(["block", "family", *head], rows, "second", "every linear by block and family"),
    ]
    return Section("Numerical health", explanation, tables=tables)


def _one_row(members: Sequence[LinearRow], health: Health) -> list[str]:
    """One linear, or the experts of one block."""
    fallbacks = sorted({member.fallback for member in members if member.fallback})
    ranks = span(member.rank for member in members)
    cells = [ranks, _mean_loss(members), *_health_cells(members, health)]
    return [*cells, ", ".join(fallbacks) or "–"]


def _health_head(health: Health) -> list[str]:
    share = ["share of all loss"] if health.total_loss else []
    return ["loss", *share, "condition", "damping"]


def _health_cells(members: Sequence[LinearRow], health: Health) -> list[str]:
    """Loss summed, with its share where losses compare; the worst condition; the most damping."""
    has_loss = any(member.loss is not None for member in members)
    loss = math.fsum(map(loss_of, members)) if has_loss else math.nan
    cells = [f"{loss:.3g}" if math.isfinite(loss) else "–"]
    if health.total_loss:
        cells.append(percent(loss / health.total_loss) if math.isfinite(loss) else "–")
    names = {linear.name for linear in health.singular}
    singular = sum(member.name in names for member in members)
    conditions = [member.condition for member in members if member.condition is not None]
    condition = f"{max(conditions):.1e}" if conditions else "–"
    if singular:
        condition = "singular" if len(members) == 1 else f"{singular} singular"
    return [*cells, condition, f"{max(member.damping for member in members):.2g}"]


def _mean_loss(members: Iterable[LinearRow]) -> str:
    losses = _losses(members)
    return percent(fmean(loss for loss, _ in losses)) if losses else "–"


def _max_loss(members: Iterable[LinearRow]) -> str:
    worst, name = max(_losses(members), default=(math.nan, ""))
    return f"{percent(worst)} in block {block_of(name)}" if name else "–"


# -- refinement --------------------------------------------------------------------------


def refinement(refined: Sequence[RefinedBlock]) -> Section | None:
    """The held-out loss of each block before and after its factors were trained together."""
    if not refined:
        return None
    axis = loss_axis([loss for item in refined for loss in (item.before, item.after)])
    places, below = block_labels([item.block for item in refined])
    marks: list[Line] = []
    rows, size = [], 8 if len(places) <= _BIG_DOTS else 5
    for item in refined:
        at, before, after = places[item.block], axis(item.before), axis(item.after)
        gain = 1 - item.after / item.before if item.before > 0 else 0.0
        told = f"{percent(item.before)} \N{RIGHTWARDS ARROW} {percent(item.after)}"
        tip = f"block {item.block}: {told}, {counted(item.steps, 'step')} kept"
        marks.append(Line(f"M{at:.2f} {before:.2f}V{after:.2f}", "var(--c7)", 2, tip))
        marks.append(Line(f"M{at:.2f} {before:.2f}h0", "var(--c1)", size, tip))
        marks.append(Line(f"M{at:.2f} {after:.2f}h0", "var(--c0)", size, tip))
        steps = item.steps or "0, the closed form"
        rows.append((item.block, told, f"{percent(gain)} less", steps))
    better = sum(item.after < item.before for item in refined)
    before, after = (median(item.before for item in refined), median(i.after for i in refined))
    others = "" if better == len(refined) else " The others stay as they were."
    explanation = (
        f"Relative error of a block's outputs on windows held out from the training: {better} of "
        f"{counted(len(refined), 'block')} improved, the median went from {percent(before)} "
        f"to {percent(after)}.{others}"
    )
    keys = Key("closed form", "var(--c1)", 8), Key("refined", "var(--c0)", 8)
    head = ("block", "held-out loss", "gain", "steps kept")
    plot = Plot(axis, keys, marks, below, "block")
    tables = [Table(head, rows, summary="every block")]
    return Section("Refinement", explanation, plot, tables=tables)
