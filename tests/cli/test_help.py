"""Help pages, completion and refusals, for which nothing large is imported."""

from __future__ import annotations

import inspect
import json
import re
from pathlib import Path
from typing import Any

import click
import pytest

import streamcomp
from streamcomp import cli
from streamcomp.settings import SECTIONS
from tests.jobs import ENVIRONMENT, REPOSITORY, run_cli, run_python

GROUP = cli.cli
COMMANDS = {"": GROUP, **GROUP.commands}


# -- help -----------------------------------------------------------------------------------

OPTIONS = [
    pytest.param(name, option, id=f"{name or 'streamcomp'} {option.opts[0]}")
    for name, command in COMMANDS.items()
    for option in command.params
    if isinstance(option, click.Option) and option.name not in ("help", "version")
]


@pytest.mark.parametrize("name", COMMANDS)
def test_the_help_of_a_command_names_each_of_its_options(name: str) -> None:
    help_page = run_cli(*name.split(), "--help")

    assert help_page.code == 0 and not help_page.err
    words = help_page.out.replace(",", " ").split()
    for parameter in COMMANDS[name].params:
        if isinstance(parameter, click.Option):
            assert set(parameter.opts) <= set(words)
    for command in COMMANDS if not name else ():
        assert command in help_page.out
    assert run_cli(*name.split(), "-h").out == help_page.out


@pytest.mark.parametrize(("name", "option"), OPTIONS)
def test_each_option_tells_its_default_and_an_example(name: str, option: click.Option) -> None:
    assert option.help
    if option.is_flag:
        return  # off unless given
    assert "[default: " in option.help or option.name == "config"
    told = isinstance(option.type, click.Choice) or option.type in (click.INT, click.FLOAT)
    assert told or f"Example: --{(option.name or '').replace('_', '-')} " in option.help


@pytest.mark.parametrize("name", [name for name in COMMANDS if name])
def test_each_command_has_an_example(name: str) -> None:
    assert re.search(rf"Examples?:\n +streamcomp {name} ", COMMANDS[name].help or "")


@pytest.mark.parametrize("name", COMMANDS)
def test_a_help_page_fits_80_columns_and_has_its_sections_in_order(name: str) -> None:
    lines = run_cli(*name.split(), "--help").out.splitlines()

    assert max(map(len, lines)) <= 80
    sections = [line.removesuffix(" options:").lower() for line in lines if "options:" in line]
    assert sections == [section for section in SECTIONS if section in sections]


def test_the_defaults_in_the_help_are_those_of_a_recipe() -> None:
    recipe = streamcomp.Recipe()
    for option in GROUP.commands["compress"].params:
        value = getattr(recipe, option.name or "", None)
        own = isinstance(value, float) and value == 0  # the method's
        if value in (None, (), "") or isinstance(value, bool) or own:
            continue
        assert isinstance(option, click.Option)
        told = f"{value:g}" if isinstance(value, float) else value
        assert re.search(rf"\[default: {told}\b", option.help or ""), option.name


def test_each_setting_of_a_recipe_has_an_option() -> None:
    options = {parameter.name for parameter in GROUP.commands["compress"].params}

    assert set(vars(streamcomp.Recipe())) | set(vars(streamcomp.Resources())) <= options
    of_plan = {parameter.name for parameter in GROUP.commands["plan"].params}
    assert of_plan == options - {"out"}


def test_the_module_runs_and_tells_its_version() -> None:
    told = run_python("-m", "streamcomp", "--version", cwd=REPOSITORY)

    assert (told.code, told.err) == (0, "")
    assert told.out.endswith(f"version {streamcomp.__version__}\n")
    project = (REPOSITORY / "pyproject.toml").read_text("utf-8")
    assert f'\nversion = "{streamcomp.__version__}"\n' in project


def test_what_follows_no_command_is_refused_in_one_line() -> None:
    refused = run_cli("compres")

    assert refused.code == 2 and not refused.out
    assert "No such command 'compres'" in refused.err


# -- before torch is imported ---------------------------------------------------------------

# Runs the command line, then tells its exit code, what it imported, and its environment.
WATCHED = """
import json, os, sys
from streamcomp.cli import main

code = 0
try:
    main()
except SystemExit as stop:
    code = stop.code or 0
imported = sorted({"numpy", "torch", "transformers"} & sys.modules.keys())
names = ("GOMP_SPINCOUNT", "KMP_BLOCKTIME", "OMP_WAIT_POLICY")
settings = {name: os.environ[name] for name in names if name in os.environ}
print(json.dumps([code, imported, settings]), file=sys.stderr)
"""
SPINNING = {"GOMP_SPINCOUNT": "1000", "KMP_BLOCKTIME": "1"}


