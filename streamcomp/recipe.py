"""The settings of a job: a :class:`Recipe` says what is computed, :class:`Resources` with what.

A recipe decides the result and is fixed for the life of a job. Resources may change between
two runs of the same job.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from streamcomp.errors import RecipeError
from streamcomp.units import parse_bytes

__all__ = [
    "ALLOCATIONS",
    "AXES",
    "DECOMPOSITION_FIELDS",
    "FORMS",
    "METHODS",
    "OUTPUT_FIELDS",
    "STATISTICS",
    "Recipe",
    "Resources",
    "chosen_blocks",
]

METHODS = ("two-sided", "svd-llm", "rom", "swsc")
FORMS = ("pivot", "uv", "shared")
STATISTICS = ("dense", "compressed", "none")
ALLOCATIONS = ("uniform", "loss")
AXES = ("auto", "rows", "columns")
_AUTO = "auto"
# More threads than this only wait for each other, and far more kill the process.
_THREADS_PER_CORE = 4
_DEVICE = re.compile(r"auto|cpu|cuda(:\d+)?")
_BLOCKS = re.compile(r"(?:(first|last):(\d+)|(\d+)-(\d+))")

# Fields that shape the output alone: jobs that differ in nothing else share their analysis.
OUTPUT_FIELDS = (
    "ratio", "size", "form", "allocation", "module_ratio", "update", "anchor", "refine", "rate"
)  # fmt: skip
# Fields that shape decompositions, not moments: jobs that differ in these too share their moments.
DECOMPOSITION_FIELDS = ("damping",)


@dataclass(frozen=True)
class Recipe:
    """All that decides the compressed model, given its source.

    ``"auto"`` becomes the method's own value when the recipe is made.
    """

    ratio: float | tuple[float, ...] = 0.2  # share of the linears' parameters to remove; or several
    size: str = ""  # bytes of the output, "5GiB", in the place of a ratio
    method: str = "two-sided"  # METHODS
    form: str = _AUTO  # how factors are stored: FORMS
    statistics: str = _AUTO  # which stream the moments are taken from: STATISTICS
    allocation: str = _AUTO  # how ranks are shared among linears: ALLOCATIONS
    blocks: str = ""  # those to compress: "last:12", "first:4", "3-10"; "" = all
    module_ratio: float = 0.0  # share removed from each linear of those blocks; 0 = from ratio
    clusters: int = 0  # swsc: representatives per linear; 0 = whatever loses least
    axis: str = "auto"  # swsc: AXES
    damping: float = 0.0  # relative, added to the moments; 0 = the method's own
    update: bool = False  # refit left factors on the compressed stream (SVD-LLM's update)
    anchor: float = 1.0  # update: share of the dense stream in the target
    refine: int = 0  # steps of refinement per block; 0 = none
    rate: float = 0.0  # learning rate of the refinement; 0 = its own
    calibration: tuple[str, ...] = ()  # files, folders, hub datasets; () = Python's reference
    chat: bool = False  # render texts through the chat template
    samples: int = 128  # calibration windows
    seq_len: int = 512  # tokens per window
    batch: int = 0  # windows per forward; 0 = the planner chooses
    store_every: int = 1  # two-sided: every how many blocks hidden states stay on disk
    seed: int = 0  # draws the windows
    include: str = ""  # regex searched in a linear's name; "" = all
    exclude: str = ""  # regex searched in a linear's name; "" = none

    def __post_init__(self) -> None:
        self._resolve()
        self._check_ratios()
        _one_of("method", self.method, METHODS)
        _one_of("form", self.form, FORMS)
        _one_of("statistics", self.statistics, STATISTICS)
        _one_of("allocation", self.allocation, ALLOCATIONS)
        _one_of("axis", self.axis, AXES)
        for name, least in (
            ("samples", 1), ("seq_len", 2), ("batch", 0), ("seed", 0), ("refine", 0),
            ("store_every", 1), ("clusters", 0), ("rate", 0), ("damping", 0), ("module_ratio", 0),
            ("anchor", 0),
        ):  # fmt: skip
            if not (value := getattr(self, name)) >= least:
                raise RecipeError(f"{name} {value}: at least {least} is needed")
        for name, most in (("anchor", 1.0), ("damping", 0.5), ("rate", 1.0), ("seed", 2**63 - 1)):
            if (value := getattr(self, name)) > most:
                raise RecipeError(f"{name} {value}: at most {most} is possible")
        if not all(self.calibration):
            raise RecipeError("calibration '': a file, a folder or a dataset on the hub is needed")
        self._check_together()
        for name in ("include", "exclude"):
            try:
                re.compile(getattr(self, name))
            except re.error as error:
                raise RecipeError(
                    f"{name} {getattr(self, name)!r} is no regular expression: {error}"
                ) from None
        if self.blocks and not _BLOCKS.fullmatch(self.blocks):
            raise RecipeError(f"blocks {self.blocks!r} unknown: last:12, first:4 or 3-10")
        if self.size:
            parse_bytes(self.size)

    @property
    def ratios(self) -> tuple[float, ...]:
        """One per output."""
        return self.ratio if isinstance(self.ratio, tuple) else (self.ratio,)

    @property
    def two_sided(self) -> bool:
        """Whether the loss's gradients are needed."""
        return self.method == "two-sided"

    @property
    def follows(self) -> bool:
        """Whether factors are changed on the compressed stream after their decomposition."""
        return self.update or self.refine > 0

    @property
    def compressed_stream(self) -> bool:
        """Whether the windows also run through the compressed blocks."""
        return self.follows or self.statistics == "compressed"

    @classmethod
    def from_mapping(cls, settings: Mapping[str, Any], origin: str = "recipe") -> Recipe:
        """A recipe from plain values, as a TOML file holds them; unknown names are refused."""
        kinds = {f.name: type(f.default) for f in fields(cls)}
        values: dict[str, Any] = {}
        for key, value in settings.items():
            name = key.replace("-", "_")
            if name not in kinds:
                raise RecipeError(f"{origin}: unknown setting {key!r}; known: {', '.join(kinds)}")
            if name == "ratio" and isinstance(value, list | tuple):
                values[name] = tuple(_coerce(origin, name, item, float) for item in value)
            else:
                values[name] = _coerce(origin, name, value, kinds[name])
        return cls(**values)

    def _resolve(self) -> None:
        """Put in the method's own choices."""
        own = {
            "form": "shared" if self.method == "swsc" else "pivot",
            "statistics": "compressed" if self.method == "rom" else "dense",
            "allocation": "loss" if self.two_sided and not self.module_ratio else "uniform",
        }
        for name, value in own.items():
            if getattr(self, name) == _AUTO:
                object.__setattr__(self, name, value)
        if isinstance(self.ratio, list | tuple):
            several = tuple(float(ratio) for ratio in self.ratio)
            object.__setattr__(self, "ratio", several[0] if len(several) == 1 else several)

    def _check_ratios(self) -> None:
        for ratio in self.ratios:
            if not 0 < ratio < 1:
                raise RecipeError(
                    f"ratio {ratio:g}: the share to remove lies between 0 and 1, e.g. 0.2"
                )
        if not self.ratios:
            raise RecipeError("ratio (): at least one is needed, e.g. 0.2")
        if len({f"{ratio:g}" for ratio in self.ratios}) < len(self.ratios):
            raise RecipeError(
                f"ratio {self.ratio}: each of several ratios stands there once, to six digits"
            )
        if not 0 <= self.module_ratio < 1:
            raise RecipeError(f"module_ratio {self.module_ratio:g}: at least 0 and below 1")
        if len(self.ratios) > 1 and (self.size or self.module_ratio):
            raise RecipeError("size and module_ratio are for one output: give one ratio or none")
        if self.size and self.module_ratio:
            raise RecipeError("size and module_ratio exclude each other: give one of them")

    def _check_together(self) -> None:
        """RecipeError where two settings contradict each other."""
        shared = self.method == "swsc"
        for wrong, message in (
            (shared != (self.form == "shared"),
             f"form {self.form} is not for method {self.method}: swsc stores shared channels, "
             "the others pivot or uv"),
            (self.two_sided and self.statistics != "dense",
             "method two-sided takes its statistics from the dense model: leave --statistics out"),
            (self.method == "rom" and self.statistics == "none",
             "method rom needs statistics: dense or compressed"),
            (self.allocation == "loss" and self.statistics == "compressed",
             "allocation loss needs all spectra before the first block is compressed: "
             "use --statistics dense"),
            (self.allocation == "loss" and (shared or self.statistics == "none"),
             f"allocation loss needs the spectra of statistics, which method {self.method} with "
             f"statistics {self.statistics} does not have: use --allocation uniform"),
            (self.allocation == "loss" and self.module_ratio > 0,
             "module_ratio shares the ratio evenly: use --allocation uniform"),
            (shared and self.follows, "update and refine are not for method swsc"),
            (self.statistics == "none" and self.follows, "update and refine need statistics"),
            (self.clusters > 0 and not shared, "clusters is for method swsc"),
            (self.axis != "auto" and not shared, "axis is for method swsc"),
            (self.store_every > 1 and not self.two_sided, "store_every is for method two-sided"),
            (self.anchor != 1 and not self.update, "anchor is for update: give --update too"),
            (self.rate > 0 and not self.refine, "rate is for refine: give --refine too"),
            (self.refine > 0 and self.samples < 2, "refine holds windows out: give --samples 2"),
        ):  # fmt: skip
            if wrong:
                raise RecipeError(message)


