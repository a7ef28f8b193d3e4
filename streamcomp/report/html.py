"""The report as one HTML file: tables and plots, no script, nothing fetched.

Text comes from anywhere: all markup is in ``templates/``, where every value is escaped.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from statistics import fmean
from typing import Any

import jinja2

from streamcomp.job.rows import LinearRow, MemoryFigures, Report, StepRow
from streamcomp.report.experts import experts_section
from streamcomp.report.health import Health, numerical_health
from streamcomp.report.linears import (
    block_of,
    families,
    health_section,
    linears_table,
    loss_plot,
    rank_map,
    refinement,
    span,
)
from streamcomp.report.section import Section, Table, counted
from streamcomp.report.steps import memory_plot, seconds_plot, speed
from streamcomp.report.summary import perplexity
from streamcomp.units import format_bytes, format_seconds

__all__ = ["html_report"]


def html_report(report: Report) -> str:
    """``streamcomp_report.html`` of a finished job."""
    health, budget = numerical_health(report), report.memory.budget_bytes
    sections = [
        _warnings(health, report.steps, budget),
        rank_map(report.linears, report.dense),
        loss_plot(report.linears, health),
        linears_table(report.linears, health),
        health_section(health),
        experts_section(report.linears),
        refinement(report.refined),
        memory_plot(report.steps, budget),
        seconds_plot(report.steps),
        speed(report),
        Section("Notes", "" if report.notes else "None.", items=report.notes),
        _left_table(report.left),
    ]
    page = _template().render(
        name=report.model.source,
        summary=_summary(report),
        figures=_figures(report),
        sections=[section for section in sections if section],
        settings=[
            _settings("Recipe", report.recipe),
            _settings("Levers", asdict(report.levers)),
            _settings("Versions", report.versions),
        ],
    )
    return page.encode("utf-8", "replace").decode()  # names come in any encoding


@cache
def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("streamcomp.report"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["fixed"] = "{:.2f}".format
    return environment.get_template("page.html")


def _summary(report: Report) -> str:
    recipe = report.recipe
    words = [
        f"{word} {recipe[word]}" for word in ("method", "form", "allocation") if word in recipe
    ]
    words += [word for word in ("update", "refine") if recipe.get(word)]
    blocks = len({block_of(linear.name) for linear in report.linears})
    linears = counted(len(report.linears), "linear")
    factored = f"{linears} factored in {counted(blocks, 'block')}"
    return " · ".join([f"{report.model.type or 'unknown'} model", *words, factored])


# -- key figures -------------------------------------------------------------------------


@dataclass(frozen=True)
class _Figure:
    title: str
    value: str
    more: str


def _figures(report: Report) -> list[_Figure]:
    """The row of key figures."""
    model, steps = report.model, report.steps
    asked = f"asked {report.asked:.1%}; " if report.asked is not None else ""
    whole = f"{model.model_ratio:.1%} of the whole model"
    linears = _change(model.linear_parameters, model.linear_parameters_kept, _large)
    parameters = _change(model.parameters, model.parameters_kept, _large)
    kept = f"{model.bytes_kept / model.bytes:.1%} of the original"
    windows = f", {report.windows} windows" if report.windows else ""
    return [
        _Figure("ratio reached", f"{model.ratio:.1%}", f"{asked}{whole}"),
        _Figure("parameters", parameters, f"in linears {linears}"),
        _Figure("bytes of weights", _change(model.bytes, model.bytes_kept, format_bytes), kept),
        *_sharing(report.linears),
        *_dense_perplexity(report),
        *_peaks(report.memory),
        _Figure("time", format_seconds(report.seconds), f"{counted(len(steps), 'step')}{windows}"),
    ]


def _peaks(memory: MemoryFigures) -> Iterable[_Figure]:
    """Peak, prediction and budget of the host's memory, and of the GPU's where there is one."""
    for title, *figures in (
        ("peak memory", memory.peak_bytes, memory.predicted_bytes, memory.budget_bytes),
        ("peak GPU memory", memory.device_peak_bytes, memory.device_predicted_bytes,
         memory.device_budget_bytes),
    ):  # fmt: skip
        told = [format_bytes(figure) for figure in figures if figure is not None]
        if len(told) == len(figures):
            yield _Figure(title, told[0], f"predicted {told[1]}, budget {told[2]}")


def _sharing(linears: Iterable[LinearRow]) -> Iterable[_Figure]:
    """Bits per weight of shared channels, as SWSC's paper counts them, and the clusters."""
    shared = [(row.bits_per_weight, row.spec) for row in linears if row.bits_per_weight is not None]
    if shared:
        axes = Counter(spec["axis"] for _, spec in shared)
        clusters = span(spec["clusters"] for _, spec in shared)
        told = " and ".join(f"{axis} ({count})" for axis, count in axes.most_common())
        bits = fmean(bits for bits, _ in shared)
        yield _Figure("bits per weight", f"{bits:.3g}", f"{clusters} clusters of {told}")


def _dense_perplexity(report: Report) -> Iterable[_Figure]:
    if report.nll is not None:
        told = "of the dense model on the calibration text"
        yield _Figure("perplexity before", f"{perplexity(report.nll):.4g}", told)


def _change(before: float, after: float, form: Callable[[float], str]) -> str:
    """Before -> after, with a line break only before the arrow."""
    first, second = (form(value).replace(" ", "\xa0") for value in (before, after))
    return f"{first} \N{RIGHTWARDS ARROW}\xa0{second}"


def _large(count: float) -> str:
    return f"{count / 1e6:.4g} M" if count < 1e9 else f"{count / 1e9:.4g} B"


# -- warnings, and the rest --------------------------------------------------------------


def _warnings(health: Health, steps: Sequence[StepRow], budget: int) -> Section | None:
    """Warnings about the job's numbers; None where there are none."""
    over = [(step.peak_bytes - budget, step.step) for step in steps]
    missed = [(step.peak_bytes - step.predicted_bytes, step.step) for step in steps]
    told = [
        _above("steps peaked above the budget", over),
        _above("steps peaked above their prediction", missed),
        *health.warnings(),
    ]
    told = [warning for warning in told if warning]
    return Section("Warnings", items=told, style="alarm") if told else None


def _above(what: str, amounts: Sequence[tuple[int, str]]) -> str:
    """How many amounts are above zero, and the largest with its name; empty where none is."""
    above = [(amount, name) for amount, name in amounts if amount > 0]
    if not above:
        return ""
    most, name = max(above)
    return f"{len(above)} of {len(amounts)} {what}; most of all {name}, by {format_bytes(most)}."


@dataclass(frozen=True)
class _Module:
    name: str


def _left_table(left: Mapping[str, str]) -> Section | None:
    """Modules that were not compressed, by reason."""
    if not left:
        return None
    by_reason: dict[str, list[_Module]] = defaultdict(list)
    for name, reason in left.items():
        by_reason[reason].append(_Module(name))
    rows = [
        (reason, ", ".join(f"{family} ({len(m)})" for family, m in families(modules).items()))
        for reason, modules in by_reason.items()
    ]
    return Section(
        f"{counted(len(left), 'module')} left as they are", tables=[Table((), rows, "words")]
    )


def _settings(title: str, settings: Mapping[str, Any]) -> Section:
    rows = [
        (key, ", ".join(map(str, value)) if isinstance(value, list | tuple) else value)
        for key, value in settings.items()
        if value not in ("", [], ())
    ]
    return Section(title, tables=[Table((), rows, "words")])
