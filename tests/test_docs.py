"""Links, anchors, commands and options in the documentation lead somewhere."""

from __future__ import annotations

import ast
import re
from dataclasses import fields
from pathlib import Path

import pytest

from streamcomp.recipe import Recipe, Resources

REPOSITORY = Path(__file__).parents[1]
PAGES = sorted(
    page.relative_to(REPOSITORY)
    for folder in (".", "docs", "benchmarks")
    for page in (REPOSITORY / folder).glob("*.md")
)

_FENCED = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
_CODE = re.compile(r"`[^`\n]*`")
_LINK = re.compile(r"\]\(([^)\s]+)\)")
_HEADING = re.compile(r"^#+ (.+)$", re.MULTILINE)
_SCRIPT = re.compile(r"\bbenchmarks/\w+\.py\b")
_COMMAND = re.compile(r"(?<!from )\bstreamcomp +([a-z]+)\b")
_OPTION = re.compile(r"(?<![\w-])--[a-z][\w-]*")
_STRING = re.compile(r"[\"'](--[a-z][\w-]*)")


def text_of(page: Path) -> str:
    return (REPOSITORY / page).read_text("utf-8")


def anchors(page: Path) -> set[str]:
    """What the headings of a page are called in links to them."""
    headings = _HEADING.findall(_FENCED.sub("", text_of(page)))
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def code_of(page: Path) -> str:
    """The page's code, in fences and between backticks."""
    text = text_of(page)
    return "\n".join(_FENCED.findall(text) + _CODE.findall(_FENCED.sub("", text)))


def commands() -> set[str]:
    """Names of the functions that ``@cli.command`` decorates, or what it calls them."""
    source = text_of(Path("streamcomp/cli/commands.py"))
    names = set()
    for node in ast.parse(source).body:
        for call in node.decorator_list if isinstance(node, ast.FunctionDef) else ():
            assert isinstance(node, ast.FunctionDef)
            if isinstance(call, ast.Call) and ast.unparse(call.func) == "cli.command":
                given = [arg.value for arg in call.args if isinstance(arg, ast.Constant)]
                names.add(str(given[0]) if given else node.name)
    return names


def options() -> set[str]:
    """Every option of the command line, of the benchmarks, and of linters."""
    names = {field.name for settings in (Recipe, Resources) for field in fields(settings)}
    options = {f"--{name.replace('_', '-')}" for name in names}
    options |= {"--help", "--version", "--strict"}
    for folder in ("streamcomp/cli", "benchmarks"):
        for source in (REPOSITORY / folder).glob("*.py"):
            options |= set(_STRING.findall(source.read_text("utf-8")))
    made = re.findall(r'make_option\(\s*"(\w+)"', text_of(Path("streamcomp/cli/commands.py")))
    return options | {f"--{name.replace('_', '-')}" for name in made}


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_links_lead_to_files_and_headings_that_exist(page: Path) -> None:
    for link in _LINK.findall(_FENCED.sub("", text_of(page))):
        if "://" in link:
            continue
        name, _, anchor = link.partition("#")
        target = (REPOSITORY / page).parent / name if name else REPOSITORY / page
        assert target.exists(), link
        if anchor:
            assert anchor in anchors(target.resolve().relative_to(REPOSITORY.resolve())), link


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_benchmarks_that_are_named_exist(page: Path) -> None:
    assert all((REPOSITORY / script).is_file() for script in _SCRIPT.findall(text_of(page)))


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_commands_that_are_named_exist(page: Path) -> None:
    assert {"compress", "eval"} <= commands()
    assert set(_COMMAND.findall(code_of(page))) <= commands()


@pytest.mark.parametrize("page", [p for p in PAGES if p.name != "CHANGELOG.md"], ids=str)
def test_options_that_are_named_exist(page: Path) -> None:
    assert set(_OPTION.findall(code_of(page))) <= options()


def test_every_page_is_reached_from_the_readme() -> None:
    linked = _LINK.findall(text_of(Path("README.md")))
    assert {str(page) for page in PAGES if page.parts[0] == "docs"} <= {
        link.partition("#")[0] for link in linked
    }


def test_the_readme_is_short() -> None:
    assert len(text_of(Path("README.md")).splitlines()) <= 150
