"""A model without weights, and where each of its parameters is on disk.

Nothing here depends on an architecture. transformers builds the model on the ``meta`` device, the
list of blocks is recognised by its length, and transformers' renamings map tensors on disk to
parameters.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn
from transformers.core_model_loading import dot_natural_key

from streamcomp.checkpoint.index import CheckpointIndex, TensorInfo
from streamcomp.errors import CorruptShardError, MissingShardError, UnsupportedModelError
from streamcomp.forms.install import NameMap
from streamcomp.model.loading import check_shapes
from streamcomp.model.meta import FLOATS, build_model
from streamcomp.model.packing import Packing
from streamcomp.model.rehearsal import Rehearsal, code_of, rehearse
from streamcomp.model.sites import is_linear
from streamcomp.model.taps import Conductor, InputCapture, LayerInputs, Replayer, Stop, TapPanel

__all__ = ["Skeleton"]


class Skeleton:
    """The model of ``index`` on ``meta``; blocks are replaced by taps while it runs.

    Holds module objects and the small non-persistent buffers (rotary frequencies), no weight.
    """

    def __init__(self, index: CheckpointIndex) -> None:
        self.index = index
        built = build_model(index)
        self.model, self.dtype, self.modules = built.model, built.dtype, built.modules
        self.notes = built.notes  # of settings of its config that are not followed
        self.config = self.model.config
        self.text_config = self.config.get_text_config(decoder=True)
        self.layers_name, self._layers = built.layers_name, built.layers
        self.names = NameMap(self.model)
        self.sources, self.unclaimed = self._map_tensors()
        self.ties = self._find_ties()
        self._check_shapes()
        self._parent = self.model.get_submodule(self.layers_name.rpartition(".")[0])
        self._leaf = self.layers_name.rpartition(".")[2]
        self._panel = TapPanel(self._layers)
        self.rehearsal = self._rehearse()
        if self.packing is not None:
            self.packing.hook(list(self._layers))

    # -- what is there -------------------------------------------------------------------

    @property
    def compressed(self) -> bool:
        return self.modules is not None

    def __len__(self) -> int:
        """Number of blocks."""
        return len(self._layers)

    def block(self, number: int) -> nn.Module:
        return self._layers[number]

    def block_name(self, number: int) -> str:
        return f"{self.layers_name}.{number}"

    def place_of(self, name: str) -> tuple[int, str]:
        """Number of the block that the module ``name`` of the model is in, and its name there."""
        number, _, inner = name.removeprefix(f"{self.layers_name}.").partition(".")
        return int(number), inner

    def block_parameters(self, number: int) -> dict[str, list[TensorInfo]]:
        """Tensors on disk behind each parameter of a block, by the parameter's full name."""
        prefix = self.block_name(number) + "."
        return {name: infos for name, infos in self.sources.items() if name.startswith(prefix)}

    def outer_parameters(self) -> dict[str, list[TensorInfo]]:
        """Tensors on disk behind each parameter outside of the blocks: embeddings, norms, head."""
        prefix = self.layers_name + "."
        return {name: infos for name, infos in self.sources.items() if not name.startswith(prefix)}

    def block_tensors(self, number: int) -> list[TensorInfo]:
        return [info for infos in self.block_parameters(number).values() for info in infos]

    def other_tensors(self) -> list[TensorInfo]:
        """Every tensor on disk that is in no block, also those that the model does not use."""
        infos = [info for infos in self.outer_parameters().values() for info in infos]
        return infos + self.unclaimed

    def block_kind(self, number: int) -> tuple[Any, ...]:
        """A key that blocks share if they have equal shapes and run the same code."""
        block = self.block(number)
        shapes = tuple((name, tuple(value.shape)) for name, value in block.state_dict().items())
        return code_of(block), shapes

    @property
    def hidden_size(self) -> int:
        return self.rehearsal.hidden_size

    @property
    def packing(self) -> Packing | None:
        """What a token's row in the stream holds, if that is more than its hidden states."""
        return self.rehearsal.packing

    @property
    def embedding(self) -> nn.Embedding:
        module = self.model.get_input_embeddings()
        if not isinstance(module, nn.Embedding):
            raise UnsupportedModelError(
                f"{self.config.model_type}: input embeddings of type {type(module).__name__}"
            )
        return module

    @property
    def embedding_name(self) -> str:
        return _name_of(self.model, self.embedding)

    @property
    def embedding_source(self) -> TensorInfo:
        """The token embedding's matrix on disk, (vocabulary, hidden)."""
        return self.source_of(f"{self.embedding_name}.weight")

    def source_of(self, parameter: str) -> TensorInfo:
        """The one tensor on disk behind ``parameter``, or behind the one that it is tied to."""
        infos = self.sources.get(self.ties.get(parameter, parameter), [])
        if not infos:
            raise MissingShardError(f"{parameter} is in no shard: the checkpoint is incomplete")
        if len(infos) != 1:
            raise UnsupportedModelError(f"{parameter} does not come from one tensor on disk")
        return infos[0]

    @property
    def head(self) -> nn.Linear:
        """The output embedding."""
        head = self.model.get_output_embeddings()
        if not is_linear(head):
            raise UnsupportedModelError(
                f"{self.config.model_type}: output embeddings of type {type(head).__name__}"
            )
        return head

    @property
    def outer_modules(self) -> set[str]:
        """Names of the modules that hold parameters and are in no block."""
        prefix = self.layers_name + "."
        return {
            name
            for name, module in self.model.named_modules()
            if not name.startswith(prefix)
            and any(value is not None for value in module._parameters.values())
        }

    # -- running it ----------------------------------------------------------------------

    @torch.no_grad()
    def capture(self, tokens: Tensor) -> tuple[Tensor, list[LayerInputs]]:
        """Run the model's forward on ``tokens`` (batch, seq) with taps instead of blocks.

        Returns the hidden states that enter the first block (batch, seq, hidden) and the inputs
        of each block. The outer parameters must be loaded.
        """
        capture = InputCapture(self.rehearsal.returns)
        with self._conducted_by(capture), suppress(Stop):
            self._forward(tokens)
        assert capture.hidden is not None
        if self.packing is not None:
            return self.packing.pack(capture.hidden, capture.layer_inputs)
        return capture.hidden, capture.layer_inputs

    def dry_capture(self, batch: int, seq_len: int) -> tuple[Tensor, list[LayerInputs]]:
        """Capture on the CPU with all outer parameters zero, before any is loaded.

        Layer inputs do not depend on weights.
        """
        with self._zero_parameters():
            return self.capture(torch.zeros(batch, seq_len, dtype=torch.int64))

    def finish(self, hidden: Tensor) -> Tensor:
        """Logits (batch, seq, vocabulary) of the last block's output (batch, seq, hidden).

        Can be differentiated; call it under ``torch.no_grad`` where that is not needed.
        """
        tokens = torch.zeros(hidden.shape[:-1], dtype=torch.int64, device=hidden.device)
        if self.packing is not None:
            hidden = self.packing.hidden_in(hidden)
        with self._conducted_by(Replayer(self.rehearsal.returns, hidden)):
            return self._forward(tokens)

    def _forward(self, tokens: Tensor) -> Tensor:
        logits: Tensor = self.model(input_ids=tokens, use_cache=False).logits
        return logits

    def _rehearse(self) -> Rehearsal:
        """Learn how the model runs; UnsupportedModelError where it cannot be streamed."""
        outer = {name: self.model.get_submodule(name) for name in self.outer_modules}
        try:
            with self._zero_parameters(), self._tapped():
                return rehearse(self._forward, self._panel, list(self._layers), outer, self.head)
        except UnsupportedModelError as error:
            raise UnsupportedModelError(f"{self.config.model_type}: {error}") from error.__cause__

    @contextmanager
    def _zero_parameters(self) -> Iterator[None]:
        """Set outer parameters that are not loaded to zeros on the CPU, one stored number each."""
        held: list[tuple[dict[str, Any], str, Any]] = []
        for name in self.outer_modules:
            module = self.model.get_submodule(name)
            for store in (module._parameters, module._buffers):
                for leaf, value in store.items():
                    if value is not None and value.is_meta:
                        held.append((store, leaf, value))
                        zero = torch.zeros((), dtype=value.dtype, device="cpu")
                        store[leaf] = nn.Parameter(zero.expand(value.shape), requires_grad=False)
        try:
            yield
        finally:
            for store, leaf, value in held:
                store[leaf] = value

    @contextmanager
    def _tapped(self) -> Iterator[None]:
        """Run taps instead of the blocks within the ``with``."""
        self._parent._modules[self._leaf] = self._panel.taps
        try:
            yield
        finally:
            self._parent._modules[self._leaf] = self._layers
            self._panel.conductor = None

    @contextmanager
    def _conducted_by(self, conductor: Conductor) -> Iterator[None]:
        """Run taps, for which ``conductor`` answers, instead of the blocks."""
        self._panel.conductor = conductor
        with self._tapped():
            yield

    @property
    def blocks_unused(self) -> list[str]:
        """Names on disk of tensors in blocks beyond those that the config counts."""
        place = re.compile(rf"(^|\.){re.escape(self._leaf)}\.(\d+)\.")
        numbers = {info.name: place.search(info.name) for info in self.unclaimed}
        return [name for name, at in numbers.items() if at and int(at[2]) >= len(self)]

    def check_tensors(self, *, head: bool) -> None:
        """Refuse, by the headers alone, what a later step could not load.

        Tensors that are missing, or no floats. Modules that no token runs through (a tower for
        images) may lack theirs, and without ``head`` also the modules that run after the blocks.
        """
        outer = self.rehearsal.before
        if head:
            outer = outer | self.rehearsal.behind
        blocks = self.layers_name + "."
        for name, value in self.model.state_dict().items():
            if name.startswith(blocks) or name.rpartition(".")[0] in outer:
                _check_sources(name, value, self.sources.get(self.ties.get(name, name), []))

    def _check_shapes(self) -> None:
        """CorruptShardError where a tensor on disk is not of the shape that the config says."""
        used = {info.name: info for infos in self.sources.values() for info in infos}
        check_shapes(self.model, used, self.dtype)
        for name, value in self.model.state_dict().items():
            for info in self.sources.get(self.ties.get(name, ""), []):
                if info.shape != tuple(value.shape):
                    raise CorruptShardError(
                        f"{info.name} is {list(info.shape)} on disk, config.json makes {name}, "
                        f"which takes its place, {list(value.shape)}"
                    )

    def _map_tensors(self) -> tuple[dict[str, list[TensorInfo]], list[TensorInfo]]:
        """Parameter name -> tensors on disk, and the tensors that belong to no parameter."""
        sources: dict[str, list[TensorInfo]] = {}
        unclaimed = []
        for key in sorted(self.index.tensors, key=dot_natural_key):
            name = self.names.parameter(key)
            if name is None:
                unclaimed.append(self.index.tensors[key])
            else:
                sources.setdefault(name, []).append(self.index.tensors[key])
        return sources, unclaimed

    def _find_ties(self) -> dict[str, str]:
        """Parameter that is in no shard -> the parameter on disk that it is tied to.

        A parameter that is on disk keeps its tensor whatever the config says, as in transformers.
        Blocks that share weights are refused.
        """
        groups: dict[str, list[str]] = {}
        for target, source in self.model.all_tied_weights_keys.items():
            groups.setdefault(source, [source]).append(target)
        ties: dict[str, str] = {}
        for group in groups.values():
            stored = [name for name in group if name in self.sources]
            ties |= {name: stored[0] for name in group if stored and name not in stored}
        blocks = self.layers_name + "."
        for name, source in ties.items():
            if name.startswith(blocks) or source.startswith(blocks):
                raise UnsupportedModelError(
                    f"{self.config.model_type}: {name} is the same weight as {source}; blocks that "
                    "share weights are not supported yet"
                )
        return ties


def _check_sources(name: str, value: Tensor, infos: list[TensorInfo]) -> None:
    """Refuse unless the tensors on disk ``infos`` can become the parameter or buffer ``name``."""
    if not infos:
        raise MissingShardError(f"{name} is in no shard: the checkpoint is incomplete")
    for info in infos:
        if value.is_floating_point() and not info.torch_dtype.is_floating_point:
            raise CorruptShardError(
                f"{name} is {info.dtype} on disk, a weight has to be {', '.join(FLOATS)}"
            )


def _name_of(model: nn.Module, module: nn.Module) -> str:
    return str(next(name for name, other in model.named_modules() if other is module))
