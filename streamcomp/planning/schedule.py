"""The steps of a job in their order, with the files that each reads and leaves behind.

A sweep is one pass over the blocks. The order of sweeps:

- *forward* (two-sided): the dense stream, every ``store_every``-th state kept;
- *loss* and *reverse* (two-sided): the gradient stream, last block first; moments are taken and
  decomposed, and what the writing sweeps need of them is kept;
- *analyse* (one-sided, where several outputs share it or ranks depend on it): the same, forward;
- *decompose* (where a job uses the moments that another one kept): they are decomposed again, with
  another damping;
- *ranks*: shared among all linears at once;
- *block*, once per output: factors are written, and where they depend on the compressed stream,
  computed there.

A file is deleted when no step to come reads it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from streamcomp.recipe import Recipe

__all__ = [
    "Step",
    "analysis_key",
    "can_be_analysed",
    "gradient_key",
    "hidden_key",
    "live_after",
    "needs_analysis",
    "runs_windows",
    "schedule",
]

_STREAMS = ("hidden", "gradient", "compressed")


@dataclass(frozen=True)
class Step:
    """One step: ``kind`` says what is done, ``block`` and ``output`` to which.

    ``reads`` and ``writes`` are keys of files in the work folder: names up to the first dot.
    """

    name: str
    kind: str
    block: int = -1
    output: int = -1
    reads: tuple[str, ...] = ()
    writes: tuple[str, ...] = ()


def runs_windows(step: Step) -> bool:
    """Whether windows run through the block of ``step``; a job may go on there."""
    return step.block >= 0 and any(key.startswith(_STREAMS) for key in step.reads)


def hidden_key(block: int, output: int | None = None) -> str:
    """States entering ``block``: of the dense stream, or of the compressed one of ``output``.

    Both begin with the same embeddings.
    """
    if output is None or block == 0:
        return f"hidden-{block:05d}"
    return f"compressed-{output}-{block:05d}"


def gradient_key(block: int) -> str:
    """Gradient of the loss with regard to the states entering ``block``."""
    return f"gradient-{block:05d}"


def analysis_key(block: int) -> str:
    """Decompositions of the linears of ``block``."""
    return f"analysis-{block:05d}"


def schedule(
    recipe: Recipe, depth: int, chosen: range, analysis: bool, *, from_moments: bool = False
) -> list[Step]:
    """All steps for a model of ``depth`` blocks of which ``chosen`` are compressed.

    With ``from_moments`` decompositions are made again, from moments that another job kept.
    """
    steps: list[Step] = []
    if recipe.statistics != "none":
        steps += [
            Step("tokenize", "tokenize", writes=("windows",)),
            Step("embed", "embed", reads=("windows",), writes=(hidden_key(0),)),
        ]
    if recipe.two_sided:
        steps += _two_sided_sweeps(recipe, depth, chosen)
    elif analysis:
        steps += [_analyse(k, chosen) for k in range(chosen.stop)]
    if from_moments:
        steps += [
            Step(f"decompose {k}", "decompose", k, -1, (), (analysis_key(k),)) for k in chosen
        ]
    if analysis:
        steps.append(Step("ranks", "ranks", reads=tuple(analysis_key(k) for k in chosen)))
    for output, ratio in enumerate(recipe.ratios):
        prefix = f"ratio {ratio:g}: " if len(recipe.ratios) > 1 else ""
        steps += [_write(recipe, k, output, prefix, chosen, depth, analysis) for k in range(depth)]
        steps.append(Step(f"{prefix}copy the rest", "copy", output=output))
    return steps


def live_after(steps: Sequence[Step], done: int) -> set[str]:
    """Keys of the files that some step from number ``done`` on reads before it is made anew."""
    live: set[str] = set()
    written: set[str] = set()
    for step in steps[done:]:
        live |= set(step.reads) - written
        written |= set(step.writes)
    return live


def _two_sided_sweeps(recipe: Recipe, depth: int, chosen: range) -> Iterator[Step]:
    for k in range(depth):
        yield Step(f"forward {k}", "forward", k, -1, (hidden_key(k),), (hidden_key(k + 1),))
    yield Step(
        "gradient of the loss",
        "loss",
        reads=("windows", hidden_key(depth)),
        writes=(gradient_key(depth),),
    )
    every = recipe.store_every
    for k in range(depth - 1, chosen.start - 1, -1):
        kept = k - k % every
        again: tuple[str, ...] = ()
        if k == depth - 1 or k % every == every - 1:  # the last of its segment: run it again
            again = tuple(hidden_key(j) for j in range(kept + 1, k + 1))
        reads = (hidden_key(kept if again else k), gradient_key(k + 1))
        below = (gradient_key(k),) if k > chosen.start else ()
        own = (analysis_key(k),) if k in chosen else ()
        yield Step(f"reverse {k}", "reverse", k, -1, reads, (*again, *below, *own))


def _analyse(k: int, chosen: range) -> Step:
    below = (hidden_key(k + 1),) if k + 1 < chosen.stop else ()
    own = (analysis_key(k),) if k in chosen else ()
    return Step(f"analyse {k}", "analyse", k, -1, (hidden_key(k),), (*below, *own))


def _write(
    recipe: Recipe, k: int, output: int, prefix: str, chosen: range, depth: int, analysis: bool
) -> Step:
    reads: list[str] = []
    writes: list[str] = []
    if analysis and k in chosen:
        reads.append(analysis_key(k))
    dense = recipe.follows or (recipe.statistics == "dense" and not analysis)
    if k in range(chosen.stop):
        last = k + 1 == chosen.stop
        if dense:
            reads.append(hidden_key(k))
            writes += [hidden_key(k + 1)] if recipe.refine or not last else []
        if recipe.compressed_stream:
            reads.append(hidden_key(k, output))
            writes += [hidden_key(k + 1, output)] if not last else []
    return Step(f"{prefix}block {k}", "block", k, output, tuple(reads), tuple(writes))


def can_be_analysed(recipe: Recipe) -> bool:
    """Whether decompositions depend on the dense model alone, and one serves every output."""
    return recipe.statistics == "dense" and recipe.method != "swsc"


def needs_analysis(recipe: Recipe) -> bool:
    """Whether decompositions have to be kept before any factor is written."""
    several = len(recipe.ratios) > 1
    return recipe.two_sided or recipe.allocation == "loss" or (several and can_be_analysed(recipe))
