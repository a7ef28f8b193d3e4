"""Rows of the journal and of the report: what a job writes down, typed.

On disk each row is a JSON object with the names of its fields as keys; a field that has its default
is left out. A value of another type than its field's is refused, so a damaged file is noticed where
it is read. A key that no field has is refused in a journal, whose header carries a version; in a
report it is passed over, so that a finished model stays readable.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import MISSING, Field, asdict, dataclass, field, fields, is_dataclass
from functools import cache
from typing import Any, ClassVar, TypeVar, get_args, get_origin, get_type_hints

from streamcomp.checkpoint.digests import FileDigest
from streamcomp.job.levers import Levers
from streamcomp.machine.rates import MachineRates
from streamcomp.recipe import Recipe

__all__ = [
    "AnalysisRow",
    "DenseRow",
    "ExpertsRow",
    "Header",
    "JobLevers",
    "LinearRow",
    "MemoryFigures",
    "ModelFigures",
    "Refined",
    "RefinedBlock",
    "Report",
    "Row",
    "StepResult",
    "StepRow",
]

R = TypeVar("R", bound="Row")

_TOO_LARGE = 2**63  # for a count of anything
_DEEPEST = 16  # nesting of plain values
_SECONDS = ("seconds", "stages", "limits", "planned_seconds")  # fields
_MOST_SECONDS = 1e12


class Row:
    """Base of the rows: to plain values, as JSON holds them, and back."""

    _strict: ClassVar[bool] = True  # refuses keys that no field has, also in rows inside of it

    def to_dict(self) -> dict[str, Any]:
        """Plain values, without the fields that have their defaults."""
        assert is_dataclass(self)
        values = ((about, vars(self)[about.name]) for about in fields(self))
        return {about.name: _plain(value) for about, value in values if value != _default(about)}

    @classmethod
    def from_dict(cls: type[R], values: Mapping[str, Any]) -> R:
        """The row of these plain values; ValueError where a value is missing or of another type."""
        row: R = _parsed(cls, dict(values), cls.__name__, cls._strict)
        return row


# -- linears -----------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class AnalysisRow(Row):
    """How the decomposition of one linear went."""

    name: str  # on disk
    rows: int  # outputs
    columns: int  # inputs
    energy: float | None = None  # sum of the spectrum; None where no moment was decomposed
    damping: float  # added to a moment, as a share of the mean of its diagonal
    condition: float | None  # largest over smallest eigenvalue of the moment; None: not finite
    fallback: str  # what was done because the data did not allow the method itself; or ""
    tokens: int | None = None  # that reached it; None: all, as every linear but an expert's


@dataclass(frozen=True, kw_only=True)
class LinearRow(AnalysisRow):
    """One factored linear of an output."""

    rank: int
    relative_loss: float  # share of the energy of its outputs that the factors miss
    loss: float | None = None  # in the unit of the method
    numbers: int | None = None  # stored numbers, where channels share weights
    bits_per_weight: float | None = None  # likewise
    spec: dict[str, Any]  # its entry in config.json, without the dtype
    within: str = ""  # name of the module whose entry is instead, which stores several together


@dataclass(frozen=True, kw_only=True)
class ExpertsRow(Row):
    """The factored experts of one block of an output."""

    name: str  # of their module, on disk
    spec: dict[str, Any]  # its entry in config.json, without the dtype


@dataclass(frozen=True, kw_only=True)
class DenseRow(Row):
    """A linear that could be factored and stays dense."""

    name: str
    rows: int
    columns: int


@dataclass(frozen=True, kw_only=True)
class Refined(Row):
    """A block's relative error on held-out windows before and after its factors were trained."""

    before: float
    after: float
    steps: int  # of the training that were kept


@dataclass(frozen=True, kw_only=True)
class RefinedBlock(Refined):
    block: int


# -- the journal -------------------------------------------------------------------------


