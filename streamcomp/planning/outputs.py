"""How much of each linear an output keeps: ratios, ranks and bytes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from streamcomp.errors import RecipeError
from streamcomp.linalg.allocation import (
    largest_rank,
    loss_ranks,
    stored_numbers,
    uniform_ranks,
)
from streamcomp.modeling.sites import Site
from streamcomp.modeling.skeleton import Skeleton
from streamcomp.recipe import Recipe
from streamcomp.units import format_bytes, parse_bytes

__all__ = [
    "OutputPlan",
    "Ranks",
    "allocate",
    "asked_ratios",
    "block_saving",
    "can_be_factored",
    "inner_ratio",
    "plan_output",
]

Ranks = Mapping[str, int | None]  # by full name; None = dense

# A tensor's line in the header of a shard.
_HEADER_BYTES = 192
# swsc stores rank 1 and two representatives at least.
_LEAST_SHARING = 3


@dataclass(frozen=True)
class OutputPlan:
    """One output: the share that is removed, and what each linear keeps."""

    asked: float  # ratio asked for, over all eligible linears
    ranks: Ranks
    numbers: Mapping[str, int | None]  # floats that a linear may store; None = dense
    final: bool  # False: ranks are a guess until all spectra are known
    reached: float  # ratio of these ranks
    nbytes: int  # of all shards

    def most_rank(self, linear: Site, form: str) -> int | None:
        """The largest rank that a linear may come to have; None = it stays dense."""
        rank = self.ranks[linear.full_name]
        if self.final or rank is None:
            return rank
        return largest_rank(form, linear.rows, linear.columns, math.inf)


def can_be_factored(linear: Site, form: str) -> bool:
    """Whether some factored form is smaller than the dense one."""
    if form == "shared":
        side = linear.rows + linear.columns
        return _LEAST_SHARING * side < linear.numel
    return largest_rank(form, linear.rows, linear.columns, math.inf) > 0


def asked_ratios(skeleton: Skeleton, recipe: Recipe, linears: Sequence[Site]) -> list[float]:
    """The recipe's ratios; for a size, the ratio whose output has at most that many bytes."""
    if not recipe.size:
        return list(recipe.ratios)
    wanted = parse_bytes(recipe.size)
    infos = [i for k in range(len(skeleton)) for i in skeleton.block_tensors(k)]
    whole = sum(info.nbytes for info in (*infos, *skeleton.other_tensors()))
    dense = sum(linear.source.nbytes for linear in linears)
    beside = 4 * sum(linear.rows for linear in linears) if recipe.form == "pivot" else 0
    factors = {"pivot": 3, "uv": 2, "shared": 4}[recipe.form] + recipe.centred  # at most
    headers = _HEADER_BYTES * (len(infos) + factors * len(linears))
    least = whole - dense + beside + headers
    ratio = 1 - (wanted - least) / dense
    if not 0 < ratio < 1:
        raise RecipeError(
            f"--size {recipe.size}: {format_bytes(whole)} are now in it, of which "
            f"{format_bytes(least)} stay in any case; give a size in between"
        )
    return [ratio]


