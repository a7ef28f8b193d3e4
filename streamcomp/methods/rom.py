"""LLM-ROM: a reduced-order model of each linear's features (arXiv 2312.07046, section 3).

The principal components U_r of the outputs Y = W X, about the origin, give W' = U_r U_r^T W, which
is SVD-LLM's optimum (:mod:`streamcomp.linalg.low_rank`). With components about the mean, and a bias
that restores it, perplexity is worse (``benchmarks/tried.md``).
"""

from __future__ import annotations

from streamcomp.methods.svd_llm import SvdLlm

__all__ = ["Rom"]


class Rom(SvdLlm):
    """Principal components of the outputs."""

    name = "rom"
    source = "LLM-ROM (arXiv 2312.07046)"
    statistics = ("compressed", "dense")