@dataclass(frozen=True)
class JobLevers(Levers):
    """The levers that a job began with, and what else it keeps for life or compares."""

    threads: int
    device: str
    analysis: bool  # whether decompositions are kept from one sweep to the next
    keep_work: bool
    from_moments: bool = False  # whether decompositions are made of moments that a job kept

    @property
    def planned(self) -> Levers:
        """The levers that a plan is made with."""
        return Levers.of_journal(vars(self))


@dataclass(frozen=True, kw_only=True)
class Header(Row):
    """The first line of a journal."""

    version: int
    fingerprint: dict[str, Any]
    levers: JobLevers
    total: int  # steps
    planned_seconds: tuple[float, ...]  # of each step

    @property
    def recipe(self) -> dict[str, Any]:
        """The part of the fingerprint that is the recipe."""
        names = {setting.name for setting in fields(Recipe)}
        return {name: value for name, value in self.fingerprint.items() if name in names}


@dataclass(frozen=True, kw_only=True)
class StepResult(Row):
    """Everything that a step reports; each kind of step fills in its part."""

    block: int | None = None
    output: int | None = None  # None: all outputs share the step
    digest: str | None = None  # of the block's bytes as they were read, if all were
    detail: str = ""  # for the progress
    notes: tuple[str, ...] = ()  # for the user
    windows: int | None = None  # of calibration
    nll: float | None = None  # mean over the calibration's tokens, dense model
    analysis: tuple[AnalysisRow, ...] = ()
    linears: tuple[LinearRow, ...] = ()
    experts: ExpertsRow | None = None
    unreached: tuple[str, ...] = ()  # linears that no calibration token reached
    ranks: tuple[dict[str, int | None], ...] = ()  # by output and linear; None: stays dense
    refined: Refined | None = None


@dataclass(frozen=True, kw_only=True)
class StepRow(StepResult):
    """A finished step: ``StepRow(**vars(result), step=name, ...)``."""

    step: str  # its name
    files: dict[str, FileDigest] = field(default_factory=dict)  # that it left, by name
    fetched: dict[str, int] = field(default_factory=dict)  # shards of the source, with their bytes
    # digests of the source's tensors outside of blocks, in the first step that read them
    sources: dict[str, str] = field(default_factory=dict)
    seconds: float
    stages: dict[str, float]  # seconds of each
    limits: dict[str, float]  # seconds of each at this machine's rates
    peak_bytes: int
    predicted_bytes: int
    device_peak_bytes: int | None = None  # None: on the CPU
    device_predicted_bytes: int | None = None

    def to_dict(self) -> dict[str, Any]:
        return {"step": self.step} | super().to_dict()


# -- the report --------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class ModelFigures(Row):
    """A model before and, where the name says kept, after."""

    source: str
    type: str | None  # transformers' model_type
    linear_parameters: int  # of the linears that could be factored
    linear_parameters_kept: int
    ratio: float  # share of the linears' parameters removed
    parameters: int
    parameters_kept: int
    model_ratio: float  # share of all parameters removed
    bytes: int
    bytes_kept: int


@dataclass(frozen=True, kw_only=True)
class MemoryFigures(Row):
    budget_bytes: int
    minimum_bytes: int  # the smallest budget that would do
    predicted_bytes: int
    peak_bytes: int
    device_budget_bytes: int | None = None  # None: on the CPU
    device_predicted_bytes: int | None = None
    device_peak_bytes: int | None = None


