"""Builds the model that a checkpoint's config describes, without its weights.

transformers builds it on the ``meta`` device. Buffers that no checkpoint holds (rotary
frequencies, scales) get their values, as they do whenever transformers loads a model.
"""

from __future__ import annotations

import re
import warnings
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel

from streamcomp.checkpoint.index import CheckpointIndex
from streamcomp.checkpoint.quantised import quantization_of
from streamcomp.errors import CorruptShardError, SourceError, StreamcompError, UnsupportedModelError
from streamcomp.forms.install import check_stored, install_factored, modules_of
from streamcomp.forms.runtime import FLOATS
from streamcomp.model.loading import run_as_linears
from streamcomp.model.settings import at_most, check_counts, named, refusing, runnable, silent
from streamcomp.units import format_bytes

__all__ = ["FLOATS", "MetaModel", "build_model"]

# What a model may have beyond its shards: parameters, for a tower may be missing, and bytes of
# buffers that no checkpoint holds.
_MOST_TIMES, _MORE_NUMBERS = 16, 2**28
_MOST_BUFFER_BYTES = 2**30
# Names that tensors of packed weights end with: GPTQ and AWQ, compressed-tensors, bitsandbytes.
_PACKED = (".qweight", ".weight_packed", ".weight.absmax", ".SCB")
_DECODED = "the source is quantised ({}): its weights are decoded to bf16 as they are read"
# Values of buffers before transformers fills them; they also differ as booleans.
_MARKS = (0, 1)


@dataclass(frozen=True)
class MetaModel:
    """A model on ``meta`` and properties of its source."""

    model: PreTrainedModel
    dtype: torch.dtype
    modules: dict[str, dict[str, Any]] | None  # of a compressed model, as its config lists them
    notes: tuple[str, ...]  # settings of the config that are not followed, and decoded weights
    layers_name: str
    layers: nn.ModuleList


def build_model(index: CheckpointIndex) -> MetaModel:
    """The model of ``index``; SourceError and UnsupportedModelError where there is none."""
    modules = _compressed_modules(index)
    dtype = _model_dtype(index)
    settings, notes = runnable(index.config)
    if index.quantization:
        notes += (_DECODED.format(index.quantization["quant_method"]),)
    config = _load_config(index, settings)
    what = f"{config.model_type}"
    with torch.device("meta"), warnings.catch_warnings(), at_most(len(index.tensors)):
        warnings.simplefilter("ignore")
        with refusing(what, settings):
            model: PreTrainedModel = AutoModelForCausalLM.from_config(
                config, dtype=dtype, trust_remote_code=False
            ).eval()
    if modules is not None:
        _install(index, model, modules)
        _mark_as_quantised(model)
    run_as_linears(model)
    _check_size(index, model)
    with refusing(what, settings):
        _fill_buffers(model)
        layers_name, layers = find_layers(model)
    return MetaModel(model, dtype, modules, notes, layers_name, layers)


def _check_size(index: CheckpointIndex, model: PreTrainedModel) -> None:
    """Refuse a model beyond its shards, before it is run and buffers get their values."""
    described = sum(value.numel() for value in model.parameters())
    held = sum(info.numel for info in index.tensors.values())
    if described > _MOST_TIMES * held + _MORE_NUMBERS:
        raise UnsupportedModelError(
            f"{index.folder}: config.json describes {described:.3g} parameters, the shards hold "
            f"{held:.3g}"
        )
    buffers = {name: value.nbytes for name, value in model.named_non_persistent_buffers()}
    if sum(buffers.values()) > _MOST_BUFFER_BYTES:
        largest = max(buffers, key=lambda name: buffers[name])
        raise UnsupportedModelError(
            f"{index.folder}: config.json describes tables of {format_bytes(sum(buffers.values()))}"
            f" that are in no checkpoint, {largest} the largest: at most "
            f"{format_bytes(_MOST_BUFFER_BYTES)} are built"
        )


def _compressed_modules(index: CheckpointIndex) -> dict[str, dict[str, Any]] | None:
    """The linears that streamcomp has factored, None for a dense model.

    UnsupportedModelError if it is quantised otherwise, or in a way that is not known.
    """
    quantization = quantization_of(index.config)
    if quantization is None:
        _refuse_narrow(index)
        return None
    method = quantization.get("quant_method") if isinstance(quantization, dict) else None
    if method != "streamcomp":
        raise UnsupportedModelError(
            f"{index.folder} is already quantised ({method}): start from the fp32, fp16 or "
            "bf16 original"
        )
    try:
        return modules_of(quantization)
    except ValueError as error:
        raise UnsupportedModelError(f"{index.folder}: {error}") from None


