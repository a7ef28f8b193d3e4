from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Generator, nn
from torch.profiler import ProfilerActivity, profile

from streamcomp.forms.install import NameMap, install_factored
from streamcomp.forms.runtime import (
    AXES,
    MODULES,
    FactoredLinear,
    PivotLinear,
    SharedLinear,
    factored,
)
from tests.model.folders import open_skeleton
from tests.pico import make_pico

FORMS = ("uv", "pivot")
NAMES = {"uv": ["U", "weight"], "pivot": ["coef", "pivots", "weight"]}


def filled(form: str, random: Generator, *, bias: bool = False, **place: Any) -> FactoredLinear:
    """Of 20 inputs, 12 outputs and rank 7, with random values."""
    module = MODULES[form](20, 12, 7, bias, **place).requires_grad_(False)
    for parameter in module.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=random))
    if isinstance(module, PivotLinear):
        module.pivots.copy_(torch.randperm(12, generator=random))
    return module


def spec(**changes: Any) -> dict[str, Any]:
    return {"form": "uv", "rank": 4, "dtype": "F32", **changes}


def shared_spec(**changes: Any) -> dict[str, Any]:
    return spec(**{"form": "shared", "clusters": 5, "axis": "rows", **changes})


def filled_shared(
    axis: str, random: Generator, *, clusters: int = 5, bias: bool = False, **place: Any
) -> SharedLinear:
    """Of 20 inputs, 12 outputs and rank 4, with random values and labels."""
    module = SharedLinear(20, 12, 4, bias, clusters=clusters, axis=axis, **place)
    for parameter in module.requires_grad_(False).parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=random))
    module.labels.copy_(torch.randint(clusters, module.labels.shape, generator=random))
    return module


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
    assert module.leaves == set(NAMES[form]) - {"weight"}
    assert sorted(module.state_dict()) == expected
    assert sorted(module.tensors()) == expected
    assert module.weight.shape == (7, 20)  # never that of the dense weight


def test_pivots_are_no_parameter_and_stay_whole_numbers(random: Generator) -> None:
    module = filled("pivot", random).to(torch.float16)

    assert [name for name, _ in module.named_parameters()] == ["weight", "coef"]
    assert module.pivots.dtype == torch.int32


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_outputs_are_put_in_order_alike_with_and_without_gradients(
    dtype: torch.dtype, random: Generator
) -> None:
    module = filled("pivot", random, dtype=dtype)
    inputs = torch.randn(2, 5, 20, generator=random).to(dtype)
    with torch.no_grad():
        plain = module(inputs)

    recorded = module(inputs.clone().requires_grad_())
    recorded.sum().backward()

    assert torch.equal(plain, recorded)


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


# -- channels that share


@pytest.mark.parametrize("axis", AXES)
def test_the_dense_weight_is_that_of_the_definition(axis: str, random: Generator) -> None:
    module = filled_shared(axis, random, dtype=torch.float64)

    dense = module.dense_weight() - module.U @ module.weight

    channels, codes = (dense, module.codebook) if axis == "rows" else (dense.T, module.codebook.T)
    for channel, label in zip(channels, module.labels.tolist(), strict=True):
        assert torch.allclose(channel, codes[label], rtol=0, atol=1e-13)


