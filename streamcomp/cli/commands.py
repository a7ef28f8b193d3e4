"""The commands: parse, call, print.

What takes long to import (torch, transformers) is imported by the commands that use it, after
:func:`main` has set the environment that it reads then: ``--help`` and refusals are quick.
"""

from __future__ import annotations

import dataclasses
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import click

import streamcomp
from streamcomp.cli import tables
from streamcomp.cli.options import Group, Option, make_option, options_of
from streamcomp.cli.signals import Stopped, stopping
from streamcomp.errors import OutputError, RecipeError, StreamcompError
from streamcomp.machine.addresses import within_memory
from streamcomp.recipe import Recipe, Resources
from streamcomp.settings import Setting
from streamcomp.terminal import drop

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

if TYPE_CHECKING:
    from streamcomp.job.progress import JobProgress

__all__ = ["cli", "main"]

# How long OpenMP's threads spin at a barrier before they sleep. By default it is so long that with
# a thread per core a job takes many times as long as soon as anything else wants one of the cores.
_SPINNING = {
    "GOMP_SPINCOUNT": "1000",  # rounds, in GCC's OpenMP, which torch's wheels bring
    "KMP_BLOCKTIME": "1",  # milliseconds, in LLVM's and Intel's
}
_OTHERS_SPINNING = ("OMP_WAIT_POLICY",)  # says the same to either

_MODEL = click.Argument(["model"], type=click.Path(readable=False))  # or a name on the hub
_OUT = click.Argument(["out"], type=click.Path(path_type=Path))

_MEANS = ("max_ram", "device", "max_vram", "threads")
_FETCHING = ("stream_download", "max_shards")
_REVISION = make_option(
    "revision", str, None,
    Setting(section="common", unit="REV", default_help="main", example="v1.0",
            help="Branch, tag or commit of a hub model."),
)  # fmt: skip
_CONFIG = Option(
    ["--config"],
    section="common",
    type=click.Path(path_type=Path, dir_okay=False, exists=True),
    metavar="FILE",
    help="TOML file with any settings of a recipe; options given here take precedence.  "
    "Example: --config recipe.toml",
)
_QUIET = Option(
    ["--quiet", "-q"],
    section="output",
    is_flag=True,
    help="No progress; only the result and errors.",
)
_PRINTING = [
    Option(
        ["--json", "as_json"],
        section="output",
        is_flag=True,
        help="Print the result as JSON, nothing else.",
    ),
    _QUIET,
]
_JOB = [*options_of(Recipe), *options_of(Resources), _REVISION, _CONFIG, *_PRINTING]


@click.group(
    cls=Group,
    context_settings={"help_option_names": ["-h", "--help"]},
    params=[*options_of(Resources, *_MEANS, "work_dir"), _QUIET],
)
@click.version_option(streamcomp.__version__)
@click.pass_context
def cli(context: click.Context, /, **common: Any) -> None:
    """Compress large language models one block at a time, within a fixed RAM budget.

    \b
    Examples:
      streamcomp plan meta-llama/Llama-3.3-70B-Instruct --max-ram 32G
      streamcomp compress meta-llama/Llama-3.3-70B-Instruct out/ --max-ram 32G
      streamcomp eval out/ --max-ram 32G

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


@cli.command(params=[_MODEL, _OUT, *_JOB])
def compress(model: str, out: Path, as_json: bool, quiet: bool, **settings: Any) -> None:
    """Compress MODEL into the folder OUT.

    MODEL is a folder, or a name on the hub.

    \b
    Examples:
      streamcomp compress meta-llama/Llama-3.3-70B-Instruct out/ --max-ram 32G
      streamcomp compress models/small out/ --ratio 0.2,0.4 --calibration wiki.txt

    Run it again with the same settings and it goes on where it stopped; on a finished OUT
    it prints the summary. --max-ram, --device and --threads may change in between.
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
        tables.print_json(_with_others(result))
        return
    with _unheard():
        if result.already_done:
            click.echo(f"{out} is already done; to compress anew, remove it or give another OUT")
        for made in (result, *result.others):
            tables.print_summary(made.out, made.report)


def _with_others(result: streamcomp.CompressResult) -> dict[str, Any]:
    plain = {"out": str(result.out), "already_done": result.already_done} | result.report
    if result.others:
        plain["others"] = [{"out": str(other.out)} | other.report for other in result.others]
    return plain


