"""The settings of a job: a :class:`Recipe` says what is computed, :class:`Resources` with what.

A recipe decides the result and is fixed for the life of a job. Resources may change between
two runs of the same job.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from streamcomp.errors import RecipeError

__all__ = ["ALLOCATIONS", "ANALYSIS_FIELDS", "FORMS", "STATISTICS", "Recipe", "Resources"]

FORMS = ("pivot", "uv")
STATISTICS = ("dense", "compressed")
ALLOCATIONS = ("uniform",)
_DEVICE = re.compile(r"auto|cpu|cuda(:\d+)?")

# Fields that calibration and statistics depend on; the others only shape the output.
ANALYSIS_FIELDS = ("calibration", "samples", "seq_len", "seed", "statistics", "batch")


@dataclass(frozen=True)
class Recipe:
    """All that decides the compressed model, given its source."""

    ratio: float = 0.2  # share of the eligible linears' parameters to remove, in (0, 1)
    method: str = "svd-llm"  # a name of streamcomp.methods
    form: str = "pivot"  # how factors are stored: FORMS
    statistics: str = "dense"  # which stream the moments are taken from
    allocation: str = "uniform"  # how ranks are shared among linears
    calibration: tuple[str, ...] = ()  # files, folders, hub datasets; () = Python's reference
    samples: int = 128  # calibration windows
    seq_len: int = 512  # tokens per window
    batch: int = 0  # windows per forward; 0 = the planner chooses
    seed: int = 0  # draws the windows
    include: str = ""  # regex searched in a linear's name; "" = all
    exclude: str = ""  # regex searched in a linear's name; "" = none

    def __post_init__(self) -> None:
        if not 0 < self.ratio < 1:
            raise RecipeError(
                f"ratio {self.ratio:g}: the share to remove lies between 0 and 1, e.g. 0.2"
            )
        _one_of("form", self.form, FORMS)
        _one_of("statistics", self.statistics, STATISTICS)
        _one_of("allocation", self.allocation, ALLOCATIONS)
        for name, least in (("samples", 1), ("seq_len", 2), ("batch", 0), ("seed", 0)):
            if (value := getattr(self, name)) < least:
                raise RecipeError(f"{name} {value}: at least {least} is needed")
        for name in ("include", "exclude"):
            try:
                re.compile(getattr(self, name))
            except re.error as error:
                raise RecipeError(
                    f"{name} {getattr(self, name)!r} is no regular expression: {error}"
                ) from None

    @classmethod
    def from_mapping(cls, settings: Mapping[str, Any], origin: str = "recipe") -> Recipe:
        """A recipe from plain values, as a TOML file holds them; unknown names are refused."""
        kinds = {f.name: type(f.default) for f in fields(cls)}
        values: dict[str, Any] = {}
        for key, value in settings.items():
            name = key.replace("-", "_")
            if name not in kinds:
                raise RecipeError(f"{origin}: unknown setting {key!r}; known: {', '.join(kinds)}")
            values[name] = _coerce(origin, name, value, kinds[name])
        return cls(**values)


@dataclass(frozen=True)
class Resources:
    """With what a job runs; may change from one run of a job to the next."""

    max_ram: str | None = None  # "32G", "75%"; None = 80% of what is available
    device: str = "auto"  # auto, cpu, cuda, cuda:N
    threads: int = 0  # CPU threads; 0 = one per core the process may use
    work_dir: Path | None = None  # streams and journal; None = OUT/.streamcomp

    def __post_init__(self) -> None:
        if not _DEVICE.fullmatch(self.device):
            raise RecipeError(f"device {self.device!r} unknown: auto, cpu, cuda or cuda:N")
        if self.threads < 0:
            raise RecipeError(f"threads {self.threads}: at least 0 is needed (0 = all cores)")


def _one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise RecipeError(f"{name} {value!r} unknown; one of: {', '.join(allowed)}")


def _coerce(origin: str, name: str, value: Any, kind: type) -> Any:
    """``value`` as ``kind``: an int is a float too, a string or a list is a tuple of strings."""
    if kind is tuple:
        items = [value] if isinstance(value, str) else value
        if isinstance(items, list | tuple) and all(isinstance(item, str) for item in items):
            return tuple(items)
    elif kind is float and type(value) in (int, float):
        return float(value)
    elif type(value) is kind:
        return value
    raise RecipeError(f"{origin}: {name} = {value!r} should be of type {kind.__name__}")
