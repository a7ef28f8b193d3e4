"""A model without weights, and where on disk each of its parameters lies.

Nothing here knows an architecture. The model is built on the ``meta`` device by
transformers, its blocks are found by their number, and transformers' own renamings map
tensors on disk to parameters.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.core_model_loading import dot_natural_key

from streamcomp.checkpoint.index import CheckpointIndex, TensorInfo
from streamcomp.errors import (
    CorruptShardError,
    MissingShardError,
    SourceError,
    UnsupportedModelError,
)
from streamcomp.modeling.modules import FORMAT_VERSION, NameMap, install_factored

__all__ = ["Call", "Skeleton", "call_bytes", "check_same_calls", "views_of_one"]

# What a model's code raises that does not do with what it is given.
_FAULTS = (AttributeError, IndexError, KeyError, TypeError, ValueError)
_FLOATS = ("F64", "F32", "F16", "BF16")


@dataclass(frozen=True)
class Call:
    """Arguments of one block's forward beside the hidden states."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


def call_bytes(calls: Sequence[Call]) -> int:
    """Bytes of all tensors that ``calls`` hold, each storage counted once."""
    leaves = tree_leaves([(call.args, call.kwargs) for call in calls])
    storages = [leaf.untyped_storage() for leaf in leaves if isinstance(leaf, Tensor)]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def views_of_one(calls: list[Call], one: list[Call]) -> list[Call]:
    """``calls`` of a batch as views of those of ``one`` window, as far as they are alike.

    The masks of eager attention take 4 MiB for each window of 1024 tokens, and 64 for one of 4096.
    """
    known: dict[tuple[int, int], Any] = {}

    def view(mine: Any, single: Any) -> Any:
        if not isinstance(mine, Tensor) or not isinstance(single, Tensor):
            return mine
        key = id(mine), id(single)
        if key not in known:
            same = mine.dim() == single.dim() > 0 and single.shape[0] in (1, mine.shape[0])
            same = same and single.shape[1:] == mine.shape[1:]
            same = same and torch.equal(mine, single.expand_as(mine))
            known[key] = single.expand_as(mine) if same else mine
        return known[key]

    return [
        Call(*tree_map(view, (call.args, call.kwargs), (other.args, other.kwargs)))
        for call, other in zip(calls, one, strict=True)
    ]