@dataclass(frozen=True)
class Resources:
    """With what a job runs; may change from one run of a job to the next."""

    max_ram: str | None = None  # "32G", "75%"; None = 80% of what is available
    device: str = "auto"  # auto, cpu, cuda, cuda:N
    max_vram: str | None = None  # of the GPU, as max_ram; None = 90% of what is free there
    threads: int = 0  # CPU threads; 0 = one per core the process may use
    work_dir: Path | None = None  # streams and journal; None = OUT/.streamcomp
    keep_work: bool = False  # keep decompositions and moments for jobs to come

    def __post_init__(self) -> None:
        if not _DEVICE.fullmatch(self.device):
            raise RecipeError(f"device {self.device!r} unknown: auto, cpu, cuda or cuda:N")
        if self.threads < 0:
            raise RecipeError(f"threads {self.threads}: at least 0 is needed (0 = all cores)")
        most = _THREADS_PER_CORE * (os.cpu_count() or 1)
        if self.threads > most:
            raise RecipeError(f"threads {self.threads}: at most {most} are of use on this machine")


def chosen_blocks(blocks: str, total: int) -> range:
    """The numbers of the blocks meant by ``blocks``, of ``total``; RecipeError if there are none.

    ``last:12``, ``first:4``, ``3-10`` (both ends included), or nothing for all of them.
    """
    match = _BLOCKS.fullmatch(blocks)
    if match is None:
        return range(total)
    if match[1]:
        count = int(match[2])
        found = range(total - count, total) if match[1] == "last" else range(count)
    else:
        found = range(int(match[3]), int(match[4]) + 1)
    if not len(found) or found.start < 0 or found.stop > total:
        raise RecipeError(f"blocks {blocks}: the model has blocks 0 to {total - 1}")
    return found


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
