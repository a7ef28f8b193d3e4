"""Families of linears in a checkpoint, from headers alone."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from streamcomp.calibration.hidden_states import StreamShape
from streamcomp.checkpoint.index import CheckpointIndex
from streamcomp.forms.expert_module import FactoredExperts
from streamcomp.forms.runtime import FactoredLinear, SharedLinear
from streamcomp.model.sites import every_linear, find_sites
from streamcomp.model.skeleton import Skeleton
from streamcomp.model.tracing import trace_block, trace_capture

__all__ = ["Family", "Inspection", "inspect_checkpoint"]

_TRACED_TOKENS = 16  # enough to see which linears share an input


@dataclass(frozen=True)
class Family:
    """Linears, or experts' matrices, of one name and shape in all blocks."""

    name: str  # within a block
    rows: int
    columns: int
    count: int
    form: str  # "dense", or how it is factored
    ranks: tuple[int, int] | None  # least and largest, None where dense
    clusters: tuple[int, int] | None  # likewise, None but in the form shared
    axes: tuple[str, ...]  # form shared: which channels share weights, rows or columns or both
    nbytes: int  # all of them, as they are read
    shares_with: tuple[str, ...]  # linears of the same block fed the same tensor


@dataclass(frozen=True)
class Inspection:
    """Size, type and families of linears of a checkpoint."""

    model_type: str
    dtype: str
    blocks: int
    parameters: int
    in_reach: int  # those of them in dense matrices that can be factored
    nbytes: int
    decoded_bytes: int  # of the same tensors as bf16, where the source is quantised; else nbytes
    shards: int
    compressed: bool
    families: tuple[Family, ...]
    left: dict[str, tuple[str, int]]  # module within a block -> why it cannot be factored, how many

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def inspect_checkpoint(index: CheckpointIndex) -> Inspection:
    """Inspect every block of ``index``; SourceError or UnsupportedModelError if it is unusable."""
    skeleton = Skeleton(index)
    if skeleton.compressed:
        skeleton.check_tensors(head=False)
    groups: dict[str, list[_Member]] = {}
    left: dict[str, tuple[str, int]] = {}
    shared, in_reach = _shared_inputs(skeleton), 0
    for number in range(len(skeleton)):
        for member in (*_members(skeleton, number), *_expert_members(skeleton, number)):
            groups.setdefault(member.key, []).append(member)
        prefix = skeleton.block_name(number) + "."
        sites = find_sites(skeleton, number)
        in_reach += sum(site.numel for site in sites.eligible)
        for name, why in sites.left.items():
            if isinstance(skeleton.model.get_submodule(name), FactoredExperts):
                continue
            short = re.sub(r"\b\d+\b", "*", name.removeprefix(prefix))
            left[short] = (why, left.get(short, (why, 0))[1] + 1)
    return Inspection(
        str(skeleton.config.model_type),
        str(skeleton.dtype).removeprefix("torch."),
        len(skeleton),
        index.numel,
        in_reach,
        index.nbytes,
        index.decoded_bytes,
        len(index.shards),
        skeleton.compressed,
        tuple(_family(members, shared) for members in groups.values()),
        left,
    )


@dataclass(frozen=True)
class _Member:
    name: str
    rows: int
    columns: int
    form: str
    rank: int | None
    clusters: int | None
    axis: str
    nbytes: int

    @property
    def key(self) -> str:
        return f"{self.name} {self.rows} {self.columns} {self.form}"


def _members(skeleton: Skeleton, number: int) -> list[_Member]:
    """Linears of one block, dense and factored, in the order of the code."""
    parameters = skeleton.block_parameters(number)
    eligible = {site.name for site in find_sites(skeleton, number).linears}
    members = []
    for site in every_linear(skeleton, number):
        module = site.traced(skeleton.block(number))
        if site.name not in eligible and not isinstance(module, FactoredLinear):
            continue
        nbytes = sum(
            info.nbytes
            for key, infos in parameters.items()
            if key.startswith(f"{site.full_name}.")
            for info in infos
        )
        form, rank, clusters, axis = "dense", None, None, ""
        if isinstance(module, FactoredLinear):
            form, rank = module.form, module.rank
        if isinstance(module, SharedLinear):
            clusters, axis = module.clusters, module.axis
        members.append(
            _Member(site.name, site.rows, site.columns, form, rank, clusters, axis, nbytes)
        )
    return members


def _expert_members(skeleton: Skeleton, number: int) -> list[_Member]:
    """The matrices of the experts of one block, dense and factored, one for each expert."""
    members = [
        _Member(
            f"{site.bank.name}.{site.leaf}",
            site.rows,
            site.columns,
            "dense",
            None,
            None,
            "",
            site.disk_bytes,
        )
        for site in find_sites(skeleton, number).experts
    ]
    for name, module in skeleton.block(number).named_modules():
        if not isinstance(module, FactoredExperts):
            continue
        for matrix, matrices in module.matrices.items():
            right = skeleton.source_of(f"{skeleton.block_name(number)}.{name}.{matrices.right}")
            for rank in matrices.ranks:
                nbytes = right.torch_dtype.itemsize * rank * matrices.columns
                nbytes += right.torch_dtype.itemsize * rank * matrices.left_rows(rank)
                nbytes += 4 * matrices.rows if matrices.pivots else 0
                shape = (matrices.rows, matrices.columns)
                full_name = f"{name}.{matrix}"
                members.append(_Member(full_name, *shape, module.form, rank, None, "", nbytes))
    return members


def _family(members: Sequence[_Member], shared: dict[str, tuple[str, ...]]) -> Family:
    first = members[0]
    return Family(
        first.name,
        first.rows,
        first.columns,
        len(members),
        first.form,
        _range(member.rank for member in members),
        _range(member.clusters for member in members),
        tuple(sorted({member.axis for member in members if member.axis})),
        sum(member.nbytes for member in members),
        shared.get(first.name, ()),
    )


def _range(numbers: Iterable[int | None]) -> tuple[int, int] | None:
    given = [number for number in numbers if number is not None]
    return (min(given), max(given)) if given else None


def _shared_inputs(skeleton: Skeleton) -> dict[str, tuple[str, ...]]:
    """For each linear, the others of its block that are fed the same tensor."""
    layer_inputs = trace_capture(lambda: skeleton.dry_capture(1, _TRACED_TOKENS)[1]).layer_inputs
    stream = StreamShape(1, _TRACED_TOKENS, skeleton.hidden_size, skeleton.dtype)
    hidden = torch.empty(1, stream.seq_len, stream.hidden, dtype=stream.dtype, device="meta")
    shared: dict[str, tuple[str, ...]] = {}
    kinds = set()
    for number in range(len(skeleton)):
        kind = skeleton.block_kind(number)
        if kind in kinds:
            continue
        kinds.add(kind)
        sites = every_linear(skeleton, number)
        for names in trace_block(
            skeleton.block(number), sites, hidden, layer_inputs[number]
        ).groups:
            for name in names:
                shared[name] = tuple(other for other in names if other != name)
    return shared
