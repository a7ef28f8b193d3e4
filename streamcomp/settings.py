"""Self-describing settings: fields of a dataclass with help, unit, range and choices.

Values are checked against this metadata, and the options of the command line are built from it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from types import UnionType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from streamcomp.errors import RecipeError

__all__ = [
    "SECTIONS",
    "Section",
    "Setting",
    "about",
    "check_settings",
    "kinds_of",
    "parse_settings",
    "setting",
]

Section = Literal["common", "method", "calibration", "memory", "output"]
SECTIONS: tuple[Section, ...] = get_args(Section)

_METADATA = "setting"  # key in a field's metadata


@dataclass(frozen=True, kw_only=True)
class Setting:
    """Description of one setting."""

    help: str  # a sentence for the command line
    section: Section  # of the command line's help
    unit: str = ""  # SHARE, TOKENS, ...
    choices: tuple[str, ...] = ()
    # Its range; None where that end is open.
    minimum: float | None = None
    maximum: float | None = None
    above: float | None = None
    below: float | None = None
    # Called with the name and any value but the default; raises RecipeError.
    check: Callable[[str, Any], None] | None = None
    several: bool = False  # one value, or a tuple of them
    is_path: bool = False  # shells complete it with file names
    default_help: str = ""  # the meaning of a default that its value does not show
    example: str = ""
    short: str = ""  # option of one letter
    # The earliest results of a job that change with it. Jobs that differ only in "output" settings
    # share their analysis; if they differ in "decompositions" settings too, only their moments.
    affects: Literal["moments", "decompositions", "output", "nothing"] = "moments"

    @property
    def range(self) -> str:
        """Its range in words: "0 to 1", "at least 0 and below 1"; "" where there is none."""
        if self.minimum is not None and self.maximum is not None:
            return f"{self.minimum} to {self.maximum}"
        ends = {"at least": self.minimum, "above": self.above}
        ends |= {"at most": self.maximum, "below": self.below}
        return " and ".join(f"{word} {end}" for word, end in ends.items() if end is not None)

    def allows(self, number: float) -> bool:
        """Whether ``number`` is within the range; NaN is outside of every range."""
        return (
            (self.minimum is None or number >= self.minimum)
            and (self.above is None or number > self.above)
            and (self.maximum is None or number <= self.maximum)
            and (self.below is None or number < self.below)
        )

    def check_value(self, name: str, value: Any) -> None:
        """RecipeError where ``value`` is not allowed for the setting ``name``."""
        if self.choices and value not in self.choices:
            raise RecipeError(f"{name} {value!r} unknown; one of: {', '.join(self.choices)}")
        if self.range:
            for number in value if isinstance(value, tuple) else (value,):
                if not self.allows(number):
                    shown = f"{number:g}" if isinstance(number, float) else number
                    example = f", e.g. {self.example}" if self.example else ""
                    raise RecipeError(f"{name} {shown}: must be {self.range}{example}")
        if self.check is not None:
            self.check(name, value)


def setting(default: Any, **metadata: Any) -> Any:
    """A dataclass field with this default and a :class:`Setting` built from ``metadata``."""
    return field(default=default, metadata={_METADATA: Setting(**metadata)})


def about(settings: Any) -> dict[str, Setting]:
    """The metadata of each setting of a dataclass, or of an instance of one."""
    return {each.name: each.metadata[_METADATA] for each in fields(settings)}


def kinds_of(settings: type) -> dict[str, type]:
    """The type of one value of each setting: ``float`` for ``float | tuple[float, ...]``."""
    hints = get_type_hints(settings)
    one = {
        name: get_args(hint)[0] if isinstance(hint, UnionType) else hint
        for name, hint in hints.items()
    }
    return {name: get_origin(hint) or hint for name, hint in one.items()}


def check_settings(settings: Any) -> None:
    """RecipeError where a setting has a value that is neither its default nor allowed."""
    defaults = {each.name: each.default for each in fields(settings)}
    for name, one in about(settings).items():
        if (value := getattr(settings, name)) != defaults[name]:
            one.check_value(name, value)


def parse_settings(settings: type, plain: Mapping[str, Any], origin: str) -> dict[str, Any]:
    """Values by field from plain TOML values; unknown names are refused."""
    kinds, described = kinds_of(settings), about(settings)
    values: dict[str, Any] = {}
    for key, value in plain.items():
        name = key.replace("-", "_")
        if name not in kinds:
            raise RecipeError(f"{origin}: unknown setting {key!r}; known: {', '.join(kinds)}")
        if described[name].several and isinstance(value, list | tuple):
            values[name] = tuple(_coerce(origin, name, item, kinds[name]) for item in value)
        else:
            values[name] = _coerce(origin, name, value, kinds[name])
    return values


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
