"""HTML that holds text from anywhere: every name is escaped on its way in."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence
from typing import NewType

__all__ = ["Html", "counted", "details", "listing", "percent", "section", "table", "tag", "text"]

# Markup, told from text by its type: mypy refuses a name that was not escaped on its way in.
Html = NewType("Html", str)


def text(value: object) -> Html:
    """``value`` as text or attribute: names come from untrusted checkpoints, in any encoding."""
    return Html(html.escape(str(value).encode("utf-8", "replace").decode()))


def tag(name: str, *children: Html, **attributes: object) -> Html:
    """``<name ...>children</name>``; attributes are spelled ``class_`` and ``stroke_width``."""
    pairs = (f' {key.rstrip("_").replace("_", "-")}="{text(v)}"' for key, v in attributes.items())
    return Html(f"<{name}{''.join(pairs)}>{''.join(children)}</{name}>\n")


def section(title: str, explanation: str, *children: Html) -> Html:
    heading = (tag("h2", text(title)), tag("p", text(explanation), class_="dim"))
    return tag("section", *heading, *children)


def table(head: Sequence[str], rows: Iterable[Sequence[object]], class_: str = "") -> Html:
    lines = [tag("tr", *(tag("th", text(cell), scope="col") for cell in head))] if head else []
    lines += [tag("tr", *(tag("td", text(cell)) for cell in row)) for row in rows]
    return tag("div", tag("table", *lines, class_=class_), class_="scroll")


def details(title: str, *children: Html) -> Html:
    """Children that a click shows."""
    return tag("details", tag("summary", text(title)), *children)


def listing(items: Iterable[str], class_: str = "") -> Html:
    return tag("ul", *(tag("li", text(item), class_=class_) for item in items))


def counted(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def percent(share: float) -> str:
    return f"{100 * share:.3g}%"
