"""How much of each linear an output keeps: ratios, ranks and bytes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from streamcomp.errors import RecipeError
from streamcomp.forms import Allowance, Form, form_of
from streamcomp.job.block_plan import BlockPlan
from streamcomp.methods import find_method
from streamcomp.model.sites import Site
from streamcomp.model.skeleton import Skeleton
from streamcomp.recipe import Recipe
from streamcomp.units import format_bytes, parse_bytes

__all__ = [
    "Allowances",
    "OutputPlan",
    "Ranks",
    "allocate",
    "block_saving",
    "plan_outputs",
]

Ranks = Mapping[str, int | None]  # by full name; None = dense
Allowances = Mapping[str, Allowance | None]  # likewise

# A tensor's line in the header of a shard.
_HEADER_BYTES = 192


@dataclass(frozen=True)
class OutputPlan:
    """One output: the share that is removed, and what each linear keeps."""

    asked: float  # ratio asked for, over all eligible linears
    allowances: Allowances
    final: bool  # False: ranks are a guess until all spectra are known
    reached: float  # ratio of these ranks
    nbytes: int  # of all shards

    @property
    def ranks(self) -> dict[str, int | None]:
        return {name: kept.rank if kept else None for name, kept in self.allowances.items()}

    def rank(self, site: Site) -> int | None:
        """The rank of a site; None = it stays dense."""
        kept = self.allowances[site.full_name]
        return kept.rank if kept else None

    def most_rank(self, site: Site, form: Form) -> int | None:
        """The largest rank that a site may come to have; None = it stays dense."""
        allowance = self.allowances[site.full_name]
        if allowance is None or self.final:
            return None if allowance is None else allowance.rank
        return form.largest_rank(site.rows, site.columns)


def plan_outputs(
    skeleton: Skeleton,
    recipe: Recipe,
    blocks: Sequence[BlockPlan],
    ranks: Sequence[Ranks] | None,
) -> list[OutputPlan]:
    """One for each ratio of the recipe; ``ranks`` of each where the spectra have led to them."""
    eligible = [site for block in blocks for site in block.sites.eligible]
    chosen = [site for block in blocks for site in block.targets]
    return [
        _plan_output(skeleton, recipe, asked, eligible, chosen, ranks[place] if ranks else None)
        for place, asked in enumerate(_asked_ratios(skeleton, recipe, eligible))
    ]


def _asked_ratios(skeleton: Skeleton, recipe: Recipe, sites: Sequence[Site]) -> list[float]:
    """The recipe's ratios; for a size, the ratio whose output has at most that many bytes."""
    if not recipe.size:
        return list(recipe.ratios)
    wanted = parse_bytes(recipe.size)
    infos = [i for k in range(len(skeleton)) for i in skeleton.block_tensors(k)]
    whole = sum(info.nbytes for info in (*infos, *skeleton.other_tensors()))
    dense = sum(site.disk_bytes for site in sites)
    form = form_of(recipe)
    extra = sum(form.extra_bytes(site.rows, site.columns) for site in sites)
    headers = _HEADER_BYTES * (len(infos) + len(form.tensors) * len(sites))
    least = whole - dense + extra + headers
    ratio = 1 - (wanted - least) / dense
    if not 0 < ratio < 1:
        raise RecipeError(
            f"--size {recipe.size}: {format_bytes(whole)} are now in it, of which "
            f"{format_bytes(least)} stay in any case; give a size in between"
        )
    return [ratio]


def _plan_output(
    skeleton: Skeleton,
    recipe: Recipe,
    asked: float,
    eligible: Sequence[Site],
    chosen: Sequence[Site],
    ranks: Ranks | None,
) -> OutputPlan:
    """Share ``asked`` among the ``chosen`` of all ``eligible`` linears.

    ``ranks`` are those that the spectra have led to, where a step has shared them already.
    """
    form, method = form_of(recipe), find_method(recipe.method)
    for site in chosen:
        method.check(site, recipe)
    if ranks is None:
        shared = form.share_evenly(chosen, _inner_ratio(recipe, asked, eligible, chosen))
    else:
        shared = [_at_rank(form, site, ranks.get(site.full_name)) for site in chosen]
    allowances: dict[str, Allowance | None] = {site.full_name: None for site in eligible}
    allowances |= {m.full_name: kept for m, kept in zip(chosen, shared, strict=True)}
    numbers = [
        site.numel if (kept := allowances[site.full_name]) is None else kept.numbers
        for site in eligible
    ]
    reached = 1 - sum(numbers) / sum(site.numel for site in eligible)
    final = ranks is not None or recipe.allocation == "uniform"
    nbytes = _output_bytes(skeleton, recipe, eligible, allowances)
    return OutputPlan(asked, allowances, final, reached, nbytes)


def _at_rank(form: Form, site: Site, rank: int | None) -> Allowance | None:
    if rank is None:
        return None
    return Allowance(rank, int(form.numbers(site.rows, site.columns, rank)))


def _inner_ratio(
    recipe: Recipe, asked: float, eligible: Sequence[Site], chosen: Sequence[Site]
) -> float:
    """The share to remove from the ``chosen`` linears alone."""
    if recipe.module_ratio:
        return recipe.module_ratio
    inside = sum(site.numel for site in chosen)
    inner = asked * sum(site.numel for site in eligible) / inside
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
    spectra: Iterable[Tensor],
) -> dict[str, int | None]:
    """Ranks of the ``chosen`` linears that lose least, given the spectrum of each."""
    inner = _inner_ratio(recipe, asked, eligible, chosen)
    shared = form_of(recipe).share_by_loss(chosen, spectra, inner)
    return {
        m.full_name: kept.rank if kept else None for m, kept in zip(chosen, shared, strict=True)
    }


def _output_bytes(
    skeleton: Skeleton,
    recipe: Recipe,
    sites: Sequence[Site],
    allowances: Allowances,
) -> int:
    total = sum(i.nbytes for k in range(len(skeleton)) for i in skeleton.block_tensors(k))
    total += sum(info.nbytes for info in skeleton.other_tensors())
    return total + sum(block_saving(form_of(recipe), site, allowances) for site in sites)


def block_saving(form: Form, site: Site, allowances: Allowances) -> int:
    """Bytes by which the factors at ``site`` differ from its dense weight."""
    kept = allowances[site.full_name]
    if kept is None:
        return 0
    return form.nbytes(site.rows, site.columns, kept, site.dtype) - site.disk_bytes
