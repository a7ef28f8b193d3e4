"""Methods of compression: one file each, looked up by name. Importing it does not import torch."""

from __future__ import annotations

from streamcomp.errors import RecipeError
from streamcomp.methods.base import Factors, Figures, GradientMoment, Method, Moment, Settings, Site
from streamcomp.methods.rom import Rom
from streamcomp.methods.svd_llm import SvdLlm
from streamcomp.methods.swsc import Swsc
from streamcomp.methods.two_sided import TwoSided

__all__ = [
    "METHODS",
    "Factors",
    "Figures",
    "GradientMoment",
    "Method",
    "Moment",
    "Settings",
    "Site",
    "find_method",
]

METHODS: dict[str, Method] = {
    method.name: method for method in (TwoSided(), SvdLlm(), Rom(), Swsc())
}


def find_method(name: str) -> Method:
    """The method called ``name``; RecipeError if there is none."""
    if name not in METHODS:
        raise RecipeError(f"method {name!r} unknown; one of: {', '.join(METHODS)}")
    return METHODS[name]
