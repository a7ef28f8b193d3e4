"""Options made from the fields of settings, and help pages that show them in sections."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import click

from streamcomp.recipe import Recipe, Resources
from streamcomp.settings import SECTIONS, Section, Setting, about, kinds_of

__all__ = ["Command", "Group", "Option", "make_option", "options_of"]


_LARGE = 2**53  # help does not show the end of a range beyond this


class Option(click.Option):
    """An option that has a section of the help page."""

    def __init__(self, *arguments: Any, section: Section, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.section = section


class _InSections:
    """Shows a command's options section by section; click's are the last."""

    def format_options(self, context: click.Context, formatter: click.HelpFormatter) -> None:
        for section in SECTIONS:
            records = [
                record
                for parameter in context.command.get_params(context)
                if isinstance(parameter, click.Option)
                and _section_of(parameter) == section
                and (record := parameter.get_help_record(context))
            ]
            if records:
                with formatter.section(f"{section.capitalize()} options"):
                    formatter.write_dl(records)


def _section_of(parameter: click.Option) -> Section:
    return parameter.section if isinstance(parameter, Option) else "output"


class Command(_InSections, click.Command):
    pass


class Group(_InSections, click.Group):
    """A group of :class:`Command`, which are shown before its options."""

    command_class = Command

    def format_options(self, context: click.Context, formatter: click.HelpFormatter) -> None:
        self.format_commands(context, formatter)
        super().format_options(context, formatter)


def options_of(
    settings: type[Recipe] | type[Resources], *names: str, **changes: Mapping[str, Any]
) -> list[Option]:
    """An option for each of ``names`` among the settings, or for all of them.

    ``changes`` are made to the metadata of some, by name. No option has a default: an option that
    is not given leaves a setting to the recipe's file, or to its default.
    """
    kinds, described = kinds_of(settings), about(settings)
    made = []
    for field in fields(settings):
        if not names or field.name in names:
            one = described[field.name]
            one = replace(one, **changes.get(field.name, {}))
            made.append(make_option(field.name, kinds[field.name], field.default, one))
    return made


def make_option(name: str, kind: type, default: Any, setting: Setting) -> Option:
    """The option ``--name`` of a setting whose single values are of this ``kind``."""
    option = f"--{name.replace('_', '-')}"
    told = "" if (setting.maximum or 0) > _LARGE else setting.range
    remarks = "; ".join(filter(None, (_default(default, setting), told)))
    parts = [setting.help]
    if remarks:
        parts.append(f"[{remarks}]")
    if setting.example:
        parts.append(f"Example: {option} {setting.example}")
    return Option(
        [name, *filter(None, [setting.short]), option],
        section=setting.section,
        help="  ".join(parts),
        type=_type(kind, setting),
        metavar=setting.unit or None,
        is_flag=kind is bool,
        multiple=kind is tuple,
        default=None,
        callback=_checked(default, setting),
    )


def _checked(
    default: Any, setting: Setting
) -> Callable[[click.Context, click.Parameter, Any], Any]:
    """A callback that refuses values that the setting cannot have."""

    def check(context: click.Context, parameter: click.Parameter, value: Any) -> Any:
        if value not in (None, (), default):
            setting.check_value(parameter.name or "", value)
        return value

    return check


def _default(default: Any, setting: Setting) -> str:
    """The default in words; a switch is off unless it is given, so it has none."""
    if isinstance(default, bool):
        return ""
    plain = f"{default:g}" if isinstance(default, float) else default
    if not setting.default_help:
        return f"default: {plain}"
    number = f"{plain} = " if isinstance(default, int | float) else ""
    return f"default: {number}{setting.default_help}"


class _Several(click.ParamType):  # type: ignore[type-arg]
    """One number, or several with commas between them."""

    name = "numbers"

    def convert(self, value: Any, param: Any, ctx: Any) -> float | tuple[float, ...]:
        if isinstance(value, float | tuple):
            return value
        try:
            numbers = tuple(float(part) for part in str(value).split(","))
        except ValueError:
            self.fail(f"{value!r} is no number: write 0.2 or 0.2,0.4", param, ctx)
        return numbers[0] if len(numbers) == 1 else numbers


def _type(kind: type, setting: Setting) -> Any:
    if setting.choices:
        return click.Choice(setting.choices)
    if setting.several:
        return _Several()
    if kind is Path:
        return click.Path(path_type=Path, file_okay=False)
    if setting.is_path:
        return click.Path(readable=False)  # or a name on the hub
    return str if kind is tuple else kind
