"""Blocks of a model before they are read: sites, moments, and bytes according to traces."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property, partial
from typing import Any, TypeVar

import torch
from torch import nn

from streamcomp.calibration.hidden_states import StreamShape
from streamcomp.calibration.observe import MomentGroup, group_moments
from streamcomp.calibration.routing import replay_bytes
from streamcomp.forms import form_of
from streamcomp.job.levers import Levers
from streamcomp.linalg.dtypes import gradient_dtype, moment_dtype, solve_dtype
from streamcomp.methods import find_method
from streamcomp.model.experts import ExpertBank
from streamcomp.model.sites import BlockSites, ExpertSite, LinearSite, Site, find_sites
from streamcomp.model.skeleton import Skeleton
from streamcomp.model.tracing import BlockTrace, CaptureTrace, trace_block, trace_capture
from streamcomp.recipe import Recipe, chosen_blocks

__all__ = ["BlockPlan", "Pass", "plan_blocks"]

S = TypeVar("S", bound=Site)

# Experts that take more are loaded apart from their block, also where it only runs.
_LARGE_BYTES = 256 * 2**20

# Copies of its scores that attention holds where it keeps them: forward, and forward and back.
_SCORES = 3, 6

Pass = tuple[
    MomentGroup[LinearSite], ...
]  # the groups that a step works on each time that it reads a block


@dataclass(frozen=True)
class BlockPlan:
    """One block: its sites, the moments that serve those to be factored, and its sizes."""

    number: int
    name: str
    sites: BlockSites
    groups: tuple[MomentGroup[LinearSite], ...]
    experts: tuple[MomentGroup[ExpertSite], ...]  # one of each matrix to be factored
    bank: ExpertBank | None  # experts that are loaded apart from the block, a few at a time
    stream: StreamShape
    weight_bytes: int  # its parameters, without those of the bank, in the dtype in which it runs
    merge_bytes: int  # the most that tensors on disk take which become one parameter of these
    read_bytes: int  # all its tensors on disk
    inputs: CaptureTrace  # masks and positions of all blocks for one window
    trace: BlockTrace  # one window through the block
    retrace: Callable[[int], BlockTrace]  # for a number of tokens per call of the feed-forward

    def chunked(self, levers: Levers) -> BlockPlan:
        """This block with its feed-forward run on as many tokens at a time as ``levers`` say."""
        if levers.feed_forward_tokens >= self.stream.seq_len or self.bank is not None:
            return self
        trace = self.retrace(levers.feed_forward_tokens)
        return replace(self, trace=trace) if trace.exact else self  # an estimate knows no chunks

    @property
    def targets(self) -> list[Site]:
        """The sites to factor, in the order in which they are decomposed."""
        linears: list[Site] = [site for group in self.groups for site in group.sites]
        return linears + [site for group in self.experts for site in group.sites]

    @cached_property
    def groups_of_expert(self) -> dict[int, list[MomentGroup[ExpertSite]]]:
        """The groups of each expert that is to be factored."""
        groups: dict[int, list[MomentGroup[ExpertSite]]] = {}
        for group in self.experts:
            groups.setdefault(group.sites[0].expert, []).append(group)
        return groups

    def passes(self, levers: Levers, *, observed: bool = True) -> list[Pass]:
        """Groups that a step works on each time that it reads the block, which is once at least.

        ``levers.groups`` at a time where they are ``observed``; else ``levers.linears`` sites, each
        in a group of its own.
        """
        if observed:
            groups, size = self.groups, levers.groups
        else:
            groups = tuple(replace(g, sites=(site,)) for g in self.groups for site in g.sites)
            size = levers.linears
        return [groups[start : start + size] for start in range(0, max(1, len(groups)), size)]

    def others(self, groups: Pass) -> list[LinearSite]:
        """Linears that are in none of ``groups``, whose weights are not needed with them."""
        needed = {site.name for group in groups for site in group.sites}
        return [site for site in self.sites.linears if site.name not in needed]

    # -- bytes ---------------------------------------------------------------------------

    def activations(self, batch: int) -> int:
        """Most bytes alive in a forward of ``batch`` windows, their output among them."""
        replayed = self.replay_bytes(self.stream.dtype, gradients=False)
        return batch * (self.trace.activation_bytes + self.stream.window_bytes + replayed)

    def replay_bytes(self, run_dtype: torch.dtype, *, gradients: bool) -> int:
        """Bytes of one window that stand for the experts, where these are loaded apart."""
        if self.bank is None:
            return 0
        return replay_bytes(self.bank, self.stream, run_dtype, gradients=gradients)

    def moment_bytes(self, groups: Sequence[MomentGroup[S]]) -> int:
        return sum(group.nbytes(self.stream.dtype) for group in groups)

    def site_bytes(self, sites: Sequence[Site]) -> int:
        """The dense weights of ``sites``, in the dtype that the block runs in."""
        return sum(site.numel for site in sites) * self.stream.dtype.itemsize

    def captured_again_bytes(self, tokens: int) -> int:
        """Masks and positions that the model makes for ``tokens`` tokens before the head."""
        return math.ceil(self.inputs.peak_bytes * (tokens / self.stream.seq_len) ** 2)

    @property
    def output_gradient_bytes(self) -> int:
        """The moment (hidden, hidden) of the gradient of the block's output."""
        return self.stream.hidden**2 * moment_dtype(self.stream.dtype).itemsize

    def cast_weight_bytes(self, run_dtype: torch.dtype) -> int:
        """The block's weights, and once more where they are cast to a wider ``run_dtype``."""
        return self.weight_bytes + self._cast(self.weight_bytes, run_dtype)

    def cast_input_bytes(self, run_dtype: torch.dtype) -> int:
        """Masks and positions of one block cast to a wider ``run_dtype``; at most all."""
        return self._cast(self.inputs.nbytes, run_dtype)

    def _cast(self, nbytes: int, run_dtype: torch.dtype) -> int:
        wider = run_dtype.itemsize / self.stream.dtype.itemsize
        return int(wider * nbytes) if wider > 1 else 0


