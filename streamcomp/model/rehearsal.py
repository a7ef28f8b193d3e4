"""Runs a model once without weights, before anything is read.

It tells how blocks return their hidden states, which of their linears they call, and which
modules run before and after them. It also refuses models that streaming would compute wrongly:
those that hand anything but hidden states from block to block, or from a block to the head. The
autograd graph shows this, because the output of each tap is a leaf of it.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from streamcomp.errors import StreamcompError, UnsupportedModelError
from streamcomp.model.sites import is_linear
from streamcomp.model.taps import (
    InputCapture,
    LayerInputs,
    Returned,
    Stop,
    TapPanel,
    check_same_inputs,
    is_state,
)
from streamcomp.model.tracing import BlockUse, use_of_block

__all__ = ["Rehearsal", "code_of", "rehearse"]

# Two batches that differ in their tokens alone. No row is 0, 1, 2, ..., which positions are.
_TOKENS = ([[1, 0, 1, 1], [0, 0, 1, 0]], [[0, 1, 1, 0], [1, 1, 0, 1]])
# How a block may return its hidden states where it cannot be run without weights.
_GUESSES = tuple(Returned(length, frozenset(range(1, length))) for length in range(4))


@dataclass(frozen=True)
class Rehearsal:
    """Results of one forward without weights."""

    returns: tuple[Returned, ...]  # of each block
    called: tuple[frozenset[str] | None, ...]  # linears each block calls; None: unknown
    # modules of experts in each block -> experts that each token is sent to, as far as it is known
    chosen: tuple[Mapping[str, int], ...]
    before: frozenset[str]  # outer modules that run before the last block
    behind: frozenset[str]  # outer modules that run only after it, the head among them
    hidden_size: int


@torch.inference_mode(False)
@torch.enable_grad()
def rehearse(
    forward: Callable[[Tensor], Any],
    panel: TapPanel,
    blocks: Sequence[nn.Module],
    outer: dict[str, nn.Module],
    head: nn.Module,
) -> Rehearsal:
    """Run ``forward`` of tokens (batch, seq) with the taps of ``panel`` instead of ``blocks``.

    ``outer`` are the modules outside of blocks that hold parameters, by name; these parameters
    must have values, whichever, those of the blocks need none. ``head`` is never computed.
    Raises UnsupportedModelError where the model cannot be streamed.
    """
    error: Exception | None = None
    for guess in _GUESSES:
        actors = _Actors(blocks, guess)
        try:
            before, behind = _perform(forward, panel, actors, outer, head)
        except Exception as fault:  # models may raise anything
            error = error or fault
            if actors.certain:
                break
            continue  # perhaps because the guess is wrong
        panel.conductor = capture = InputCapture(actors.returns)
        with torch.no_grad(), suppress(Stop):
            forward(torch.tensor(_TOKENS[1]))
        check_same_inputs(actors.layer_inputs, capture.layer_inputs)
        return Rehearsal(
            tuple(actors.returns),
            tuple(use.called if use else None for use in actors.uses),
            tuple(use.chosen if use else {} for use in actors.uses),
            frozenset(before),
            frozenset(behind - before),
            actors.leaves[-1].shape[-1],
        )
    assert error is not None
    if isinstance(error, StreamcompError):
        raise error
    text = (str(error).splitlines() or [""])[0]
    raise UnsupportedModelError(
        f"its code cannot be run block by block ({type(error).__name__}: {text[:120]})"
    ) from error


def _perform(
    forward: Callable[[Tensor], Any],
    panel: TapPanel,
    actors: _Actors,
    outer: dict[str, nn.Module],
    head: nn.Module,
) -> tuple[set[str], set[str]]:
    """Run once with ``actors``; return outer modules that run before the last block, and after."""
    tokens = torch.tensor(_TOKENS[0])
    arrived: list[Tensor] = []
    used: tuple[set[str], set[str]] = (set(), set())

    def note(name: str) -> Callable[..., None]:
        return lambda *_: used[actors.finished].add(name)

    def stop(_: nn.Module, args: tuple[Any, ...]) -> None:
        arrived.append(args[0])
        raise Stop  # the head is large: do not compute

    def embed(_: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        of_tokens = args and isinstance(args[0], Tensor) and torch.equal(args[0].cpu(), tokens)
        return output.detach().requires_grad_().clone() if of_tokens else None

    panel.conductor = actors
    with ExitStack() as hooks:
        for name, module in outer.items():
            hooks.callback(module.register_forward_pre_hook(note(name)).remove)
            if isinstance(module, nn.Embedding):
                hooks.callback(module.register_forward_hook(embed).remove)
        hooks.callback(head.register_forward_pre_hook(stop).remove)
        with suppress(Stop):
            forward(tokens)
    actors.check_run(len(panel.taps))
    actors.check_head(arrived)
    return used


class _Actors:
    """Answers for blocks: traces each without weights, and returns a leaf of the autograd graph.

    A block that cannot run without weights is assumed to return its states as ``guess`` says.
    """

    def __init__(self, blocks: Sequence[nn.Module], guess: Returned) -> None:
        self._blocks, self._guess = blocks, guess
        self._seen: dict[Hashable, BlockUse | None] = {}
        self.uses: list[BlockUse | None] = []
        self.layer_inputs: list[LayerInputs] = []
        self.leaves: list[Tensor] = []
        self._output: Tensor | None = None  # of the block before; models may change it in place
        self._version = 0

    @property
    def finished(self) -> bool:
        """Whether the last block has answered."""
        return len(self.layer_inputs) == len(self._blocks)

    @property
    def certain(self) -> bool:
        """Whether nothing was guessed so far."""
        return None not in self.uses

    @property
    def returns(self) -> list[Returned]:
        return [use.returned if use else self._guess for use in self.uses]

    def answer(self, number: int, hidden: Tensor, inputs: LayerInputs) -> Any:
        if number < len(self.layer_inputs):
            raise UnsupportedModelError("its blocks run in another order than they are listed in")
        self.check_run(number)
        windows, positions = len(_TOKENS[0]), len(_TOKENS[0][0])
        if hidden.dim() != 3 or hidden.shape[:2] != (windows, positions):
            raise UnsupportedModelError(
                f"hidden states of {windows} x {positions} tokens are not (batch, tokens, hidden) "
                f"but {list(hidden.shape)}"
            )
        changed = hidden is not self._output or hidden._version != self._version
        if self.leaves and changed:
            raise UnsupportedModelError(
                f"block {number} is given something else than what block {number - 1} returned: "
                "not supported yet"
            )
        for name, value in _named(inputs):
            if value.requires_grad:
                raise UnsupportedModelError(
                    f"block {number} is given a state that depends on the tokens, besides the "
                    f"hidden states ({name}): not supported yet"
                )
        self.layer_inputs.append(inputs)
        self.uses.append(self._use(number, hidden, inputs))
        self.leaves.append(hidden.detach().clone().requires_grad_())
        self._output = self.leaves[-1].clone()
        self._version = self._output._version
        return self.returns[-1].around(self._output)

    def check_run(self, count: int) -> None:
        """Refuse unless the first ``count`` blocks have run."""
        if len(self.layer_inputs) < count:
            raise UnsupportedModelError(
                f"block {len(self.layer_inputs)} does not run on text alone: not supported"
            )

    def check_head(self, arrived: list[Tensor]) -> None:
        """Check that the head depends on the output of the last block, and of no other block."""
        if not arrived or arrived[0].shape[:-1] != self.leaves[0].shape[:-1]:
            raise UnsupportedModelError("the code behind its last block cannot be run by itself")
        if not arrived[0].requires_grad:
            raise UnsupportedModelError("its head does not depend on its last block")
        *others, last = torch.autograd.grad(
            arrived[0].float().sum(), self.leaves, allow_unused=True
        )
        for number, gradient in enumerate(others):
            if gradient is not None:
                raise UnsupportedModelError(
                    f"its head is given what block {number} returned, besides the last block's "
                    "hidden states: not supported yet"
                )
        if last is None:
            raise UnsupportedModelError("its head does not depend on its last block")

    def _use(self, number: int, hidden: Tensor, inputs: LayerInputs) -> BlockUse | None:
        """How the block uses its linears; blocks that run the same code are traced once."""
        block = self._blocks[number]
        key = code_of(block), tuple(map(_code_key, inputs.leaves))
        if key not in self._seen:
            self._seen[key] = use_of_block(block, hidden, inputs)
        return self._seen[key]


def _named(inputs: LayerInputs) -> list[tuple[str, Tensor]]:
    """The tensors of ``inputs`` with the names of the arguments that they are in."""
    arguments = {f"argument {k}": value for k, value in enumerate(inputs.args, 1)} | inputs.kwargs
    leaves = ((name, leaf) for name, value in arguments.items() for leaf in tree_leaves(value))
    return [(name, leaf) for name, leaf in leaves if isinstance(leaf, Tensor)]


def code_of(block: nn.Module) -> Hashable:
    """A key that blocks share if they run the same code: modules and plain settings, not sizes."""
    return tuple((name, type(module), _settings(module)) for name, module in block.named_modules())


def _settings(module: nn.Module) -> Hashable:
    if is_linear(module):
        return None
    return tuple(
        (name, repr(value))
        for name, value in sorted(vars(module).items())
        if isinstance(value, str | bool | int | float | None)
        and name not in ("layer_idx", "training")
    )


def _code_key(leaf: Any) -> Hashable:
    """Properties of an argument that may decide which code a block runs."""
    if isinstance(leaf, Tensor):
        return leaf.shape, leaf.dtype
    if is_state(leaf):
        return object()  # trace every block: its number may decide whether it uses this
    plain = isinstance(leaf, str | bool | int | float | None)
    return leaf if plain else type(leaf).__name__
