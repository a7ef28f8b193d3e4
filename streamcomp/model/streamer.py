"""Runs a model with the weights of one block in memory.

Modules that run before the blocks stay loaded (position embeddings, if any), but only those rows
of the token embedding that are in use are read. A block's weights, and the head, are in memory
only within a ``with``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from streamcomp.checkpoint.digests import combined
from streamcomp.checkpoint.index import TensorInfo
from streamcomp.checkpoint.reader import TensorReader
from streamcomp.errors import (
    CorruptShardError,
    MissingShardError,
    NonFiniteError,
    UnsupportedModelError,
)
from streamcomp.forms.experts import expert_parts
from streamcomp.forms.runtime import FactoredLinear
from streamcomp.model.experts import ExpertBank
from streamcomp.model.feed_forward import in_chunks, whole
from streamcomp.model.loading import load_state
from streamcomp.model.skeleton import Skeleton
from streamcomp.model.taps import LayerInputs, check_same_inputs, hidden_of, views_of_one

__all__ = ["BlockStreamer", "LoadedBlock", "LoadedExperts"]


class LoadedBlock:
    """Block ``number`` with its weights: ``module`` to run, ``digests`` of the tensors read."""

    def __init__(self, module: nn.Module, name: str, number: int = 0) -> None:
        self.module, self.name, self.number = module, name, number
        self.digests: dict[str, str] = {}  # experts that are loaded apart add theirs
        self._replaced: dict[str, nn.Module] = {}

    @property
    def digest(self) -> str:
        """One digest of all tensors that were read."""
        return combined(self.digests)

    @torch.no_grad()
    def run(self, hidden: Tensor, inputs: LayerInputs) -> Tensor:
        """Output hidden states (batch, seq, hidden) of the block."""
        return hidden_of(self.module(hidden, *inputs.args, **inputs.kwargs))

    @torch.enable_grad()
    def differentiate(self, hidden: Tensor, inputs: LayerInputs, gradient: Tensor) -> Tensor:
        """Gradient of the loss at the block's input, from the one at its output (``gradient``).

        Both have the shape of ``hidden``. Weights get no gradient, but hooks see the gradients at
        the outputs of linears.
        """
        start = hidden.detach().requires_grad_()
        output = hidden_of(self.module(start, *inputs.args, **inputs.kwargs))
        below: Tensor = torch.autograd.grad(output, start, gradient)[0]
        return below

    def run_with(
        self, parameters: Mapping[str, Tensor], hidden: Tensor, inputs: LayerInputs
    ) -> Tensor:
        """Run the block with other values for some parameters, and with autograd where it is on.

        ``parameters`` by their names in the block, rounded to the dtype of those they stand for.
        """
        rounded = {
            name: value.to(hidden.dtype) if value.is_floating_point() else value
            for name, value in parameters.items()
        }
        output = torch.func.functional_call(
            self.module, rounded, (hidden, *inputs.args), dict(inputs.kwargs)
        )
        return hidden_of(output)

    @contextmanager
    def cast(self, dtype: torch.dtype) -> Iterator[None]:
        """Hold parameters in ``dtype`` within the ``with``; buffers stay as they are.

        The dtypes must be restored, because the next load follows them.
        """
        dtypes = {parameter: parameter.dtype for parameter in self.module.parameters()}
        for parameter in dtypes:
            parameter.data = parameter.data.to(dtype)
        try:
            yield
        finally:
            for parameter, before in dtypes.items():
                parameter.data = parameter.data.to(before)

    @contextmanager
    def whole(self) -> Iterator[None]:
        """Run the feed-forward on all positions at once within the ``with``."""
        with whole(self.module):
            yield

    def original(self, name: str) -> nn.Module:
        """The module ``name`` that was loaded, whether it is replaced now or not."""
        return self._replaced[name] if name in self._replaced else self.running(name)

    def running(self, name: str) -> nn.Module:
        """The module ``name`` that runs now."""
        return self.module.get_submodule(name)

    def replace(self, name: str, module: nn.Module) -> None:
        """Run ``module`` instead of the one called ``name`` until the block is dropped."""
        held = self._swap(name, module)
        self._replaced.setdefault(name, held)

    @contextmanager
    def dense(self) -> Iterator[None]:
        """Run the original modules again within the ``with``."""
        now = {name: self._swap(name, module) for name, module in self._replaced.items()}
        try:
            yield
        finally:
            for name, module in now.items():
                self._swap(name, module)

    def restore(self) -> None:
        """Put the original modules back."""
        for name, module in self._replaced.items():
            self._swap(name, module)
        self._replaced.clear()

    def _swap(self, name: str, module: nn.Module) -> nn.Module:
        parent, _, leaf = name.rpartition(".")
        owner = self.module.get_submodule(parent)
        held: nn.Module = getattr(owner, leaf)
        setattr(owner, leaf, module)
        return held


class LoadedExperts:
    """Experts ``first`` to ``last`` (exclusive) of a block; ``digests`` of the tensors read."""

    def __init__(self, module: nn.Module, first: int, last: int, digests: dict[str, str]) -> None:
        self.first, self.last, self.digests = first, last, digests
        self.parts = expert_parts(module)

    def weight(self, expert: int, matrix: str) -> Tensor:
        """A view of W (m, n) of one expert."""
        return self.parts.matrix(matrix, expert - self.first).detach()

    def bias(self, expert: int, matrix: str) -> Tensor | None:
        """The bias (m,) of one expert."""
        bias = self.parts.bias(matrix, expert - self.first)
        return None if bias is None else bias.detach()


class BlockStreamer:
    """Loads parts of ``skeleton``'s model onto ``device`` and runs them.

    ``feed_forward_tokens`` is how many positions a block's feed-forward runs at a time; 0: all.
    ``saw`` is told the digest of each complete tensor that was read, by its name on disk.
    """

    def __init__(
        self,
        skeleton: Skeleton,
        device: torch.device,
        feed_forward_tokens: int = 0,
        saw: Callable[[Mapping[str, str]], None] = lambda digests: None,
    ) -> None:
        self.skeleton, self.device, self._saw = skeleton, device, saw
        self._feed_forward_tokens = feed_forward_tokens
        self._inputs: dict[torch.Size, list[LayerInputs]] = {}
        wanted = skeleton.rehearsal.before - self._tables
        _move_buffers(skeleton.model, device)
        self._load_outer(wanted)

    def capture(self, tokens: Tensor) -> tuple[Tensor, list[LayerInputs]]:
        """Embed ``tokens`` (batch, seq) and capture the inputs of each block.

        Holds one row of the embedding per distinct token.
        """
        with self._embedding_rows(tokens):
            return self.skeleton.capture(tokens.to(self.device))

    def embed(self, tokens: Tensor) -> Tensor:
        """Hidden states (batch, seq, hidden) of ``tokens`` as they enter the first block.

        UnsupportedModelError where layer inputs differ from those of other tokens of this shape.
        """
        expected = self.layer_inputs(tokens)
        hidden, layer_inputs = self.capture(tokens)
        check_same_inputs(expected, layer_inputs)
        return hidden

    def layer_inputs(self, tokens: Tensor) -> list[LayerInputs]:
        """Inputs of each block for ``tokens`` (batch, seq), which depend on their shape alone.

        Cached for each shape. Tensors that all windows of a batch share are kept for one window.
        """
        if tokens.shape not in self._inputs:
            layer_inputs = self.capture(tokens)[1]
            if len(tokens) > 1:
                layer_inputs = views_of_one(layer_inputs, self.layer_inputs(tokens[:1]))
            self._inputs[tokens.shape] = layer_inputs
        return self._inputs[tokens.shape]

    @contextmanager
    def block(self, number: int, without: ExpertBank | None = None) -> Iterator[LoadedBlock]:
        """A block with its weights; they are dropped at the end of the ``with``.

        The experts ``without`` are not loaded, and the feed-forward runs on all positions at once.
        """
        name = self.skeleton.block_name(number)
        module = self.skeleton.block(number)
        loaded = LoadedBlock(module, name, number)
        absent: Set[str] = without.parameters if without is not None else frozenset()
        tokens = self._feed_forward_tokens if without is None else 0
        try:
            loaded.digests = self._load(
                lambda parameter: parameter.startswith(name + ".") and parameter not in absent
            )
            _check_loaded(name, module, absent)
            module.requires_grad_(False)
            with in_chunks(module, tokens):
                yield loaded
        finally:
            loaded.restore()
            _free(module)

    @contextmanager
    def experts(self, bank: ExpertBank, first: int, last: int) -> Iterator[LoadedExperts]:
        """The weights of the experts from ``first`` to ``last`` (exclusive), and nothing else.

        Holds their tensors on disk and, where those are merged, their parameters.
        """
        module = self.skeleton.model.get_submodule(bank.full_name)
        before = {leaf: module.get_parameter(leaf) for leaf in bank.sources}
        for leaf, all_experts in before.items():
            shape = (last - first, *all_experts.shape[1:])
            empty = torch.empty(shape, dtype=all_experts.dtype, device="meta")
            module._parameters[leaf] = nn.Parameter(empty, requires_grad=False)
        try:
            digests = self._load_tensors(bank.parts(first, last))
            _check_loaded(bank.full_name, module)
            yield LoadedExperts(module.requires_grad_(False), first, last, digests)
        finally:
            module._parameters.update(before)

    @contextmanager
    def head(self, dtype: torch.dtype | None = None) -> Iterator[Callable[[Tensor], Tensor]]:
        """A function from hidden states (batch, seq, hidden) to logits; holds the whole head.

        It runs in ``dtype``, by default the model's, and can be differentiated.
        """
        outer = self.skeleton.rehearsal.behind - self._tables
        token = torch.zeros(1, 1, dtype=torch.int64)
        try:
            self._load_outer(outer)
            if dtype not in (None, self.skeleton.dtype):
                for name in outer:
                    self.skeleton.model.get_submodule(name).to(dtype)
            self.skeleton.model.requires_grad_(False)
            with self._embedding_rows(token, any_tokens=True):
                yield self.skeleton.finish
        finally:
            for name in outer:
                _free(self.skeleton.model.get_submodule(name))

    @property
    def _tables(self) -> frozenset[str]:
        """Names of the embeddings of which only rows are read."""
        return self.skeleton.rehearsal.tables | {self.skeleton.embedding_name}

    def _load_outer(self, names: Set[str]) -> None:
        """Load modules that are in no block; all their tensors must be there."""
        self._load(lambda parameter: parameter.rpartition(".")[0] in names)
        for parameter in self.skeleton.ties:
            if parameter.rpartition(".")[0] in names:
                self._load_tied(parameter)
        for name in sorted(names):
            _check_loaded(name, self.skeleton.model.get_submodule(name))

    def _load_tied(self, parameter: str) -> None:
        """Load a parameter from the tensor of the one that it is tied to."""
        name, _, leaf = parameter.rpartition(".")
        with TensorReader() as reader:
            value = reader.read(self.skeleton.source_of(parameter))
        self._saw(reader.digests)
        module = self.skeleton.model.get_submodule(name)
        value = value.to(self.device, self.skeleton.dtype)
        module._parameters[leaf] = nn.Parameter(value, requires_grad=False)

    @contextmanager
    def _embedding_rows(self, tokens: Tensor, any_tokens: bool = False) -> Iterator[None]:
        """Load only the rows of ``tokens`` into the embeddings, numbered anew.

        With ``any_tokens`` their values do not matter and every token takes the first row.
        """
        with ExitStack() as stack:
            for name in sorted(self._tables):
                stack.enter_context(self._rows_of(name, tokens, any_tokens))
            yield

    @contextmanager
    def _rows_of(self, name: str, tokens: Tensor, any_tokens: bool) -> Iterator[None]:
        source = self.skeleton.source_of(f"{name}.weight")
        embedding = self.skeleton.model.get_submodule(name)
        assert isinstance(embedding, nn.Embedding)
        distinct, places = tokens.cpu().unique(return_inverse=True)
        if int(distinct[0]) < 0 or int(distinct[-1]) >= source.shape[0]:
            raise CorruptShardError(
                f"tokens {int(distinct[0])} to {int(distinct[-1])} do not fit the "
                f"{source.shape[0]} rows of {source.name}: the tokenizer belongs to another model"
            )
        with TensorReader() as reader:
            rows = reader.read_rows(source, distinct).to(self.device, self.skeleton.dtype)
        places = places.to(self.device)
        empty, padding = embedding.weight, embedding.padding_idx

        strict = not any_tokens and name != self.skeleton.embedding_name

        def renumber(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            if strict and not torch.equal(args[0].flatten().cpu(), tokens.flatten().cpu()):
                raise UnsupportedModelError(f"{name} is given something else than the tokens")
            return (torch.zeros_like(args[0]) if any_tokens else places.view(args[0].shape),)

        hook = embedding.register_forward_pre_hook(renumber)
        embedding.padding_idx = None
        embedding.weight = nn.Parameter(rows, requires_grad=False)
        try:
            yield
        finally:
            hook.remove()
            embedding.weight, embedding.padding_idx = empty, padding

    def _load(self, wanted: Callable[[str], bool]) -> dict[str, str]:
        """Load the parameters whose names ``wanted`` accepts; returns digests of their tensors."""
        parameters = ((k, infos) for k, infos in self.skeleton.sources.items() if wanted(k))
        digests = self._load_tensors([info for _, infos in parameters for info in infos])
        self._saw(digests)
        return digests

    def _load_tensors(self, infos: Sequence[TensorInfo]) -> dict[str, str]:
        with TensorReader() as reader:
            state = {info.name: _LazyTensor(reader, info) for info in infos}
            load_state(self.skeleton.model, state, self.skeleton.dtype, self.device)
            return reader.digests


class _LazyTensor:
    """Stands in for a slice of a file in transformers' loader: read when it is indexed."""

    def __init__(self, reader: TensorReader, info: TensorInfo) -> None:
        self._reader, self._info = reader, info

    def __getitem__(self, index: Any) -> Tensor:
        return self._reader.read(self._info)[index]


