"""Decides the order of a job's steps.

A sweep is one pass over the blocks. The order of sweeps:

- *forward* (two-sided): the dense stream, every ``store_every``-th state kept;
- *loss* and *reverse* (two-sided): the gradient stream, last block first; moments are taken and
  decomposed, and what the writing sweeps need of them is kept;
- *analyse* (one-sided, where several outputs share it or ranks depend on it): moments and their
  decompositions, without gradients, first block first;
- *decompose* (where a job differs from the one whose work was kept in the damping alone): again,
  from the kept moments;
- *ranks*: shared among all sites at once;
- *block*, once per output: factors are written, and where they depend on the compressed stream,
  computed there.

A file is deleted when no step to come reads it.
"""

from __future__ import annotations

from collections.abc import Sequence

from streamcomp.job.files import StepFile
from streamcomp.job.steps.analyse import Analyse
from streamcomp.job.steps.base import Step
from streamcomp.job.steps.copy import Copy
from streamcomp.job.steps.decompose import Decompose
from streamcomp.job.steps.embed import Embed
from streamcomp.job.steps.forward import Forward
from streamcomp.job.steps.loss import Loss
from streamcomp.job.steps.ranks import ShareRanks
from streamcomp.job.steps.reverse import Reverse
from streamcomp.job.steps.score import Score
from streamcomp.job.steps.tokenize import Tokenize
from streamcomp.job.steps.write_block import WriteBlock
from streamcomp.methods import find_method
from streamcomp.recipe import Recipe

__all__ = [
    "can_keep_analysis",
    "compression_steps",
    "evaluation_steps",
    "live_after",
    "needs_analysis",
]


def compression_steps(
    recipe: Recipe,
    depth: int,
    chosen: range,
    *,
    analysis: bool,
    keeps_moments: bool = False,
    from_moments: bool = False,
) -> list[Step]:
    """All steps for a model of ``depth`` blocks of which the ``chosen`` ones are compressed.

    With ``analysis`` decompositions are kept before any factor is written, with ``keeps_moments``
    their moments too. With ``from_moments`` they are made again, from moments of another job.
    """
    steps: list[Step] = []
    if recipe.statistics != "none":
        steps += [Tokenize.make(), Embed.make()]
    if find_method(recipe.method).needs_gradients:
        steps += [Forward.make(block) for block in range(depth)]
        steps.append(Loss.make(depth))
        down = range(depth - 1, chosen.start - 1, -1)
        steps += [
            Reverse.make(block, depth, chosen, recipe, keeps_moments=keeps_moments)
            for block in down
        ]
    elif analysis:
        steps += [
            Analyse.make(block, chosen, keeps_moments=keeps_moments) for block in range(chosen.stop)
        ]
    if from_moments:
        steps += [Decompose.make(block) for block in chosen]
    if analysis:
        steps.append(ShareRanks.make(chosen))
    for output, ratio in enumerate(recipe.ratios):
        prefix = f"ratio {ratio:g}: " if len(recipe.ratios) > 1 else ""
        steps += [
            WriteBlock.make(block, output, prefix, chosen, recipe, analysis=analysis)
            for block in range(depth)
        ]
        steps.append(Copy.make(output, prefix))
    return steps


def evaluation_steps(depth: int) -> list[Step]:
    """The steps that score windows with a model of ``depth`` blocks."""
    return [Embed.make(), *(Forward.make(block) for block in range(depth)), Score.make(depth)]


def can_keep_analysis(recipe: Recipe) -> bool:
    """Whether decompositions depend on the dense model alone, so that one serves every output."""
    return find_method(recipe.method).can_be_analysed(recipe)


def needs_analysis(recipe: Recipe) -> bool:
    """Whether decompositions have to be kept before any factor is written."""
    several = len(recipe.ratios) > 1 and can_keep_analysis(recipe)
    return find_method(recipe.method).needs_gradients or recipe.allocation == "loss" or several


def live_after(steps: Sequence[Step], done: int) -> set[StepFile]:
    """Files that some step from number ``done`` on reads before it is made anew."""
    live: set[StepFile] = set()
    written: set[StepFile] = set()
    for step in steps[done:]:
        live |= set(step.reads) - written
        written |= set(step.writes)
    return live
