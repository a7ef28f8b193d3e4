"""Sites: where a block's weights are, what can be done there, why other matrices are left.

A :class:`Site` is what plans, methods and reports know of a weight, wherever it is: in an
``nn.Linear``, or one expert's part of a parameter that holds all experts of a block. The first kind
can also be watched while its block runs, and replaced. Experts are run one by one instead
(:mod:`streamcomp.calibration.routing`).
"""

from __future__ import annotations

import copy
import inspect
import operator
import re
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from streamcomp.checkpoint.index import TensorInfo
from streamcomp.forms.runtime import FactoredLinear, factored
from streamcomp.memory_errors import lacks_memory
from streamcomp.model.experts import ExpertBank, find_bank
from streamcomp.model.loading import stored_shape
from streamcomp.model.meta import FLOATS

if TYPE_CHECKING:  # both run blocks, and blocks are traced through their sites
    from streamcomp.model.skeleton import Skeleton
    from streamcomp.model.streamer import LoadedBlock

__all__ = [
    "BlockSites",
    "ExpertSite",
    "LinearSite",
    "Site",
    "empty_factored",
    "every_linear",
    "find_sites",
    "is_linear",
    "linear_modules",
]

# Ranks of experts are multiples of 8, of which there are some 16.
_ALIGNED, _RANKS = 8, 16
# Settings for the number of experts in configs of mixture models.
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
# A line of code that multiplies.
_PRODUCT = re.compile(r"@|\b(linear|matmul|mm|einsum)\(")


@dataclass(frozen=True)
class Site(ABC):
    """One weight matrix W (rows m x columns n) of a block."""

    name: str  # within the block: "self_attn.q_proj"
    full_name: str  # within the model
    rows: int  # outputs m
    columns: int  # inputs n

    @property
    def leaf(self) -> str:
        """The last part of its name: "q_proj"."""
        return self.name.rpartition(".")[2]

    @property
    def numel(self) -> int:
        return self.rows * self.columns

    @property
    def rank_step(self) -> int:
        """Ranks that are chosen by loss are multiples of it."""
        return 1

    def tokens(self, stream: int) -> int:
        """How many of a stream's tokens are expected to reach it."""
        return stream

    @property
    @abstractmethod
    def disk_name(self) -> str:
        """Its name in the checkpoint, without ``.weight``."""

    @property
    @abstractmethod
    def dtype(self) -> torch.dtype:
        """The dtype of the weight on disk."""

    @property
    @abstractmethod
    def disk_bytes(self) -> int:
        """Bytes of the weight on disk."""


