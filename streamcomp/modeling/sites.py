"""Which linears of a block can be factored, and why the others are left as they are."""

from __future__ import annotations

import copy
import inspect
import operator
import re
import sys
from dataclasses import dataclass
from functools import cache

import torch
from torch import nn

from streamcomp.checkpoint.index import TensorInfo
from streamcomp.modeling.meta import FLOATS
from streamcomp.modeling.modules import FactoredLinear
from streamcomp.modeling.skeleton import Skeleton

__all__ = ["BlockLinears", "Linear", "find_linears"]

# How configs of mixture models call their number of experts.
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
# A line of code that multiplies.
_PRODUCT = re.compile(r"@|\b(linear|matmul|mm|einsum)\(")


@dataclass(frozen=True)
class Linear:
    """One weight matrix (rows x columns) of a block."""

    name: str  # within the block: "self_attn.q_proj"
    full_name: str  # within the model
    source: TensorInfo  # its weight on disk
    rows: int  # outputs m
    columns: int  # inputs n

    @property
    def disk_name(self) -> str:
        """Its name in the checkpoint, without ``.weight``."""
        return self.source.name.removesuffix(".weight")

    @property
    def numel(self) -> int:
        return self.rows * self.columns


@dataclass(frozen=True)
class BlockLinears:
    """The linears of one block: those to factor, and the rest with the reason."""

    eligible: tuple[Linear, ...]
    left: dict[str, str]  # full name -> why it is left as it is


def find_linears(
    skeleton: Skeleton, number: int, include: str = "", exclude: str = ""
) -> BlockLinears:
    """Look at every module of a block that holds a matrix.

    ``include`` and ``exclude`` are regular expressions searched in the full name.
    """
    eligible, left = [], {}
    prefix = skeleton.block_name(number)
    for name, module in skeleton.block(number).named_modules():
        parameters = {k: v for k, v in module._parameters.items() if v is not None and v.dim() > 1}
        if not parameters or isinstance(module, FactoredLinear):
            continue
        full_name = f"{prefix}.{name}"
        reason = _reason(skeleton, full_name, module, include, exclude)
        if reason:
            left[full_name] = reason
            continue
        assert isinstance(module, nn.Linear)
        source = skeleton.sources[f"{full_name}.weight"][0]
        rows, columns = module.weight.shape
        eligible.append(Linear(name, full_name, source, rows, columns))
    return BlockLinears(tuple(eligible), left)


def _reason(
    skeleton: Skeleton, full_name: str, module: nn.Module, include: str, exclude: str
) -> str:
    """Why ``module`` cannot or shall not be factored; empty where it can."""
    if not isinstance(module, nn.Linear) or not _computes_a_linear(module):
        return f"a {type(module).__name__}, no linear"
    sources = skeleton.sources.get(f"{full_name}.weight", [])
    if len(sources) != 1 or sources[0].shape != tuple(module.weight.shape):
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
    except (AttributeError, KeyError, OSError, TypeError):  # a class without code of its own
        return frozenset()
    lines = [line for line in code.splitlines() if _PRODUCT.search(line)]
    return frozenset(leaf for line in lines for leaf in re.findall(r"\.(\w+)\.weight\b", line))


def _computes_a_linear(module: nn.Linear) -> bool:
    """Whether a subclass of ``nn.Linear`` computes what that does: tried on a copy of 3 x 5."""
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
    except Exception:  # whatever the model's own code raises
        return False


def _is_router(skeleton: Skeleton, full_name: str, rows: int) -> bool:
    """One output per expert, beside the experts: a list of as many, or one tensor of them all."""
    if rows not in _expert_counts(skeleton):
        return False
    beside = skeleton.model.get_submodule(full_name.rpartition(".")[0])
    lists = (m for m in beside.modules() if isinstance(m, nn.ModuleList))
    return any(len(experts) == rows for experts in lists) or any(
        value.dim() == 3 and value.shape[0] == rows for value in beside.parameters()
    )


def _expert_counts(skeleton: Skeleton) -> set[int]:
    counts = (getattr(skeleton.text_config, name, None) for name in _EXPERTS)
    return {count for count in counts if isinstance(count, int) and count > 1}
