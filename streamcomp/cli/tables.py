"""Output of commands: tables for people, JSON for programs."""

from __future__ import annotations

import json
import math
from pathlib import Path
from statistics import fmean, median
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

import streamcomp
from streamcomp.terminal import OpenConsole
from streamcomp.units import format_bytes, format_seconds

if TYPE_CHECKING:
    from streamcomp.tools.inspect import Family, Inspection

__all__ = [
    "print_evaluation",
    "print_inspection",
    "print_json",
    "print_plan",
    "print_status",
    "print_summary",
    "print_verification",
]

# Stages of a job in its summary, the longest.
_STAGES_SHOWN = 3
# Columns, more than any table takes.
_UNBOUND = 10_000


def print_plan(model: str, made: streamcomp.Plan) -> None:
    table = Table("step", "peak RAM", "at", "time", "written", title=f"plan for {model}")
    for step in _merged(made.steps):
        table.add_row(
            step[0],
            format_bytes(step[1].peak_bytes),
            step[1].peak_phase,
            format_seconds(step[2]),
            format_bytes(step[3]),
        )
    console = _console()
    console.print(table)
    for note in made.notes:
        console.print(f"note: {note}", highlight=False, soft_wrap=True)
    _print_rows(
        console,
        {
            "peak RAM": f"{format_bytes(made.peak_bytes)} of {format_bytes(made.budget_bytes)}",
            "least budget": f"{format_bytes(made.minimum_bytes)} "
            f"(--max-ram {made.minimum_bytes // 2**20}M)",
            **_device_plan_rows(made),
            "time": f"about {format_seconds(made.seconds)}",
            "disk": f"{format_bytes(made.disk_bytes)} at most, {format_bytes(made.output_bytes)} "
            "of it the result",
            **_fetching_row(made),
            "at a time": _at_a_time(made),
            "linears": f"{len(made.outline.eligible)} eligible, ratio {made.ratio:.4f}, "
            f"{len(made.outline.left)} other modules left as they are",
            "in reach": f"{made.reach:.1%} of the model's parameters: the ratio takes "
            f"{made.reach * made.ratio:.1%} off them",
        },
    )


def _fetching_row(made: streamcomp.Plan) -> dict[str, str]:
    if not made.shard_bytes:
        return {}
    fetched, held = format_bytes(made.fetched_bytes), format_bytes(made.shard_bytes)
    return {"fetched": f"about {fetched} in all, {held} on disk at a time (counted above)"}


def _at_a_time(made: streamcomp.Plan) -> str:
    """The levers in words; other levers change rounding, and the speed only little."""
    levers, outline = made.levers, made.outline
    seq_len = outline.stream.seq_len
    parts = [f"{levers.batch} windows of {seq_len} tokens at a time"]
    if outline.method.needs_gradients:
        parts.append(f"{levers.reverse_batch} in reverse")
        parts.append(f"{levers.head_tokens} tokens in the head")
    if levers.feed_forward_tokens < seq_len:
        parts.append(f"{levers.feed_forward_tokens} in a feed-forward")
    times = {"passes": max(len(block.passes(levers)) for block in outline.blocks)}
    if outline.analysis:
        readings = (block.passes(levers, observed=False) for block in outline.blocks)
        times["readings"] = max(map(len, readings))
    parts += [f"{count} {what} of a block" for what, count in times.items() if count > 1]
    more = f" (+{format_seconds(made.levers_seconds)})" if made.levers_seconds else ""
    return ", ".join(parts) + more


def _device_plan_rows(made: streamcomp.Plan) -> dict[str, str]:
    if not made.device_budget_bytes:
        return {}
    peak, budget = format_bytes(made.device_peak_bytes), format_bytes(made.device_budget_bytes)
    least = f"{format_bytes(made.device_minimum_bytes)} "
    return {
        "peak GPU memory": f"{peak} of {budget}",
        "least of the GPU": least + f"(--max-vram {made.device_minimum_bytes // 2**20}M)",
    }


def _merged(steps: Any) -> list[tuple[str, Any, float, int]]:
    """One row for consecutive steps with equal needs: name, example, seconds, bytes written."""
    rows: list[list[Any]] = []
    for step in steps:
        last = rows[-1] if rows else None
        if last and _alike(last[1], step):
            last[2:] = [last[2] + step.seconds, last[3] + step.written_bytes, step.name]
            continue
        rows.append([step.name, step, step.seconds, step.written_bytes, step.name])
    return [
        (row[0] if row[0] == row[4] else f"{row[0]} to {row[4].split()[-1]}", *row[1:4])
        for row in rows
    ]