def _move_buffers(model: nn.Module, device: torch.device) -> None:
    """Move the buffers that have values; those on ``meta`` come from disk."""
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None and not buffer.is_meta:
                module._buffers[name] = buffer.to(device)


def _free(block: nn.Module) -> None:
    """Drop all that came from disk; other buffers stay, since they could not be loaded again."""
    for module in block.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = nn.Parameter(parameter.to("meta"), requires_grad=False)
        for name, buffer in module._buffers.items():
            if buffer is not None and name not in module._non_persistent_buffers_set:
                module._buffers[name] = buffer.to("meta")


def _check_loaded(name: str, module: nn.Module, absent: Set[str] = frozenset()) -> None:
    """Refuse missing weights, except ``absent`` ones, and NaN and infinite ones, which spread."""
    for leaf, value in module.state_dict().items():
        if f"{name}.{leaf}" in absent:
            continue
        if value.is_meta:
            raise MissingShardError(f"{name}.{leaf} is in no shard: the checkpoint is incomplete")
        if value.is_floating_point() and not bool(value.sum().isfinite()):
            bad = int((~value.isfinite()).sum())
            if bad:
                raise NonFiniteError(
                    f"{name}.{leaf}: {bad} of {value.numel()} weights are NaN or infinite; "
                    "the checkpoint is damaged"
                )
    for leaf, part in module.named_modules():
        if isinstance(part, FactoredLinear):
            try:
                part.check_indices(f"{name}.{leaf}")
            except ValueError as error:
                raise CorruptShardError(f"{error}; the checkpoint is damaged") from None
