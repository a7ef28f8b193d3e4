from __future__ import annotations

from dataclasses import fields

import pytest
import torch
from torch import Generator, Tensor

from streamcomp.errors import RecipeError
from streamcomp.forms import FORMS, Allowance, find_form
from streamcomp.linalg.low_rank import FIRST_DAMPING, GRADIENT_DAMPING, damped_outputs
from streamcomp.methods import METHODS, GradientMoment, Method, Moment, find_method
from streamcomp.methods.low_rank import LowRank
from streamcomp.methods.svd_llm import SvdLlm
from streamcomp.methods.two_sided import TwoSided
from streamcomp.recipe import Recipe
from tests.jobs import run_python
from tests.methods.sites import Place

SHAPES = [(12, 20), (20, 12), (16, 16)]
PRODUCTS = [name for name, form in FORMS.items() if form.is_product]


def problem(shape: tuple[int, int], random: Generator) -> tuple[Tensor, Tensor]:
    """A weight, and inputs as columns."""
    weight = torch.randn(*shape, dtype=torch.float64, generator=random)
    return weight, torch.randn(shape[1], 40, dtype=torch.float64, generator=random)


def test_methods_are_found_by_the_name_they_carry() -> None:
    assert all(find_method(name).name == name for name in METHODS)
    with pytest.raises(RecipeError, match="'magic' unknown; one of: two-sided, svd-llm, rom, swsc"):
        find_method("magic")


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_what_a_method_names_is_there(method: Method) -> None:
    assert method.source
    assert set(method.forms) <= set(FORMS)
    assert set(method.settings) <= {field.name for field in fields(Recipe)}
    recipe = Recipe(method=method.name)
    assert (recipe.form, recipe.statistics) == (method.forms[0], method.statistics[0])
    assert (recipe.allocation == "loss") == method.losses_compare


def test_methods_are_read_without_torch() -> None:
    script = "import sys, streamcomp.methods; print('torch' in sys.modules)"

    assert run_python("-c", script).out == "False\n"


@pytest.mark.parametrize("form", PRODUCTS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("statistics", ["dense", "compressed", "none"])
def test_compressing_is_analysing_and_factoring(
    statistics: str, shape: tuple[int, int], form: str, random: Generator
) -> None:
    weight, inputs = problem(shape, random)
    moment = None if statistics == "none" else Moment("inputs", inputs @ inputs.T, 40)
    recipe = Recipe(method="svd-llm", form=form, statistics=statistics)
    site, allowance, method = Place(*shape), Allowance(5, 0), SvdLlm()

    whole = method.compress(site, weight, moment, allowance, recipe)

    analysis = method.analyse(weight, moment, recipe, 5)
    assert method.can_be_analysed(recipe) == (statistics == "dense")
    if statistics == "dense":
        analysis = analysis.rounded(site.dtype)
        assert analysis.left.dtype == torch.float32
    parts = method.factors(site, weight, analysis, allowance, recipe)
    assert whole.spec == parts.spec == {"form": form, "rank": 5}
    assert whole.figures == parts.figures
    assert set(whole.tensors) == set(find_form(form)().tensors)
    assert all(torch.equal(whole.tensors[name], parts.tensors[name]) for name in parts.tensors)
    assert whole.spare(allowance) == 0


def test_a_method_without_spectra_keeps_no_analysis(random: Generator) -> None:
    weight, _ = problem((12, 20), random)
    recipe = Recipe(method="swsc")

    assert not find_method("swsc").can_be_analysed(recipe)
    with pytest.raises(NotImplementedError, match="swsc keeps no analysis"):
        find_method("swsc").analyse(weight, None, recipe)


def test_the_damping_that_one_linear_took_is_the_least_for_the_next() -> None:
    moment = Moment("inputs", torch.eye(3))

    assert moment.damped(0.1).damped(0.01).min_damping == 0.1


@pytest.mark.parametrize("form", PRODUCTS)
@pytest.mark.parametrize("shape", SHAPES)
def test_a_decomposition_outlives_the_factors_made_of_it(
    form: str, shape: tuple[int, int], random: Generator
) -> None:
    weight, inputs = problem(shape, random)
    found = SvdLlm().decompose(weight, Moment("inputs", inputs @ inputs.T), 0.1)
    before = torch.matmul(*found.factors(weight, 5))

    left, right = found.factors(weight, 5)
    find_form(form)().encode(left, right, torch.float64)  # overwrites both

    assert torch.equal(torch.matmul(*found.factors(weight, 5)), before)


# -- moments of fewer rows than directions


@pytest.mark.parametrize("method", [SvdLlm(), TwoSided()], ids=["svd-llm", "two-sided"])
@pytest.mark.parametrize(
    ("dtype", "rows", "damped"),
    [(torch.float64, 0, False), (torch.float64, 12, False), (torch.float64, 11, True)]
    + [(torch.bfloat16, 12, False), (torch.bfloat16, 11, True)],
    ids=str,
)
@pytest.mark.parametrize("side", ["inputs", "outputs"])
def test_rows_too_few_for_the_directions_leave_them_to_the_weight(
    side: str, dtype: torch.dtype, rows: int, damped: bool, method: LowRank, random: Generator
) -> None:
    """In no dtype, and on no side, does rounding order what the data says nothing of."""
    weight = problem((12, 20), random)[0].to(dtype)
    inputs = torch.randn(20, rows or 40, dtype=torch.float64, generator=random)
    wide = weight.double()
    moment = inputs @ inputs.T
    value = moment if side == "inputs" else wide @ moment @ wide.T
    gradient = GradientMoment(torch.eye(12, dtype=torch.float64), 12.0)

    found = method.decompose(
        weight,
        Moment(side, value, rows, gradient=gradient),  # type: ignore[arg-type]
        0.0,
    )

    outputs = wide @ moment @ wide.T
    if damped:
        outputs = damped_outputs(outputs, weight, FIRST_DAMPING)
    energies = torch.linalg.eigvalsh(outputs).flip(0)
    scale = 1.0 if method.name == "svd-llm" else 1 + GRADIENT_DAMPING
    # Seven digits of the moment's own: the twelfth direction has 1e-6 of the mean energy.
    assert torch.allclose(found.spectrum / scale, energies, rtol=1e-6, atol=1e-9 * energies[0])
