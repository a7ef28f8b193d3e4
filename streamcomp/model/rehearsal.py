"""Runs a model once without weights, before anything is read.

It tells how blocks return their hidden states, which of their linears they call, and which
modules run before and after them. It also refuses models that streaming would compute wrongly:
those that hand anything but hidden states from block to block, or from a block to the head. The
autograd graph shows this, because the output of each tap is a leaf of it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

from streamcomp.errors import StreamcompError, UnsupportedModelError
from streamcomp.model.packing import Packing, Part, part_of
from streamcomp.model.sites import is_linear
from streamcomp.model.taps import (
    InputCapture,
    LayerInputs,
    Returned,
    SharedStates,
    Stop,
    TapPanel,
    check_same_inputs,
    is_state,
)
from streamcomp.model.tracing import BlockUse, use_of_block

__all__ = ["Rehearsal", "code_of", "rehearse"]

# Two batches that differ in their tokens alone. No row is 0, 1, 2, ..., which positions are, and
# few models have as many of anything as there are windows, or tokens in them.
_WINDOWS, _POSITIONS = 5, 7
_TOKENS = torch.randint(
    2, (2, _WINDOWS, _POSITIONS), generator=torch.Generator().manual_seed(0), device="cpu"
)
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
    tables: frozenset[str]  # embeddings that are given the tokens
    hidden_size: int  # numbers of a token in the stream
    packing: Packing | None  # where these are more than one vector


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
            before, behind, tables = _perform(forward, panel, actors, outer, head)
        except Exception as fault:  # models may raise anything
            error = error or fault
            if actors.certain:
                break
            continue  # perhaps because the guess is wrong
        panel.conductor = capture = InputCapture(actors.returns)
        with torch.no_grad(), suppress(Stop):
            forward(_TOKENS[1].clone())
        check_same_inputs(actors.layer_inputs, capture.layer_inputs)
        packing = actors.packing()
        return Rehearsal(
            tuple(actors.returns),
            tuple(use.called if use else None for use in actors.uses),
            tuple(use.chosen if use else {} for use in actors.uses),
            frozenset(before),
            frozenset(behind - before),
            frozenset(tables),
            packing.width if packing else actors.leaves[-1].shape[-1],
            packing,
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
) -> tuple[set[str], set[str], set[str]]:
    """Run once with ``actors``.

    Returns the outer modules that run before the last block, those after it, and the embeddings
    that are given the tokens.
    """
    tokens = _TOKENS[0].clone()
    tables: set[str] = set()
    arrived: list[Tensor] = []
    used: tuple[set[str], set[str]] = (set(), set())

    def note(name: str) -> Callable[..., None]:
        return lambda *_: used[actors.finished].add(name)

    def stop(_: nn.Module, args: tuple[Any, ...]) -> None:
        arrived.append(args[0])
        raise Stop  # the head is large: do not compute

    def embed(name: str) -> Callable[..., Tensor | None]:
        def after(table: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
            if not args or not isinstance(args[0], Tensor) or not torch.equal(args[0], tokens):
                return None
            if _looks_up(table):
                tables.add(name)
            actors.embedded.append(output.detach().requires_grad_())
            return actors.embedded[-1].clone()

        return after

    panel.conductor = actors
    with ExitStack() as hooks:
        for name, module in outer.items():
            hooks.callback(module.register_forward_pre_hook(note(name)).remove)
            if isinstance(module, nn.Embedding):
                hooks.callback(module.register_forward_hook(embed(name)).remove)
        hooks.callback(head.register_forward_pre_hook(stop).remove)
        with suppress(Stop):
            forward(tokens)
    actors.check_run(len(panel.taps))
    actors.check_head(arrived)
    return *used, tables


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
        self.embedded: list[Tensor] = []  # what embeddings have made of the tokens
        self._hidden: Part | None = None
        self._inputs: list[dict[int, Part]] = []  # of each block, those that depend on the tokens
        self._states: dict[Any, Any] = {}  # that a block has left for others, as tensors on meta
        self._read: set[Any] = set()
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
        plain = hidden.dim() == 3 and hidden.shape[:2] == (_WINDOWS, _POSITIONS)
        otherwise = (
            f"hidden states of {_WINDOWS} x {_POSITIONS} tokens are not (batch, tokens, hidden) "
            f"but {list(hidden.shape)}"
        )
        whole = Part((hidden.shape[-1],), (0, 1))
        self._hidden = whole if plain else _part(hidden, hidden.dtype, otherwise)
        if self._output is not None and not self._is_output(hidden):
            raise UnsupportedModelError(
                f"block {number} is given something else than what block {number - 1} returned: "
                "not supported yet"
            )
        self.layer_inputs.append(self._without_tokens(number, hidden, inputs))
        self.uses.append(self._use(number, hidden, inputs))
        self.leaves.append(hidden.detach().clone().requires_grad_())
        self._output = self.leaves[-1].clone()
        self._version = self._output._version
        return self.returns[-1].around(self._output)

    def _is_output(self, hidden: Tensor) -> bool:
        """Whether ``hidden`` is what the block before has returned, or all of it as a view."""
        before = self._output
        assert before is not None
        same = hidden is before or (hidden.requires_grad and hidden.data_ptr() == before.data_ptr())
        same = same and hidden.shape == before.shape and hidden.stride() == before.stride()
        return same and hidden._version == self._version

    def check_run(self, count: int) -> None:
        """Refuse unless the first ``count`` blocks have run."""
        if len(self.layer_inputs) < count:
            raise UnsupportedModelError(
                f"block {len(self.layer_inputs)} does not run on text alone: not supported"
            )

    def check_head(self, arrived: list[Tensor]) -> None:
        """Check that the head depends on the output of the last block, and of no other block."""
        if not arrived or arrived[0].shape[:-1] != (_WINDOWS, _POSITIONS):
            raise UnsupportedModelError("the code behind its last block cannot be run by itself")
        if not arrived[0].requires_grad:
            raise UnsupportedModelError("its head does not depend on its last block")
        *others, last = self.leaves
        number = _dependence(arrived[0], others)
        if number is not None or _dependence(arrived[0], self.embedded) is not None:
            what = "the embeddings" if number is None else f"what block {number} returned"
            raise UnsupportedModelError(
                f"its head is given {what}, besides the last block's hidden states: not supported "
                "yet"
            )
        if _dependence(arrived[0], [last]) is None:
            raise UnsupportedModelError("its head does not depend on its last block")

    def _use(self, number: int, hidden: Tensor, inputs: LayerInputs) -> BlockUse | None:
        """How the block uses its linears; blocks that run the same code are traced once."""
        block = self._blocks[number]
        key = code_of(block), tuple(map(_code_key, inputs.leaves))
        if key not in self._seen:
            states = [leaf for leaf in inputs.leaves if isinstance(leaf, SharedStates)]
            for state in states[:1]:  # of two, keys could be the same
                state.given = _Blank(self._states)
            self._seen[key] = use_of_block(block, hidden, inputs)
            for state in states[:1]:
                self._read |= state.read
                self._states |= tree_map(lambda t: t.to("meta"), state.written)
        return self._seen[key]

    def _without_tokens(self, number: int, hidden: Tensor, inputs: LayerInputs) -> LayerInputs:
        """``inputs`` without those that depend on the tokens, which are noted."""
        leaves, spec = tree_flatten((inputs.args, inputs.kwargs))
        names = {id(value): name for name, value in _named(inputs)}
        self._inputs.append({})
        for place, leaf in enumerate(leaves):
            if not isinstance(leaf, Tensor) or not leaf.requires_grad:
                continue
            source = _dependence(leaf, self.leaves)
            otherwise = (
                f"block {number} is given a state that depends on "
                f"{'the tokens' if source is None else f'the output of block {source}'}, besides "
                f"the hidden states ({names[id(leaf)]}): not supported yet"
            )
            if source is not None:
                raise UnsupportedModelError(otherwise)
            self._inputs[-1][place] = _part(leaf, hidden.dtype, otherwise)
            leaves[place] = None
        return LayerInputs(*tree_unflatten(leaves, spec))

    def packing(self) -> Packing | None:
        """What the stream holds, if that is more than one vector for each token."""
        assert self._hidden is not None
        if self._hidden.plain and not any(self._inputs) and not self._read:
            return None
        dtype = self.leaves[0].dtype
        otherwise = "a block reads a state that others have written: not supported yet"
        shared = {
            key: tree_map(lambda state: _part(state, dtype, otherwise), states)
            for key, states in self._states.items()
            if key in self._read
        }
        return Packing(self._hidden, tuple(self._inputs), shared)


class _Blank(Mapping[Any, Any]):
    """``states`` as tensors of no data, made in the mode in which they are asked for."""

    def __init__(self, states: Mapping[Any, Any]) -> None:
        self._states = dict(states)

    def __getitem__(self, key: Any) -> Any:
        return tree_map(lambda t: torch.empty(t.shape, dtype=t.dtype), self._states[key])

    def __iter__(self) -> Iterator[Any]:
        return iter(self._states)

    def __len__(self) -> int:
        return len(self._states)


def _looks_up(table: nn.Module) -> bool:
    """Whether an embedding gives equal tokens equal rows, tried on a copy of 8 x 3.

    Some count positions instead, and are given the tokens for their shape.
    """
    small = copy.copy(table)
    random = torch.Generator().manual_seed(0)
    small._parameters = {"weight": nn.Parameter(torch.randn(8, 3, generator=random))}
    try:
        with torch.no_grad():
            first, other, again = type(table).forward(small, torch.tensor([[1, 0, 1]]))[0]
    except Exception:  # model code may raise anything
        return False
    return torch.equal(first, again) and not torch.equal(first, other)


def _dependence(value: Tensor, leaves: Sequence[Tensor]) -> int | None:
    """The first of ``leaves`` of the graph that ``value`` was computed from."""
    if not leaves or not value.requires_grad:
        return None
    gradients = torch.autograd.grad(
        value.float().sum(), leaves, allow_unused=True, retain_graph=True
    )
    return next((place for place, gradient in enumerate(gradients) if gradient is not None), None)


def _part(tensor: Tensor, dtype: torch.dtype, otherwise: str) -> Part:
    """The part of a row that ``tensor`` is; UnsupportedModelError where it cannot be one."""
    part = part_of(tensor.shape, _WINDOWS, _POSITIONS)
    if part is None or tensor.dtype != dtype:
        raise UnsupportedModelError(otherwise)
    return part


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