def plan_blocks(
    skeleton: Skeleton,
    recipe: Recipe,
    stream: StreamShape,
    *,
    on_device: bool = False,
    runs_only: bool = False,
) -> list[BlockPlan]:
    """Sites and groups of every block; one trace per kind of block.

    With ``runs_only`` no block is to be factored, as in an evaluation.
    """
    inputs = trace_capture(lambda: skeleton.dry_capture(1, stream.seq_len)[1])
    hidden = torch.empty(1, stream.seq_len, stream.hidden, dtype=stream.dtype, device="meta")
    traces: dict[tuple[Any, ...], Callable[[int], BlockTrace]] = {}
    left = _experts_left(recipe)
    chosen = range(0) if runs_only else chosen_blocks(recipe.blocks, len(skeleton))
    scores = _score_bytes(skeleton, stream) if on_device else (0, 0)
    blocks = []
    for number in range(len(skeleton)):
        module = skeleton.block(number)
        sites = find_sites(skeleton, number, recipe.include, recipe.exclude, left)
        factors = number in chosen
        bank = _apart(recipe, sites, factors=factors)
        linears = tuple(site.name for site in sites.linears)
        kind = (*skeleton.block_kind(number), linears, bank is None)
        if kind not in traces:
            trace_it = partial(
                trace_block,
                module,
                sites.linears,
                hidden,
                inputs.layer_inputs[number],
                without=bank,
            )
            traces[kind] = cache(partial(_with_scores, trace_it, scores))
        trace = traces[kind](0)
        blocks.append(
            BlockPlan(
                number,
                skeleton.block_name(number),
                sites,
                _groups(recipe, sites.linears, trace.groups, stream) if factors else (),
                _groups(recipe, sites.experts, (), stream) if factors else (),
                bank,
                stream,
                _weight_bytes(module, bank),
                _merge_bytes(skeleton, number, bank),
                sum(info.nbytes for info in skeleton.block_tensors(number)),
                inputs,
                trace,
                traces[kind],
            )
        )
    return blocks


def _score_bytes(skeleton: Skeleton, stream: StreamShape) -> tuple[int, int]:
    """Bytes that attention holds for the scores of one window on a GPU: forward, and back.

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


def _experts_left(recipe: Recipe) -> str:
    """Why a job with these settings leaves experts dense; empty where it can factor them."""
    method = find_method(recipe.method)
    if not method.factors_experts:
        return f"experts, which method {method.name} leaves dense"
    if recipe.compressed_stream:
        return "experts, which stay dense with --update, --refine and --statistics compressed"
    return ""


def _apart(recipe: Recipe, sites: BlockSites, *, factors: bool) -> ExpertBank | None:
    """The block's experts, where they are not loaded with it.

    Those that are factored, and others that are large; but where factors follow the compressed
    stream, the whole block runs with them.
    """
    bank = sites.bank
    if bank is None or recipe.compressed_stream:
        return None
    return bank if (factors and sites.experts) or bank.nbytes > _LARGE_BYTES else None


def _groups(
    recipe: Recipe, sites: Sequence[S], shared: Sequence[Sequence[str]], stream: StreamShape
) -> tuple[MomentGroup[S], ...]:
    narrow = solve_dtype(stream.dtype) != torch.float64
    method, form = find_method(recipe.method), form_of(recipe)
    return group_moments(
        [site for site in sites if form.can_hold(site.rows, site.columns)],
        shared,
        gradients=method.needs_gradients,
        inputs_only=method.needs_inputs or recipe.statistics == "none",
        tokens=stream.tokens if narrow else 0,
    )


def _weight_bytes(block: nn.Module, bank: ExpertBank | None) -> int:
    apart = {f"{bank.name}.{leaf}" for leaf in bank.sources} if bank is not None else set()
    return sum(value.nbytes for name, value in block.state_dict().items() if name not in apart)


def _merge_bytes(skeleton: Skeleton, number: int, bank: ExpertBank | None) -> int:
    """Bytes of the tensors that are held next to the one parameter that they become."""
    apart = bank.parameters if bank is not None else frozenset()
    sources = skeleton.block_parameters(number)
    merged = (infos for name, infos in sources.items() if len(infos) > 1 and name not in apart)
    return max((sum(info.nbytes for info in infos) for infos in merged), default=0)