class Skeleton:
    """The model of ``index`` on ``meta``; blocks are replaced by taps while it runs.

    Holds module objects and the small non-persistent buffers (rotary frequencies), no weight.
    """

    def __init__(self, index: CheckpointIndex) -> None:
        self.index = index
        self.compressed = check_source(index)
        self.dtype = _model_dtype(index)
        config = _load_config(index)
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                self.model: PreTrainedModel = AutoModelForCausalLM.from_config(
                    config, dtype=self.dtype, trust_remote_code=False
                ).eval()
            except ValueError as error:
                raise UnsupportedModelError(
                    f"{config.model_type}: transformers has no causal language model of this "
                    f"type ({str(error).splitlines()[0][:120]})"
                ) from None
        self.config = self.model.config
        self.tied = self.head.weight is self.embedding.weight
        self.text_config = config.get_text_config(decoder=True)
        _rebuild_buffers(self.model)
        self.layers_name, self._layers = _find_layers(self.model, self.text_config)
        if self.compressed:
            try:
                install_factored(self.model, index.config["quantization_config"]["modules"])
            except ValueError as error:
                raise UnsupportedModelError(f"{index.folder}: {error}") from None
        self.sources, self.unclaimed = self._map_tensors()
        self._parent = self.model.get_submodule(self.layers_name.rpartition(".")[0])
        self._leaf = self.layers_name.rpartition(".")[2]
        self._tape = _Tape(len(self._layers))
        self._taps = nn.ModuleList(_Tap(layer, self._tape) for layer in self._layers)

    # -- what is there -------------------------------------------------------------------

    def __len__(self) -> int:
        """Number of blocks."""
        return len(self._layers)

    def block(self, number: int) -> nn.Module:
        return self._layers[number]

    def block_name(self, number: int) -> str:
        return f"{self.layers_name}.{number}"

    def block_parameters(self, number: int) -> dict[str, list[TensorInfo]]:
        """Tensors on disk behind each parameter of a block, by the parameter's full name."""
        prefix = self.block_name(number) + "."
        return {name: infos for name, infos in self.sources.items() if name.startswith(prefix)}

    def outer_parameters(self) -> dict[str, list[TensorInfo]]:
        """The same for all that is not in a block: embeddings, norms, head."""
        prefix = self.layers_name + "."
        return {name: infos for name, infos in self.sources.items() if not name.startswith(prefix)}

    def block_tensors(self, number: int) -> list[TensorInfo]:
        return [info for infos in self.block_parameters(number).values() for info in infos]

    def other_tensors(self) -> list[TensorInfo]:
        """Every tensor on disk that is in no block, also those that the model does not use."""
        infos = [info for infos in self.outer_parameters().values() for info in infos]
        return infos + self.unclaimed

    def block_kind(self, number: int) -> tuple[Any, ...]:
        """Blocks of equal kind have equal shapes and run the same code."""
        block = self.block(number)
        shapes = tuple((name, tuple(value.shape)) for name, value in block.state_dict().items())
        plain = tuple(
            (name, repr(value))
            for module in block.modules()
            for name, value in sorted(vars(module).items())
            if isinstance(value, str | bool | int | float | None)
            and name not in ("layer_idx", "training")
        )
        return (type(block).__name__, shapes, plain)

    @property
    def hidden_size(self) -> int:
        return int(self.text_config.hidden_size)

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
        name = f"{self.embedding_name}.weight"
        infos = self.sources.get(name, [])
        if not infos:
            raise MissingShardError(f"{name} is in no shard: the checkpoint is incomplete")
        if len(infos) != 1:
            raise UnsupportedModelError(f"{name} does not come from one tensor on disk")
        return infos[0]

    @property
    def head(self) -> nn.Linear:
        """The output embedding."""
        head = self.model.get_output_embeddings()
        if not isinstance(head, nn.Linear):
            raise UnsupportedModelError(
                f"{self.config.model_type}: output embeddings of type {type(head).__name__}"
            )
        return head

    @property
    def head_name(self) -> str:
        return _name_of(self.model, self.head)

    @property
    def outer_modules(self) -> set[str]:
        """Names of the modules that hold parameters and lie in no block."""
        prefix = self.layers_name + "."
        return {
            name
            for name, module in self.model.named_modules()
            if not name.startswith(prefix)
            and any(value is not None for value in module._parameters.values())
        }

    # -- running it ----------------------------------------------------------------------

    @torch.no_grad()
    def record(self, tokens: Tensor) -> tuple[Tensor, list[Call]]:
        """Run the real forward up to the blocks.

        ``tokens`` (batch, seq). Returns the hidden states entering the first block (batch,
        seq, hidden) and each block's call. The outer parameters must be in place.
        """
        known = self._tape.wrap
        for wrap in (known,) if known else (None, tuple):
            self._tape.wrap = wrap
            self._tape.start()
            fault = self._run_taps(tokens)
            if fault is None:
                break
        if fault is not None:
            self._tape.wrap = known
            raise UnsupportedModelError(
                f"{self.config.model_type}: its code cannot be run block by block "
                f"({type(fault).__name__}: {str(fault).splitlines()[0][:120]})"
            ) from fault
        if self._tape.hidden is None or self._tape.hidden.shape[:-1] != tokens.shape:
            raise UnsupportedModelError(
                f"{self.config.model_type}: hidden states are not (batch, tokens, hidden)"
            )
        hidden, calls = self._tape.hidden, self._tape.calls
        self._tape.start()  # forgets them
        for call in calls:
            _check_call(self.config.model_type, call)
        return hidden, calls

    def _run_taps(self, tokens: Tensor) -> Exception | None:
        """Run the model with its taps; what went wrong, if anything did."""
        with self._tapped(), suppress(_Stop):
            try:
                self.model(input_ids=tokens, use_cache=False)
            except _FAULTS as error:
                return error
        return None

    @cached_property
    def modules_before(self) -> set[str]:
        """The outer modules that run before the blocks: a vision tower, say, does not."""
        return self._modules_run_by(lambda: self.dry_record(1, 2))

    def modules_behind(self, device: torch.device) -> set[str]:
        """The outer modules that a forward runs from the last block on, the head among them.

        As long as no block has run, it is not known whether hidden states come in a tuple: what
        arrives at the head tells.
        """
        hidden = torch.zeros(2, 3, self.hidden_size, dtype=self.dtype, device=device)
        arrived: list[torch.Size] = []

        def stop(_: nn.Module, args: tuple[Any, ...]) -> None:
            arrived.append(args[0].shape[:-1])
            raise _Stop  # the head is large: do not compute

        def run() -> None:
            hook = self.head.register_forward_pre_hook(stop)
            try:
                with self._zero_parameters(device), suppress(_Stop), torch.no_grad():
                    self.finish(hidden)
            finally:
                hook.remove()

        known = self._tape.wrap
        for wrap in (known,) if known else (None, tuple):
            self._tape.wrap = wrap
            with suppress(*_FAULTS, RuntimeError):
                used = self._modules_run_by(run)
                if hidden.shape[:-1] in arrived:
                    return used - self.modules_before
        self._tape.wrap = known
        raise UnsupportedModelError(
            f"{self.config.model_type}: its code behind the last block cannot be run by itself"
        )

    def dry_record(self, batch: int, seq_len: int) -> tuple[Tensor, list[Call]]:
        """:meth:`record` on the CPU with all outer parameters zero, before any is loaded.

        Calls do not depend on weights.
        """
        with self._zero_parameters(torch.device("cpu")):
            return self.record(torch.zeros(batch, seq_len, dtype=torch.int64))

    def _modules_run_by(self, run: Callable[[], Any]) -> set[str]:
        """The outer modules whose forward ``run`` calls."""
        used: set[str] = set()
        hooks = [
            self.model.get_submodule(name).register_forward_pre_hook(
                lambda module, args, name=name: used.add(name)
            )
            for name in self.outer_modules
        ]
        try:
            run()
        finally:
            for hook in hooks:
                hook.remove()
        return used

    @contextmanager
    def _zero_parameters(self, device: torch.device) -> Iterator[None]:
        """Zeros for all outer parameters that are not loaded, each expanded from one number."""
        held: list[tuple[dict[str, Any], str, Any]] = []
        for name in self.outer_modules:
            module = self.model.get_submodule(name)
            for store in (module._parameters, module._buffers):
                for leaf, value in store.items():
                    if value is not None and value.is_meta:
                        held.append((store, leaf, value))
                        zero = torch.zeros((), dtype=value.dtype, device=device)
                        store[leaf] = nn.Parameter(zero.expand(value.shape), requires_grad=False)
        try:
            yield
        finally:
            for store, leaf, value in held:
                store[leaf] = value

    def finish(self, hidden: Tensor) -> Tensor:
        """Logits (batch, seq, vocabulary) of the last block's output (batch, seq, hidden).

        Can be differentiated; wants ``torch.no_grad`` around it where that is not needed.
        """
        self._tape.start(hidden)
        tokens = torch.zeros(hidden.shape[:-1], dtype=torch.int64, device=hidden.device)
        with self._tapped():
            logits: Tensor = self.model(input_ids=tokens, use_cache=False).logits
        self._tape.start()  # forgets them
        return logits

    def unwrap(self, output: Any) -> Tensor:
        """The hidden states in a block's return value; remembers how they were wrapped."""
        if isinstance(output, tuple | list):
            self._tape.wrap = type(output)
            output = output[0]
        return output  # type: ignore[no-any-return]

    @contextmanager
    def _tapped(self) -> Iterator[None]:
        self._parent._modules[self._leaf] = self._taps
        try:
            yield
        finally:
            self._parent._modules[self._leaf] = self._layers

    @property
    def blocks_unused(self) -> list[str]:
        """Names on disk of tensors in blocks beyond those that the config counts."""
        place = re.compile(rf"(^|\.){re.escape(self._leaf)}\.(\d+)\.")
        numbers = {info.name: place.search(info.name) for info in self.unclaimed}
        return [name for name, at in numbers.items() if at and int(at[2]) >= len(self)]

    def check_tensors(self, *, head: bool) -> None:
        """Refuse, by the headers alone, what a later step could not load.

        Tensors that are missing, of another shape than the config says, or no floats. Modules
        that no token runs through (a tower for images) may lack theirs, and without ``head`` also
        what lies behind the blocks.
        """
        outer = self.modules_before
        if head:
            outer = outer | self.modules_behind(torch.device("cpu"))
        blocks, tied_head = self.layers_name + ".", f"{self.head_name}.weight"
        for name, value in self.model.state_dict().items():
            runs = name.startswith(blocks) or name.rpartition(".")[0] in outer
            if runs and not (self.tied and name == tied_head):
                _check_sources(name, value, self.sources.get(name, []))

    def _map_tensors(self) -> tuple[dict[str, list[TensorInfo]], list[TensorInfo]]:
        """Parameter name -> tensors on disk, and the tensors that no parameter wants."""
        names = NameMap(self.model)
        sources: dict[str, list[TensorInfo]] = {}
        unclaimed = []
        for key in sorted(self.index.tensors, key=dot_natural_key):
            name = names.parameter(key)
            if name is None:
                unclaimed.append(self.index.tensors[key])
            else:
                sources.setdefault(name, []).append(self.index.tensors[key])
        return sources, unclaimed


