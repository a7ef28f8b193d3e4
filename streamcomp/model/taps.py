"""Stand-ins for decoder blocks, which see what the model's forward hands to each block.

While a model runs with taps instead of its blocks, a *conductor* decides what each tap returns:
it captures layer inputs, hands back hidden states, or rehearses (:mod:`.rehearsal`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from streamcomp.errors import UnsupportedModelError

__all__ = [
    "LayerInputs",
    "Conductor",
    "InputCapture",
    "Replayer",
    "Returned",
    "SharedStates",
    "Stop",
    "Tap",
    "TapPanel",
    "Unstreamed",
    "input_bytes",
    "check_same_inputs",
    "hidden_of",
    "is_state",
    "views_of_one",
]


@dataclass(frozen=True)
class LayerInputs:
    """Arguments of one block's forward besides the hidden states: masks, positions."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @property
    def leaves(self) -> list[Any]:
        """All values in the arguments, with tuples flattened."""
        return tree_leaves((self.args, self.kwargs))

    @property
    def tensors(self) -> list[Tensor]:
        return [leaf for leaf in self.leaves if isinstance(leaf, Tensor)]


def input_bytes(layer_inputs: Sequence[LayerInputs]) -> int:
    """Bytes of all tensors in ``layer_inputs``, each storage counted once."""
    storages = [tensor.untyped_storage() for inputs in layer_inputs for tensor in inputs.tensors]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def views_of_one(batch: list[LayerInputs], one: list[LayerInputs]) -> list[LayerInputs]:
    """Layer inputs of a ``batch``, as views of those of ``one`` window wherever they are equal.

    This saves memory: the mask of eager attention takes 4 MiB for each window of 1024 tokens, and
    64 MiB for one of 4096.
    """
    views: dict[tuple[int, int], Any] = {}

    def view(many: Any, single: Any) -> Any:
        if not isinstance(many, Tensor) or not isinstance(single, Tensor):
            return many
        key = id(many), id(single)
        if key not in views:
            same = many.dim() == single.dim() > 0 and single.shape[0] in (1, many.shape[0])
            same = same and single.shape[1:] == many.shape[1:]
            same = same and torch.equal(many, single.expand_as(many))
            views[key] = single.expand_as(many) if same else many
        return views[key]

    return [
        LayerInputs(*tree_map(view, (inputs.args, inputs.kwargs), (other.args, other.kwargs)))
        for inputs, other in zip(batch, one, strict=True)
    ]


def check_same_inputs(first: list[LayerInputs], second: list[LayerInputs]) -> None:
    """UnsupportedModelError unless two batches of equal shape led to equal layer inputs.

    Layer inputs then depend on the shape of a batch alone, and are kept once per shape.
    """
    for one, other in zip(first, second, strict=True):
        for a, b in zip(one.leaves, other.leaves, strict=True):
            if isinstance(a, Tensor) and not torch.equal(a, b):
                raise UnsupportedModelError(
                    "the model hands its blocks a state that depends on the tokens, besides the "
                    "hidden states: not supported yet"
                )


def hidden_of(output: Any) -> Tensor:
    """Hidden states from the output of a block: the output itself, or the first of a tuple."""
    return output[0] if isinstance(output, tuple | list) else output  # type: ignore[no-any-return]


@dataclass(frozen=True)
class Returned:
    """How a block returns its hidden states: alone (``length`` 0), or first of a tuple.

    ``states`` are the indices of the tuple's other items that are not None.
    """

    length: int = 0
    states: frozenset[int] = frozenset()

    @classmethod
    def of(cls, output: Any) -> Returned:
        if not isinstance(output, tuple | list):
            return cls()
        return cls(
            len(output), frozenset(k for k in range(1, len(output)) if output[k] is not None)
        )

    def around(self, hidden: Tensor) -> Any:
        """``hidden`` in the structure in which the block returns it."""
        if not self.length:
            return hidden
        items = (Unstreamed() if k in self.states else None for k in range(1, self.length))
        return (hidden, *items)


