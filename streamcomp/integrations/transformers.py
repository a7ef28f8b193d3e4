"""Loads a compressed model with plain transformers.

Importing this registers the quantisation method ``streamcomp``, and
``AutoModelForCausalLM.from_pretrained`` does the rest. Every output folder also carries this
module and those of :mod:`streamcomp.forms` that it needs joined into one file, ``PLUGIN``, which
``trust_remote_code=True`` imports where streamcomp is not installed.

It is imported while transformers itself is (:mod:`streamcomp.integrations.on_import`): what needs
more than the table of quantisation methods is imported by the functions that use it.
"""

from __future__ import annotations

import inspect
import re
from typing import TYPE_CHECKING, Any

import transformers
from safetensors import safe_open
from transformers.quantizers.auto import (
    AUTO_QUANTIZER_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = [
    "AUTO_MAP",
    "PLUGIN",
    "StreamCompConfig",
    "StreamCompQuantizer",
    "plugin_source",
]

# -- plugin begins

PLUGIN = "streamcomp_plugin.py"
AUTO_MAP = {
    "AutoConfig": "streamcomp_plugin.StreamCompAutoConfig",
    "AutoModel": "streamcomp_plugin.StreamCompAutoModel",
    "AutoModelForCausalLM": "streamcomp_plugin.StreamCompAutoModelForCausalLM",
}


class StreamCompConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """``quantization_config`` of a compressed model: forms and ranks of linears and experts."""

    def __init__(self, /, **settings: Any) -> None:
        from streamcomp.forms.install import modules_of
        from streamcomp.forms.runtime import FORMAT_VERSION

        self.modules = modules_of(settings)
        self.quant_method = "streamcomp"
        self.version = FORMAT_VERSION


class StreamCompQuantizer(HfQuantizer):  # type: ignore[misc]
    """Puts factored modules into the empty model before its weights are loaded."""

    requires_calibration = True  # nothing is compressed while loading

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> PreTrainedModel:
        from streamcomp.forms.install import check_stored, install_factored

        if self._has_experts and getattr(model.config, "distributed_config", None) is not None:
            raise ValueError("streamcomp: factored experts run in one process alone")
        install_factored(model, self.quantization_config.modules)
        if checkpoint_files and all(name.endswith(".safetensors") for name in checkpoint_files):
            check_stored(model, _headers(checkpoint_files))
        return model

    def _process_model_after_weight_loading(
        self, model: PreTrainedModel, **kwargs: Any
    ) -> PreTrainedModel:
        """transformers only warns of missing tensors; a missing factor is an error."""
        from streamcomp.forms.install import FACTORED

        # what save_pretrained makes of this model has no plugin next to it for auto_map to name
        vars(model.config).pop("auto_map", None)
        for name, module in model.named_modules():
            if not isinstance(module, FACTORED):
                continue
            for leaf, tensor in module.tensors().items():
                if not tensor.is_meta and not getattr(tensor, "_is_hf_initialized", False):
                    raise ValueError(f"streamcomp: {name}.{leaf} is missing from the checkpoint")
            module.check_values(name)
        return model

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True

    @property
    def is_qat_trainable(self) -> bool:
        return True

    @property
    def is_compileable(self) -> bool:
        return not self._has_experts  # how many tokens an expert gets decides what runs

    @property
    def _has_experts(self) -> bool:
        return any("ranks" in spec for spec in self.quantization_config.modules.values())


def _headers(files: list[str]) -> dict[str, tuple[str, list[int]]]:
    """Dtype and shape of each tensor in safetensors ``files``."""
    tensors = {}
    for name in files:
        with safe_open(name, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118
                entry = file.get_slice(key)
                tensors[key] = (entry.get_dtype(), entry.get_shape())
    return tensors


class _Redirect:
    """An ``auto_map`` target: importing it was all that was needed, transformers goes on."""

    target = ""

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = None) -> None:
        """transformers calls this on what it imports; there is nothing to register."""

    @classmethod
    def from_pretrained(cls, path: Any, *args: Any, **kwargs: Any) -> Any:
        kwargs["trust_remote_code"] = False
        kwargs.pop("code_revision", None)
        return getattr(transformers, cls.target).from_pretrained(path, *args, **kwargs)

    @classmethod
    def from_config(cls, config: Any, **kwargs: Any) -> Any:
        kwargs["trust_remote_code"] = False
        return getattr(transformers, cls.target).from_config(config, **kwargs)


class StreamCompAutoConfig(_Redirect):
    target = "AutoConfig"


class StreamCompAutoModel(_Redirect):
    target = "AutoModel"


class StreamCompAutoModelForCausalLM(_Redirect):
    target = "AutoModelForCausalLM"


if "streamcomp" not in AUTO_QUANTIZER_MAPPING:
    register_quantization_config("streamcomp")(StreamCompConfig)
    register_quantizer("streamcomp")(StreamCompQuantizer)

# -- plugin ends


def plugin_source() -> str:
    """The plugin file: the modules that a model needs, joined, with no import of streamcomp."""
    from streamcomp.forms import expert_module, experts, install, runtime

    this = inspect.getsource(inspect.getmodule(plugin_source))  # type: ignore[arg-type]
    imports, _, rest = _without_streamcomp(this).partition("__all__")
    body = imports + rest.partition("# -- plugin begins")[2].partition("# -- plugin ends")[0]
    others = (experts, expert_module, install)
    parts = [_without_streamcomp(inspect.getsource(module)) for module in others]
    return "\n\n".join((inspect.getsource(runtime), *parts, "# -- loading\n" + body))


def _without_streamcomp(source: str) -> str:
    """``source`` after its docstring and future import, without its imports of streamcomp."""
    code = source.partition("from __future__ import annotations\n")[2]
    return re.sub(r"^ *from streamcomp\S* import (\([^)]*\)|.*)\n", "", code, flags=re.MULTILINE)
