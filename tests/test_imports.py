"""Imports inside the package point one way, also those inside functions."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import streamcomp
from tests.jobs import run_python

PACKAGE = Path(streamcomp.__path__[0])

_MATHS = {"errors", "linalg", "forms", "methods"}
_BASE = _MATHS | {"memory_errors", "units", "settings", "recipe"}
_MODELS = _BASE | {"checkpoint", "model"}
_JOBS = _MODELS | {"terminal", "machine", "calibration", "job"}

# A room -> the rooms it may import, beside itself.
ALLOWED: dict[str, set[str]] = {
    "errors": set(),
    "memory_errors": set(),
    "units": {"errors"},
    "terminal": set(),
    "linalg": {"errors"},
    "forms": {"errors", "memory_errors", "linalg"},
    "methods": {"errors", "linalg", "forms"},
    "settings": {"errors"},
    "recipe": {"errors", "units", "settings", "methods"},
    "machine": {"errors", "memory_errors", "units", "linalg", "recipe"},
    "checkpoint": {"errors", "units", "recipe"},
    "model": _BASE | {"checkpoint"},
    "calibration": _MODELS,
    "job": _MODELS | {"terminal", "machine", "calibration"},
    "report": _JOBS,
    "tools": _JOBS,
    "integrations": _JOBS,
    "api": _JOBS | {"report", "tools", "integrations"},
    "cli": _JOBS | {"report", "tools", "integrations", "api"},
    "__main__": {"cli"},
}

MODULES = sorted(path.relative_to(PACKAGE) for path in PACKAGE.rglob("*.py"))


def imported(path: Path) -> Iterator[str]:
    """Full names of all that a module imports, wherever in it the import stands."""
    here = ("streamcomp", *path.parent.parts)
    for node in ast.walk(ast.parse((PACKAGE / path).read_text("utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            start = here[: len(here) - node.level + 1] if node.level else ()
            module = ".".join((*start, *([node.module] if node.module else [])))
            # "from streamcomp import linalg" imports a room too
            yield from (f"{module}.{alias.name}" for alias in node.names)


def room_of(path: Path) -> str:
    return path.parts[0].removesuffix(".py")


def rooms_imported(path: Path) -> set[str]:
    names = (name.split(".") for name in imported(path))
    return {parts[1] for parts in names if parts[0] == "streamcomp" and len(parts) > 1}


def test_every_room_has_its_place() -> None:
    assert len(MODULES) > 20
    assert {room_of(path) for path in MODULES} <= {*ALLOWED, "__init__"}


@pytest.mark.parametrize("path", [p for p in MODULES if room_of(p) != "__init__"], ids=str)
def test_imports_point_one_way(path: Path) -> None:
    room = room_of(path)

    assert rooms_imported(path) - {room} <= ALLOWED[room]


@pytest.mark.parametrize("path", [p for p in MODULES if room_of(p) == "linalg"], ids=str)
def test_linalg_imports_torch_and_the_standard_library_alone(path: Path) -> None:
    packages = {name.split(".")[0] for name in imported(path)}

    assert packages - set(sys.stdlib_module_names) <= {"torch", "streamcomp"}


@pytest.mark.parametrize("room", ["errors", "units", "recipe"])
def test_the_ground_floor_needs_the_standard_library_alone(room: str) -> None:
    packages = {name.split(".")[0] for name in imported(Path(f"{room}.py"))}

    assert packages - set(sys.stdlib_module_names) <= {"streamcomp"}


def test_the_order_of_rooms_has_no_circle() -> None:
    for room, below in ALLOWED.items():
        assert all(room not in ALLOWED[other] for other in below), room


def test_each_dependency_is_imported_or_needed_by_one_that_is() -> None:
    """``Tensor.numpy`` needs numpy, which torch does not install; ``device_map`` accelerate."""
    text = (PACKAGE.parent / "pyproject.toml").read_text("utf-8")
    listed = text.partition("\ndependencies = [")[2].partition("\n]")[0]
    declared = set(re.findall(r'^    "([a-z_0-9]+)', listed, re.MULTILINE))

    packages = {name.split(".")[0] for path in MODULES for name in imported(path)}

    assert {"safetensors", "torch", "transformers"} < declared
    assert declared - packages == {"accelerate"}


# -- what the package itself imports ----------------------------------------------------------


def test_importing_the_package_or_the_command_line_imports_nothing_large() -> None:
    script = """
import sys
import streamcomp, streamcomp.cli
print(sorted({"numpy", "torch", "transformers"} & sys.modules.keys()))
"""
    assert run_python("-c", script).out == "[]\n"


def test_each_public_name_is_found_where_it_is_made() -> None:
    assert streamcomp.__all__ == sorted(streamcomp.__all__)
    assert set(streamcomp.__all__) <= set(dir(streamcomp))
    for name in streamcomp.__all__:
        value = getattr(streamcomp, name)
        assert value.__name__ == name
        assert value is getattr(sys.modules[value.__module__], name)


def test_a_public_name_can_be_imported_first() -> None:
    assert run_python("-c", "from streamcomp import Plan").code == 0
    refused = run_python("-c", "from streamcomp import plans")
    assert refused.code == 1 and "cannot import name 'plans' from 'streamcomp'" in refused.err


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'streamcomp' has no attribute 'compres'"):
        _ = streamcomp.compres
