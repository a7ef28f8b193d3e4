"""Methods of decomposition: a file each, found by name."""

from __future__ import annotations

from streamcomp.errors import RecipeError
from streamcomp.methods.base import GradientMoment, Method, Moment
from streamcomp.methods.factors import factor_tensors, shared_tensors
from streamcomp.methods.rom import Rom
from streamcomp.methods.svd_llm import SvdLlm
from streamcomp.methods.swsc import Swsc
from streamcomp.methods.two_sided import TwoSided

__all__ = [
    "METHODS",
    "GradientMoment",
    "Method",
    "Moment",
    "Swsc",
    "factor_tensors",
    "find_method",
    "shared_tensors",
]

METHODS: dict[str, Method | Swsc] = {
    method.name: method for method in (TwoSided(), SvdLlm(), Rom(), Swsc())
}


def find_method(name: str) -> Method | Swsc:
    """The method called ``name``; RecipeError if there is none."""
    if name not in METHODS:
        raise RecipeError(f"method {name!r} unknown; one of: {', '.join(METHODS)}")
    return METHODS[name]