@dataclass(frozen=True)
class LinearSite(Site):
    """The weight of an ``nn.Linear``.

    Watchers are called in every forward, or backward, until the handle that they came with is
    removed. They are given rows (..., n) or (..., m), one for each token that reaches the site,
    perhaps none: who needs their number counts them. What watches the dense block and then the
    block with factors, on one batch, sees the rows of the same tokens, in the same order.
    """

    source: TensorInfo  # its weight on disk

    @property
    def disk_name(self) -> str:
        return self.source.name.removesuffix(".weight")

    @property
    def dtype(self) -> torch.dtype:
        return self.source.torch_dtype

    @property
    def disk_bytes(self) -> int:
        return self.source.nbytes

    def traced(self, block: nn.Module) -> nn.Module:
        """The module of ``block`` that gets its inputs."""
        return block.get_submodule(self.name)

    def weight(self, block: LoadedBlock) -> Tensor:
        """A view of the dense W (m, n), also while factors run instead of it."""
        return self._dense(block).weight.detach()

    def bias(self, block: LoadedBlock) -> Tensor | None:
        """The bias (m,) that is added to the outputs."""
        bias = self._dense(block).bias
        return None if bias is None else bias.detach()

    def watch_inputs(self, block: LoadedBlock, see: Callable[[Tensor], None]) -> RemovableHandle:
        """Have ``see`` called with the inputs (..., n) of each forward."""

        def before(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            see(args[0])

        return block.running(self.name).register_forward_pre_hook(before)

    def watch_outputs(
        self, block: LoadedBlock, see: Callable[[Tensor, Tensor | None], None]
    ) -> RemovableHandle:
        """Have ``see`` called with the outputs (..., m) of each forward, and the bias in them."""

        def after(module: nn.Module, _: tuple[Tensor, ...], output: Tensor) -> None:
            bias = module.bias
            see(output, bias if isinstance(bias, Tensor) else None)

        return block.running(self.name).register_forward_hook(after)

    def watch_gradients(self, block: LoadedBlock, see: Callable[[Tensor], None]) -> RemovableHandle:
        """Have ``see`` called with the gradient (..., m) of its outputs in each backward."""

        def after(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            if output.requires_grad:
                output.register_hook(see)

        return block.running(self.name).register_forward_hook(after)

    def install(
        self, block: LoadedBlock, tensors: Mapping[str, Tensor], spec: Mapping[str, Any]
    ) -> None:
        """Run factors instead of W: ``tensors`` by their names on disk, of the form in ``spec``.

        In the dtype of W, and with its bias.
        """
        dtype, bias = self.weight(block).dtype, self.bias(block)
        state = {k: v.to(dtype) if v.is_floating_point() else v for k, v in tensors.items()}
        if bias is not None:
            state["bias"] = bias
        module = empty_factored(self.rows, self.columns, spec, bias=bias is not None)
        module.load_state_dict(state, assign=True)
        self.put(block, module.requires_grad_(False))

    def put(self, block: LoadedBlock, module: FactoredLinear) -> None:
        """Run ``module`` instead of W, until the block is dropped."""
        block.replace(self.name, module)

    def factored(self, block: LoadedBlock) -> FactoredLinear:
        """The module that runs instead of W."""
        module = block.running(self.name)
        assert isinstance(module, FactoredLinear)
        return module

    def parameter(self, leaf: str) -> str:
        """The name within the block of tensor ``leaf`` of the module that runs instead of W."""
        return f"{self.name}.{leaf}"

    def free(self, block: LoadedBlock) -> None:
        """Free the dense W; the block cannot run any more."""
        linear = self._dense(block)
        linear.weight = nn.Parameter(linear.weight.to("meta"), requires_grad=False)

    def _dense(self, block: LoadedBlock) -> nn.Linear:
        module = block.original(self.name)
        assert isinstance(module, nn.Linear)
        return module


@dataclass(frozen=True)
class ExpertSite(Site):
    """One matrix of one expert: "mlp.experts.7.gate_up_proj"."""

    bank: ExpertBank
    expert: int

    @property
    def rank_step(self) -> int:
        """A sixteenth of the smaller side, and a multiple of 8; 1 where that is short.

        Experts of equal rank run together, and where rows begin at multiples of 16 bytes, faster:
        a few different ranks are as good as many.
        """
        smaller = min(self.rows, self.columns)
        return _ALIGNED * (smaller // (_ALIGNED * _RANKS)) or 1

    def tokens(self, stream: int) -> int:
        return self.bank.tokens(stream)

    @property
    def disk_name(self) -> str:
        return f"{self.bank.disk_name}.{self.expert}.{self.leaf}"

    @property
    def dtype(self) -> torch.dtype:
        return self.bank.sources[self.leaf][0].torch_dtype

    @property
    def disk_bytes(self) -> int:
        return self.numel * self.dtype.itemsize


@dataclass(frozen=True)
class BlockSites:
    """The sites of one block: those to factor, and what else holds a matrix, with the reason."""

    linears: tuple[LinearSite, ...]
    left: dict[str, str]  # full name -> why it is left as it is
    experts: tuple[ExpertSite, ...] = ()
    bank: ExpertBank | None = None  # the block's experts, if they can be taken one by one

    @property
    def eligible(self) -> tuple[Site, ...]:
        return (*self.linears, *self.experts)


def find_sites(
    skeleton: Skeleton, number: int, include: str = "", exclude: str = "", experts_left: str = ""
) -> BlockSites:
    """Look at every module of a block that holds a matrix.

    ``include`` and ``exclude`` are regular expressions searched in the full name. Experts are left
    for the reason ``experts_left``, where there is one.
    """
    eligible, left = [], {}
    prefix = skeleton.block_name(number)
    bank, reasons = find_bank(skeleton, number)
    experts: list[ExpertSite] = []
    if bank is not None and not experts_left:
        experts = _expert_sites(bank, include, exclude)
        if not experts:
            reasons = {bank.name: "not included" if include else "excluded"}
    elif bank is not None:
        reasons = {bank.name: experts_left}
    for name, module in skeleton.block(number).named_modules():
        parameters = {k: v for k, v in module._parameters.items() if v is not None and v.dim() > 1}
        if not parameters or isinstance(module, FactoredLinear):
            continue
        full_name = f"{prefix}.{name}"
        if experts and bank is not None and name == bank.name:
            continue
        reason = reasons.get(name) or _reason(skeleton, full_name, module, include, exclude)
        if reason:
            left[full_name] = reason
            continue
        assert is_linear(module)
        eligible.append(_site(skeleton, number, name, module))
    return BlockSites(tuple(eligible), left, tuple(experts), bank)


def _expert_sites(bank: ExpertBank, include: str, exclude: str) -> list[ExpertSite]:
    """Every matrix of every expert that is included by name."""
    sites = []
    for expert in range(bank.count):
        for leaf, rows, columns in bank.matrices:
            name, full_name = f"{bank.name}.{expert}.{leaf}", f"{bank.full_name}.{expert}.{leaf}"
            if not _unwanted(full_name, include, exclude):
                sites.append(ExpertSite(name, full_name, rows, columns, bank, expert))
    return sites


def every_linear(skeleton: Skeleton, number: int) -> list[LinearSite]:
    """Every linear of a block that is on disk: dense, factored, or one that cannot be."""
    prefix = skeleton.block_name(number)
    return [
        _site(skeleton, number, name, module)
        for name, module in linear_modules(skeleton.block(number)).items()
        if skeleton.sources.get(f"{prefix}.{name}.weight")
    ]


def _site(skeleton: Skeleton, number: int, name: str, module: nn.Linear) -> LinearSite:
    full_name = f"{skeleton.block_name(number)}.{name}"
    source = skeleton.sources[f"{full_name}.weight"][0]
    return LinearSite(name, full_name, module.out_features, module.in_features, source)


def linear_modules(block: nn.Module) -> dict[str, nn.Linear]:
    """Every linear in ``block``, dense or factored, by its name there."""
    return {name: module for name, module in block.named_modules() if is_linear(module)}


def is_linear(module: nn.Module) -> TypeGuard[nn.Linear]:
    """Whether ``module`` is a linear, dense or factored."""
    return isinstance(module, nn.Linear)


def empty_factored(
    rows: int, columns: int, spec: Mapping[str, Any], *, bias: bool = False
) -> FactoredLinear:
    """A factored linear as ``spec`` of the config says, without memory for its tensors."""
    with torch.device("meta"):
        return factored(nn.Linear(columns, rows, bias=bias), spec)


def _reason(
    skeleton: Skeleton, full_name: str, module: nn.Module, include: str, exclude: str
) -> str:
    """Why ``module`` cannot or shall not be factored; empty where it can."""
    if not isinstance(module, nn.Linear) or not _computes_a_linear(module):
        return f"a {type(module).__name__}, no linear"
    sources = skeleton.sources.get(f"{full_name}.weight", [])
    if len(sources) != 1 or sources[0].shape != stored_shape(module):
        return "not one matrix on disk"
    if not sources[0].name.endswith(".weight"):
        return f"named {sources[0].name} on disk"
    if sources[0].dtype not in FLOATS:
        return f"of dtype {sources[0].dtype}"
    if _is_router(skeleton, full_name, module.weight.shape[0]):
        return "a router"
    block, name = skeleton.place_of(full_name)
    owner, _, leaf = full_name.rpartition(".")
    if leaf in _multiplied(skeleton.model.get_submodule(owner)):
        return "its weight is read by other code"
    called = skeleton.rehearsal.called[block]
    if called is not None and name not in called:
        return "not called by its block"
    return _unwanted(full_name, include, exclude)


def _unwanted(full_name: str, include: str, exclude: str = "") -> str:
    """Why a matrix shall not be factored; empty where it shall."""
    if include and not re.search(include, full_name):
        return "not included"
    if exclude and re.search(exclude, full_name):
        return "excluded"
    return ""


def _multiplied(owner: nn.Module) -> frozenset[str]:
    """Names of the linears whose weight the code of ``owner`` multiplies by itself.

    Perhaps in a branch that this machine does not take: with other kernels, or in another release
    of transformers, the same model does.
    """
    return _weights_in_products(type(owner).__module__, type(owner).__qualname__)


@cache
def _weights_in_products(module: str, name: str) -> frozenset[str]:
    """Every ``leaf`` of which a line in the class's code multiplies ``leaf.weight``."""
    try:
        code = inspect.getsource(operator.attrgetter(name)(sys.modules[module]))
    except (AttributeError, KeyError, OSError, TypeError):  # the class has no source code
        return frozenset()
    lines = [line for line in code.splitlines() if _PRODUCT.search(line)]
    return frozenset(leaf for line in lines for leaf in re.findall(r"\.(\w+)\.weight\b", line))


def _computes_a_linear(module: nn.Linear) -> bool:
    """Whether a subclass of ``nn.Linear`` computes a linear, tried on a 3 x 5 copy."""
    if type(module).forward is nn.Linear.forward:
        return True
    if set(module._parameters) != {"weight", "bias"} or module._buffers or module._modules:
        return False
    rows, columns = 3, 5
    random = torch.Generator().manual_seed(0)
    small = copy.copy(module)
    small.in_features, small.out_features = columns, rows
    weight, bias = torch.randn(rows, columns, generator=random), torch.ones(rows)
    small._parameters = {"weight": nn.Parameter(weight), "bias": None}
    if module.bias is not None:
        small._parameters["bias"] = nn.Parameter(bias)
    inputs = torch.randn(2, 4, columns, generator=random)
    try:
        with torch.no_grad():
            output = type(module).forward(small, inputs)
        return torch.allclose(output, nn.functional.linear(inputs, weight, small.bias), atol=1e-5)
    except Exception as error:  # model code may raise anything
        if lacks_memory(error):
            raise
        return False


def _is_router(skeleton: Skeleton, full_name: str, rows: int) -> bool:
    """One output per expert, next to the experts: a list of as many, or one tensor of them all.

    Also within a module of its own, whose class is named after what it is.
    """
    if rows not in _expert_counts(skeleton):
        return False
    owner = full_name.rpartition(".")[0]
    module = skeleton.model.get_submodule(owner)
    if "Router" in type(module).__name__:
        module = skeleton.model.get_submodule(owner.rpartition(".")[0])
    lists = (m for m in module.modules() if isinstance(m, nn.ModuleList))
    return any(len(experts) == rows for experts in lists) or any(
        value.dim() == 3 and value.shape[0] == rows for value in module.parameters()
    )


def _expert_counts(skeleton: Skeleton) -> set[int]:
    counts = (getattr(skeleton.text_config, name, None) for name in _EXPERTS)
    return {count for count in counts if isinstance(count, int) and count > 1}
