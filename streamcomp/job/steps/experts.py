"""What steps do with experts that are loaded apart from their block, a few at a time.

The block runs up to its experts, each expert runs on its tokens, and the block runs again with
what they gave (:mod:`streamcomp.calibration.routing`). Experts are decomposed one by one, and their
factors go to nameless files until the block's shard is written.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial

import torch

from streamcomp.calibration.routing import (
    Routing,
    RowFile,
    expert_activations,
    routing_bytes,
    scratch_bytes,
)
from streamcomp.checkpoint.writer import Computed, Entry
from streamcomp.forms import Allowance
from streamcomp.forms.experts import ExpertMatrices, guard_of
from streamcomp.job import kept
from streamcomp.job.block_plan import BlockPlan
from streamcomp.job.files import Gradients, States
from streamcomp.job.levers import Levers
from streamcomp.job.outline import Outline
from streamcomp.job.rows import AnalysisRow, ExpertsRow, LinearRow
from streamcomp.job.steps.base import Phase
from streamcomp.job.workspace import Stage, Workspace
from streamcomp.linalg.dtypes import gradient_dtype, moment_dtype, solve_dtype
from streamcomp.methods import Factors, Moment
from streamcomp.model.experts import ExpertBank
from streamcomp.model.sites import ExpertSite
from streamcomp.model.streamer import LoadedBlock, LoadedExperts

__all__ = [
    "StoredExperts",
    "decompose_experts",
    "decomposing_experts",
    "descend",
    "descending",
    "each_expert",
    "factorize_experts",
    "factorizing_experts",
    "routing_parts",
    "route",
    "routing",
    "scratch",
]

_BACKWARD = 2  # forwards that take as long as a backward


# -- bytes and seconds -----------------------------------------------------------------------


def routing(
    outline: Outline, block: BlockPlan, batch: int, run_dtype: torch.dtype
) -> Iterator[Phase]:
    """Everything up to the experts of ``block``, then the experts; nothing where none are apart."""
    bank, stream = block.bank, block.stream
    if bank is None:
        return
    weights = block.cast_weight_bytes(run_dtype)
    wider = max(1, run_dtype.itemsize // stream.dtype.itemsize)
    activations = wider * block.activations(batch) + block.cast_input_bytes(run_dtype)
    parts = {"weights": weights, "activations": activations}
    yield Phase("routing", parts, outline.forward_seconds(block.number))
    yield _experts("experts", outline, block, run_dtype)


def descending(
    outline: Outline, block: BlockPlan, levers: Levers, run_dtype: torch.dtype
) -> Iterator[Phase]:
    """The gradients at what the experts give, and at what they are given."""
    bank, stream = block.bank, block.stream
    if bank is None:
        return
    wider = run_dtype.itemsize / stream.dtype.itemsize
    states = 4 * stream.window_bytes
    run = int(wider * levers.reverse_batch * (block.trace.autograd_bytes + states))
    run += levers.reverse_batch * block.replay_bytes(run_dtype, gradients=True)
    parts = {
        "weights": block.cast_weight_bytes(run_dtype),
        "activations": run + block.cast_input_bytes(run_dtype),
    }
    yield Phase("descending", parts, 2 * outline.forward_seconds(block.number))
    yield _experts("differentiating", outline, block, run_dtype, gradients=True)


def decomposing_experts(
    outline: Outline, block: BlockPlan, run_dtype: torch.dtype
) -> Iterator[Phase]:
    """Moments and decomposition of each expert's matrices."""
    gradients = outline.method.needs_gradients
    for number, (site, seconds, moments) in enumerate(_expert_sites(outline, block)):
        if number == 0:  # all matrices of an expert at once
            phase = _experts("decomposing", outline, block, run_dtype, gradients=gradients)
            yield replace(phase, parts={**phase.parts, "moments": moments})
        parts = {
            "weights": phase.parts["weights"],
            "moments": moments,
            "decomposition": _working_bytes(outline, block, site),
        }
        yield Phase("decomposing", parts, seconds, site.leaf)


def _working_bytes(outline: Outline, block: BlockPlan, site: ExpertSite) -> int:
    tokens = max(min(site.rows, site.columns), site.tokens(outline.tokens))  # with the prior
    side = next(group.side for group in block.experts if group.sites[0] == site)
    dtype = block.stream.dtype
    return outline.method.working_bytes(site, side, tokens, dtype, outline.recipe)


