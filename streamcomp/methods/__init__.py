"""Methods of decomposition: a file each, found by name."""

from __future__ import annotations

from streamcomp.errors import RecipeError
from streamcomp.methods.base import Method, Moment
from streamcomp.methods.factors import factor_tensors
from streamcomp.methods.svd_llm import SvdLlm

__all__ = ["METHODS", "Method", "Moment", "factor_tensors", "find_method"]

METHODS: dict[str, Method] = {method.name: method for method in (SvdLlm(),)}


def find_method(name: str) -> Method:
    """The method called ``name``; RecipeError if there is none."""
    if name not in METHODS:
        raise RecipeError(f"method {name!r} unknown; one of: {', '.join(METHODS)}")
    return METHODS[name]
