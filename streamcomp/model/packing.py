"""Streams of models that hand their blocks more than one vector for each token.

A token's row in the stream then holds, one after the other: its hidden states, in however many
vectors; the inputs that each block is given and that depend on the tokens alone; and the states
that one block leaves for later ones, such as keys and values. Hooks on the blocks take a row apart
before a block runs and put it together again behind, so that whoever runs a block, traces it or
takes gradients sees a stream (batch, tokens, width) like any other.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from streamcomp.model.taps import LayerInputs, SharedStates, hidden_of

__all__ = ["Packing", "Part", "part_of"]


@dataclass(frozen=True)
class Part:
    """A tensor that holds ``shape`` for each token; where its batch and token axes are."""

    shape: tuple[int, ...]
    axes: tuple[int, int]

    @property
    def numbers(self) -> int:
        """How many it holds for each token."""
        return prod(self.shape)

    @property
    def plain(self) -> bool:
        """Whether it is (batch, tokens, numbers) already."""
        return self.axes == (0, 1) and len(self.shape) == 1

    def flat(self, tensor: Tensor) -> Tensor:
        """``tensor`` as (batch, tokens, numbers)."""
        first: Tensor = tensor.movedim(self.axes, (0, 1))
        return first.flatten(2)

    def whole(self, flat: Tensor) -> Tensor:
        """The tensor that became ``flat``."""
        tensor: Tensor = flat.unflatten(2, self.shape).movedim((0, 1), self.axes)
        return tensor


def part_of(shape: Sequence[int], batch: int, tokens: int) -> Part | None:
    """The part that a tensor of ``shape`` is; None where its axes cannot be told."""
    sizes = list(shape)
    if len(sizes) < 3 or sizes.count(batch) != 1 or sizes.count(tokens) != 1:
        return None
    axes = sizes.index(batch), sizes.index(tokens)
    return Part(tuple(size for axis, size in enumerate(sizes) if axis not in axes), axes)


class _Carried:
    """Stands for a layer input that is in the stream."""


@dataclass(frozen=True)
class Packing:
    """What a row holds."""

    hidden: Part
    inputs: tuple[Mapping[int, Part], ...]  # of each block, by the place among its arguments
    shared: Mapping[Any, Any]  # by the key that blocks use, a part or a tuple of parts

    @property
    def width(self) -> int:
        return self._shared_from + sum(part.numbers for part in self._states)

    @property
    def _states(self) -> list[Part]:
        return tree_flatten(list(self.shared.values()))[0]

    @property
    def _shared_from(self) -> int:
        inputs = sum(part.numbers for parts in self.inputs for part in parts.values())
        return self.hidden.numbers + inputs

    def pack(
        self, hidden: Tensor, layer_inputs: Sequence[LayerInputs]
    ) -> tuple[Tensor, list[LayerInputs]]:
        """The rows that enter the first block, and the inputs that are not in them."""
        pieces, rest = [self.hidden.flat(hidden)], []
        for parts, inputs in zip(self.inputs, layer_inputs, strict=True):
            leaves, spec = tree_flatten((inputs.args, inputs.kwargs))
            pieces += [part.flat(leaves[place]) for place, part in parts.items()]
            leaves = [_Carried() if place in parts else v for place, v in enumerate(leaves)]
            rest.append(LayerInputs(*tree_unflatten(leaves, spec)))
        states = sum(part.numbers for part in self._states)
        pieces.append(pieces[0].new_zeros(*pieces[0].shape[:2], states))
        return torch.cat(pieces, dim=-1), rest

    def hidden_in(self, rows: Tensor) -> Tensor:
        """The hidden states, as the model's code has them."""
        return self.hidden.whole(rows[..., : self.hidden.numbers])

    def hook(self, blocks: Sequence[nn.Module]) -> None:
        """Have each block take rows and return them."""
        for number, block in enumerate(blocks):
            _Hooks(self, number, block)


class _Hooks:
    """Takes a row apart before block ``number`` runs, and puts it together behind."""

    def __init__(self, packing: Packing, number: int, block: nn.Module) -> None:
        self._packing, self._number = packing, number
        self._rows: Tensor | None = None
        self._shared: SharedStates | None = None
        block.register_forward_pre_hook(self.before, with_kwargs=True)
        block.register_forward_hook(self.behind)

    def before(self, _: nn.Module, args: Any, kwargs: Any) -> Any:
        packing, (rows, *rest) = self._packing, args
        start = packing._shared_from

        def take(part: Part) -> Tensor:
            nonlocal start
            start += part.numbers
            return part.whole(rows[..., start - part.numbers : start])

        self._rows, self._shared = rows, SharedStates("", tree_map(take, dict(packing.shared)))
        start = packing.hidden.numbers
        start += sum(p.numbers for parts in packing.inputs[: self._number] for p in parts.values())
        parts, states = iter(packing.inputs[self._number].values()), [self._shared]

        def fill(leaf: Any) -> Any:
            if isinstance(leaf, SharedStates):
                return states.pop() if states else leaf
            return take(next(parts)) if isinstance(leaf, _Carried) else leaf

        rest, kwargs = tree_map(fill, (tuple(rest), kwargs))
        return (packing.hidden_in(rows), *rest), kwargs

    def behind(self, _: nn.Module, args: Any, output: Any) -> Any:
        packing, rows, shared = self._packing, self._rows, self._shared
        assert rows is not None and shared is not None
        self._rows = self._shared = None
        pieces = [packing.hidden.flat(hidden_of(output))]
        pieces.append(rows[..., packing.hidden.numbers : packing._shared_from])
        start = packing._shared_from
        for key, parts in packing.shared.items():
            flat, stop = tree_flatten(parts)[0], start
            stop += sum(part.numbers for part in flat)
            if key in shared.written:
                values = tree_flatten(shared.written[key])[0]
                pieces += [part.flat(value) for part, value in zip(flat, values, strict=True)]
            else:
                pieces.append(rows[..., start:stop])
            start = stop
        packed = torch.cat(pieces, dim=-1)
        return (packed, *output[1:]) if isinstance(output, tuple | list) else packed