def plan_output(
    skeleton: Skeleton,
    recipe: Recipe,
    asked: float,
    eligible: Sequence[Site],
    chosen: Sequence[Site],
    ranks: Ranks | None,
) -> OutputPlan:
    """Share ``asked`` among the ``chosen`` of all ``eligible`` linears.

    ``ranks`` are those that the spectra have led to, where they are known already.
    """
    inner = inner_ratio(recipe, asked, eligible, chosen)
    biases = {m.full_name: m.rows for m in chosen if _gains_bias(skeleton, recipe, m)}
    inner += sum(biases.values()) / sum(linear.numel for linear in chosen)
    shapes = [(linear.rows, linear.columns) for linear in chosen]
    numbers: dict[str, int | None] = {linear.full_name: None for linear in eligible}
    if recipe.form == "shared":
        _check_clusters(recipe, chosen)
        numbers |= _shared_numbers(chosen, inner)
        found: dict[str, int | None] = {
            linear.full_name: n and max(1, n // (linear.rows + linear.columns))
            for linear in eligible
            for n in [numbers[linear.full_name]]
        }
    else:
        found = {linear.full_name: None for linear in eligible}
        if ranks is not None:
            found |= ranks
        else:
            shares = uniform_ranks(shapes, inner, recipe.form)
            found |= {m.full_name: rank for m, rank in zip(chosen, shares, strict=True)}
        numbers |= {
            m.full_name: rank and stored_numbers(recipe.form, m.rows, m.columns, rank)
            for m in chosen
            for rank in [found[m.full_name]]
        }
    total = sum(linear.numel for linear in eligible)
    kept = sum(
        linear.numel
        if (n := numbers[linear.full_name]) is None
        else n + biases.get(linear.full_name, 0)
        for linear in eligible
    )
    final = ranks is not None or recipe.allocation == "uniform"
    nbytes = _output_bytes(skeleton, recipe, eligible, numbers)
    return OutputPlan(asked, found, numbers, final, 1 - kept / total, nbytes)


def _check_clusters(recipe: Recipe, chosen: Sequence[Site]) -> None:
    """RecipeError where a linear has fewer channels than there are clusters asked for."""
    for m in chosen:
        most = {"rows": m.rows, "columns": m.columns}.get(recipe.axis, max(m.rows, m.columns))
        if recipe.clusters > most:
            raise RecipeError(
                f"clusters {recipe.clusters}: {m.full_name} ({m.rows} x {m.columns}) has {most} "
                f"channels along {recipe.axis}: ask for fewer, or --exclude it"
            )


def inner_ratio(
    recipe: Recipe, asked: float, eligible: Sequence[Site], chosen: Sequence[Site]
) -> float:
    """The share to remove from the ``chosen`` linears alone."""
    if recipe.module_ratio:
        return recipe.module_ratio
    inside = sum(linear.numel for linear in chosen)
    inner = asked * sum(linear.numel for linear in eligible) / inside
    if inner >= 1:
        raise RecipeError(
            f"--blocks {recipe.blocks} holds {inside:,} of the linears' parameters, too few to "
            f"remove the share {asked:g} of all: take more blocks, or give --module-ratio"
        )
    return inner


def allocate(
    recipe: Recipe,
    asked: float,
    eligible: Sequence[Site],
    chosen: Sequence[Site],
    spectra: Sequence[Tensor],
) -> dict[str, int | None]:
    """Ranks of the ``chosen`` linears that lose least, given the spectrum of each."""
    inner = inner_ratio(recipe, asked, eligible, chosen)
    shapes = [(linear.rows, linear.columns) for linear in chosen]
    found = loss_ranks(spectra, shapes, inner, recipe.form)
    return {linear.full_name: rank for linear, rank in zip(chosen, found, strict=True)}


def _shared_numbers(linears: Sequence[Site], ratio: float) -> dict[str, int | None]:
    """An even share for each; what those that stay dense exceed it by is taken from the others."""
    able = [linear for linear in linears if can_be_factored(linear, "shared")]
    whole = sum(linear.numel for linear in able)
    dense = sum(linear.numel for linear in linears) - whole
    share = ((1 - ratio) * (whole + dense) - dense) / max(1, whole)
    found: dict[str, int | None] = {linear.full_name: None for linear in linears}
    for linear in able:
        least = _LEAST_SHARING * (linear.rows + linear.columns)
        if share * linear.numel < least:
            raise RecipeError(
                f"ratio {ratio:g} leaves {linear.full_name} {int(share * linear.numel)} numbers, "
                f"shared channels take {least}: give a smaller ratio"
            )
        found[linear.full_name] = int(share * linear.numel)
    return found


def _gains_bias(skeleton: Skeleton, recipe: Recipe, linear: Site) -> bool:
    """Whether a centred method gives ``linear`` a bias that the dense one has not."""
    return recipe.centred and f"{linear.full_name}.bias" not in skeleton.sources


def _output_bytes(
    skeleton: Skeleton,
    recipe: Recipe,
    linears: Sequence[Site],
    numbers: Mapping[str, int | None],
) -> int:
    total = sum(i.nbytes for k in range(len(skeleton)) for i in skeleton.block_tensors(k))
    total += sum(info.nbytes for info in skeleton.other_tensors())
    return total + sum(block_saving(recipe, linear, numbers) for linear in linears)


def block_saving(recipe: Recipe, linear: Site, numbers: Mapping[str, int | None]) -> int:
    """Bytes by which the factored linear differs from the dense one, pivots or labels counted."""
    stored = numbers[linear.full_name]
    if stored is None:
        return 0
    item = linear.source.nbytes // linear.numel
    extra = 4 * linear.rows if recipe.form == "pivot" else 0
    extra += item * linear.rows if recipe.centred else 0
    return item * stored - linear.source.nbytes + extra
