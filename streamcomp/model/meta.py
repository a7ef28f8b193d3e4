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
from streamcomp.errors import CorruptShardError, SourceError, UnsupportedModelError
from streamcomp.forms.runtime import FLOATS, check_stored, install_factored, modules_of

__all__ = ["FLOATS", "MetaModel", "build_model", "find_layers"]

# Implementations of attention and experts that a config may choose. transformers also writes these
# settings with an underscore before their name and ``_internal`` after it. Other implementations
# need a package or a kernel that has to be installed, or fetched from a hub.
_IMPLEMENTATIONS = {
    "attn_implementation": ("eager", "sdpa"),
    "experts_implementation": ("eager", "batched_mm", "grouped_mm"),
}
# Values of buffers before transformers fills them; they also differ as booleans.
_MARKS = (0, 1)


@dataclass(frozen=True)
class MetaModel:
    """A model on ``meta`` and properties of its source."""

    model: PreTrainedModel
    dtype: torch.dtype
    modules: dict[str, dict[str, Any]] | None  # of a compressed model, as its config lists them
    notes: tuple[str, ...]  # settings of the config that are not followed


def build_model(index: CheckpointIndex) -> MetaModel:
    """The model of ``index``; SourceError and UnsupportedModelError where there is none."""
    modules = _compressed_modules(index)
    dtype = _model_dtype(index)
    settings, notes = _runnable(_plain_floats(index.config))
    config = _load_config(index, settings)
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            model: PreTrainedModel = AutoModelForCausalLM.from_config(
                config, dtype=dtype, trust_remote_code=False
            ).eval()
        except Exception as error:  # model classes refuse configs with errors of many kinds
            first = (str(error).strip().splitlines() or [""])[0]
            if isinstance(error, ValueError) and "Unrecognized configuration" in first:
                first = f"transformers has no causal language model of this type ({first[:120]})"
            else:
                first = f"transformers cannot build it ({type(error).__name__}: {first[:200]})"
            raise UnsupportedModelError(f"{config.model_type}: {first}") from None
    if modules is not None:
        _install(index, model, modules)
        _mark_as_quantised(model)
    _fill_buffers(model)
    return MetaModel(model, dtype, modules, notes)


def _compressed_modules(index: CheckpointIndex) -> dict[str, dict[str, Any]] | None:
    """The linears that streamcomp has factored, None for a dense model.

    UnsupportedModelError if it is quantised otherwise, or in a way that is not known.
    """
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


def _plain_floats(value: Any) -> Any:
    """``value`` with floats instead of ``{"__float__": "Infinity"}`` and the like.

    So transformers writes what JSON has no number for.
    """
    if isinstance(value, dict):
        if list(value) == ["__float__"] and value["__float__"] in ("NaN", "Infinity", "-Infinity"):
            return float(value["__float__"])
        return {key: _plain_floats(item) for key, item in value.items()}
    return [_plain_floats(item) for item in value] if isinstance(value, list) else value


def _runnable(settings: dict[str, Any]) -> tuple[dict[str, Any], tuple[str, ...]]:
    """``settings`` without implementations that are not part of torch, and notes on those."""
    kept, notes = dict(settings), list[str]()
    for name, value in settings.items():
        if isinstance(value, dict):
            kept[name], more = _runnable(value)
            notes += more
        plain = name.removeprefix("_").removesuffix("_internal")
        if plain not in _IMPLEMENTATIONS:
            continue
        if value is not None and value not in _IMPLEMENTATIONS[plain]:
            del kept[name]
            shown = plain.removesuffix("_implementation").replace("attn", "attention")
            notes.append(f"config.json asks for {shown} by {value!r}: torch's own is used instead")
    return kept, tuple(notes)


def _load_config(index: CheckpointIndex, settings: dict[str, Any]) -> Any:
    path = index.folder / "config.json"
    model_type = settings.get("model_type")
    if not model_type:
        raise SourceError(f"{path} names no model_type")
    if model_type not in CONFIG_MAPPING:
        code = " and the code in its folder is never run" if "auto_map" in settings else ""
        raise UnsupportedModelError(
            f"model type {model_type!r} is unknown to transformers {transformers.__version__}{code}"
        )
    try:
        config = CONFIG_MAPPING[model_type].from_dict(settings)
    except Exception as error:  # config classes validate with errors of many kinds
        raise SourceError(f"{path} is not valid: {' '.join(str(error).split())[:300]}") from None
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    return config


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