def factorizing_experts(
    outline: Outline, block: BlockPlan, *, from_analysis: bool
) -> Iterator[Phase]:
    """Factors of each expert's matrices, from kept decompositions or from moments taken now."""
    stream, form = block.stream, outline.form
    for site, seconds, moments in _expert_sites(outline, block):
        bank, count = site.bank, sum(group.sites[0].leaf == site.leaf for group in block.experts)
        most = form.largest_rank(site.rows, site.columns)
        bases = moment_dtype(stream.dtype) if from_analysis else solve_dtype(stream.dtype)
        analysed = outline.method.analysis_bytes(site, bases)
        parts = {
            "weights": block.weight_bytes + 2 * bank.at_once * bank.expert_bytes,
            "factors": form.running_bytes(site.rows, site.columns, most, stream.dtype),
        }
        encoding = {
            "decomposition": form.encoding_bytes(site.rows, site.columns, most, stream.dtype)
        }
        flops = outline.rates.seconds(form.encoding_flops(site.rows, site.columns, most // 2))
        if from_analysis:
            encoding["moments"] = analysed
            yield Phase("factorizing", parts | encoding, count * flops, site.leaf)
            continue
        active = expert_activations(bank, stream, stream.dtype, gradients=False)
        yield Phase("factorizing", {**parts, "moments": moments, "activations": active})
        working = {"moments": moments, "decomposition": _working_bytes(outline, block, site)}
        yield Phase("factorizing", parts | working, seconds, site.leaf)
        encoding["moments"] = moments + analysed
        yield Phase("factorizing", parts | encoding, count * flops, site.leaf)


def routing_parts(outline: Outline, number: int, *, gradients: bool = False) -> dict[str, int]:
    """What is in memory while windows run through a block whose experts are loaded apart."""
    bank = outline.blocks[number].bank
    if bank is None:
        return {}
    return {"routing": routing_bytes(bank, outline.stream, gradients=gradients)}


def scratch(outline: Outline, number: int, *, gradients: bool = False) -> int:
    """Nameless files while windows run through a block whose experts are loaded apart."""
    bank, stream = outline.blocks[number].bank, outline.stream
    run_dtype = gradient_dtype(stream.dtype) if gradients else stream.dtype
    return scratch_bytes(bank, stream, run_dtype, gradients=gradients) if bank else 0


def _experts(
    name: str,
    outline: Outline,
    block: BlockPlan,
    run_dtype: torch.dtype,
    *,
    gradients: bool = False,
) -> Phase:
    """All experts, some at a time, on the tokens that are sent to them."""
    bank, stream = block.bank, block.stream
    assert bank is not None
    wider = run_dtype.itemsize > stream.dtype.itemsize
    parts = {
        "weights": block.weight_bytes
        + 2 * bank.at_once * bank.expert_bytes  # tensors on disk, and the parameters they become
        + wider * bank.numel * run_dtype.itemsize,
        "activations": expert_activations(bank, stream, run_dtype, gradients=gradients),
    }
    flops = 2.0 * bank.chosen * stream.tokens * bank.numel * (1 + _BACKWARD * gradients)
    seconds = flops / outline.rates.model_flops + bank.disk_bytes / outline.rates.disk_bytes
    return Phase(name, parts, seconds)


def _expert_sites(outline: Outline, block: BlockPlan) -> Iterator[tuple[ExpertSite, float, int]]:
    """One site of each matrix, seconds of the decompositions of all such, and bytes of moments.

    Moments are those of all matrices of one expert.
    """
    moments = 0
    if outline.recipe.statistics != "none":
        moments = max(map(block.moment_bytes, block.groups_of_expert.values()), default=0)
    for leaf, count in Counter(group.sites[0].leaf for group in block.experts).items():
        group = next(group for group in block.experts if group.sites[0].leaf == leaf)
        site, seconds = group.sites[0], 0.0
        if outline.method.has_spectra:
            seconds = outline.rates.eigh_seconds(min(site.rows, site.columns))
            seconds += outline.rates.seconds(outline.method.flops(site, group.side))
        yield site, count * seconds, moments


# -- running them ----------------------------------------------------------------------------


def each_expert(
    work: Workspace, stage: Stage, phase: str, loaded: LoadedBlock, bank: ExpertBank
) -> Iterator[tuple[LoadedExperts, int]]:
    """The numbers of all experts, with their weights.

    JobMismatchError at the end where the block has other bytes than in an earlier step.
    """
    for first, last in bank.groups():
        stage(phase, first / bank.count)
        with work.streamer.experts(bank, first, last) as experts:
            loaded.digests |= experts.digests
            for number in range(first, last):
                yield experts, number
    work.check_source(loaded)


@contextmanager
def route(
    work: Workspace, stage: Stage, loaded: LoadedBlock, source: States, dtype: torch.dtype
) -> Iterator[Routing | None]:
    """What the experts of a block give for the windows of ``source``, in ``dtype``.

    None where they are loaded with their block.
    """
    bank = work.block_plan(loaded.number).bank
    if bank is None:
        yield None
        return
    with Routing(bank, work.shape, dtype, work.folder) as routed:
        with loaded.cast(dtype), work.reading(source) as states:
            for start, stop in work.batches(stage, "routing", work.levers.batch):
                hidden = states.read(start, stop).to(work.device, dtype)
                inputs = work.inputs(loaded.number, stop - start, dtype)
                routed.capture(loaded, start, hidden, inputs)
        for experts, number in each_expert(work, stage, "experts", loaded, bank):
            routed.forward(experts, number)
        yield routed


def descend(
    work: Workspace,
    stage: Stage,
    loaded: LoadedBlock,
    routing: Routing,
    files: tuple[States, Gradients],
    dtype: torch.dtype,
) -> None:
    """The gradients at what the experts gave, and at what they were given.

    ``files`` are the block's input and the gradient at its output.
    """
    with (
        loaded.cast(dtype),
        work.reading(files[0]) as states,
        work.reading(files[1]) as gradients,
    ):
        for start, stop in work.batches(stage, "descending", work.levers.reverse_batch):
            hidden = states.read(start, stop).to(work.device, dtype)
            gradient = gradients.read(start, stop).to(work.device)
            inputs = work.inputs(loaded.number, stop - start, dtype)
            routing.descend(loaded, start, hidden, inputs, gradient)
    for experts, number in each_expert(work, stage, "differentiating", loaded, routing.bank):
        routing.differentiate(experts, number)


def decompose_experts(
    work: Workspace, stage: Stage, loaded: LoadedBlock, routing: Routing
) -> list[AnalysisRow]:
    """Decompose the matrices of each expert into the work folder; figures of each."""
    rows = []
    groups = work.block_plan(loaded.number).groups_of_expert
    for experts, number in each_expert(work, stage, "decomposing", loaded, routing.bank):
        if number not in groups:
            continue
        moments = routing.moments(experts, number, groups[number])
        for site in list(moments):
            weight = experts.weight(number, site.leaf)
            analysis = work.method.analyse(weight, moments.pop(site), work.recipe)
            kept.write_decomposition(work.ledger, loaded.number, site, analysis)
            row = kept.figures(site, analysis)
            rows.append(replace(row, tokens=routing.reached(number)))
    return rows


def factorize_experts(
    work: Workspace,
    stage: Stage,
    loaded: LoadedBlock,
    output: int,
    routing: Routing | None,
    *,
    from_analysis: bool,
) -> StoredExperts | None:
    """Factors of the experts that an output factors; None where all of a block's stay dense.

    From kept decompositions, from the moments that ``routing`` takes, or from weights alone.
    """
    block = work.block_plan(loaded.number)
    allowances = work.outline.outputs[output].allowances
    chosen = {site: allowances[site.full_name] for group in block.experts for site in group.sites}
    if block.bank is None or not any(chosen.values()):
        return None
    stored = StoredExperts.of(work, block.bank, chosen)
    for experts, number in each_expert(work, stage, "factorizing", loaded, block.bank):
        moments: dict[ExpertSite, Moment] = {}
        if routing is not None and not from_analysis:
            moments = routing.moments(experts, number, block.groups_of_expert.get(number, []))
        for name, _, _ in block.bank.matrices:
            weight = experts.weight(number, name)
            site = stored.sites.get((number, name))
            if site is None:
                stored.put_dense(number, name, weight)
                continue
            allowance = chosen[site]
            assert allowance is not None
            tokens = routing.reached(number) if routing is not None else None
            if from_analysis:
                row = work.analysis_row(loaded.number, site)
                tokens = row.tokens
                analysis = kept.read_decomposition(
                    work.ledger, loaded.number, site, row, work.device
                )
                factors = work.method.factors(site, weight, analysis, allowance, work.recipe)
            else:
                moment = moments.pop(site, None)
                factors = work.method.compress(site, weight, moment, allowance, work.recipe)
            stored.put(site, factors, tokens)
    return stored


@dataclass
class StoredExperts:
    """Factors of the experts of one block, in nameless files until a shard takes them."""

    bank: ExpertBank
    matrices: Mapping[str, ExpertMatrices]
    sites: Mapping[tuple[int, str], ExpertSite]  # those to be factored
    rows: list[LinearRow]
    form: str
    dtype: torch.dtype
    files: dict[str, RowFile]
    guard: tuple[str, torch.Tensor]

    @classmethod
    def of(
        cls, work: Workspace, bank: ExpertBank, chosen: Mapping[ExpertSite, Allowance | None]
    ) -> StoredExperts:
        form = work.outline.form.name
        sites = {(site.expert, site.leaf): site for site, kept in chosen.items() if kept}
        ranks = {site.full_name: kept.rank for site, kept in chosen.items() if kept}
        matrices = {}
        for name, rows, columns in bank.matrices:
            held = (sites.get((expert, name)) for expert in range(bank.count))
            each = tuple(rows if site is None else ranks[site.full_name] for site in held)
            matrices[name] = ExpertMatrices(form, name, rows, columns, each)
        dtype = next(iter(sites.values())).dtype
        files = {}
        for each_matrix in matrices.values():
            for name, shape in each_matrix.shapes().items():
                width = shape[1] if len(shape) > 1 else 1
                of_pivots = name == each_matrix.pivots
                files[name] = RowFile(
                    work.folder, shape[0], width, torch.int32 if of_pivots else dtype
                )
        module = work.skeleton.model.get_submodule(bank.full_name)
        return cls(bank, matrices, sites, [], form, dtype, files, guard_of(module, dtype))

    def put(self, site: ExpertSite, factors: Factors, tokens: int | None) -> None:
        """Store the factors of one matrix, and how their compression went."""
        self._store(site.expert, site.leaf, factors.tensors)
        row = LinearRow(
            **vars(factors.figures), spec=factors.spec, tokens=tokens, within=self.bank.disk_name
        )
        self.rows.append(row)

    def put_dense(self, expert: int, name: str, weight: torch.Tensor) -> None:
        self._store(expert, name, {"weight": weight})

    def _store(self, expert: int, name: str, tensors: Mapping[str, torch.Tensor]) -> None:
        matrices = self.matrices[name]
        places = matrices.slices(expert)
        for leaf, piece in matrices.pieces(expert, tensors).items():
            rows = torch.arange(places[leaf].start, places[leaf].stop)
            self.files[leaf].write(rows, piece if piece.dim() > 1 else piece[:, None])

    @property
    def row(self) -> ExpertsRow:
        """Their entry in the config."""
        ranks = {name: list(matrices.ranks) for name, matrices in self.matrices.items()}
        return ExpertsRow(name=self.bank.disk_name, spec={"form": self.form, "ranks": ranks})

    def entries(self) -> list[Entry]:
        """Tensors of the shard."""
        name, guard = self.guard
        entries = [Entry(f"{self.bank.disk_name}.{name}", guard)]
        for matrices in self.matrices.values():
            for leaf, shape in matrices.shapes().items():
                stored = Computed(self.files[leaf].dtype, shape, partial(self._parts, leaf, shape))
                entries.append(Entry(f"{self.bank.disk_name}.{leaf}", stored))
        return entries

    def _parts(self, leaf: str, shape: tuple[int, ...]) -> Iterator[torch.Tensor]:
        return (part.view(-1, *shape[1:]) for part in self.files[leaf].parts())

    def close(self) -> None:
        for file in self.files.values():
            file.close()
