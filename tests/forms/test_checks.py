"""What is checked when a compressed model is opened."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Generator

from streamcomp.forms.install import check_stored, install_factored, modules_of
from streamcomp.forms.runtime import AXES
from tests.forms.test_runtime import FORMS, filled, filled_shared, shared_spec, spec
from tests.pico import make_pico


def test_the_modules_of_a_config_are_returned() -> None:
    modules = {"a": spec(), "b": shared_spec()}

    given = {"quant_method": "streamcomp", "version": 1, "modules": modules}
    assert modules_of(given) == modules


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([1, 2], r"quantization_config is \[1, 2\], no object"),
        ({"version": True}, "format version True, this reader knows 1"),
        ({"version": "1"}, "format version '1'"),
        ({"quant_method": "gptq"}, "another method's"),
        ({"bits": 4}, "unknown key 'bits' in quantization_config"),
        ({"modules": None}, "modules of quantization_config is None"),
        ({"modules": ["a"]}, r"modules of quantization_config is \['a'\]"),
        ({"modules": {"a": []}}, r"the entry of 'a' is \[\]"),
    ],
)
def test_a_config_that_is_not_of_this_version_is_refused(given: Any, message: str) -> None:
    if isinstance(given, dict):
        given = {"quant_method": "streamcomp", "version": 1, "modules": {}} | given

    with pytest.raises(ValueError, match=f"^streamcomp: .*{message}"):
        modules_of(given)


# -- what checkpoints hold

UP = "model.layers.0.mlp.up_proj"
STORED = {"weight": ("F32", (4, 32)), "coef": ("F32", (44, 4)), "pivots": ("I32", [48])}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"coef": None}, "coef is missing from the checkpoint"),
        ({"coef": ("F32", (4, 44))}, r"coef is \[4, 44\] in the checkpoint, the config makes it"),
        ({"coef": ("F32", (176,))}, r"coef is \[176\]"),
        ({"coef": ("BF16", (44, 4))}, f"the factors of {UP} are BF16 and F32"),
        ({"weight": ("I32", (4, 32))}, "weight is I32 in the checkpoint, it has to be F64, F32"),
        ({"weight": ("F8_E4M3", (4, 32))}, "weight is F8_E4M3"),
        ({"pivots": ("F32", (48,))}, "pivots is F32 in the checkpoint, it has to be I32"),
        ({"pivots": ("I64", (48,))}, "pivots is I64"),
        ({"U": ("F32", (48, 4))}, "U is a factor that the config does not list"),
    ],
)
def test_tensors_of_another_shape_or_dtype_are_refused(change: Any, message: str) -> None:
    model = make_pico("llama")
    install_factored(model, {UP: spec(form="pivot")})
    entries = {leaf: entry for leaf, entry in {**STORED, **change}.items() if entry}
    tensors = {f"{UP}.{leaf}": entry for leaf, entry in entries.items()}
    check_stored(model, {f"{UP}.{leaf}": entry for leaf, entry in STORED.items()})

    with pytest.raises(ValueError, match=f"^streamcomp: .*{message}"):
        check_stored(model, tensors)


def test_a_tensor_that_is_there_by_two_names_is_refused() -> None:
    model = make_pico("llama")
    install_factored(model, {UP: spec(form="pivot")})
    names = [f"{name}.{leaf}" for name in (UP, UP.removeprefix("model.")) for leaf in STORED]

    with pytest.raises(ValueError, match="weight is in the checkpoint twice"):
        check_stored(model, {name: STORED[name.rpartition(".")[2]] for name in names})


def test_factors_of_a_linear_that_is_not_listed_are_refused() -> None:
    tensors = {f"{UP}.{leaf}": entry for leaf, entry in STORED.items()}

    with pytest.raises(ValueError, match=f"{UP}.coef is a factor that the config does not list"):
        check_stored(make_pico("llama"), tensors)


@pytest.mark.parametrize("form", FORMS)
def test_random_factors_are_sound(form: str, random: Generator) -> None:
    filled(form, random, bias=True).check_values("up")
    filled(form, random, dtype=torch.float16).check_values("up")
    filled(form, random).to("meta").check_values("up")


@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("label", [-1, 5])
def test_a_label_without_its_cluster_is_refused(axis: str, label: int, random: Generator) -> None:
    module = filled_shared(axis, random)
    module.check_values("up")
    module.labels[3] = label

    with pytest.raises(ValueError, match=r"^streamcomp: up\.labels are .* for 5 clusters"):
        module.check_values("up")


@pytest.mark.parametrize("pivot", [-1, 0, 12])
def test_pivots_that_are_no_permutation_are_refused(pivot: int, random: Generator) -> None:
    module = filled("pivot", random)
    pivots = module.get_buffer("pivots")
    pivots[pivots.tolist().index(5)] = pivot

    with pytest.raises(ValueError, match=r"^streamcomp: up\.pivots is no permutation of 0 to 11"):
        module.check_values("up")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("form", FORMS)
def test_a_factor_that_is_not_finite_is_refused(form: str, value: float, random: Generator) -> None:
    for leaf in dict(filled(form, random, bias=True).named_parameters()):
        module = filled(form, random, bias=True)
        module.get_parameter(leaf).view(-1)[-1] = value

        with pytest.raises(ValueError, match=rf"^streamcomp: up\.{leaf} holds NaN or infinity"):
            module.check_values("up")


def test_a_sum_beyond_the_dtype_is_no_damage(random: Generator) -> None:
    module = filled("uv", random, dtype=torch.float16)
    module.weight.fill_(60000.0)

    module.check_values("up")