@dataclass(frozen=True, kw_only=True)
class Report(Row):
    """``streamcomp_report.json`` of one output."""

    _strict: ClassVar[bool] = False

    model: ModelFigures
    memory: MemoryFigures
    seconds: float
    stages: dict[str, float]  # seconds of each, over all steps
    limits: dict[str, float]
    rates: MachineRates
    windows: int
    recipe: dict[str, Any]
    levers: JobLevers
    fingerprint: dict[str, Any]
    versions: dict[str, str]
    notes: tuple[str, ...]
    linears: tuple[LinearRow, ...]
    dense: tuple[DenseRow, ...]
    refined: tuple[RefinedBlock, ...]
    left: dict[str, str]  # modules left as they are, and why
    steps: tuple[StepRow, ...]
    experts: tuple[ExpertsRow, ...] = ()
    asked: float | None = None  # the ratio asked for
    files: dict[str, FileDigest] = field(default_factory=dict)  # of OUT, except the report

    def to_dict(self) -> dict[str, Any]:
        """Plain values; of the report itself, every field that is not None."""
        return {name: _plain(value) for name, value in vars(self).items() if value is not None}

    @property
    def settings(self) -> Recipe:
        """The recipe, without settings that this version does not have."""
        names = {setting.name for setting in fields(Recipe)}
        return Recipe.from_mapping({k: v for k, v in self.recipe.items() if k in names}, "report")

    @property
    def specs(self) -> dict[str, dict[str, Any]]:
        """Entries in config.json, without dtypes, by the names of modules on disk."""
        linears = {row.name: row.spec for row in self.linears if not row.within}
        return linears | {row.name: row.spec for row in self.experts}

    @property
    def nll(self) -> float | None:
        """Mean negative log-likelihood of the dense model, where a step took it."""
        return next((step.nll for step in self.steps if step.nll is not None), None)


# -- to plain values and back ------------------------------------------------------------


def _plain(value: Any) -> Any:
    if isinstance(value, Row):
        return value.to_dict()
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if is_dataclass(value) and not isinstance(value, type):
        return asdict(value)
    return value


def _parsed(kind: Any, value: Any, where: str, strict: bool) -> Any:
    """``value`` as ``kind``: plain, a dataclass, or a tuple or dict of such, or None."""
    origin, inner = get_origin(kind), get_args(kind)
    if type(None) in inner:
        return None if value is None else _parsed(inner[0], value, where, strict)
    if kind is Any:
        _check_depth(value, where)
        return value
    if is_dataclass(kind) and isinstance(value, dict):
        return _from_values(kind, value, where, strict)
    if origin is tuple and isinstance(value, list | tuple):
        return tuple(_parsed(inner[0], item, where, strict) for item in value)
    if origin is dict and isinstance(value, dict):
        return {key: _parsed(inner[1], item, where, strict) for key, item in value.items()}
    if type(value) is int and not 0 <= value < _TOO_LARGE:
        raise ValueError(f"{where} is a number of {value.bit_length()} bits, or below zero")
    if type(value) is int and kind is float:
        return float(value)
    if origin is None and isinstance(value, kind) and isinstance(value, bool) is (kind is bool):
        return value
    raise ValueError(f"{where} is {value!r:.80}")


def _check_depth(value: Any, where: str, left: int = _DEEPEST) -> None:
    """ValueError where lists and objects are nested more than ``left`` deep."""
    if not left:
        raise ValueError(f"{where} is nested more than {_DEEPEST} deep")
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    for item in inner:
        _check_depth(item, where, left - 1)


def _check_seconds(name: str, value: Any) -> None:
    """ValueError where a field of seconds holds what no job can take."""
    if name in _SECONDS:
        held = value.values() if isinstance(value, dict) else value
        for seconds in held if isinstance(held, Iterable) else [held]:
            if not 0 <= seconds < _MOST_SECONDS:
                raise ValueError(f"{name} has {seconds}")


def _from_values(kind: Any, values: dict[str, Any], where: str, strict: bool) -> Any:
    hints = _hints(kind)
    if strict and not values.keys() <= hints.keys():
        raise ValueError(f"{where} has unknown keys: {sorted(values.keys() - hints.keys())}")
    missing = [f.name for f in fields(kind) if _default(f) is MISSING and f.name not in values]
    if missing:
        raise ValueError(f"{where} lacks {', '.join(missing)}")
    read = {
        name: _parsed(hint, values[name], f"{where}.{name}", strict)
        for name, hint in hints.items()
        if name in values
    }
    for name, value in read.items():
        _check_seconds(name, value)
    return kind(**read)


@cache
def _hints(kind: Any) -> dict[str, Any]:
    hints = get_type_hints(kind)
    return {about.name: hints[about.name] for about in fields(kind)}


def _default(about: Field[Any]) -> Any:
    return about.default if about.default_factory is MISSING else about.default_factory()
