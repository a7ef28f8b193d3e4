"""Puts tensors from disk into a model as transformers does: renamed, merged, split, cast.

A ``Conv1D``, the linear of GPT-2, has its weight (n, m) on disk. A skeleton runs an ``nn.Linear``
instead, whose weight is a transposed view of what was read.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import convert_and_load_state_dict_in_model
from transformers.modeling_utils import LoadStateDictConfig
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging as transformers_logging

from streamcomp.checkpoint.index import DTYPES, TensorInfo
from streamcomp.errors import CorruptShardError, StreamcompError
from streamcomp.forms.install import NameMap

__all__ = ["check_shapes", "load_state", "quiet_loading", "run_as_linears", "stored_shape"]

# The loader of the first transformers 5 releases takes one argument more.
_OLDER_ARGUMENTS = (
    {"tp_plan": None}
    if "tp_plan" in signature(convert_and_load_state_dict_in_model).parameters
    else {}
)


class _TransposedLinear(nn.Linear):
    """Runs instead of a ``Conv1D``."""


def run_as_linears(model: PreTrainedModel) -> None:
    """Put an ``nn.Linear`` instead of each ``Conv1D`` of ``model``, which is on ``meta``."""
    for name, module in list(model.named_modules()):
        if isinstance(module, Conv1D):
            columns, rows = module.weight.shape
            linear = _TransposedLinear(columns, rows, device="meta", dtype=module.weight.dtype)
            model.set_submodule(name, linear.train(module.training))


def stored_shape(linear: nn.Linear) -> tuple[int, ...]:
    """Shape of the weight of ``linear`` on disk."""
    shape = tuple(linear.weight.shape)
    return shape[::-1] if isinstance(linear, _TransposedLinear) else shape


class _Transposed:
    """Stands in for ``tensor`` in transformers' loader, and gives a transposed view of it."""

    def __init__(self, tensor: Any) -> None:
        self._tensor = tensor

    def __getitem__(self, index: Any) -> Tensor:
        whole: Tensor = self._tensor[...]
        return whole.transpose(0, -1)[index]


def _transposed(model: PreTrainedModel, state: Mapping[str, Any]) -> set[str]:
    """Names in ``state`` of the weights that run transposed."""
    linears = {f"{n}.weight" for n, m in model.named_modules() if isinstance(m, _TransposedLinear)}
    names = NameMap(model) if linears else None
    return {name for name in state if names and names.parameter(name) in linears}


def load_state(
    model: PreTrainedModel, state: Mapping[str, Any], dtype: torch.dtype, device: torch.device
) -> None:
    """Put ``state``, tensors by their names on disk, into ``model``.

    CorruptShardError where they do not give its parameters the shapes that the config says.
    """
    transposed = _transposed(model, state)
    with quiet_loading():
        info, _ = convert_and_load_state_dict_in_model(
            model=model,
            state_dict={k: _Transposed(v) if k in transposed else v for k, v in state.items()},
            load_config=LoadStateDictConfig(
                dtype=dtype,
                dtype_plan=model._get_dtype_plan(dtype),
                device_map={"": device},
                weight_mapping=get_model_conversion_mapping(model),
            ),
            disk_offload_index=None,
            **_OLDER_ARGUMENTS,
        )
    if info.mismatched_keys:
        name, *shapes = sorted(info.mismatched_keys)[0]
        owner = model.get_submodule(name.rpartition(".")[0])
        step = -1 if isinstance(owner, _TransposedLinear) and name.endswith(".weight") else 1
        on_disk, expected = (list(shape)[::step] for shape in shapes)
        raise CorruptShardError(f"{name} is {on_disk} on disk, config.json makes it {expected}")
    if info.conversion_errors:
        raise CorruptShardError(
            f"{min(info.conversion_errors)} cannot be made of its tensors on disk: "
            "config.json describes other shapes"
        )


def check_shapes(
    model: PreTrainedModel, tensors: Mapping[str, TensorInfo], dtype: torch.dtype
) -> None:
    """CorruptShardError unless loading ``tensors`` gives each parameter its shape.

    They are loaded without their data, and ``model`` is as it was before.
    """
    before = [
        (module, dict(module._parameters), dict(module._buffers)) for module in model.modules()
    ]
    try:
        state = {
            name: torch.empty(info.shape, dtype=info.torch_dtype, device="meta")
            for name, info in tensors.items()
            if info.dtype in DTYPES
        }
        load_state(model, state, dtype, torch.device("meta"))
    except StreamcompError:
        raise
    except Exception as error:  # conversions expect the shapes that their models have
        text = " ".join(str(error).split())[:200]
        raise CorruptShardError(
            f"tensors on disk cannot become parameters ({type(error).__name__}: {text}): "
            "config.json describes other shapes"
        ) from None
    finally:
        for part, parameters, buffers in before:
            part._parameters.update(parameters)
            part._buffers.update(buffers)


@contextmanager
def quiet_loading() -> Iterator[None]:
    """Load without transformers' progress bar, and one tensor after the other."""
    bars = transformers_logging.is_progress_bar_enabled()
    before = os.environ.get("HF_DEACTIVATE_ASYNC_LOAD")
    os.environ["HF_DEACTIVATE_ASYNC_LOAD"] = "1"
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if bars:
            transformers_logging.enable_progress_bar()
        if before is None:
            del os.environ["HF_DEACTIVATE_ASYNC_LOAD"]
        else:
            os.environ["HF_DEACTIVATE_ASYNC_LOAD"] = before
