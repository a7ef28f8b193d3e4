"""Factored experts against products of their factors, and the trial of a model's own experts."""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional
from transformers.integrations.moe import use_experts_implementation
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.mixtral.modeling_mixtral import MixtralExperts
from transformers.models.muse_spark.modeling_muse_spark import MuseSparkExperts
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHExperts

from streamcomp.forms.expert_module import FactoredExperts, factored_experts
from streamcomp.forms.expert_trial import computes_experts
from streamcomp.forms.experts import (
    EXPERT_FORMS,
    ExpertMatrices,
    expert_parts,
    guard_of,
    has_experts,
    matrices_of,
)
from tests.mixtures import factor_experts, ragged

EXPERTS, INNER, HIDDEN = 5, 24, 16
KINDS = {
    "gated": MixtralExperts,
    "biased, transposed, interleaved": GptOssExperts,
    "without a gate": NemotronHExperts,
    "with a norm": MuseSparkExperts,
}
both_forms = pytest.mark.parametrize("form", EXPERT_FORMS)


class Sizes:
    """A config that gives each class of experts its small sizes, by the names it asks for."""

    _experts_implementation = "eager"
    hidden_act = mlp_hidden_act = hidden_activation = "silu"

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        sizes = {
            "limit": 2.0,
            "alpha": 1.7,
            "eps": 1e-5,
            "inter": INNER,
            "ffn": INNER,
            "act": "silu",
        }
        for part, value in sizes.items():
            if part in name:
                return value
        if "expert" in name and "size" not in name and "dim" not in name:
            return EXPERTS
        return False if "bias" in name else HIDDEN


def dense_experts(kind: str = "gated", dtype: torch.dtype = torch.float32) -> Any:
    """Dense experts of one class, with random weights."""
    experts = KINDS[kind](Sizes()).to(dtype).requires_grad_(False)
    random = torch.Generator().manual_seed(0)
    for parameter in experts.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=random))
    return experts


def factored(dense: Any, form: str, ranks: Callable[..., int] = ragged) -> FactoredExperts:
    """``dense`` factored; it gets the products of its factors instead of its weights."""
    dtype = next(dense.parameters()).dtype
    tensors, spec = factor_experts(dense, form, ranks, dtype)
    module = factored_experts(dense, spec)
    module.load_state_dict(tensors, strict=False)
    return module.requires_grad_(False)