def _alike(one: Any, other: Any) -> bool:
    """Whether two steps do the same to two blocks, with the same needs."""
    same = (type(one.step), one.step.output, one.peak_bytes, one.peak_phase) == (
        type(other.step), other.step.output, other.peak_bytes, other.peak_phase
    )  # fmt: skip
    return same and one.step.block >= 0


def print_status(job: streamcomp.JobStatus) -> None:
    state = "finished" if job.finished else "unfinished: the same compress command continues it"
    _print_rows(
        _console(),
        {
            "state": state,
            "steps": f"{job.steps_done} of {job.steps_total}, last {job.last_step or 'none'}",
            "time": f"{format_seconds(job.seconds)} used, about "
            f"{format_seconds(job.seconds_left)} left",
            "peak RAM": format_bytes(job.peak_bytes),
            "recipe": ", ".join(f"{k}={v}" for k, v in job.recipe.items() if v not in ("", [])),
        },
    )


def print_verification(result: streamcomp.Verification) -> None:
    console = _console()
    lines = [("ok", line) for line in result.checked]
    lines += [("note", line) for line in result.notes]
    lines += [("damaged", line) for line in result.faults]
    for kind, line in lines:
        console.print(f"{kind}: {line}", highlight=False, soft_wrap=True)
    count = len(result.faults)
    state = f"is damaged, {count} fault{'s' if count > 1 else ''}" if count else "is whole"
    console.print(f"{result.out} {state}", highlight=False, soft_wrap=True)


def print_evaluation(run: streamcomp.Evaluation) -> None:
    _print_rows(
        _console(),
        {
            "perplexity": f"{run.perplexity:.3f}  ({run.nll:.4f} nats per token)",
            "text": f"{run.text}, {run.windows} windows of {run.seq_len} tokens",
            "parameters": f"{run.parameters:,} in {format_bytes(run.checkpoint_bytes)}",
            "peak RAM": f"{format_bytes(run.peak_bytes)} of {format_bytes(run.budget_bytes)} "
            f"(predicted {format_bytes(run.predicted_bytes)})",
            "time": format_seconds(run.seconds),
        },
    )


def print_inspection(model: str, inspection: Inspection) -> None:
    console = _console()
    console.print(_families_table(model, inspection, console))
    for name, (why, count) in inspection.left.items():
        console.print(f"left as it is: {name} ({why}), {count}x", highlight=False)
    size, decoded = format_bytes(inspection.nbytes), inspection.decoded_bytes
    more = "" if decoded == inspection.nbytes else f" (decoded: {format_bytes(decoded)})"
    reach = f"; {inspection.in_reach / inspection.parameters:.1%} of them can be factored"
    console.print(
        f"{inspection.parameters:,} parameters, {size} in {inspection.shards} shards{more}"
        f"{'' if inspection.compressed else reach}",
        highlight=False,
    )


def _families_table(model: str, inspection: Inspection, console: Console) -> Table:
    """The widest of the layouts that fits; a name is broken where none does."""
    tables = [_families_in(model, inspection, narrow) for narrow in range(4)]
    unbound = console.options.update(max_width=_UNBOUND)
    fits = (t for t in tables if console.measure(t, options=unbound).maximum <= console.width)
    return next(fits, tables[-1])


def _families_in(model: str, inspection: Inspection, narrow: int) -> Table:
    """Between two rules stand the linears that are fed the same tensor.

    ``narrow`` 1 breaks the form into lines, 2 also the name, 3 the form into words.
    """
    table = Table(
        Column("linear", overflow="fold"),
        *(Column(name, no_wrap=True) for name in ("shape", "count", "form, rank", "bytes")),
        title=f"{model}: {inspection.model_type}, {inspection.dtype}, {inspection.blocks} blocks",
        caption="between two rules: linears that are fed the same tensor",
    )
    by_input: dict[frozenset[str], list[Family]] = {}
    for family in inspection.families:
        by_input.setdefault(frozenset((family.name, *family.shares_with)), []).append(family)
    for families in by_input.values():
        table.add_section()
        for family in families:
            name, form = family.name, ("\n" if narrow else ", ").join(_form(family))
            name = ".\n".join(name.rsplit(".", 1)) if narrow >= 2 else name
            form = form.replace(" ", "\n") if narrow == 3 else form
            shape = f"{family.rows} x {family.columns}"
            table.add_row(name, shape, str(family.count), form, format_bytes(family.nbytes))
    return table


