"""The command line: parse, call, print.

What takes long to import (torch, transformers) is imported by the commands that use it, and after
:func:`main` has set the environment that it reads then: ``--help`` and refusals are quick.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from statistics import fmean, median
from typing import TYPE_CHECKING, Any, TypeVar

import click
from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

import streamcomp
from streamcomp.errors import RecipeError, StreamcompError
from streamcomp.recipe import (
    ALLOCATIONS,
    AXES,
    FORMS,
    METHODS,
    STATISTICS,
    Recipe,
    Resources,
)
from streamcomp.units import format_bytes, format_seconds

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

if TYPE_CHECKING:
    from streamcomp.evaluation.inspection import Family, Inspection
    from streamcomp.job.progress import JobProgress

__all__ = ["main"]

Command = TypeVar("Command", bound=Callable[..., Any])

_DEFAULT = Recipe()

# How long OpenMP's threads spin at a barrier before they sleep. By default it is so long that with
# a thread per core a job takes many times as long as soon as anything else wants one of the cores.
_SPINNING = {
    "GOMP_SPINCOUNT": "1000",  # rounds, of the OpenMP of GCC, which torch's wheels bring
    "KMP_BLOCKTIME": "1",  # milliseconds, of that of LLVM and Intel
}
_OTHERS_SPINNING = ("OMP_WAIT_POLICY",)  # says the same to either


def _options(*options: Callable[[Command], Command]) -> Callable[[Command], Command]:
    """Several options as one decorator, in the order of the help page."""

    def decorate(command: Command) -> Command:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


_max_ram = click.option(
    "--max-ram",
    metavar="SIZE",
    help="Resident memory that is never exceeded: 32G, 900MiB, 75% of the machine.  "
    "[default: 80% of what is free]  Example: --max-ram 32G",
)
_device = click.option(
    "--device",
    metavar="auto|cpu|cuda[:N]",
    default="auto",
    show_default=True,
    help="Where blocks run and are decomposed; streams stay on the host.  Example: --device cuda:1",
)
_max_vram = click.option(
    "--max-vram",
    metavar="SIZE",
    help="The same of the GPU, driver and libraries included: 24G, 80%.  "
    "[default: 90% of what is free]  Example: --max-vram 12G",
)
_threads = click.option(
    "--threads",
    type=click.IntRange(min=0),
    metavar="N",
    default=0,
    help="CPU threads; 0 = all cores.  [default: 0]  Example: --threads 8",
)


def _work_folder(text: str) -> Callable[[Command], Command]:
    folder = click.Path(path_type=Path, file_okay=False)
    return click.option("--work-dir", type=folder, metavar="DIR", help=text)


_work_dir = _work_folder(
    "Folder for hidden states and the journal, best on a fast disk.  "
    "[default: OUT/.streamcomp]  Example: --work-dir /scratch/job"
)
_revision = click.option(
    "--revision",
    metavar="REV",
    help="Branch, tag or commit of a hub model.  [default: main]  Example: --revision v1.0",
)
_json = click.option(
    "--json", "as_json", is_flag=True, help="Print the result as JSON, nothing else."
)
_quiet = click.option(
    "--quiet", "-q", is_flag=True, help="No progress; only the result and errors."
)

_keep_work = click.option(
    "--keep-work",
    is_flag=True,
    help="Keep decompositions and moments in the work folder, for jobs of another ratio, form or "
    "damping with the same --work-dir.",
)

_stream_dir = _work_folder(
    "Folder below which hidden states lie for as long as this runs; in memory (tmpfs) they "
    "count in the budget.  [default: where temporary files go]  Example: --work-dir /scratch"
)

_means = (_max_ram, _device, _max_vram, _threads)
_resources = _options(*_means, _work_dir)
_output = _options(_json, _quiet)


class _Ratios(click.ParamType):  # type: ignore[type-arg]
    """One number, or several with commas between them."""

    name = "ratios"

    def convert(self, value: Any, param: Any, ctx: Any) -> float | tuple[float, ...]:
        if isinstance(value, float | tuple):
            return value
        try:
            found = tuple(float(part) for part in str(value).split(","))
        except ValueError:
            self.fail(f"{value!r} is no number: write 0.2 or 0.2,0.4", param, ctx)
        return found[0] if len(found) == 1 else found


_recipe = _options(
    click.option(
        "--ratio",
        type=_Ratios(),
        metavar="SHARE[,...]",
        help="Share of the linears' parameters to remove, between 0 and 1; several give a folder "
        f"each from one analysis.  [default: {_DEFAULT.ratio}]  Example: --ratio 0.2,0.4",
    ),
    click.option(
        "--size",
        metavar="BYTES",
        help="Bytes of weights that the result has at most, in the place of --ratio.  "
        "Example: --size 5GiB",
    ),
    click.option(
        "--method",
        type=click.Choice(METHODS),
        help="two-sided weighs errors by what they do to the model's loss; svd-llm by the inputs; "
        "rom: principal components of the outputs, block after block; swsc: channels that share "
        f"weights.  [default: {_DEFAULT.method}]",
    ),
    click.option(
        "--form",
        type=click.Choice(FORMS),
        help="How factors are stored: pivot holds a higher rank in the same bytes, uv is plain "
        "low rank, shared is swsc's.  [default: pivot; shared for swsc]",
    ),
    click.option(
        "--allocation",
        type=click.Choice(ALLOCATIONS),
        help="How the ratio is shared among linears: evenly, or so that the least is lost over "
        "all of them.  [default: loss for two-sided, uniform else]",
    ),
    click.option(
        "--refine",
        type=int,
        metavar="STEPS",
        help="Steps of training of each block's factors against the dense block.  "
        f"[default: {_DEFAULT.refine}]  Example: --refine 200",
    ),
    click.option(
        "--rate",
        type=float,
        metavar="SHARE",
        help="Learning rate of --refine, relative to the factors' size.  [default: its own]  "
        "Example: --rate 1e-3",
    ),
    click.option(
        "--update",
        is_flag=True,
        default=None,
        help="Refit left factors in closed form on what compressed blocks put out.",
    ),
    click.option(
        "--anchor",
        type=float,
        metavar="SHARE",
        help="Share of the dense model's outputs in the target of --update; the rest is of the "
        f"compressed stream.  [default: {_DEFAULT.anchor:g}]  Example: --anchor 0.5",
    ),
    click.option(
        "--blocks",
        metavar="WHICH",
        help="Blocks to compress; the others stay dense and count in the ratio.  [default: all]  "
        "Example: --blocks last:12",
    ),
    click.option(
        "--module-ratio",
        type=float,
        metavar="SHARE",
        help="Share removed from each linear of those blocks, in the place of --ratio.  "
        "Example: --module-ratio 0.54",
    ),
    click.option(
        "--damping",
        type=float,
        metavar="SHARE",
        help="Added to the moments' diagonals, relative to their mean.  [default: 0.01 of the "
        "gradients for two-sided, else as little as is needed]  Example: --damping 1e-3",
    ),
    click.option(
        "--clusters",
        type=int,
        metavar="K",
        help="For swsc: representatives per linear; 0 = whatever loses least.  "
        f"[default: {_DEFAULT.clusters}]  Example: --clusters 64",
    ),
    click.option(
        "--axis",
        type=click.Choice(AXES),
        help=f"For swsc: whether rows or columns share.  [default: {_DEFAULT.axis}]",
    ),
    click.option(
        "--calibration",
        multiple=True,
        metavar="SOURCE",
        help="File of text, .jsonl, .json, .csv or .tsv, a folder of them, or a hub dataset; "
        "repeat it to mix evenly.  "
        "[default: Python's language reference]  Example: --calibration wiki.txt",
    ),
    click.option(
        "--chat",
        is_flag=True,
        default=None,
        help="Render calibration texts through the model's chat template; objects of a .jsonl or "
        ".json may hold messages.",
    ),
    click.option(
        "--samples",
        type=int,
        metavar="WINDOWS",
        help=f"Calibration windows.  [default: {_DEFAULT.samples}]  Example: --samples 256",
    ),
    click.option(
        "--seq-len",
        type=int,
        metavar="TOKENS",
        help=f"Tokens per window.  [default: {_DEFAULT.seq_len}]  Example: --seq-len 2048",
    ),
    click.option(
        "--batch",
        type=int,
        metavar="WINDOWS",
        help="Windows per forward; 0 = as many as are useful and fit.  "
        f"[default: {_DEFAULT.batch}]  Example: --batch 4",
    ),
    click.option(
        "--statistics",
        type=click.Choice(STATISTICS),
        help="Take moments from the dense model's hidden states, from those of the blocks "
        "compressed so far, or not at all.  [default: dense; compressed for rom]",
    ),
    click.option(
        "--store-every",
        type=int,
        metavar="K",
        help="For two-sided: keep the hidden states of every K-th block on disk and run the others "
        f"again.  [default: {_DEFAULT.store_every}]  Example: --store-every 8",
    ),
    click.option(
        "--seed",
        type=int,
        metavar="N",
        help=f"Draws the calibration windows.  [default: {_DEFAULT.seed}]",
    ),
    click.option(
        "--include",
        metavar="REGEX",
        help="Only linears whose name matches.  [default: all]  Example: --include 'mlp\\.'",
    ),
    click.option(
        "--exclude",
        metavar="REGEX",
        help="Not the linears whose name matches.  [default: none]  Example: --exclude k_proj",
    ),
    click.option(
        "--config",
        type=click.Path(path_type=Path, dir_okay=False, exists=True),
        metavar="FILE",
        help="TOML file with any of these settings; options given here go first.  "
        "Example: --config recipe.toml",
    ),
)


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@_resources
@_quiet
@click.version_option(streamcomp.__version__)
@click.pass_context
def cli(context: click.Context, /, **common: Any) -> None:
    """Compress large language models one block at a time, within a fixed RAM budget.

    \b
    streamcomp plan     MODEL            what it would take
    streamcomp compress MODEL OUT        do it; run it again after a crash and it goes on
    streamcomp eval     OUT              perplexity, under the same budget

    Options before the command hold for whatever command follows and knows them.
    """
    given = {name: value for name, value in common.items() if value}
    assert isinstance(context.command, click.Group)
    context.default_map = {
        name: {key: value for key, value in given.items() if key in _names(command)}
        for name, command in context.command.commands.items()
    }


def _names(command: click.Command) -> set[str]:
    return {parameter.name for parameter in command.params if parameter.name}


@cli.command()
@click.argument("model")
@click.argument("out", type=click.Path(path_type=Path))
@_recipe
@_resources
@_keep_work
@_revision
@_output
def compress(model: str, out: Path, as_json: bool, quiet: bool, **settings: Any) -> None:
    """Compress MODEL (a folder, or a name on the hub) into the folder OUT.

    Run it again with the same settings and it goes on where it stopped; on a finished OUT
    it prints the summary. --max-ram, --device and --threads may change in between.

    Example: streamcomp compress meta-llama/Llama-3.3-70B-Instruct out/ --max-ram 32G
    """
    recipe, resources = _make_recipe(settings), _make_resources(settings)
    result = streamcomp.compress(
        model,
        out,
        recipe,
        resources,
        revision=settings["revision"],
        progress=_progress(quiet or as_json),
    )
    if as_json:
        _print_json(_with_others(result))
        return
    if result.already_done:
        click.echo(f"{out} is already done; to compress anew, remove it or give another OUT")
    for made in (result, *result.others):
        _print_summary(made.out, made.report)


def _with_others(result: streamcomp.CompressResult) -> dict[str, Any]:
    plain = {"out": str(result.out), "already_done": result.already_done} | result.report
    if result.others:
        plain["others"] = [{"out": str(other.out)} | other.report for other in result.others]
    return plain


def _progress(quiet: bool) -> JobProgress:
    from streamcomp.job.progress import console_progress

    return console_progress(quiet)


def _at_a_time(made: streamcomp.Plan) -> str:
    """What the levers are set to; rounding differs between settings, the speed but little."""
    levers, kinds = made.levers, {step.step.kind for step in made.steps}
    parts = [f"{levers.batch} windows of {made.stream.seq_len} tokens at a time"]
    if "reverse" in kinds:
        parts.append(f"{levers.reverse_batch} in reverse")
    if "loss" in kinds:
        parts.append(f"{levers.head_tokens} tokens in the head")
    if levers.feed_forward_tokens < made.stream.seq_len:
        parts.append(f"{levers.feed_forward_tokens} in a feed-forward")
    times = {"passes": max(len(block.passes(levers)) for block in made.blocks)}
    if made.analysis:
        times["readings"] = max(len(block.passes(levers, observed=False)) for block in made.blocks)
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


@cli.command()
@click.argument("model")
@_recipe
@_resources
@_keep_work
@_revision
@_output
def plan(model: str, as_json: bool, quiet: bool, **settings: Any) -> None:
    """Show what compressing MODEL would take: bytes, seconds and disk of each step.

    Reads headers only. Exits with 5 and the least budget where --max-ram is too small.

    Example: streamcomp plan meta-llama/Llama-3.3-70B-Instruct --max-ram 32G
    """
    recipe, resources = _make_recipe(settings), _make_resources(settings)
    made = streamcomp.plan(model, recipe, resources, revision=settings["revision"])
    if as_json:
        _print_json(made.to_dict())
        return
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
            "at a time": _at_a_time(made),
            "linears": f"{len(made.linears)} eligible, ratio {made.ratio:.4f}, "
            f"{len(made.left)} other modules left as they are",
        },
    )


@cli.command()
@click.argument("out", type=click.Path(path_type=Path))
@_work_dir
@_output
def status(out: Path, work_dir: Path | None, as_json: bool, quiet: bool) -> None:
    """Show where the job in OUT stands: done, used, left.

    Example: streamcomp status out/
    """
    found = streamcomp.status(out, work_dir=work_dir)
    if as_json:
        _print_json(dataclasses.asdict(found) | {"out": str(found.out)})
        return
    state = "finished" if found.finished else "unfinished: the same compress command continues it"
    _print_rows(
        _console(),
        {
            "state": state,
            "steps": f"{found.steps_done} of {found.steps_total}, last {found.last_step or 'none'}",
            "time": f"{format_seconds(found.seconds)} used, about "
            f"{format_seconds(found.seconds_left)} left",
            "peak RAM": format_bytes(found.peak_bytes),
            "recipe": ", ".join(f"{k}={v}" for k, v in found.recipe.items() if v not in ("", [])),
        },
    )


@cli.command("eval")
@click.argument("model")
@click.option(
    "--text",
    metavar="SOURCE",
    help="File, folder or hub dataset, as for --calibration.  [default: the part of Python's "
    "language reference that calibration never sees]  Example: --text wiki.test.txt",
)
@click.option(
    "--seq-len",
    type=click.IntRange(min=2),
    default=512,
    show_default=True,
    metavar="TOKENS",
    help="Tokens per window; each is predicted from its window alone.  Example: --seq-len 2048",
)
@click.option(
    "--windows",
    type=click.IntRange(min=0),
    default=64,
    show_default=True,
    metavar="N",
    help="Windows from the beginning of the text; 0 = all, of its first 16 Mi characters.  "
    "Example: --windows 0",
)
@click.option("--chat", is_flag=True, help="Render the text through the model's chat template.")
@_options(*_means, _stream_dir)
@_revision
@_output
def evaluate(
    model: str,
    text: str | None,
    seq_len: int,
    windows: int,
    chat: bool,
    as_json: bool,
    quiet: bool,
    **settings: Any,
) -> None:
    """Perplexity of MODEL, dense or compressed, streamed block by block.

    Example: streamcomp eval out/ --text wiki.test.txt --max-ram 4G
    """
    resources = _make_resources(settings)
    found = streamcomp.evaluate(
        model,
        text,
        seq_len=seq_len,
        windows=windows,
        chat=chat,
        resources=resources,
        revision=settings["revision"],
        progress=_progress(quiet or as_json),
    )
    if as_json:
        _print_json(found.to_dict())
        return
    _print_rows(
        _console(),
        {
            "perplexity": f"{found.perplexity:.3f}  ({found.nll:.4f} nats per token)",
            "text": f"{found.text}, {found.windows} windows of {found.seq_len} tokens",
            "parameters": f"{found.parameters:,} in {format_bytes(found.checkpoint_bytes)}",
            "peak RAM": f"{format_bytes(found.peak_bytes)} of {format_bytes(found.budget_bytes)} "
            f"(predicted {format_bytes(found.predicted_bytes)})",
            "time": format_seconds(found.seconds),
        },
    )


@cli.command()
@click.argument("out")
@click.argument("dest", type=click.Path(path_type=Path))
@click.option(
    "--form",
    type=click.Choice(("dense", "uv")),
    default="dense",
    show_default=True,
    help="dense: factors multiplied out, a plain checkpoint; uv: two factors per linear.",
)
@_output
def export(out: str, dest: Path, form: str, as_json: bool, quiet: bool) -> None:
    """Write the compressed model OUT to DEST for tools that know no pivots or factors.

    Example: streamcomp export out/ dense/
    """
    path = streamcomp.export(out, dest, form=form, progress=_progress(quiet or as_json))
    if as_json:
        _print_json({"out": str(path), "form": form})
    else:
        click.echo(f"{path} holds {out} in form {form}")


@cli.command()
@click.argument("model")
@_revision
@_output
def inspect(model: str, revision: str | None, as_json: bool, quiet: bool) -> None:
    """List the linears of MODEL, dense or compressed, by family. Reads headers only.

    Example: streamcomp inspect out/
    """
    found = streamcomp.inspect(model, revision=revision)
    if as_json:
        _print_json(found.to_dict())
        return
    console = _console()
    console.print(_families_table(model, found, console))
    for name, (why, count) in found.left.items():
        console.print(f"left as it is: {name} ({why}), {count}x", highlight=False)
    console.print(
        f"{found.parameters:,} parameters, {format_bytes(found.nbytes)} in {found.shards} shards",
        highlight=False,
    )


def main() -> None:
    """Entry point: errors of ours become one line and their exit code."""
    _prepare_libraries()
    try:
        cli(standalone_mode=False)
    except StreamcompError as error:
        click.echo(f"error: {error}", err=True)
        sys.exit(error.exit_code)
    except click.exceptions.Exit as stop:
        sys.exit(stop.exit_code)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except OSError as error:
        _drop_output()
        where = f"{error.filename}: " if error.filename else ""
        click.echo(f"error: {where}{error.strerror or error}", err=True)
        sys.exit(1)
    except (KeyboardInterrupt, click.Abort):
        click.echo("interrupted: the finished steps are kept, the same command goes on", err=True)
        sys.exit(130)


def _prepare_libraries() -> None:
    """Set what OpenMP and transformers read when they are loaded, unless the user has."""
    if "torch" in sys.modules:
        return  # too late, and the environment is another program's
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    if not any(name in os.environ for name in (*_SPINNING, *_OTHERS_SPINNING)):
        os.environ.update(_SPINNING)


def _drop_output() -> None:
    """Let what could not be printed go, else the interpreter tries again as it ends."""
    with suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _make_recipe(settings: dict[str, Any]) -> Recipe:
    values = _asked(settings)
    for other in ("size", "module_ratio"):
        if values.get(other) and "ratio" in values:
            raise RecipeError(f"ratio and {other} both say how much to remove: give one of them")
    return Recipe.from_mapping(values, str(settings["config"] or "command line"))


def _asked(settings: dict[str, Any]) -> dict[str, Any]:
    """The recipe's settings in the TOML file, then those of the command line over them."""
    values: dict[str, Any] = {}
    if settings["config"]:
        try:
            values = tomllib.loads(settings["config"].read_text("utf-8"))
        except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
            raise RecipeError(f"{settings['config']} cannot be read as TOML: {error}") from None
    names = {field.name for field in dataclasses.fields(Recipe)}
    given = {k: v for k, v in settings.items() if k in names and v not in (None, ())}
    return {**values, **given}