def routed(tokens: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    random = torch.Generator().manual_seed(tokens)
    hidden = torch.randn(tokens, HIDDEN, generator=random).to(dtype)
    weights, index = torch.rand(tokens, EXPERTS, generator=random).topk(2)
    return hidden, index, weights.to(dtype)


def eager(dense: nn.Module, *given: Tensor) -> Tensor:
    """The outputs of the class's own code."""
    own: Any = type(dense).forward
    output: Tensor = own.__wrapped__(dense, *given)
    return output


# -- what runs ---------------------------------------------------------------------------------


@both_forms
@pytest.mark.parametrize("kind", KINDS)
def test_factored_experts_compute_with_the_products(kind: str, form: str) -> None:
    dense = dense_experts(kind)
    module = factored(dense, form)

    for tokens in (1, 3, 200):  # few rows for each expert, and many
        given = routed(tokens)
        torch.testing.assert_close(module(*given), eager(dense, *given), rtol=2e-4, atol=2e-4)


@both_forms
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_experts_of_equal_rank_run_in_their_dtype(form: str, dtype: torch.dtype) -> None:
    dense = dense_experts("biased, transposed, interleaved", dtype)
    module = factored(dense, form, lambda *_: 8)
    given = routed(200, dtype)

    output = module(*given)

    assert output.dtype == dtype
    expected = eager(dense.double(), *(g.double() if g.is_floating_point() else g for g in given))
    error = (output.double() - expected).abs().max() / expected.abs().max()
    assert error < (1e-12 if dtype == torch.float64 else 3e-2)


@both_forms
def test_each_dense_weight_is_the_product(form: str) -> None:
    dense = dense_experts("biased, transposed, interleaved")
    module = factored(dense, form)

    for name in matrices_of(dense):
        for expert in range(EXPERTS):
            expected = expert_parts(dense).matrix(name, expert)
            torch.testing.assert_close(module.dense_weight(name, expert), expected)


@both_forms
def test_parts_of_an_expert_are_found_again(form: str) -> None:
    dense = dense_experts()
    module = factored(dense, form)
    matrices = module.matrices["gate_up_proj"]
    tensors = module.tensors()

    for expert in range(EXPERTS):
        pieces = {leaf: tensors[leaf][at] for leaf, at in matrices.slices(expert).items()}
        again = matrices.pieces(expert, matrices.tensors(expert, pieces))
        assert again.keys() == pieces.keys()
        for leaf, piece in pieces.items():
            assert torch.equal(again[leaf], piece)


@both_forms
def test_gradients_are_those_of_the_products(form: str) -> None:
    dense = dense_experts("biased, transposed, interleaved", torch.float64)
    module = factored(dense, form).requires_grad_(True)
    hidden, index, weights = routed(50, torch.float64)
    hidden.requires_grad_()

    (module(hidden, index, weights) ** 2).sum().backward()

    for name in module.factors:
        gradient = module.get_parameter(name).grad if name in module._parameters else 1
        assert gradient is not None
    (by_factors,) = [hidden.grad]
    assert by_factors is not None
    again = hidden.detach().requires_grad_()
    (eager(dense, again, index, weights) ** 2).sum().backward()
    torch.testing.assert_close(by_factors, again.grad)
    parameter = module.get_parameter("down_proj_V")
    step = torch.zeros_like(parameter)
    step[0, 0] = 1e-6
    with torch.no_grad():
        sums = []
        for sign in (1, -1):
            parameter.add_(sign * step)
            sums.append(float((module(hidden, index, weights) ** 2).sum()))
            parameter.sub_(sign * step)
    assert parameter.grad is not None
    assert float(parameter.grad[0, 0]) == pytest.approx((sums[0] - sums[1]) / 2e-6, rel=1e-4)


def test_without_data_shapes_are_right() -> None:
    module = factored(dense_experts(), "pivot").to("meta")

    output = module(*(tensor.to("meta") for tensor in routed(6)))

    assert output.is_meta and output.shape == (6, HIDDEN)


@both_forms
def test_other_tensors_run_in_the_place_of_its_parameters(form: str) -> None:
    module = factored(dense_experts(), form)
    tensors = {name: value * 2 for name, value in module.named_parameters()}

    output = torch.func.functional_call(module, tensors, routed(6))

    module.load_state_dict(tensors, strict=False)
    assert torch.equal(output, module(*routed(6)))


def test_where_all_are_dense_there_is_no_left_factor() -> None:
    matrices = ExpertMatrices("uv", "down_proj", 16, 24, (16,) * 3)

    assert matrices.shapes() == {"down_proj_V": (48, 24)}


# -- what is refused ---------------------------------------------------------------------------

RANKS = {"gate_up_proj": [2] * EXPERTS, "down_proj": [3] * EXPERTS}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"form": "shared"}, "form 'shared' is unknown for experts"),
        ({"form": None}, "form None is unknown"),
        ({"dtype": "I8"}, "dtype 'I8' is impossible"),
        ({"rank": 3}, "unknown key 'rank'"),
        ({"ranks": None}, "ranks are of None, not of gate_up_proj and down_proj"),
        ({"ranks": {"down_proj": [1] * EXPERTS}}, r"ranks are of \['down_proj'\]"),
        (
            {"ranks": RANKS | {"down_proj": [1] * 4}},
            r"\[1, 1, 1, 1\] of down_proj are no list of 5",
        ),
        ({"ranks": RANKS | {"down_proj": 3}}, "ranks 3 of down_proj are no list of 5"),
        *(
            ({"ranks": RANKS | {"down_proj": [1, 1, 1, 1, bad]}}, "of down_proj is impossible for")
            for bad in (0, -1, HIDDEN + 1, True, 2.0, "2", None)
        ),
    ],
)
def test_what_the_config_may_not_say_of_experts_is_refused(
    changes: dict[str, Any], message: str
) -> None:
    spec = {"form": "uv", "ranks": RANKS, "dtype": "F32"} | changes

    with pytest.raises(ValueError, match=f"^streamcomp: .*{message}"):
        factored_experts(dense_experts(), spec)


def test_a_rank_beyond_the_columns_is_refused_of_pivots() -> None:
    ExpertMatrices("uv", "gate_up_proj", 48, 16, (17, 48))
    ExpertMatrices("pivot", "gate_up_proj", 48, 16, (16, 48))
    with pytest.raises(ValueError, match="rank 17 of gate_up_proj is impossible for 48 x 16"):
        ExpertMatrices("pivot", "gate_up_proj", 48, 16, (17, 48))


def test_experts_that_run_on_several_processes_are_refused() -> None:
    dense = dense_experts()
    dense._is_expert_parallel = True

    with pytest.raises(ValueError, match="do not run expert-parallel"):
        FactoredExperts(dense, "uv", RANKS)


