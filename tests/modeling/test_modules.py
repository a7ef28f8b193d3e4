from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Generator, nn

from streamcomp.modeling.modules import (
    FORMS,
    FactoredLinear,
    NameMap,
    PivotLinear,
    factored,
    install_factored,
)
from tests.modeling.folders import open_skeleton
from tests.pico import make_pico

NAMES = {"uv": ["U", "weight"], "pivot": ["coef", "pivots", "weight"]}


def filled(form: str, random: Generator, *, bias: bool = False, **place: Any) -> FactoredLinear:
    """Of 20 inputs, 12 outputs and rank 7, with random values."""
    module = FORMS[form](20, 12, 7, bias, **place).requires_grad_(False)
    for parameter in module.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=random))
    if isinstance(module, PivotLinear):
        module.pivots.copy_(torch.randperm(12, generator=random))
    return module


def spec(**changes: Any) -> dict[str, Any]:
    return {"form": "uv", "rank": 4, "dtype": "float32", **changes}


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_forward_multiplies_by_the_dense_weight(form: str, bias: bool, random: Generator) -> None:
    module = filled(form, random, bias=bias, dtype=torch.float64)
    inputs = torch.randn(3, 5, 20, dtype=torch.float64, generator=random)

    outputs = module(inputs)

    assert outputs.shape == (3, 5, 12)
    expected = inputs @ module.dense_weight().T
    if bias:
        expected += module.bias
    assert torch.allclose(outputs, expected, atol=1e-12)
    assert torch.linalg.matrix_rank(module.dense_weight()) == 7
    assert torch.allclose(module.left_factor() @ module.weight, module.dense_weight())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("form", FORMS)
def test_narrow_factors_run_in_their_own_dtype(
    form: str, dtype: torch.dtype, random: Generator
) -> None:
    module = filled(form, random, dtype=dtype)
    inputs = torch.randn(5, 20, generator=random)

    outputs = module(inputs.to(dtype))

    assert outputs.dtype == dtype
    assert module.dense_weight().dtype == torch.float32
    expected = inputs @ module.dense_weight().T
    assert (outputs.float() - expected).norm() < 8 * torch.finfo(dtype).eps * expected.norm()


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_tensors_have_the_names_of_the_format(form: str, bias: bool, random: Generator) -> None:
    module = filled(form, random, bias=bias)

    expected = sorted(NAMES[form] + ["bias"] * bias)
    assert sorted(module.state_dict()) == expected
    assert sorted(module.tensors()) == expected
    assert module.weight.shape == (7, 20)  # never that of the dense weight


def test_pivots_are_no_parameter_and_stay_whole_numbers(random: Generator) -> None:
    module = filled("pivot", random).to(torch.float16)

    assert [name for name, _ in module.named_parameters()] == ["weight", "coef"]
    assert module.pivots.dtype == torch.int32


@pytest.mark.parametrize("form", FORMS)
def test_a_factored_linear_passes_for_a_linear(form: str, random: Generator) -> None:
    module = filled(form, random)

    assert isinstance(module, nn.Linear)
    assert (module.in_features, module.out_features) == (20, 12)
    assert "rank=7" in repr(module)
    before = module.weight.clone()
    module.reset_parameters()
    assert torch.equal(module.weight, before)


@pytest.mark.parametrize("form", FORMS)
def test_gradients_flow_through_the_factors(form: str, random: Generator) -> None:
    module = filled(form, random).requires_grad_()

    module(torch.randn(5, 20, generator=random)).square().sum().backward()

    assert all(parameter.grad is not None for parameter in module.parameters())


# -- the config's words


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_a_dense_linear_is_replaced_by_an_empty_one_of_its_kind(form: str, bias: bool) -> None:
    dense = nn.Linear(20, 12, bias, device="meta", dtype=torch.bfloat16)

    module = factored(dense, spec(form=form))

    assert isinstance(module, FORMS[form])
    assert (module.in_features, module.out_features, module.rank) == (20, 12, 4)
    assert (module.bias is not None) == bias
    assert {p.dtype for p in module.parameters()} == {torch.bfloat16}
    assert all(value.is_meta for value in module.tensors().values())


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (spec(form="shared"), "unknown form 'shared': written by a newer version"),
        ({"rank": 4}, "unknown form None"),
        (spec(codebook=16), "unknown key 'codebook': written by a newer version"),
        (spec(rank=0), "rank 0 is impossible for 12 x 20"),
        (spec(rank=-1), "rank -1 is impossible"),
        (spec(rank=20), "rank 20 is impossible"),
        (spec(rank=4.0), "rank 4.0 is impossible"),
        (spec(rank="4"), "rank '4' is impossible"),
        (spec(rank=None), "rank None is impossible"),
    ],
)
def test_what_the_config_may_not_say_is_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        factored(nn.Linear(20, 12), given)


@pytest.mark.parametrize("rank", [12, 13])
@pytest.mark.parametrize("form", FORMS)
def test_a_rank_as_large_as_the_shorter_side_is_refused(form: str, rank: int) -> None:
    with pytest.raises(ValueError, match=f"rank {rank} is impossible"):
        factored(nn.Linear(20, 12), spec(form=form, rank=rank))


@pytest.mark.parametrize("architecture", ["llama", "opt", "gpt_neox"])
def test_factored_linears_are_put_where_the_names_say(architecture: str) -> None:
    model = make_pico(architecture)
    names = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and ".0." in n]
    assert len(names) >= 4

    install_factored(model, {name: spec(form="pivot") for name in names})

    found = [n for n, m in model.named_modules() if isinstance(m, FactoredLinear)]
    assert found == names


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("model.layers.7.mlp.up_proj", "LlamaForCausalLM has no module model.layers.7"),
        ("model.layers.0.mlp", "has no module model.layers.0.mlp"),
        ("model.embed_tokens", "model.embed_tokens is a Embedding, no linear"),
        ("model.norm", "model.norm is a LlamaRMSNorm, no linear"),
    ],
)
def test_a_module_that_is_no_linear_is_named(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        install_factored(make_pico("llama"), {name: spec()})


def test_names_on_disk_are_mapped_as_transformers_loads_them(pico: Callable[..., Path]) -> None:
    names = NameMap(open_skeleton(pico("mixtral")).model)

    assert names.parameter("model.norm.weight") == "model.norm.weight"
    assert (
        names.parameter("model.layers.0.block_sparse_moe.gate.weight")
        == "model.layers.0.mlp.gate.weight"
    )
    assert (
        names.parameter("model.layers.0.block_sparse_moe.experts.1.w2.weight")
        == "model.layers.0.mlp.experts.down_proj"
    )
    assert names.parameter("ghost.weight") is None


def test_names_of_a_bare_model_are_mapped_into_the_causal_one(pico: Callable[..., Path]) -> None:
    names = NameMap(open_skeleton(pico("llama")).model)

    assert names.parameter("layers.0.mlp.up_proj.weight") == "model.layers.0.mlp.up_proj.weight"