def _check_sources(name: str, value: Tensor, infos: list[TensorInfo]) -> None:
    """That the tensors on disk ``infos`` can become the parameter or buffer ``name``."""
    if not infos:
        raise MissingShardError(f"{name} is in no shard: the checkpoint is incomplete")
    for info in infos:
        if value.is_floating_point() and not info.torch_dtype.is_floating_point:
            raise CorruptShardError(
                f"{name} is {info.dtype} on disk, a weight has to be {', '.join(_FLOATS)}"
            )
    if sum(info.numel for info in infos) != value.numel():
        shapes = " and ".join(str(list(info.shape)) for info in infos[:2])
        raise CorruptShardError(
            f"{name} is {shapes} on disk, config.json makes it {list(value.shape)}"
        )


def check_same_calls(first: list[Call], second: list[Call]) -> None:
    """UnsupportedModelError unless two batches of one shape were called alike.

    Then a call depends on the shape of a batch alone, and need not be kept for each.
    """
    for one, other in zip(first, second, strict=True):
        mine, theirs = tree_leaves((one.args, one.kwargs)), tree_leaves((other.args, other.kwargs))
        for a, b in zip(mine, theirs, strict=True):
            if isinstance(a, Tensor) and not torch.equal(a, b):
                raise UnsupportedModelError(
                    "the model hands its blocks a state that depends on the tokens beside the "
                    "hidden states: not supported yet"
                )