@cli.command(params=[_MODEL, *_JOB])
def plan(model: str, as_json: bool, quiet: bool, **settings: Any) -> None:
    """Show the bytes, seconds and disk that compressing MODEL takes.

    \b
    Examples:
      streamcomp plan meta-llama/Llama-3.3-70B-Instruct --max-ram 32G
      streamcomp plan models/small --size 5GiB --method svd-llm

    Reads headers only. Exits with 5 and the least budget where --max-ram is too small.
    """
    recipe, resources = _make_recipe(settings), _make_resources(settings)
    made = streamcomp.plan(model, recipe, resources, revision=settings["revision"])
    if as_json:
        tables.print_json(made.to_dict())
    else:
        tables.print_plan(model, made)


@cli.command(params=[_OUT, *options_of(Resources, "work_dir"), *_PRINTING])
def status(out: Path, work_dir: Path | None, as_json: bool, quiet: bool) -> None:
    """Show where the job in OUT stands.

    \b
    Example:
      streamcomp status out/
    """
    job = streamcomp.status(out, work_dir=work_dir)
    if as_json:
        tables.print_json(dataclasses.asdict(job) | {"out": str(job.out)})
    else:
        tables.print_status(job)


@cli.command(params=[_OUT, *_PRINTING])
def verify(out: Path, as_json: bool, quiet: bool) -> None:
    """Check that the compressed model in OUT is whole.

    Compares sizes and digests with OUT's report, and tensors with its config; reads every byte.

    \b
    Example:
      streamcomp verify out/

    Exits with 0 if all is well, with 6 if something is damaged or missing, and with 3 if OUT
    holds no compressed model.
    """
    result = streamcomp.verify(out, progress=_progress(quiet or as_json))
    if as_json:
        tables.print_json(result.to_dict())
    else:
        tables.print_verification(result)
    if not result.sound:
        raise click.exceptions.Exit(OutputError.exit_code)


_TEXT = [
    make_option(
        "text", str, None,
        Setting(section="common", unit="SOURCE", is_path=True, example="wiki.test.txt",
                default_help="a part of Python's language reference that calibration never sees",
                help="File, folder or hub dataset, as for --calibration."),
    ),
    make_option(
        "seq_len", int, 512,
        Setting(section="common", unit="TOKENS", minimum=2,
                help="Tokens per window; each is predicted from its window alone."),
    ),
    make_option(
        "windows", int, 64,
        Setting(section="common", unit="N", minimum=0,
                help="Windows from the beginning of the text; 0 takes all of its first 16 Mi "
                "characters."),
    ),
    make_option(
        "chat", bool, False,
        Setting(section="common", help="Render the text through the model's chat template."),
    ),
]  # fmt: skip
_STREAM_DIR = options_of(
    Resources, "work_dir",
    work_dir={
        "help": "Folder for hidden states while this runs; in memory (tmpfs) they count in the "
        "budget.",
        "default_help": "where temporary files go",
        "example": "/scratch",
    },
)  # fmt: skip


@cli.command(
    "eval",
    params=[
        _MODEL, *_TEXT, *options_of(Resources, *_MEANS, *_FETCHING), *_STREAM_DIR, _REVISION,
        *_PRINTING
    ],
)  # fmt: skip
def evaluate(model: str, as_json: bool, quiet: bool, **settings: Any) -> None:
    """Measure the perplexity of MODEL, streamed block by block.

    MODEL is dense or compressed: a folder, or a name on the hub.

    \b
    Examples:
      streamcomp eval out/ --max-ram 4G
      streamcomp eval out/ --text wiki.test.txt --windows 0 --seq-len 2048
    """
    resources = _make_resources(settings)
    asked = {option.name: settings[option.name] for option in _TEXT if option.name}
    evaluation = streamcomp.evaluate(
        model,
        **_given(asked),
        resources=resources,
        revision=settings["revision"],
        progress=_progress(quiet or as_json),
    )
    if as_json:
        tables.print_json(evaluation.to_dict())
    else:
        tables.print_evaluation(evaluation)


_EXPORTED = make_option(
    "form", str, "dense",
    Setting(section="common", choices=("dense", "uv"),
            help="dense: factors multiplied out, a plain checkpoint; uv: two factors per linear."),
)  # fmt: skip


