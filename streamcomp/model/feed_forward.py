"""Runs a block's feed-forward on a chunk of positions at a time.

Its intermediate activations are several times as large as the hidden states, and each position
is independent of the others, so chunks save memory. In a backward, each chunk's activations are
computed again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from streamcomp.errors import UnsupportedModelError

__all__ = ["in_chunks", "whole"]

# Names of the feed-forward in transformers' blocks.
_NAMES = ("mlp", "feed_forward", "ffn", "block_sparse_moe")


@contextmanager
def in_chunks(block: nn.Module, tokens: int) -> Iterator[None]:
    """Run the feed-forward of ``block`` on ``tokens`` positions at a time; 0: on all.

    A block without one, or whose feed-forward takes or returns more than hidden states (batch,
    seq, hidden), runs unchanged. Gradients do not reach the feed-forward's weights.
    """
    module = _feed_forward(block)
    if module is None or not tokens:
        yield
        return
    at_once = module.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        if kwargs or len(args) != 1 or args[0].dim() != 3 or args[0].shape[1] <= tokens:
            return at_once(*args, **kwargs)
        try:
            return _Chunks.apply(args[0], at_once, tokens)  # type: ignore[no-untyped-call]
        except _MoreThanStates:
            if any(part._forward_hooks or part._forward_pre_hooks for part in module.modules()):
                raise UnsupportedModelError(  # hooks would see its first chunk twice
                    f"{type(module).__name__} gives more than hidden states and cannot run in "
                    "chunks: allow more memory"
                ) from None
            return at_once(*args)

    module.forward = forward
    try:
        yield
    finally:
        module.__dict__.pop("forward", None)


@contextmanager
def whole(block: nn.Module) -> Iterator[None]:
    """Run the feed-forward on all positions at once within the ``with``."""
    module = _feed_forward(block)
    held = module.__dict__.pop("forward", None) if module is not None else None
    try:
        yield
    finally:
        if module is not None and held is not None:
            module.forward = held


def _feed_forward(block: nn.Module) -> nn.Module | None:
    children = dict(block.named_children())
    return next((children[name] for name in _NAMES if name in children), None)


class _MoreThanStates(Exception):
    """Raised where a feed-forward returns something else than a tensor."""


class _Chunks(torch.autograd.Function):
    """Runs chunk after chunk, without a graph in the forward; the backward builds each graph."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, run: Callable[[Tensor], Any], tokens: int) -> Tensor:
        ctx.save_for_backward(hidden)
        ctx.run, ctx.tokens = run, tokens
        result = torch.empty_like(hidden)
        for start in range(0, hidden.shape[1], tokens):
            part = run(hidden[:, start : start + tokens].contiguous())
            if not isinstance(part, Tensor):
                raise _MoreThanStates
            result[:, start : start + tokens] = part
        return result

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (hidden,) = ctx.saved_tensors
        result = torch.empty_like(hidden)
        for start in range(0, hidden.shape[1], ctx.tokens):
            part = slice(start, start + ctx.tokens)
            with torch.enable_grad():
                inputs = hidden[:, part].detach().contiguous().requires_grad_()
                output = ctx.run(inputs)
            result[:, part] = torch.autograd.grad(output, inputs, gradients[0][:, part])[0]
        return result, None, None
