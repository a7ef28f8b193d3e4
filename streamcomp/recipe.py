"""The settings of a job: a :class:`Recipe` for its result, :class:`Resources` for its means.

A recipe decides the result and is fixed for the life of a job. Resources may change between
two runs of the same job.

Each field carries its help, unit, range and choices (:mod:`streamcomp.settings`), so that a new
setting is added only here.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from streamcomp.errors import RecipeError
from streamcomp.methods import METHODS as _METHODS
from streamcomp.methods import find_method
from streamcomp.settings import about, check_settings, parse_settings, setting
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

METHODS = tuple(_METHODS)
FORMS = tuple(dict.fromkeys(form for method in _METHODS.values() for form in method.forms))
STATISTICS = ("dense", "compressed", "none")
ALLOCATIONS = ("uniform", "loss")
AXES = ("auto", "rows", "columns")
_AUTO = "auto"
# More threads than this only wait for each other, and far more kill the process.
_THREADS_PER_CORE = 4
_DEVICE = re.compile(r"auto|cpu|cuda(:\d+)?")
_BLOCKS = re.compile(r"(?:(first|last):(\d+)|(\d+)-(\d+))")


def _matching(pattern: re.Pattern[str], ways: str) -> Callable[[str, str], None]:
    """A check that a value matches ``pattern``; ``ways`` describes it to the user."""

    def check(name: str, value: str) -> None:
        if not pattern.fullmatch(value):
            raise RecipeError(f"{name} {value!r} unknown: {ways}")

    return check


def _check_regex(name: str, value: str) -> None:
    try:
        re.compile(value)
    except re.error as error:
        raise RecipeError(f"{name} {value!r} is no regular expression: {error}") from None


def _check_bytes(name: str, value: str) -> None:
    parse_bytes(value)


def _check_sources(name: str, value: tuple[str, ...]) -> None:
    if not all(value):
        raise RecipeError(f"{name} '': a file, a folder or a dataset on the hub is needed")


@dataclass(frozen=True)
class Recipe:
    """The settings that determine the compressed model, given its source.

    ``"auto"`` becomes the method's default when the recipe is made.
    """

    ratio: float | tuple[float, ...] = setting(
        0.2, section="common", unit="SHARE[,...]", above=0, below=1, several=True, short="-r",
        help="Share of the linears' parameters to remove; several give a folder each from one "
        "analysis.", example="0.2,0.4", affects="output",
    )  # fmt: skip
    size: str = setting(
        "", section="common", unit="BYTES", check=_check_bytes, default_help="no limit",
        help="The most bytes of weights in the result, instead of --ratio.",
        example="5GiB", affects="output",
    )  # fmt: skip
    method: str = setting(
        "two-sided", section="common", choices=METHODS, short="-m",
        help="two-sided weighs errors by what they do to the model's loss; svd-llm by the inputs; "
        "rom takes principal components of the outputs, block after block; swsc lets channels "
        "share weights.",
    )  # fmt: skip
    form: str = setting(
        _AUTO, section="method", choices=FORMS, default_help="pivot; shared for swsc",
        help="How factors are stored: pivot holds a higher rank in the same bytes, uv is plain "
        "low rank, shared is swsc's.", affects="output",
    )  # fmt: skip
    statistics: str = setting(
        _AUTO, section="calibration", choices=STATISTICS, default_help="dense; compressed for rom",
        help="Take moments from the dense model's hidden states, from those of the blocks "
        "compressed so far, or not at all.",
    )  # fmt: skip
    allocation: str = setting(
        _AUTO, section="method", choices=ALLOCATIONS,
        default_help="loss for two-sided, otherwise uniform",
        help="Share the ratio evenly among linears, or so that their summed loss is smallest.",
        affects="output",
    )  # fmt: skip
    blocks: str = setting(
        "", section="method", unit="WHICH", default_help="all", example="last:12",
        check=_matching(_BLOCKS, "last:12, first:4 or 3-10"),
        help="Blocks to compress: last:12, first:4 or 3-10. The others stay dense and count in "
        "the ratio.",
    )  # fmt: skip
    module_ratio: float = setting(
        0.0, section="method", unit="SHARE", minimum=0, below=1, default_help="as --ratio asks",
        help="Share to remove from each linear of those blocks, instead of --ratio.",
        example="0.54", affects="output",
    )  # fmt: skip
    clusters: int = setting(
        0, section="method", unit="K", minimum=0, default_help="whatever loses least",
        help="For swsc: representatives per linear.",
    )  # fmt: skip
    axis: str = setting(
        _AUTO, section="method", choices=AXES, help="For swsc: whether rows or columns share."
    )
    damping: float = setting(
        0.0, section="method", unit="SHARE", minimum=0, maximum=0.5, affects="decompositions",
        default_help="0.01 of the gradients' moments for two-sided, otherwise what is needed",
        help="Added to the moments' diagonals, relative to their mean.", example="1e-3",
    )  # fmt: skip
    update: bool = setting(
        False, section="method", affects="output",
        help="Refit left factors in closed form on the outputs of compressed blocks.",
    )  # fmt: skip
    anchor: float = setting(
        1.0, section="method", unit="SHARE", minimum=0, maximum=1, affects="output", example="0.5",
        help="For --update: share of the dense model's outputs in the target; the rest comes from "
        "the compressed stream.",
    )  # fmt: skip
    refine: int = setting(
        0, section="method", unit="STEPS", minimum=0, affects="output", example="200",
        help="Train each block's factors against the dense block for so many steps.",
    )  # fmt: skip
    rate: float = setting(
        0.0, section="method", unit="SHARE", minimum=0, maximum=1, affects="output", example="1e-3",
        default_help="chosen for --refine",
        help="Learning rate of --refine, relative to the factors' size.",
    )  # fmt: skip
    calibration: tuple[str, ...] = setting(
        (), section="calibration", unit="SOURCE", check=_check_sources, is_path=True, short="-c",
        help="File of text, .jsonl, .json, .csv or .tsv, a folder of them, or a hub dataset; "
        "repeat it to mix evenly.", default_help="Python's language reference", example="wiki.txt",
    )  # fmt: skip
    chat: bool = setting(
        False, section="calibration",
        help="Render calibration texts through the model's chat template; objects of a .jsonl or "
        ".json may hold messages.",
    )  # fmt: skip
    samples: int = setting(
        128, section="calibration", unit="WINDOWS", minimum=1, help="Calibration windows."
    )
    seq_len: int = setting(
        512, section="calibration", unit="TOKENS", minimum=2, help="Tokens per window."
    )
    batch: int = setting(
        0, section="memory", unit="WINDOWS", minimum=0, help="Windows per forward.",
        default_help="as many as are useful and fit",
    )  # fmt: skip
    store_every: int = setting(
        1, section="memory", unit="K", minimum=1,
        help="For two-sided: keep the hidden states of every K-th block on disk and run the "
        "others again.",
    )  # fmt: skip
    seed: int = setting(
        0, section="calibration", unit="N", minimum=0, maximum=2**63 - 1,
        help="Draws the calibration windows.",
    )  # fmt: skip
    include: str = setting(
        "", section="method", unit="REGEX", check=_check_regex, default_help="all",
        help="Compress only the linears whose name matches.", example="'mlp\\.'",
    )  # fmt: skip
    exclude: str = setting(
        "", section="method", unit="REGEX", check=_check_regex, default_help="none",
        help="Leave out the linears whose name matches.", example="k_proj",
    )  # fmt: skip

    def __post_init__(self) -> None:
        if isinstance(self.ratio, list | tuple):
            several = tuple(float(ratio) for ratio in self.ratio)
            object.__setattr__(self, "ratio", several[0] if len(several) == 1 else several)
        check_settings(self)
        self._resolve()
        self._check_ratios()
        self._check_together()

    @property
    def ratios(self) -> tuple[float, ...]:
        """One per output."""
        return self.ratio if isinstance(self.ratio, tuple) else (self.ratio,)

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
        """A recipe from plain TOML values; unknown names are refused."""
        return cls(**parse_settings(cls, settings, origin))

    def _resolve(self) -> None:
        """Replace "auto" by the method's defaults."""
        method = find_method(self.method)
        by_loss = method.losses_compare and not self.module_ratio
        defaults = {
            "form": method.forms[0],
            "statistics": method.statistics[0],
            "allocation": "loss" if by_loss else "uniform",
        }
        for name, value in defaults.items():
            if getattr(self, name) == _AUTO:
                object.__setattr__(self, name, value)

    def _check_ratios(self) -> None:
        if not self.ratios:
            raise RecipeError("ratio (): at least one is needed, e.g. 0.2")
        if len({f"{ratio:g}" for ratio in self.ratios}) < len(self.ratios):
            raise RecipeError(
                f"ratio {self.ratio}: several ratios must differ in their first six digits"
            )
        if len(self.ratios) > 1 and (self.size or self.module_ratio):
            raise RecipeError("size and module_ratio are for one output: give one ratio or none")
        if self.size and self.module_ratio:
            raise RecipeError("size and module_ratio exclude each other: give one of them")

    def _check_together(self) -> None:
        """RecipeError where two settings contradict each other."""
        method = find_method(self.method)
        defaults = {field.name: field.default for field in fields(self)}
        for other in _METHODS.values():
            for name in set(other.settings) - set(method.settings):
                if getattr(self, name) != defaults[name]:
                    raise RecipeError(f"{name} is for method {other.name}")
        for wrong, message in (
            (self.form not in method.forms,
             f"form {self.form} is not for method {self.method}: use {' or '.join(method.forms)}"),
            (self.statistics not in method.statistics,
             f"statistics {self.statistics} are not for method {self.method}: "
             f"use {' or '.join(method.statistics)}"),
            (self.allocation == "loss" and self.statistics == "compressed",
             "allocation loss needs all spectra before the first block is compressed: "
             "use --statistics dense"),
            (self.allocation == "loss" and not (method.has_spectra and self.statistics != "none"),
             f"allocation loss needs the spectra of statistics, which method {self.method} with "
             f"statistics {self.statistics} does not have: use --allocation uniform"),
            (self.allocation == "loss" and self.module_ratio > 0,
             "module_ratio shares the ratio evenly: use --allocation uniform"),
            (self.follows and not method.can_follow,
             f"update and refine are not for method {self.method}"),
            (self.statistics == "none" and self.follows, "update and refine need statistics"),
            (self.anchor != 1 and not self.update, "anchor is for update: give --update too"),
            (self.rate > 0 and not self.refine, "rate is for refine: give --refine too"),
            (self.refine > 0 and self.samples < 2, "refine holds windows out: give --samples 2"),
        ):  # fmt: skip
            if wrong:
                raise RecipeError(message)


