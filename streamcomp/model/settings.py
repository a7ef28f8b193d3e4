"""What is followed of a config.json that anybody may have written.

A config says how a model is built. It chooses no code, no kernel and no file, and nothing in it may
make transformers build much more than the shards hold.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch.nn.modules import module as registry
from transformers.utils import logging as transformers_logging

from streamcomp.errors import SourceError, StreamcompError, UnsupportedModelError

__all__ = ["at_most", "check_counts", "named", "refusing", "runnable", "silent"]

# Implementations of attention and experts that a config may choose. transformers also writes these
# settings with an underscore before their name and ``_internal`` after it. Other implementations
# need a package or a kernel that has to be installed, or fetched from a hub.
_IMPLEMENTATIONS = {
    "attn_implementation": ("eager", "sdpa"),
    "experts_implementation": ("eager", "batched_mm", "grouped_mm"),
}
# Code, quantisation, dtypes and the weights of a tower do not follow from these settings; labels
# belong to classifiers.
_UNUSED = frozenset(
    {
        "auto_map",
        "dtype",
        "id2label",
        "label2id",
        "num_labels",
        "quantization_config",
        "torch_dtype",
        "use_pretrained_backbone",
    }
)
# Of a tower that the package timm builds: an architecture's name may also be a place to fetch one
# from, and an argument may be a file to load.
_ARCHITECTURES = ("architecture", "backbone")
_ARGUMENTS = ("backbone_kwargs", "model_args")

# A count of layers, which transformers also makes lists of; ``..._per_layer`` is none.
_COUNT = re.compile(r"(^|_)(?<!per_)(layers?|blocks|depths?)$")
_MORE_LAYERS = 1024  # than tensors on disk: some layers share weights, a tower may be missing
_LARGEST = 2**63  # no tensor has such a size; a longest length may be any number
_LENGTH = re.compile(r"max|length")
# Modules and parameters that a model may have for each tensor on disk, and in addition. A block has
# three for each of its tensors; one tensor may become several parameters, and a tower be missing.
_PARTS_PER_TENSOR, _MORE_PARTS = 16, 20_000

_SIZE = re.compile(r"size|dim|head|layer|expert|embd|ratio|group|freq|(^|_)num_|^n_")
_SHOWN_CHARS = 80


def runnable(settings: dict[str, Any]) -> tuple[dict[str, Any], tuple[str, ...]]:
    """``settings`` without those that choose code, and notes on them, each once."""
    notes: list[str] = []
    kept = {} if "__float__" in settings else _followed(settings, notes)  # no config at all
    return kept, tuple(dict.fromkeys(notes))


def _followed(value: Any, notes: list[str]) -> Any:
    if isinstance(value, list):
        return [_followed(item, notes) for item in value]
    if not isinstance(value, dict):
        return value
    if list(value) == ["__float__"] and value["__float__"] in ("NaN", "Infinity", "-Infinity"):
        return float(value["__float__"])  # so transformers writes what JSON has no number for
    kept = {}
    for name, item in value.items():
        plain = name.removeprefix("_").removesuffix("_internal")
        allowed = _IMPLEMENTATIONS.get(plain)
        if name in _UNUSED:
            continue
        if allowed and item is not None and item not in allowed:
            shown = plain.removesuffix("_implementation").replace("attn", "attention")
            notes.append(
                f"config.json asks for {shown} by {_shown(item)}: torch's own is used instead"
            )
        elif name in _ARCHITECTURES and isinstance(item, str) and not re.fullmatch(r"[\w.]*", item):
            notes.append(f"config.json asks for {name} {_shown(item)}: its default is used instead")
        elif name in _ARGUMENTS and isinstance(item, dict):
            kept[name] = {key: part for key, part in item.items() if not isinstance(part, str)}
        else:
            kept[name] = _followed(item, notes)
    return kept


def check_counts(path: Path, settings: dict[str, Any], config_class: type, tensors: int) -> None:
    """SourceError where ``settings`` of the config in ``path`` are beyond ``tensors`` on disk.

    Some config classes make lists as long as the model has layers. A setting with the name of one
    of their methods would replace it.
    """
    for name, value in _flat(settings):
        if type(value) is not int:
            continue
        vast = abs(value) >= _LARGEST and not _LENGTH.search(name)
        if vast or (_COUNT.search(name) and value > tensors + _MORE_LAYERS):
            raise SourceError(
                f"{path} is not valid: {name} is {_shown(value)}, and the shards hold "
                f"{tensors} tensors"
            )
    for name in settings:
        if name.startswith("__") or callable(getattr(config_class, name, None)):
            raise SourceError(f"{path} is not valid: {_shown(name)} is no setting")


@contextmanager
def at_most(tensors: int) -> Iterator[None]:
    """Stop building a model that has many more modules and parameters than ``tensors`` on disk."""
    left = tensors * _PARTS_PER_TENSOR + _MORE_PARTS

    def count(*_: object) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise UnsupportedModelError(
                f"config.json describes many more layers than the {tensors} tensors in the shards"
            )

    hooks = [
        registry.register_module_module_registration_hook(count),
        registry.register_module_parameter_registration_hook(count),
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def silent() -> Iterator[None]:
    """Keep transformers from logging what it raises as well."""
    before = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity(transformers_logging.CRITICAL)
    try:
        yield
    finally:
        transformers_logging.set_verbosity(before)


@contextmanager
def refusing(what: str, settings: dict[str, Any]) -> Iterator[None]:
    """One UnsupportedModelError for whatever transformers raises about ``settings``."""
    try:
        yield
    except StreamcompError:
        raise
    except Exception as error:  # model classes refuse configs with errors of many kinds
        text = (str(error).strip().splitlines() or [""])[0]
        if isinstance(error, ValueError) and "Unrecognized configuration" in text:
            told = f"transformers has no causal language model of this type ({text[:120]})"
        else:
            told = f"transformers cannot build it ({type(error).__name__}: {text[:200]})"
            told += named(settings, str(error))
        raise UnsupportedModelError(f"{what}: {told}") from None


def named(settings: dict[str, Any], text: str) -> str:
    """The setting that an error's ``text`` is most likely about: named, quoted, or no size."""
    flat = [(name, value) for name, value in _flat(settings) if name != "model_type"]
    named = [pair for pair in flat if len(pair[0]) > 4 and pair[0] in re.findall(r"\w+", text)]
    quoted = [pair for pair in flat if isinstance(pair[1], str) and f"'{pair[1]}'" in text]
    no_size = [pair for pair in flat if type(pair[1]) is int and pair[1] < 1]
    suspects = [*named, *quoted, *(pair for pair in no_size if _SIZE.search(pair[0]))]
    return "".join(f"; {name} is {_shown(value)}" for name, value in suspects[:1])


def _flat(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Each plain value in ``value``, with the name of the setting that it is in."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _flat(item, key)
    elif isinstance(value, list):
        for item in value:
            yield from _flat(item, name)
    else:
        yield name, value


def _shown(value: Any) -> str:
    """``value`` as a message shows it, in one line that is not long."""
    text = repr(value)
    return text if len(text) <= _SHOWN_CHARS else f"{text[:_SHOWN_CHARS]}..."
