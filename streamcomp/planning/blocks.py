"""The blocks of a model as a plan sees them: their linears, moments, and bytes by their traces."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import torch

from streamcomp.calibration.hidden_states import StreamShape
from streamcomp.calibration.observe import MomentGroup, group_moments
from streamcomp.linalg.symmetric import solve_dtype
from streamcomp.modeling.sites import BlockSites, Site, find_sites
from streamcomp.modeling.skeleton import Skeleton
from streamcomp.modeling.tracing import BlockTrace, trace_block, trace_calls
from streamcomp.planning.cost import BlockCost, gradient_dtype
from streamcomp.planning.levers import Levers
from streamcomp.planning.outputs import can_be_factored
from streamcomp.planning.schedule import Step
from streamcomp.recipe import Recipe, chosen_blocks

__all__ = ["BlockPlan", "passes_of_step", "plan_blocks"]

# Copies of its scores that attention holds where it keeps them: forward, and forward and back.
_SCORES = 3, 6


@dataclass(frozen=True)
class BlockPlan:
    """One block: its linears, and the moments that serve those to be factored."""

    number: int
    name: str
    linears: BlockSites
    groups: tuple[MomentGroup, ...]
    trace: BlockTrace
    cost: BlockCost
    retrace: Callable[[int], BlockTrace]  # with so many tokens per call of the feed-forward

    def cost_with(self, levers: Levers) -> BlockCost:
        """``cost`` where the feed-forward runs as many tokens at a time as ``levers`` say."""
        if levers.feed_forward_tokens >= self.cost.stream.seq_len:
            return self.cost
        trace = self.retrace(levers.feed_forward_tokens)
        if not trace.exact:  # an estimate knows of no chunks
            return self.cost
        return replace(
            self.cost,
            activation_bytes=trace.activation_bytes,
            autograd_bytes=trace.autograd_bytes,
        )

    @property
    def targets(self) -> list[Site]:
        """The linears to factor, in the order in which they are decomposed."""
        return [linear for group in self.groups for linear in group.sites]

    def passes(self, levers: Levers, *, observed: bool = True) -> list[tuple[MomentGroup, ...]]:
        """What a step works on each time that it reads the block: some groups, one time at least.

        ``levers.groups`` at a time where they are ``observed``; else ``levers.linears``, each in a
        group of its own.
        """
        if observed:
            groups, size = self.groups, levers.groups
        else:
            groups = tuple(replace(g, sites=(m,)) for g in self.groups for m in g.sites)
            size = levers.linears
        return [groups[start : start + size] for start in range(0, max(1, len(groups)), size)]

    def others(self, groups: Sequence[MomentGroup]) -> list[Site]:
        """The linears that are in none of ``groups``: their weights are not needed with them."""
        needed = {linear.name for group in groups for linear in group.sites}
        return [linear for linear in self.linears.eligible if linear.name not in needed]


def passes_of_step(
    step: Step, block: BlockPlan, recipe: Recipe, analysis: bool, levers: Levers
) -> list[tuple[MomentGroup, ...]]:
    """The groups that ``step`` works on each time that it reads its ``block``.

    All at once where its factors run together on the compressed stream.
    """
    if step.kind == "block" and recipe.compressed_stream:
        return [block.groups]
    from_kept = step.kind == "redo" or (step.kind == "block" and analysis)
    return block.passes(levers, observed=not from_kept)


def plan_blocks(
    skeleton: Skeleton, recipe: Recipe, stream: StreamShape, *, on_device: bool = False
) -> list[BlockPlan]:
    """Linears and groups of every block; one trace per kind of block."""
    record = trace_calls(lambda: skeleton.dry_record(1, stream.seq_len)[1])
    hidden = torch.empty(1, stream.seq_len, stream.hidden, dtype=stream.dtype, device="meta")
    traces: dict[tuple[Any, ...], Callable[[int], BlockTrace]] = {}
    chosen = chosen_blocks(recipe.blocks, len(skeleton))
    blocks = []
    for number in range(len(skeleton)):
        block = find_sites(skeleton, number, recipe.include, recipe.exclude)
        kind = (*skeleton.block_kind(number), tuple(linear.name for linear in block.eligible))
        if kind not in traces:
            call = record.calls[number]
            trace_it = partial(trace_block, skeleton.block(number), block.eligible, hidden, call)
            scores = _score_bytes(skeleton, stream) if on_device else (0, 0)
            traces[kind] = cache(partial(_with_scores, trace_it, scores))
        trace = traces[kind](0)
        groups = _groups(recipe, block, trace, stream) if number in chosen else ()
        weight_bytes = sum(
            value.numel() * value.element_size()
            for value in skeleton.block(number).state_dict().values()
        )
        known = BlockCost(
            weight_bytes,
            _merge_bytes(skeleton, number),
            trace.activation_bytes,
            trace.autograd_bytes,
            stream,
            groups,
            record.nbytes,
            record.peak_bytes,
        )
        name = skeleton.block_name(number)
        blocks.append(BlockPlan(number, name, block, groups, trace, known, traces[kind]))
    return blocks


def _score_bytes(skeleton: Skeleton, stream: StreamShape) -> tuple[int, int]:
    """What attention holds for its scores on a GPU, of one window: forward, and back.

    The kernels that keep no scores are for half precision; a backward of fp16 runs in fp32.
    """
    heads = getattr(skeleton.text_config, "num_attention_heads", 0)
    copy = heads * stream.seq_len**2 * stream.dtype.itemsize
    forward, back = _SCORES
    return (
        0 if solve_dtype(stream.dtype) == torch.float32 else forward * copy,
        0 if gradient_dtype(stream.dtype) == torch.bfloat16 else back * copy,
    )


def _with_scores(
    trace_it: Callable[[int], BlockTrace], scores: tuple[int, int], tokens: int
) -> BlockTrace:
    trace = trace_it(tokens)
    return replace(
        trace,
        activation_bytes=trace.activation_bytes + scores[0],
        autograd_bytes=trace.autograd_bytes + scores[1],
    )


def _groups(
    recipe: Recipe, block: BlockSites, trace: BlockTrace, stream: StreamShape
) -> tuple[MomentGroup, ...]:
    narrow = solve_dtype(stream.dtype) != torch.float64
    factored = [linear for linear in block.eligible if can_be_factored(linear, recipe.form)]
    return group_moments(
        factored,
        trace.groups,
        gradients=recipe.two_sided,
        inputs_only=recipe.method == "swsc" or recipe.statistics == "none",
        tokens=stream.tokens if narrow else 0,
    )


def _merge_bytes(skeleton: Skeleton, number: int) -> int:
    """Bytes of the tensors that are held beside the one parameter that they become."""
    sources = skeleton.block_parameters(number).values()
    return max((sum(i.nbytes for i in infos) for infos in sources if len(infos) > 1), default=0)