@pytest.fixture(autouse=True)
def unset(monkeypatch: pytest.MonkeyPatch) -> None:
    """What this machine's user has told OpenMP is not handed on."""
    for name in (*SPINNING, "OMP_WAIT_POLICY"):
        monkeypatch.delitem(ENVIRONMENT, name, raising=False)


def watched(*arguments: object, **environment: str) -> list[Any]:
    done = run_python("-c", WATCHED, *arguments, environment=environment)
    told: list[Any] = json.loads(done.err.splitlines()[-1])
    return told


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (("--help",), 0),
        (("compress", "--help"), 0),
        (("--version",), 0),
        (("compres",), 2),
        (("plan",), 2),
        (("plan", "model", "--samples", "many"), 2),
        (("plan", "model", "--ratio", 2), 2),
        (("compress", "model", "out", "--size", "5 apples"), 2),
        (("compress", "model", "out", "--device", "tpu"), 2),
        (("eval", "model", "--threads", 100_000), 2),
    ],
)
def test_help_and_refused_settings_wait_for_no_large_import(
    arguments: tuple[object, ...], code: int
) -> None:
    assert watched(*arguments)[:2] == [code, []]


@pytest.mark.parametrize(
    ("typed", "offered"),
    [
        ("streamcomp comp", ["compress"]),
        ("streamcomp compress --al", ["--allocation"]),
        ("streamcomp plan --method s", ["svd-llm", "swsc"]),
        ("streamcomp export --form ", ["dense", "uv"]),
    ],
)
def test_the_completion_of_a_shell_waits_for_no_large_import(
    typed: str, offered: list[str]
) -> None:
    script = f"import sys; sys.argv[0] = 'streamcomp'\n{WATCHED}"
    shell = {"_STREAMCOMP_COMPLETE": "bash_complete", "COMP_WORDS": typed}

    done = run_python("-c", script, environment={**shell, "COMP_CWORD": str(typed.count(" "))})

    assert done.out.splitlines() == [f"plain,{word}" for word in offered]
    assert json.loads(done.err)[:2] == [0, []]


def test_the_defaults_in_the_help_of_eval_are_those_of_evaluate() -> None:
    parameters = inspect.signature(streamcomp.evaluate).parameters
    for option in GROUP.commands["eval"].params:
        if option.name in ("seq_len", "windows"):
            assert isinstance(option, click.Option)
            assert f"[default: {parameters[option.name].default};" in (option.help or "")


@pytest.mark.parametrize("option", ["--blocks", "--include", "--size"])
def test_an_empty_value_is_the_default(option: str) -> None:
    refused = run_cli("plan", "model", option, "", "--ratio", 2)

    assert refused.err.startswith("error: ratio 2: ")


def test_the_threads_of_openmp_are_told_not_to_spin_for_long(tmp_path: Path) -> None:
    """By the time its library is loaded: it says itself what it has been told."""
    done = run_python("-c", WATCHED, "status", tmp_path, environment={"OMP_DISPLAY_ENV": "VERBOSE"})

    code, imported, settings = json.loads(done.err.splitlines()[-1])
    assert code == 6 and "torch" in imported and settings == SPINNING
    assert re.search(r"GOMP_SPINCOUNT = '1000'|KMP_BLOCKTIME=1\b", done.err)


@pytest.mark.parametrize("name", [*SPINNING, "OMP_WAIT_POLICY"])
def test_what_the_user_has_told_openmp_is_left_alone(name: str) -> None:
    value = "active" if name == "OMP_WAIT_POLICY" else "7"

    assert watched("--version", **{name: value})[2] == {name: value}


def test_the_interface_of_python_leaves_the_waiting_of_openmp_alone(tmp_path: Path) -> None:
    script = "import os, sys\nimport streamcomp\ntry:\n    streamcomp.status(sys.argv[1])\n"
    script += "except streamcomp.OutputError:\n    print('torch' in sys.modules, *os.environ)\n"

    told = run_python("-c", script, tmp_path).out.split()

    assert told[0] == "True" and not {*SPINNING, "OMP_WAIT_POLICY"} & {*told}