@pytest.mark.parametrize("shape", [(20,), (5, 20), (3, 5, 20), (0, 20)])
@pytest.mark.parametrize("clusters", [1, 5, 32767, 32768])  # int16 ends at 32767
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("axis", AXES)
def test_shared_channels_multiply_by_the_dense_weight(
    axis: str, bias: bool, clusters: int, shape: tuple[int, ...], random: Generator
) -> None:
    module = filled_shared(axis, random, clusters=clusters, bias=bias, dtype=torch.float64)
    module.labels[0] = clusters - 1
    inputs = torch.randn(*shape, dtype=torch.float64, generator=random)

    outputs = module(inputs)

    expected = inputs @ module.dense_weight().T + (module.bias if bias else 0)
    assert module.labels.dtype == (torch.int16 if clusters <= 32767 else torch.int32)
    assert outputs.shape == (*shape[:-1], 12)
    assert torch.allclose(outputs, expected, rtol=0, atol=1e-12)
    # the shared part is not of the rank of the factors
    assert torch.linalg.matrix_rank(module.dense_weight()) == min(
        12, 4 + len(module.labels.unique())
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("axis", AXES)
def test_narrow_shared_channels_run_in_their_own_dtype(
    axis: str, dtype: torch.dtype, random: Generator
) -> None:
    module = filled_shared(axis, random, dtype=dtype)
    inputs = torch.randn(5, 20, generator=random)

    outputs = module(inputs.to(dtype))

    assert outputs.dtype == dtype
    assert module.dense_weight().dtype == torch.float32
    expected = inputs @ module.dense_weight().T
    assert (outputs.float() - expected).norm() < 8 * torch.finfo(dtype).eps * expected.norm()


def test_inputs_are_summed_wide() -> None:
    """In bf16 a sum of 512 ones would stop at 256."""
    module = SharedLinear(512, 4, 1, clusters=1, axis="columns", dtype=torch.bfloat16)
    module.requires_grad_(False).labels.zero_()
    for parameter in module.parameters():
        parameter.zero_()
    module.codebook.fill_(1)

    outputs = module(torch.ones(1, 512, dtype=torch.bfloat16))

    assert outputs.tolist() == [[512.0] * 4]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("axis", AXES)
def test_shared_channels_are_stored_and_read_back(axis: str, bias: bool, random: Generator) -> None:
    module = filled_shared(axis, random, bias=bias)
    other = filled_shared(axis, random, bias=bias)
    inputs = torch.randn(5, 20, generator=random)
    assert not torch.equal(other(inputs), module(inputs))

    other.load_state_dict(module.state_dict())

    assert sorted(module.tensors()) == sorted(
        ["U", "codebook", "labels", "weight"] + ["bias"] * bias
    )
    assert sorted(module.state_dict()) == sorted(module.tensors())
    assert module.weight.shape == (4, 20)
    assert module.codebook.shape == ((5, 20) if axis == "rows" else (12, 5))
    assert torch.equal(other(inputs), module(inputs))


def test_labels_are_no_parameter_and_stay_whole_numbers(random: Generator) -> None:
    module = filled_shared("rows", random).to(torch.float16)

    assert {name for name, _ in module.named_parameters()} == {"weight", "U", "codebook"}
    assert module.labels.dtype == torch.int16


@pytest.mark.parametrize("axis", AXES)
def test_gradients_reach_the_codebook_and_the_inputs(axis: str, random: Generator) -> None:
    module = filled_shared(axis, random, dtype=torch.float64).requires_grad_()
    inputs = torch.randn(5, 20, dtype=torch.float64, generator=random, requires_grad=True)

    module(inputs).square().sum().backward()

    assert all(parameter.grad is not None for parameter in module.parameters())
    assert inputs.grad is not None
    expected = 2 * (inputs @ module.dense_weight().T) @ module.dense_weight()
    assert torch.allclose(inputs.grad, expected, atol=1e-10)


@pytest.mark.parametrize("axis", AXES)
def test_shared_channels_pass_for_a_linear(axis: str, random: Generator) -> None:
    module = filled_shared(axis, random)

    assert isinstance(module, nn.Linear)
    assert (module.in_features, module.out_features) == (20, 12)
    assert f"rank=4, clusters=5, axis={axis}" in repr(module)


@pytest.mark.parametrize("axis", AXES)
def test_no_matrix_of_the_dense_shape_is_made(axis: str, random: Generator) -> None:
    """Of 20 000 x 20 000 one would take 1.5 GiB; the forward holds no tenth of that."""
    side = 20_000
    module = SharedLinear(side, side, 1, clusters=2, axis=axis)
    inputs = torch.randn(1, side, generator=random)
    module.requires_grad_(False).labels.zero_()

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        module(inputs)

    assert 0 < sum(max(0, event.self_cpu_memory_usage) for event in seen.events()) < 100 * side


# -- the config's words


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_a_dense_linear_is_replaced_by_an_empty_one_of_its_kind(form: str, bias: bool) -> None:
    dense = nn.Linear(20, 12, bias, device="meta", dtype=torch.bfloat16)

    module = factored(dense, spec(form=form))

    assert isinstance(module, MODULES[form])
    assert (module.in_features, module.out_features, module.rank) == (20, 12, 4)
    assert (module.bias is not None) == bias
    assert {p.dtype for p in module.parameters()} == {torch.bfloat16}
    assert all(value.is_meta for value in module.tensors().values())


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (spec(form="other"), "unknown form 'other': written by a newer version"),
        (spec(form=["uv"]), "unknown form \\['uv'\\]"),
        ({"rank": 4}, "unknown form None"),
        (spec(codebook=16), "unknown key 'codebook': written by a newer version"),
        (spec(rank=0), "rank 0 is impossible for 12 x 20"),
        (spec(rank=-1), "rank -1 is impossible"),
        (spec(rank=20), "rank 20 is impossible"),
        (spec(rank=4.0), "rank 4.0 is impossible"),
        (spec(rank="4"), "rank '4' is impossible"),
        (spec(rank=None), "rank None is impossible"),
        (spec(rank=True), "rank True is impossible"),
        (spec(clusters=3), "unknown key 'clusters': written by a newer version"),
        (spec(form="pivot", axis="rows"), "unknown key 'axis'"),
        (spec(form="shared"), "axis None is impossible: rows or columns"),
        (shared_spec(axis="row"), "axis 'row' is impossible: rows or columns"),
        (shared_spec(scale=2), "unknown key 'scale': written by a newer version"),
        (shared_spec(rank=12), "rank 12 is impossible for 12 x 20"),
        (shared_spec(clusters=0), "clusters 0 are impossible for 12 rows"),
        (shared_spec(clusters=13), "clusters 13 are impossible for 12 rows"),
        (shared_spec(clusters=21, axis="columns"), "clusters 21 are impossible for 20 columns"),
        (shared_spec(clusters=5.0), "clusters 5.0 are impossible"),
        (shared_spec(clusters=True), "clusters True are impossible"),
        (shared_spec(clusters=None), "clusters None are impossible"),
        (spec(bias=True), "unknown key 'bias': written by a newer version"),
        (spec(dtype="I32"), "dtype 'I32' is impossible: F64, F32, F16, BF16"),
        (spec(dtype=None), "dtype None is impossible"),
        (spec(dtype=["F32"]), r"dtype \['F32'\] is impossible"),
        (shared_spec(bias=True), "unknown key 'bias'"),
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


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("axis", AXES)
def test_a_dense_linear_is_replaced_by_one_that_shares_channels(axis: str, bias: bool) -> None:
    dense = nn.Linear(20, 12, bias, device="meta", dtype=torch.bfloat16)

    module = factored(dense, shared_spec(axis=axis, clusters=12))

    assert isinstance(module, SharedLinear)
    assert (module.in_features, module.out_features, module.rank) == (20, 12, 4)
    assert (module.axis, module.clusters) == (axis, 12)
    assert (module.bias is not None) == bias
    assert {p.dtype for p in module.parameters()} == {torch.bfloat16}
    assert all(value.is_meta for value in module.tensors().values())


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
        ("lm_head", "lm_head is the head, which stays dense"),
        ("", "has no module"),
        ("model\n", r"has no module 'model\\n'"),
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


def test_a_linear_is_listed_once() -> None:
    names = ["model.layers.0.mlp.up_proj", "layers.0.mlp.up_proj"]

    with pytest.raises(ValueError, match="layers.0.mlp.up_proj is listed by two names"):
        install_factored(make_pico("llama"), {name: spec() for name in names})