def _form(family: Family) -> list[str]:
    """``pivot 12-40``, and what channels share."""
    ranks = "" if family.ranks is None else f" {_span(family.ranks)}"
    if family.clusters is None:
        return [f"{family.form}{ranks}"]
    return [f"{family.form}{ranks}", f"{_span(family.clusters)} clusters"]


def _span(ends: tuple[int, int]) -> str:
    return "-".join(str(end) for end in sorted(set(ends)))


def _device_row(memory: dict[str, int]) -> dict[str, str]:
    """The line of the GPU's memory, where there is one."""
    if "device_budget_bytes" not in memory:
        return {}
    peak, predicted, budget = (
        format_bytes(memory[f"device_{which}_bytes"]) for which in ("peak", "predicted", "budget")
    )
    return {"peak GPU memory": f"{peak} measured, {predicted} predicted, {budget} allowed"}


def print_summary(out: Path, report: dict[str, Any]) -> None:
    from streamcomp.job.rows import Report
    from streamcomp.report.health import numerical_health

    model, memory = report["model"], report["memory"]
    longest = sorted(report["stages"].items(), key=lambda stage: -stage[1])[:_STAGES_SHOWN]
    stages = ", ".join(f"{name} {format_seconds(spent)}" for name, spent in longest if spent >= 0.1)
    rows = {
        "linear parameters": f"{model['linear_parameters']:,} -> "
        f"{model['linear_parameters_kept']:,}"
        f"  (ratio {model['ratio']:.4f})",
        "all parameters": f"{model['parameters']:,} -> {model['parameters_kept']:,}"
        f"  (ratio {model['model_ratio']:.4f})",
        "bytes on disk": f"{format_bytes(model['bytes'])} -> {format_bytes(model['bytes_kept'])}",
        "peak RAM": f"{format_bytes(memory['peak_bytes'])} measured, "
        f"{format_bytes(memory['predicted_bytes'])} predicted, "
        f"{format_bytes(memory['budget_bytes'])} allowed",
        **_device_row(memory),
        "time": format_seconds(report["seconds"]) + (f"  ({stages})" if stages else ""),
    }
    fetched = sum(sum(step.get("fetched", {}).values()) for step in report["steps"])
    if fetched:
        rows["fetched"] = format_bytes(fetched)
    rows |= _method_rows(report)
    if report["left"]:
        rows["left as it is"] = f"{len(report['left'])} modules, see {out}/streamcomp_report.json"
    console = _console()
    _print_rows(console, rows, title=str(out))
    for warning in numerical_health(Report.from_dict(report)).warnings():
        console.print(f"warning: {warning}", highlight=False, soft_wrap=True)
    console.print(
        f"load it:  import streamcomp; AutoModelForCausalLM.from_pretrained({str(out)!r})",
        highlight=False,
        soft_wrap=True,
    )


def _method_rows(report: dict[str, Any]) -> dict[str, str]:
    """Rows that only some methods have."""
    rows = {}
    linears, dense, refined = (report.get(kind, []) for kind in ("linears", "dense", "refined"))
    nll = next((step["nll"] for step in report["steps"] if "nll" in step), None)
    if nll is not None:
        rows["dense perplexity"] = f"{math.exp(min(nll, 700)):.4g} on the calibration text"
    if bits := [m["bits_per_weight"] for m in linears if "bits_per_weight" in m]:
        rows["bits per weight"] = f"{fmean(bits):.3g} in {len(bits)} linears"
    if refined:
        better = sum(item["after"] < item["before"] for item in refined)
        before, after = (median(item[when] for item in refined) for when in ("before", "after"))
        rows["refined"] = f"{better} of {len(refined)} blocks improved, held-out loss "
        rows["refined"] += f"{before:.3g} -> {after:.3g} (median)"
    if dense:
        rows["stay dense"] = f"{len(dense)} of {len(linears) + len(dense)} linears"
    return rows


def _console() -> Console:
    """Prints text without markup, which a path or a name from a checkpoint may look like."""
    return OpenConsole(markup=False, emoji=False)


def _print_rows(console: Console, rows: dict[str, str], title: str | None = None) -> None:
    table = Table(show_header=False, title=title, title_justify="left")
    for name, value in rows.items():
        table.add_row(Text(name, style="bold"), value)
    console.print(table)


def print_json(value: Any) -> None:
    click.echo(json.dumps(value, indent=1, ensure_ascii=False, default=str))