@cli.command(
    params=[
        click.Argument(["out"], type=click.Path(readable=False)),
        click.Argument(["dest"], type=click.Path(path_type=Path)),
        _EXPORTED,
        *_PRINTING,
    ]
)
def export(out: str, dest: Path, form: str | None, as_json: bool, quiet: bool) -> None:
    """Write the compressed model OUT to DEST for other tools.

    DEST becomes a plain checkpoint, or one with two factors per linear and no pivots.

    \b
    Example:
      streamcomp export out/ dense/
    """
    form = form or "dense"
    path = streamcomp.export(out, dest, form=form, progress=_progress(quiet or as_json))
    if as_json:
        tables.print_json({"out": str(path), "form": form})
    else:
        with _unheard():
            click.echo(f"{path} holds {out} in form {form}")


@cli.command(params=[_MODEL, _REVISION, *_PRINTING])
def inspect(model: str, revision: str | None, as_json: bool, quiet: bool) -> None:
    """List the linears of MODEL, dense or compressed, by family.

    Reads headers only.

    \b
    Example:
      streamcomp inspect out/
    """
    inspection = streamcomp.inspect(model, revision=revision)
    if as_json:
        tables.print_json(inspection.to_dict())
    else:
        tables.print_inspection(model, inspection)


def main() -> None:
    """Entry point; a StreamcompError becomes one line and its exit code."""
    _prepare_libraries()
    try:
        with stopping(), within_memory("this command"):
            code = cli(standalone_mode=False)
    except StreamcompError as error:
        _fail(f"error: {error}", error.exit_code)
    except click.ClickException as error:
        with _unheard():
            error.show()
        sys.exit(error.exit_code)
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        with _unheard():
            click.echo(f"error: {where}{error.strerror or error}", err=True)
        _drop_output()  # what could not be written may be the output itself
        sys.exit(1)
    except (Stopped, KeyboardInterrupt, click.Abort) as stop:
        number = stop.number if isinstance(stop, Stopped) else signal.SIGINT
        by = "" if number == signal.SIGINT else f" by {number.name}"
        _fail(
            f"interrupted{by}: the finished steps are kept, the same command goes on", 128 + number
        )
    if code:  # what a command asks for
        sys.exit(code)


def _fail(message: str, code: int) -> NoReturn:
    """Say why on stderr, where that can be written, and exit with ``code``."""
    with _unheard():
        click.echo(message, err=True)
    sys.exit(code)


@contextmanager
def _unheard() -> Iterator[None]:
    """Go on where what is said in this block cannot be written (a closed pipe, a full disk)."""
    try:
        yield
    except OSError:
        _drop_output()


def _drop_output() -> None:
    """Discard output that could not be printed, or the interpreter tries again at its exit."""
    drop(sys.stdout)
    drop(sys.stderr)


def _prepare_libraries() -> None:
    """Set what OpenMP and transformers read when they are loaded, unless the user has."""
    if "torch" in sys.modules:
        return  # too late, and the environment is another program's
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("USE_HUB_KERNELS", "NO")  # no code is fetched for a model
    if not any(name in os.environ for name in (*_SPINNING, *_OTHERS_SPINNING)):
        os.environ.update(_SPINNING)


def _progress(quiet: bool) -> JobProgress:
    from streamcomp.job.progress import console_progress

    return console_progress(quiet)


def _make_recipe(settings: dict[str, Any]) -> Recipe:
    """The recipe in the TOML file; command-line options take precedence."""
    config, values = settings["config"], {}
    if config:
        try:
            values = tomllib.loads(config.read_text("utf-8"))
        except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
            raise RecipeError(f"{config} cannot be read as TOML: {error}") from None
    values |= _given(settings, Recipe)
    for other in ("size", "module_ratio"):
        if values.get(other) and "ratio" in values:
            raise RecipeError(f"ratio and {other} both say how much to remove: give one of them")
    return Recipe.from_mapping(values, str(config or "command line"))


def _make_resources(settings: dict[str, Any]) -> Resources:
    return Resources(**_given(settings, Resources))


def _given(
    values: dict[str, Any], settings: type[Recipe] | type[Resources] | None = None
) -> dict[str, Any]:
    """The options that were given, or those of them that are fields of ``settings``."""
    names = values if settings is None else {field.name for field in dataclasses.fields(settings)}
    return {k: v for k, v in values.items() if k in names and v not in (None, ())}