def test_values_that_no_checkpoint_may_hold_are_refused() -> None:
    module: Any = factored(dense_experts(), "pivot")
    module.check_values("experts")
    module.down_proj_pivots[1, 0] = module.down_proj_pivots[1, 1]
    with pytest.raises(
        ValueError, match=f"experts.down_proj_pivots is no permutation of 0 to {HIDDEN - 1}"
    ):
        module.check_values("experts")
    module.gate_up_proj_coef[0] = torch.nan
    with pytest.raises(ValueError, match="experts.gate_up_proj_coef holds NaN"):
        module.check_values("experts")


def test_the_guard_has_no_dense_shape() -> None:
    for kind in KINDS:
        dense = dense_experts(kind)
        name, guard = guard_of(dense, torch.float32)
        assert guard.numel() <= 2 and guard.dim() == 3
        assert guard.shape != dense.get_parameter(name).shape


# -- the trial ---------------------------------------------------------------------------------


def classes_of_experts() -> list[type[nn.Module]]:
    """Every class behind the experts interface of the installed transformers."""
    found = []
    for path in sorted((Path(transformers.__file__).parent / "models").glob("*/modeling_*.py")):
        decorated = r"@use_experts_implementation(?:\([^)]*\))?\n(?:@.*\n)*class (\w+)"
        for name in re.findall(decorated, path.read_text("utf-8")):
            module = importlib.import_module(f"transformers.models.{path.parent.name}.{path.stem}")
            found.append(getattr(module, name))
    return found


def test_every_class_of_transformers_computes_what_is_expected() -> None:
    classes = classes_of_experts()
    assert len(classes) > 40
    failing = []
    for kind in classes:
        with torch.device("meta"):
            experts = kind(Sizes())
        if not has_experts(experts) or not computes_experts(experts):
            failing.append(kind.__name__)
    assert not failing


mixtral = MixtralExperts.forward.__wrapped__


@use_experts_implementation
class Scaled(MixtralExperts):  # type: ignore[misc]
    """Experts that do something more."""

    def forward(self, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        output: Tensor = 1.5 * mixtral(self, hidden, index, weights)
        return output


@use_experts_implementation
class Limited(MixtralExperts):  # type: ignore[misc]
    """Experts with a limit that is met by large inputs alone."""

    def forward(self, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        output: Tensor = mixtral(self, hidden.clamp(-20, 20), index, weights)
        return output


class Bare(nn.Module):
    """Experts that are not behind the interface."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.zeros(3, 8, 4))
        self.down_proj = nn.Parameter(torch.zeros(3, 4, 4))


def test_experts_that_compute_something_else_are_refused() -> None:
    assert computes_experts(dense_experts())
    for kind in (Scaled, Limited):
        with torch.device("meta"):
            experts = kind(Sizes())
        assert has_experts(experts) and not computes_experts(experts)
    assert not has_experts(Bare()) and not computes_experts(Bare())
    assert not has_experts(nn.Linear(3, 4))


def test_the_trial_changes_nothing() -> None:
    dense = dense_experts("with a norm")
    before = {name: value.clone() for name, value in dense.state_dict().items()}
    settings = {name: value for name, value in vars(dense).items() if type(value) is int}

    assert computes_experts(dense)

    assert {name: value for name, value in vars(dense).items() if type(value) is int} == settings
    for name, value in dense.state_dict().items():
        assert torch.equal(value, before[name])


@pytest.mark.parametrize("inner", [HIDDEN, HIDDEN // 2, EXPERTS])
def test_sizes_that_are_equal_stay_so_in_the_trial(inner: int, monkeypatch: Any) -> None:
    monkeypatch.setitem(globals(), "INNER", inner)
    with torch.device("meta"):
        experts = MixtralExperts(Sizes())
    assert computes_experts(experts)


def test_the_steps_of_an_expert_are_those_of_its_class() -> None:
    dense = dense_experts("biased, transposed, interleaved")
    hidden, _, _ = routed(4)
    parts = expert_parts(dense)

    first = parts.first(hidden, parts.matrix("gate_up_proj", 3), parts.bias("gate_up_proj", 3))
    second = parts.second(
        parts.gate(first), parts.matrix("down_proj", 3), parts.bias("down_proj", 3)
    )

    index, weights = torch.full((4, 1), 3), torch.ones(4, 1)
    torch.testing.assert_close(parts.last(second), eager(dense, hidden, index, weights))
    weight = dense.gate_up_proj[3].T
    torch.testing.assert_close(first, functional.linear(hidden, weight, dense.gate_up_proj_bias[3]))