@dataclass(frozen=True)
class Resources:
    """The machine's resources for a job; may change from one run of a job to the next."""

    max_ram: str | None = setting(
        None, section="common", unit="SIZE", default_help="80% of what is free", example="32G",
        help="Resident memory that is never exceeded: 32G, 900MiB, 75% of the machine.",
        affects="nothing",
    )  # fmt: skip
    device: str = setting(
        "auto", section="common", unit="auto|cpu|cuda[:N]", example="cuda:1", affects="nothing",
        check=_matching(_DEVICE, "auto, cpu, cuda or cuda:N"),
        help="Where blocks run and are decomposed; hidden states stay in files.",
    )  # fmt: skip
    max_vram: str | None = setting(
        None, section="memory", unit="SIZE", default_help="90% of what is free there",
        help="GPU memory that is never exceeded, driver and libraries included: 24G, 80%.",
        example="12G", affects="nothing",
    )  # fmt: skip
    threads: int = setting(
        0, section="memory", unit="N", minimum=0, default_help="one per core", affects="nothing",
        help="CPU threads.",
    )  # fmt: skip
    work_dir: Path | None = setting(
        None, section="output", unit="DIR", is_path=True, default_help="OUT/.streamcomp",
        help="Folder for hidden states and the journal, best on a fast disk.",
        example="/scratch/job", affects="nothing",
    )  # fmt: skip
    keep_work: bool = setting(
        False, section="output", affects="nothing",
        help="Keep decompositions and moments in the work folder, for jobs of another ratio, form "
        "or damping with the same --work-dir.",
    )  # fmt: skip

    stream_download: bool = setting(
        False, section="output", affects="nothing",
        help="Fetch the shards of a hub model one at a time as they are needed and drop them "
        "again, for a disk smaller than the model. A sweep over all blocks fetches it anew.",
    )  # fmt: skip
    max_shards: str | None = setting(
        None, section="output", unit="SIZE", example="40G", affects="nothing",
        default_help="what two neighbouring blocks need",
        help="Disk that shards of --stream-download may take.",
    )  # fmt: skip

    def __post_init__(self) -> None:
        check_settings(self)
        if self.max_shards and not self.stream_download:
            raise RecipeError("max_shards is for stream_download: give --stream-download too")
        if self.max_shards:
            parse_bytes(self.max_shards)
        limit = _THREADS_PER_CORE * (os.cpu_count() or 1)
        if self.threads > limit:
            raise RecipeError(f"threads {self.threads}: at most {limit} are of use on this machine")


def _affecting(results: str) -> tuple[str, ...]:
    return tuple(name for name, one in about(Recipe).items() if one.affects == results)


# Jobs that differ only in these share their analysis, or their moments.
OUTPUT_FIELDS = _affecting("output")
DECOMPOSITION_FIELDS = _affecting("decompositions")


def chosen_blocks(blocks: str, total: int) -> range:
    """Numbers of the blocks meant by ``blocks``, out of ``total``; RecipeError if there are none.

    ``last:12``, ``first:4``, ``3-10`` (both ends included), or "" for all of them.
    """
    match = _BLOCKS.fullmatch(blocks)
    if match is None:
        return range(total)
    if match[1]:
        count = int(match[2])
        chosen = range(total - count, total) if match[1] == "last" else range(count)
    else:
        chosen = range(int(match[3]), int(match[4]) + 1)
    if not len(chosen) or chosen.start < 0 or chosen.stop > total:
        raise RecipeError(f"blocks {blocks}: the model has blocks 0 to {total - 1}")
    return chosen