def _refuse_narrow(index: CheckpointIndex) -> None:
    """UnsupportedModelError where weights are quantised and the config does not say how."""
    for name, info in index.tensors.items():
        narrow, packed = info.dtype.startswith("F8"), name.endswith(_PACKED)
        if narrow or packed:
            raise UnsupportedModelError(
                f"{index.folder}: {name} is {info.dtype}, the model is already quantised and "
                "config.json does not say how: start from the fp32, fp16 or bf16 original"
            )


def _install(
    index: CheckpointIndex, model: PreTrainedModel, modules: dict[str, dict[str, Any]]
) -> None:
    """Put factored linears into ``model``, and check that the shards hold their tensors."""
    try:
        install_factored(model, modules)
    except ValueError as error:
        raise UnsupportedModelError(f"{index.folder}: {error}") from None
    try:
        check_stored(model, {i.name: (i.dtype, i.shape) for i in index.tensors.values()})
    except ValueError as error:
        raise CorruptShardError(f"{index.folder}: {error}") from None


def _model_dtype(index: CheckpointIndex) -> torch.dtype:
    """The float dtype that holds most of the bytes."""
    sizes: dict[str, int] = {}
    for info in index.tensors.values():
        if info.dtype in FLOATS:
            sizes[info.dtype] = sizes.get(info.dtype, 0) + info.nbytes
    if not sizes:
        raise UnsupportedModelError(f"{index.folder} holds no tensor of fp32, fp16 or bf16")
    largest = max(sizes, key=lambda name: sizes[name])
    return next(i.torch_dtype for i in index.tensors.values() if i.dtype == largest)


def _load_config(index: CheckpointIndex, settings: dict[str, Any]) -> Any:
    path = index.folder / "config.json"
    model_type = settings.get("model_type")
    if not model_type or not isinstance(model_type, str):
        raise SourceError(f"{path} names no model_type")
    if model_type not in CONFIG_MAPPING:
        code = " and the code in its folder is never run" if "auto_map" in index.config else ""
        raise UnsupportedModelError(
            f"model type {model_type[:80]!r} is unknown to transformers "
            f"{transformers.__version__}{code}"
        )
    try:
        config_class = CONFIG_MAPPING[model_type]
        check_counts(path, settings, config_class, len(index.tensors))
        with silent():
            return config_class.from_dict(settings)
    except StreamcompError:
        raise
    except Exception as error:  # config classes validate with errors of many kinds
        text = " ".join(str(error).split())[:300]
        raise SourceError(f"{path} is not valid: {text}{named(settings, str(error))}") from None


def _mark_as_quantised(model: PreTrainedModel) -> None:
    """Attributes that transformers sets while it loads a quantised model; some code reads them."""
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            module.config._is_quantized = True


def _fill_buffers(model: PreTrainedModel) -> None:
    """Give buffers that no checkpoint holds their values; refuse one that transformers leaves.

    ``initialize_weights`` fills them, as it does when transformers loads a model. It runs twice,
    from different initial values: a buffer that is not filled, or filled with random numbers,
    then differs.
    """
    first, second = (_initialised(model, mark) for mark in _MARKS)
    for name, value in first.items():
        if not torch.equal(value, second[name]):
            raise UnsupportedModelError(
                f"{model.config.model_type}: {name} is in no checkpoint, and transformers fills it "
                "with nothing that stays the same: not supported"
            )


@torch.no_grad()
def _initialised(model: PreTrainedModel, mark: int) -> dict[str, Tensor]:
    """Fill buffers of ``model`` with ``mark``, then as transformers does; return copies."""
    names = [name for name, _ in model.named_non_persistent_buffers()]
    for module in model.modules():
        module.__dict__.pop("_is_hf_initialized", None)
    for name in names:
        owner, _, leaf = name.rpartition(".")
        buffers = model.get_submodule(owner)._buffers
        buffers[leaf] = torch.full_like(buffers[leaf], mark, device="cpu")
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(mark)  # only the CPU's, which is restored
        model.initialize_weights()
    return {name: model.get_buffer(name).clone() for name in names}


def find_layers(model: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """Name and list of the decoder blocks: as long as the config says, of a type never split.

    Where no list has that length (a block may count as two layers), any list of such types.
    """
    config = model.config.get_text_config(decoder=True)
    count = getattr(config, "num_hidden_layers", None)
    whole = set(model._no_split_modules or ())
    decoder = set(model.get_decoder().modules())  # a tower for images may be next to it
    lists = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m)]
    lists = [pair for pair in lists if pair[1] in decoder] or lists  # or the head is called decoder
    for name, layers in lists:
        named = re.search(r"(^|\.)(layers|h|blocks)$", name) is not None
        if len(layers) == count and (type(layers[0]).__name__ in whole or named):
            return name, layers
    for name, layers in lists:
        if all(type(block).__name__ in whole for block in layers):
            return name, layers
    raise UnsupportedModelError(f"{config.model_type}: its decoder blocks were not found")