def _make_resources(settings: dict[str, Any]) -> Resources:
    names = [field.name for field in dataclasses.fields(Resources)]
    return Resources(**{name: settings[name] for name in names if name in settings})


def _merged(steps: Any) -> list[tuple[str, Any, float, int]]:
    """Runs of steps with the same needs as one row: name, example, seconds, bytes written."""
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
    same = (one.step.kind, one.step.output, one.peak_bytes, one.peak_phase) == (
        other.step.kind, other.step.output, other.peak_bytes, other.peak_phase
    )  # fmt: skip
    return same and one.step.block >= 0


# Stages of a job in its summary, the longest.
_STAGES_SHOWN = 3
# Columns, more than any table takes.
_UNBOUND = 10_000


def _families_table(model: str, found: Inspection, console: Console) -> Table:
    """The widest of the layouts that fits; a name is broken where none does."""
    tables = [_families_in(model, found, narrow) for narrow in range(4)]
    unbound = console.options.update(max_width=_UNBOUND)
    fits = (t for t in tables if console.measure(t, options=unbound).maximum <= console.width)
    return next(fits, tables[-1])


def _families_in(model: str, found: Inspection, narrow: int) -> Table:
    """Between two rules stand the linears that are fed the same tensor.

    ``narrow`` 1 breaks the form into lines, 2 also the name, 3 the form into words.
    """
    table = Table(
        Column("linear", overflow="fold"),
        *(Column(name, no_wrap=True) for name in ("shape", "count", "form, rank", "bytes")),
        title=f"{model}: {found.model_type}, {found.dtype}, {found.blocks} blocks",
        caption="between two rules: linears that are fed the same tensor",
    )
    by_input: dict[frozenset[str], list[Family]] = {}
    for family in found.families:
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


def _print_summary(out: Path, report: dict[str, Any]) -> None:
    from streamcomp.evaluation.health import numerical_health

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
    rows |= _method_rows(report)
    if report["left"]:
        rows["left as it is"] = f"{len(report['left'])} modules, see {out}/streamcomp_report.json"
    console = _console()
    _print_rows(console, rows, title=str(out))
    for warning in numerical_health(report).warnings():
        console.print(f"warning: {warning}", highlight=False, soft_wrap=True)
    console.print(
        f"load it:  import streamcomp; AutoModelForCausalLM.from_pretrained({str(out)!r})",
        highlight=False,
        soft_wrap=True,
    )


def _method_rows(report: dict[str, Any]) -> dict[str, str]:
    """What only some methods have to tell, a line each."""
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
    """Prints text as it is: a path or a name from a checkpoint may look like markup."""
    return Console(markup=False, emoji=False)


def _print_rows(console: Console, rows: dict[str, str], title: str | None = None) -> None:
    table = Table(show_header=False, title=title, title_justify="left")
    for name, value in rows.items():
        table.add_row(Text(name, style="bold"), value)
    console.print(table)


def _print_json(value: Any) -> None:
    click.echo(json.dumps(value, indent=1, ensure_ascii=False, default=str))
