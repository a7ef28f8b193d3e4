"""Stand-ins for decoder blocks, which see how the model's own forward calls them.

While a model runs with taps instead of its blocks, a *conductor* decides what each tap
answers: it records calls, hands back hidden states, or rehearses (:mod:`.rehearsal`).
"""

from __future__ import annotations

from collections.abc import Iterator, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from streamcomp.errors import UnsupportedModelError

__all__ = [
    "Call",
    "Conductor",
    "Recorder",
    "Replayer",
    "Returned",
    "Stop",
    "Tap",
    "TapPanel",
    "Unstreamed",
    "call_bytes",
    "check_same_calls",
    "hidden_of",
    "is_state",
    "views_of_one",
]


@dataclass(frozen=True)
class Call:
    """Arguments of one block's forward besides the hidden states."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @property
    def leaves(self) -> list[Any]:
        """Every value in it, those in tuples one by one."""
        return tree_leaves((self.args, self.kwargs))

    @property
    def tensors(self) -> list[Tensor]:
        return [leaf for leaf in self.leaves if isinstance(leaf, Tensor)]


def call_bytes(calls: Sequence[Call]) -> int:
    """Bytes of all tensors that ``calls`` hold, each storage counted once."""
    storages = [tensor.untyped_storage() for call in calls for tensor in call.tensors]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def views_of_one(calls: list[Call], one: list[Call]) -> list[Call]:
    """``calls`` of a batch as views of those of ``one`` window, as far as they are alike.

    The masks of eager attention take 4 MiB for each window of 1024 tokens, and 64 for one of 4096.
    """
    views: dict[tuple[int, int], Any] = {}

    def view(mine: Any, single: Any) -> Any:
        if not isinstance(mine, Tensor) or not isinstance(single, Tensor):
            return mine
        key = id(mine), id(single)
        if key not in views:
            same = mine.dim() == single.dim() > 0 and single.shape[0] in (1, mine.shape[0])
            same = same and single.shape[1:] == mine.shape[1:]
            same = same and torch.equal(mine, single.expand_as(mine))
            views[key] = single.expand_as(mine) if same else mine
        return views[key]

    return [
        Call(*tree_map(view, (call.args, call.kwargs), (other.args, other.kwargs)))
        for call, other in zip(calls, one, strict=True)
    ]


def check_same_calls(first: list[Call], second: list[Call]) -> None:
    """UnsupportedModelError unless two batches of one shape were called alike.

    Then a call depends on the shape of a batch alone, and need not be kept for each.
    """
    for one, other in zip(first, second, strict=True):
        for a, b in zip(one.leaves, other.leaves, strict=True):
            if isinstance(a, Tensor) and not torch.equal(a, b):
                raise UnsupportedModelError(
                    "the model hands its blocks a state that depends on the tokens, besides the "
                    "hidden states: not supported yet"
                )


def hidden_of(output: Any) -> Tensor:
    """The hidden states in what a block returns: alone, or first in a tuple."""
    return output[0] if isinstance(output, tuple | list) else output  # type: ignore[no-any-return]


@dataclass(frozen=True)
class Returned:
    """How a block returns its hidden states: alone (``length`` 0), or first of a tuple.

    ``states`` are the places of the tuple's other items that are not None.
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
        """``hidden`` as the block returns it."""
        if not self.length:
            return hidden
        items = (Unstreamed() if k in self.states else None for k in range(1, self.length))
        return (hidden, *items)


class Unstreamed:
    """Takes the place of what a block returns besides its hidden states.

    Only hidden states are streamed. The model may pass this on to the next block; a block that
    makes use of it raises UnsupportedModelError.
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


class _WriteOnly(MutableMapping[Any, Any]):
    """Takes the place of an empty mapping that all blocks share: they may fill it, not read it."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __setitem__(self, key: Any, value: Any) -> None:
        """Forgets it."""

    def __delitem__(self, key: Any) -> None:
        self._refuse()

    def __getitem__(self, key: Any) -> Any:
        self._refuse()

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
    return isinstance(leaf, Unstreamed | _WriteOnly)


def _sealed(name: str, value: Any) -> Any:
    """``value`` of an argument; what would let state pass between blocks is refused or sealed."""
    if not isinstance(value, MutableMapping | list):
        return value
    if value or isinstance(value, list):
        raise UnsupportedModelError(
            f"the model hands the state {name!r} from block to block: not supported yet"
        )
    return _WriteOnly(name)


class Stop(Exception):  # noqa: N818 - not an error: ends a forward early
    """Raised where the rest of a forward is of no interest."""


class Conductor(Protocol):
    """Decides what taps answer."""

    def answer(self, number: int, hidden: Tensor, call: Call) -> Any:
        """Return value of block ``number`` for ``hidden`` (batch, seq, hidden)."""


class Recorder:
    """Records each block's call, and stops the forward at the last block."""

    def __init__(self, returns: Sequence[Returned]) -> None:
        self._returns = returns
        self.hidden: Tensor | None = None
        self.calls: list[Call] = []

    def answer(self, number: int, hidden: Tensor, call: Call) -> Any:
        if self.hidden is None:
            self.hidden = hidden
        self.calls.append(call)
        if len(self.calls) == len(self._returns):
            raise Stop
        return self._returns[number].around(hidden)


class Replayer:
    """Returns ``hidden`` from every block."""

    def __init__(self, returns: Sequence[Returned], hidden: Tensor) -> None:
        self._returns, self._hidden = returns, hidden

    def answer(self, number: int, hidden: Tensor, call: Call) -> Any:
        return self._returns[number].around(self._hidden)


class TapPanel:
    """Taps for all ``layers``, and the conductor that they ask."""

    def __init__(self, layers: nn.ModuleList) -> None:
        self.conductor: Conductor | None = None
        # a plain list of modules: models cut it, which makes a new one of its class
        self.taps = nn.ModuleList(Tap(layer, place, self) for place, layer in enumerate(layers))


class Tap(nn.Module):
    """One block's place; other attributes are the block's own (``attention_type``)."""

    def __init__(self, layer: nn.Module, number: int, panel: TapPanel) -> None:
        super().__init__()
        self.__dict__.update(layer=layer, number=number, panel=panel)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["layer"], name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        conductor: Conductor = self.__dict__["panel"].conductor
        hidden, *rest = args if args else (kwargs.pop("hidden_states"),)
        call = Call(
            tuple(_sealed(f"argument {place}", value) for place, value in enumerate(rest, 1)),
            {name: _sealed(name, value) for name, value in kwargs.items()},
        )
        return conductor.answer(self.__dict__["number"], hidden, call)