def check_source(index: CheckpointIndex) -> bool:
    """Whether ``index`` is a model of ours; UnsupportedModelError if quantised by others."""
    quantization = index.config.get("quantization_config")
    if quantization is None:
        text = index.config.get("text_config")
        quantization = text.get("quantization_config") if isinstance(text, dict) else None
    if quantization is None:
        narrow = next((i for i in index.tensors.values() if i.dtype.startswith("F8")), None)
        if narrow is not None:
            raise UnsupportedModelError(
                f"{index.folder}: {narrow.name} is {narrow.dtype}, the model is already "
                "quantised: start from the fp32, fp16 or bf16 original"
            )
        return False
    method = quantization.get("quant_method") if isinstance(quantization, dict) else None
    if method != "streamcomp":
        raise UnsupportedModelError(
            f"{index.folder} is already quantised ({method}): start from the fp32, fp16 or "
            "bf16 original"
        )
    if quantization.get("version") != FORMAT_VERSION:
        raise UnsupportedModelError(
            f"{index.folder}: format version {quantization.get('version')!r}, this streamcomp "
            f"reads {FORMAT_VERSION}"
        )
    return True


def _load_config(index: CheckpointIndex) -> Any:
    model_type = index.config.get("model_type")
    if not model_type:
        raise SourceError(f"{index.folder / 'config.json'} names no model_type")
    try:
        config = AutoConfig.for_model(**index.config)
    except (KeyError, ValueError):
        own = " and the code in its folder is never run" if "auto_map" in index.config else ""
        raise UnsupportedModelError(
            f"model type {model_type!r} is unknown to transformers {transformers.__version__}{own}"
        ) from None
    except Exception as error:  # config classes validate with errors of many kinds
        raise SourceError(f"{index.folder / 'config.json'} is not valid: {error}") from None
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    return config


