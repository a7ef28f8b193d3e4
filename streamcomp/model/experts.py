"""The experts of a mixture: one module of a block, which is loaded a few experts at a time.

transformers keeps each matrix of all experts of a block in one parameter, (experts, m, n), and
hands their module the tokens with the experts that the router chose. On disk they are one tensor
of them all, or one for each expert; either way a part of it can be read.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from streamcomp.checkpoint.index import TensorInfo
from streamcomp.forms.expert_trial import computes_experts
from streamcomp.forms.experts import has_experts, matrices_of
from streamcomp.model.meta import FLOATS

if TYPE_CHECKING:  # both are traced through what runs in their blocks
    from streamcomp.model.skeleton import Skeleton

__all__ = ["ExpertBank", "answering", "expert_modules", "find_bank"]

# Weights that are loaded at a time: as many experts as fit, one at least.
_AT_ONCE_BYTES = 64 * 2**20

# What experts are given: tokens (T, n), chosen experts (T, k) and their weights (T, k).
Answer = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class ExpertBank:
    """All experts of one block, and where their weights are."""

    name: str  # within the block: "mlp.experts"
    full_name: str  # within the model
    disk_name: str  # in the checkpoint
    count: int
    chosen: int  # experts that each token is sent to
    matrices: tuple[tuple[str, int, int], ...]  # name, rows m, columns n, in the order of their use
    item_bytes: int  # of a number, where it runs
    # Tensors on disk behind each parameter (experts, ...), by its name in the module.
    sources: Mapping[str, Sequence[TensorInfo]] = field(hash=False, compare=False)

    @property
    def inputs(self) -> int:
        """Channels n of the tokens that experts are given, and of what they give."""
        return self.matrices[0][2]

    @property
    def numel(self) -> int:
        """Numbers of the matrices of one expert."""
        return sum(rows * columns for _, rows, columns in self.matrices)

    @property
    def expert_bytes(self) -> int:
        """Matrices of one expert, as it runs."""
        return self.numel * self.item_bytes

    @property
    def nbytes(self) -> int:
        """All experts, as they run."""
        return self.count * self.expert_bytes

    @property
    def disk_bytes(self) -> int:
        return sum(info.nbytes for infos in self.sources.values() for info in infos)

    @property
    def at_once(self) -> int:
        """Experts that are loaded at a time."""
        return min(self.count, max(1, _AT_ONCE_BYTES // self.expert_bytes))

    @property
    def parameters(self) -> frozenset[str]:
        """Full names of the parameters that hold experts."""
        return frozenset(f"{self.full_name}.{leaf}" for leaf in self.sources)

    @property
    def names_on_disk(self) -> frozenset[str]:
        """Names of the tensors behind the matrices, without biases."""
        names = {name for name, _, _ in self.matrices}
        return frozenset(i.name for leaf in names for i in self.sources[leaf])

    def tokens(self, stream: int) -> int:
        """How many of a stream's tokens are expected to reach one expert."""
        return -(-stream * self.chosen // self.count)

    def groups(self) -> Iterator[tuple[int, int]]:
        """First and last (exclusive) of the experts that are loaded together."""
        for first in range(0, self.count, self.at_once):
            yield first, min(first + self.at_once, self.count)

    def parts(self, first: int, last: int) -> list[TensorInfo]:
        """What is to be read for the experts from ``first`` to ``last`` (exclusive)."""
        return [
            part
            for infos in self.sources.values()
            for info in infos
            for part in _part(info, self.count, len(infos), first, last)
        ]


def _part(
    info: TensorInfo, count: int, tensors: int, first: int, last: int
) -> Iterator[TensorInfo]:
    """The rows of ``info`` that belong to the experts; nothing where it is another expert's.

    Of ``tensors`` that make one parameter, as many as there are experts, or a multiple, hold one
    expert each.
    """
    if tensors < count:
        yield info.part(first, last)
    elif first <= _expert_of(info) < last:
        yield info


def _expert_of(info: TensorInfo) -> int:
    """The number of the expert that a tensor is named after: the last number in its name."""
    return int(re.findall(r"\.(\d+)(?=\.)", info.name)[-1])


def expert_modules(block: nn.Module) -> dict[str, nn.Module]:
    """Modules of ``block`` that run experts behind transformers' interface, by name."""
    return {name: module for name, module in block.named_modules() if has_experts(module)}


def find_bank(skeleton: Skeleton, number: int) -> tuple[ExpertBank | None, dict[str, str]]:
    """The experts of a block, if they can be loaded a few at a time and run one by one.

    Otherwise None, and for each module of experts (by its name in the block) the reason.
    """
    modules = expert_modules(skeleton.block(number))
    if len(modules) > 1:
        return None, {name: "one of several modules of experts" for name in modules}
    for name, module in modules.items():
        full_name = f"{skeleton.block_name(number)}.{name}"
        prefix = f"{full_name}."
        sources = {
            parameter.removeprefix(prefix): infos
            for parameter, infos in skeleton.sources.items()
            if parameter.startswith(prefix)
        }
        reason = _reason(skeleton, number, name, module, sources)
        if reason:
            return None, {name: reason}
        matrices = matrices_of(module)
        shapes = tuple((leaf, rows, columns) for leaf, (rows, columns) in matrices.items())
        first = sources[shapes[0][0]][0].name
        return ExpertBank(
            name,
            full_name,
            _disk_name(skeleton, full_name, shapes[0][0], first),
            _count(module, shapes[0][0]),
            skeleton.rehearsal.chosen[number][name],
            shapes,
            skeleton.dtype.itemsize,
            sources,
        ), {}
    return None, {}


def _reason(
    skeleton: Skeleton,
    number: int,
    name: str,
    module: nn.Module,
    sources: Mapping[str, Sequence[TensorInfo]],
) -> str:
    """Why the experts of ``module`` cannot be taken one by one; empty where they can."""
    kind = type(module).__name__
    if not computes_experts(module):
        return f"a {kind}, whose experts compute something else than one by one"
    if name not in skeleton.rehearsal.chosen[number]:
        return f"a {kind}, which cannot be run without data, or not on all tokens at once"
    held = {leaf for leaf, value in module._parameters.items() if value is not None}
    if held != sources.keys():
        return f"a {kind}, of which {', '.join(sorted(held ^ sources.keys()))} is on one side only"
    for leaf, infos in sources.items():
        count = _count(module, leaf)
        each = len(infos) % count == 0 and all(0 <= _numbered(i) < count for i in infos)
        fused = len(infos) < count and all(info.shape[:1] == (count,) for info in infos)
        if not each and not fused:
            return f"a {kind}, whose experts are not apart on disk"
        if any(info.dtype not in FLOATS for info in infos):
            return f"experts of dtype {infos[0].dtype}"
    return ""


def _numbered(info: TensorInfo) -> int:
    return _expert_of(info) if re.search(r"\.\d+\.", info.name) else -1


def _count(module: nn.Module, leaf: str) -> int:
    return int(module.get_parameter(leaf).shape[0])


def _disk_name(skeleton: Skeleton, full_name: str, leaf: str, first: str) -> str:
    """The name on disk of the module: where its tensors are, if transformers finds it there."""
    prefix = re.match(r".*?\bexperts(?=\.)", first)
    if prefix and skeleton.names.parameter(f"{prefix[0]}.{leaf}") == f"{full_name}.{leaf}":
        return prefix[0]
    return full_name


@contextmanager
def answering(module: Any, answer: Answer) -> Iterator[None]:
    """Let ``answer`` give what the experts ``module`` would give, within the ``with``."""

    def forward(*args: Any, **kwargs: Any) -> Tensor:
        return answer(*args, *kwargs.values())

    module.forward = forward
    try:
        yield
    finally:
        del module.forward
