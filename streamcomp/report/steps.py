"""Sections of the page on steps: memory, time, and share of the machine's speed reached."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from streamcomp.job.rows import Report, StepRow
from streamcomp.report.plots import (
    Bar,
    Key,
    Line,
    bar,
    centres,
    linear_axis,
    percent,
    step_plot,
)
from streamcomp.report.section import Section, Table
from streamcomp.units import format_bytes, format_seconds

__all__ = ["memory_plot", "seconds_plot", "speed"]

# Distances between ticks of an axis.
_BYTES = [2.0**power for power in range(60)]
_SECONDS = [0.1, 0.2, 0.5, *(n * unit for unit in (1, 60, 3600) for n in (1, 2, 5, 10, 20, 30))]

_BUDGET_SHOWN = 4  # a budget that many times above all peaks would flatten the bars
_COLORS = 7  # of stages; the rest share the next
_LEAST_LIMIT = 0.05  # seconds of a stage below which its share is noise


def memory_plot(steps: Sequence[StepRow], budget: int) -> Section:
    high = max(max(step.peak_bytes, step.predicted_bytes) for step in steps)
    shown = budget <= _BUDGET_SHOWN * high
    axis = linear_axis(max(high, budget) if shown else high, _BYTES, format_bytes)
    slot = 100 / len(steps)
    marks: list[Bar | Line] = []
    for step, centre in zip(steps, centres(len(steps)), strict=True):
        peak, predicted = format_bytes(step.peak_bytes), format_bytes(step.predicted_bytes)
        tip = f"{step.step}: {peak}, predicted {predicted}"
        path = f"M{centre - slot / 2:.2f} {axis(step.predicted_bytes):.2f}h{slot:.2f}"
        marks.append(bar(centre, 0.8 * slot, 100, axis(step.peak_bytes), "var(--c5)", tip))
        marks.append(Line(path, "var(--c1)", 2.5, tip))
    if shown:
        marks.append(Line(f"M0 {axis(budget):.2f}h100", "var(--ink)", 2, "budget", "6 4"))
    limit = f"budget {format_bytes(budget)}{'' if shown else ', above the plot'}"
    keys = (
        Key("measured peak", "var(--c5)", 10),
        Key("predicted peak", "var(--c1)", 2.5),
        Key(limit, "var(--ink)", 2, "6 4"),
    )
    plot = step_plot(axis, keys, marks, [step.step for step in steps])
    return Section("Memory", "Resident memory of the process at its peak.", plot)


def seconds_plot(steps: Sequence[StepRow]) -> Section:
    totals: Counter[str] = Counter()
    for step in steps:
        totals.update(step.stages)
    stages = [stage for stage, _ in totals.most_common()]  # the longest are at the bottom
    colors = {stage: f"var(--c{min(number, _COLORS)})" for number, stage in enumerate(stages)}
    longest = max(sum(step.stages.values()) for step in steps)
    axis = linear_axis(longest, _SECONDS, format_seconds)
    marks = []
    for step, centre in zip(steps, centres(len(steps)), strict=True):
        below = 0.0
        for stage in sorted(step.stages, key=stages.index):
            above = below + step.stages[stage]
            tip = f"{step.step}, {stage}: {format_seconds(above - below)}"
            ends = axis(below), axis(above)
            marks.append(bar(centre, 80 / len(steps), *ends, colors[stage], tip))
            below = above
    keys = [Key(f"{s} {format_seconds(totals[s])}", colors[s], 10) for s in stages]
    plot = step_plot(axis, keys, marks, [step.step for step in steps])
    return Section("Time", "Spent in the stages of each step.", plot)


def speed(report: Report) -> Section | None:
    """Speed of stages as a share of the machine's; None where no stage took long enough."""
    stages, limits, rates = report.stages, report.limits, report.rates
    long_enough = [name for name in stages if limits.get(name, 0.0) >= _LEAST_LIMIT]
    if not long_enough:
        return None
    rows = [
        (name, format_seconds(stages[name]), format_seconds(limits[name]),
         percent(limits[name] / stages[name]) if stages[name] else "")
        for name in sorted(long_enough, key=lambda name: -stages[name])
    ]  # fmt: skip
    told = ", ".join(
        f"{rate / 1e9:.3g} {unit}"
        for rate, unit in (
            (rates.model_flops, "GFLOP/s in the model's dtype"),
            (rates.moment_flops, "for moments"),
            (rates.solve_flops, "in that of factors"),
            (rates.wide_flops, "in fp64"),
            (rates.small_eigh_flops, "for eigenvectors in fp64, counted as 9 n^3"),
            (rates.eigh_flops, "for those of large matrices"),
            (rates.disk_bytes, "GB/s to disk"),
        )
    )
    explanation = (
        f"Operations and bytes as the plan counts them, at rates measured as the job began: {told}."
        " Rates of small matrices: a stage of large ones may come out above 100%."
    )
    head = ("stage", "took", "at these rates", "share")
    return Section("Speed", explanation, tables=[Table(head, rows)])