class Unstreamed:
    """Stands for anything that a block returns besides its hidden states.

    Only hidden states are streamed. The model may pass this on to the next block; a block that
    uses it raises UnsupportedModelError.
    """

    def _refuse(self, *_: Any, **__: Any) -> Any:
        raise UnsupportedModelError(
            "a block uses what the block before it returned besides its hidden states: not "
            "supported yet"
        )

    __bool__ = __len__ = __iter__ = __getitem__ = _refuse

    def __getattr__(self, name: str) -> Any:
        return object.__getattribute__(self, name) if name.startswith("__") else self._refuse()

    @classmethod
    def __torch_function__(cls, *_: Any, **__: Any) -> Any:
        cls()._refuse()


class SharedStates(MutableMapping[Any, Any]):
    """Stands for an empty mapping that all blocks share: they may fill it, and read ``given``."""

    def __init__(self, name: str, given: Mapping[Any, Any] | None = None) -> None:
        self._name, self.given = name, given or {}
        self.written: dict[Any, Any] = {}
        self.read: set[Any] = set()

    def __setitem__(self, key: Any, value: Any) -> None:
        self.written[key] = value

    def __delitem__(self, key: Any) -> None:
        self._refuse()

    def __getitem__(self, key: Any) -> Any:
        if key not in self.given:
            self._refuse()
        self.read.add(key)
        return self.given[key]

    def __iter__(self) -> Iterator[Any]:
        self._refuse()
        return iter(())

    def __len__(self) -> int:
        self._refuse()
        return 0

    def _refuse(self) -> None:
        raise UnsupportedModelError(
            f"a block reads the state {self._name!r} that others have written: not supported yet"
        )


def is_state(leaf: Any) -> bool:
    """Whether an argument stands for a state that could pass from block to block."""
    return isinstance(leaf, Unstreamed | SharedStates)


def _sealed(name: str, value: Any) -> Any:
    """``value`` of an argument; seals an empty mapping, refuses other mappings and lists."""
    if not isinstance(value, MutableMapping | list):
        return value
    if value or isinstance(value, list):
        raise UnsupportedModelError(
            f"the model hands the state {name!r} from block to block: not supported yet"
        )
    return SharedStates(name)


class Stop(Exception):  # noqa: N818 - not an error: ends a forward early
    """Raised where the rest of a forward is not needed."""


class Conductor(Protocol):
    """Decides what taps return."""

    def answer(self, number: int, hidden: Tensor, inputs: LayerInputs) -> Any:
        """Return value of block ``number`` for ``hidden`` (batch, seq, hidden)."""


class InputCapture:
    """Captures the inputs of each block, and stops the forward at the last one."""

    def __init__(self, returns: Sequence[Returned]) -> None:
        self._returns = returns
        self.hidden: Tensor | None = None
        self.layer_inputs: list[LayerInputs] = []

    def answer(self, number: int, hidden: Tensor, inputs: LayerInputs) -> Any:
        if self.hidden is None:
            self.hidden = hidden
        self.layer_inputs.append(inputs)
        if len(self.layer_inputs) == len(self._returns):
            raise Stop
        return self._returns[number].around(hidden)


class Replayer:
    """Returns ``hidden`` from every block."""

    def __init__(self, returns: Sequence[Returned], hidden: Tensor) -> None:
        self._returns, self._hidden = returns, hidden

    def answer(self, number: int, hidden: Tensor, inputs: LayerInputs) -> Any:
        return self._returns[number].around(self._hidden)


class TapPanel:
    """Taps for all ``layers``, and the conductor that decides what they return."""

    def __init__(self, layers: nn.ModuleList) -> None:
        self.conductor: Conductor | None = None
        # a plain ModuleList: models slice it, which builds another list of its class
        self.taps = nn.ModuleList(Tap(layer, place, self) for place, layer in enumerate(layers))


class Tap(nn.Module):
    """Stands in for one block; its other attributes are the block's (``attention_type``)."""

    def __init__(self, layer: nn.Module, number: int, panel: TapPanel) -> None:
        super().__init__()
        self.__dict__.update(layer=layer, number=number, panel=panel)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["layer"], name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        conductor: Conductor = self.__dict__["panel"].conductor
        hidden, *rest = args if args else (kwargs.pop("hidden_states"),)
        inputs = LayerInputs(
            tuple(_sealed(f"argument {place}", value) for place, value in enumerate(rest, 1)),
            {name: _sealed(name, value) for name, value in kwargs.items()},
        )
        return conductor.answer(self.__dict__["number"], hidden, inputs)