def _model_dtype(index: CheckpointIndex) -> torch.dtype:
    """The float dtype that holds most of the bytes."""
    sizes: dict[str, int] = {}
    for info in index.tensors.values():
        if info.dtype in _FLOATS:
            sizes[info.dtype] = sizes.get(info.dtype, 0) + info.nbytes
    if not sizes:
        raise UnsupportedModelError(f"{index.folder} holds no tensor of fp32, fp16 or bf16")
    largest = max(sizes, key=lambda name: sizes[name])
    return next(i.torch_dtype for i in index.tensors.values() if i.dtype == largest)


def _rebuild_buffers(model: PreTrainedModel) -> None:
    """Give the buffers that no checkpoint holds (rotary frequencies, scales) their values.

    transformers' contract: ``_init_weights`` of the model that owns a module fills them.
    """
    owners: set[str] = set()
    for name, _ in model.named_non_persistent_buffers():
        owner, _, leaf = name.rpartition(".")
        buffers = model.get_submodule(owner)._buffers
        buffers[leaf] = torch.empty_like(buffers[leaf], device="cpu")
        owners.add(owner)
    models = [(n, m) for n, m in model.named_modules() if isinstance(m, PreTrainedModel)]
    with torch.no_grad():
        for owner in sorted(owners):
            nearest = max(
                (pair for pair in models if not pair[0] or f"{owner}.".startswith(f"{pair[0]}.")),
                key=lambda pair: len(pair[0]),
            )
            nearest[1]._init_weights(model.get_submodule(owner))


def _find_layers(model: PreTrainedModel, config: Any) -> tuple[str, nn.ModuleList]:
    """The list of decoder blocks: as many as the config says, of a type kept on one device."""
    whole = set(model._no_split_modules or ())
    decoder = set(model.get_decoder().modules())  # beside it may stand a tower for images
    for name, module in model.named_modules():
        if (
            isinstance(module, nn.ModuleList)
            and module in decoder
            and len(module) == config.num_hidden_layers > 0
            and (
                type(module[0]).__name__ in whole
                or re.search(r"(^|\.)(layers|h|blocks)$", name) is not None
            )
        ):
            return name, module
    raise UnsupportedModelError(f"{config.model_type}: its decoder blocks were not found")


def _check_call(model_type: str, call: Call) -> None:
    for name, value in call.kwargs.items():
        if isinstance(value, dict | list) and value:
            raise UnsupportedModelError(
                f"{model_type} hands the state {name!r} from block to block: not supported yet"
            )


def _name_of(model: nn.Module, module: nn.Module) -> str:
    return str(next(name for name, other in model.named_modules() if other is module))


class _Stop(Exception):  # noqa: N818 - not an error: ends a forward early
    """Raised by the last tap."""


class _Tape:
    """What the taps share: the calls they record, or the hidden states they hand back."""

    def __init__(self, blocks: int) -> None:
        self.blocks = blocks
        self.wrap: type | None = None  # how a block returns its hidden states
        self.start()

    def start(self, final: Tensor | None = None) -> None:
        """Record calls and stop, or where ``final`` is given, return it from every block."""
        self.final = final
        self.hidden: Tensor | None = None
        self.calls: list[Call] = []

    def wrapped(self, hidden: Tensor) -> Any:
        """``hidden`` as a block returns it."""
        return hidden if self.wrap is None else self.wrap((hidden,))


class _Tap(nn.Module):
    """One block's place; other attributes are the block's own (``attention_type``)."""

    def __init__(self, layer: nn.Module, tape: _Tape) -> None:
        super().__init__()
        self.__dict__.update(layer=layer, tape=tape)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["layer"], name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        tape: _Tape = self.__dict__["tape"]
        if tape.final is not None:
            return tape.wrapped(tape.final)
        hidden = args[0] if args else kwargs.pop("hidden_states")
        if tape.hidden is None:
            tape.hidden = hidden
        if hidden.shape != tape.hidden.shape:  # the model takes a part of what a tap returns
            raise ValueError(f"a block is given {list(hidden.shape)}")
        tape.calls.append(Call(args[1:], kwargs))
        if len(tape.calls) == tape.blocks:
            raise _Stop
        return tape.wrapped(hidden)
