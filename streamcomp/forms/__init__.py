"""Stored forms of a weight: one file each, looked up by name."""

from __future__ import annotations

from streamcomp.errors import RecipeError
from streamcomp.forms.base import Allowance, Form, Matrix
from streamcomp.forms.pivot import Pivot
from streamcomp.forms.shared import Shared
from streamcomp.forms.storage import Floats, Storage, StorageSettings, storage_of
from streamcomp.forms.uv import Uv

__all__ = [
    "FORMS",
    "Allowance",
    "Floats",
    "Form",
    "Matrix",
    "Storage",
    "StorageSettings",
    "find_form",
    "form_of",
]

FORMS: dict[str, type[Form]] = {form.name: form for form in (Pivot, Uv, Shared)}


def find_form(name: str) -> type[Form]:
    """The form called ``name``; RecipeError if there is none."""
    if name not in FORMS:
        raise RecipeError(f"form {name!r} unknown; one of: {', '.join(FORMS)}")
    return FORMS[name]


def form_of(settings: StorageSettings) -> Form:
    """The form that ``settings`` choose, with the storage that they choose."""
    return find_form(settings.form)(storage_of(settings))
