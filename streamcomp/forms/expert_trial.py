"""Whether the experts of a model compute what factored experts compute, tried on a small copy."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from streamcomp.forms.expert_module import FactoredExperts
from streamcomp.forms.experts import EXPERT_FORMS, expert_parts, has_experts, matrices_of
from streamcomp.memory_errors import lacks_memory

__all__ = ["computes_experts"]

_EXPERTS, _TOKENS, _CHOSEN = 3, 7, 2
# Columns n and inner width of the copy. Even, for gates that take every other row.
_HIDDEN, _INNER = 6, 4
# Scales of the copy's inputs, so that limits are met and not met.
_SCALES = (0.1, 1.0, 30.0)


def computes_experts(module: nn.Module) -> bool:
    """Whether ``module``'s own eager forward is that of :class:`FactoredExperts` at full rank.

    A copy with a few small, random experts is tried, on the CPU; ``module`` may be on ``meta``.
    """
    if not has_experts(module):
        return False
    eager: Any = getattr(type(module).forward, "__wrapped__", None)
    if eager is None:
        return False
    random = torch.Generator().manual_seed(0)
    try:
        with torch.no_grad():
            small = _small_copy(module, random)
            factored = _at_full_rank(small)
            (_, columns), _ = matrices_of(small).values()
            for scale in _SCALES:
                hidden = scale * torch.randn(_TOKENS, columns, generator=random)
                scores = torch.rand(_TOKENS, _experts_of(small), generator=random)
                weights, index = scores.topk(min(_CHOSEN, scores.shape[1]))
                expected = eager(small, hidden, index, weights)
                output = factored(hidden, index, weights)
                limit = 1e-5 * float(expected.abs().max())
                if not torch.allclose(output, expected, rtol=1e-5, atol=limit):
                    return False
        return True
    except Exception as error:  # model code may raise anything
        if lacks_memory(error):
            raise
        return False


def _experts_of(module: Any) -> int:
    return int(module.num_experts)


def _at_full_rank(dense: nn.Module) -> FactoredExperts:
    """Experts of rank m, which hold the matrices of ``dense``."""
    count, parts = _experts_of(dense), expert_parts(dense)
    ranks = {name: [rows] * count for name, (rows, _) in matrices_of(dense).items()}
    factored = FactoredExperts(dense, EXPERT_FORMS[0], ranks)
    for name, matrices in factored.matrices.items():
        weights = [parts.matrix(name, expert) for expert in matrices.order]
        factored.get_parameter(matrices.right).copy_(torch.cat(weights))
    return factored


def _small_copy(module: nn.Module, random: torch.Generator) -> nn.Module:
    """A copy of ``module`` with a few experts of small, random matrices; it is not changed."""
    (both, hidden), (_, inner) = matrices_of(module).values()
    # Equal sizes stay equal, for a setting is recognised by its value.
    sizes = {inner: _INNER}
    sizes.setdefault(both, _INNER * both // inner)
    sizes.setdefault(hidden, _HIDDEN)
    sizes.setdefault(_experts_of(module), _EXPERTS)
    return _resized(module, sizes, random)


def _resized(module: nn.Module, sizes: Mapping[int, int], random: torch.Generator) -> nn.Module:
    """A copy of ``module`` and its children whose sizes are replaced, with random tensors."""
    result = copy.copy(module)
    for name, value in vars(module).items():
        if type(value) is int and value in sizes and not name.startswith("_"):
            vars(result)[name] = sizes[value]
    result._parameters = {
        name: value if value is None else nn.Parameter(_random(value, sizes, random))
        for name, value in module._parameters.items()
    }
    result._buffers = {
        name: value if value is None else _random(value, sizes, random)
        for name, value in module._buffers.items()
    }
    result._modules = {
        name: child if child is None else _resized(child, sizes, random)
        for name, child in module._modules.items()
    }
    return result


def _random(like: Tensor, sizes: Mapping[int, int], random: torch.Generator) -> Tensor:
    return torch.randn([sizes.get(size, size) for size in like.shape], generator=random)
