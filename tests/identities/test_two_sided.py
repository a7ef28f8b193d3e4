"""Two-sided whitening on the smaller side against both sides at once, in fp64."""

from __future__ import annotations

import pytest
import torch
from torch import Generator, Tensor

from streamcomp.forms import find_form
from streamcomp.linalg.dtypes import solve_dtype
from streamcomp.linalg.low_rank import (
    GRADIENT_DAMPING,
    Decomposition,
    decompose_inputs,
    decompose_two_sided_inputs,
    decompose_two_sided_outputs,
    output_moment,
)
from streamcomp.methods import GradientMoment, Moment
from streamcomp.methods.two_sided import TwoSided
from tests.jobs import product

F64 = torch.float64
SHAPES = [(12, 20), (20, 12), (16, 16)]
FORMS = ("uv", "pivot")


def normal(*shape: int, random: Generator) -> Tensor:
    return torch.randn(*shape, dtype=F64, generator=random)


def moment(size: int, random: Generator, *, rank: int | None = None) -> Tensor:
    """Of correlated rows with a massive channel; ``rank`` of them."""
    rows = normal(rank or 5 * size, size, random=random) @ normal(size, size, random=random)
    rows[:, 0] *= 20
    return rows.T @ rows


def decompose(
    weight: Tensor, inputs: Tensor, gradients: Tensor, damping: float = GRADIENT_DAMPING
) -> Decomposition:
    """From H (n, n) and Gamma (m, m), on the smaller side of ``weight`` (m, n)."""
    rows, columns = weight.shape
    if rows > columns:
        behind = weight.T @ gradients @ weight  # the moment of W^T g
        energy = float(gradients.trace())
        return decompose_two_sided_inputs(weight, inputs, behind, energy, damping)
    return decompose_two_sided_outputs(weight, output_moment(weight, inputs), gradients, damping)


def damped(gradients: Tensor, damping: float) -> Tensor:
    mean = gradients.diagonal().mean()
    return gradients + damping * mean * torch.eye(len(gradients), dtype=F64)


def power(matrix: Tensor, exponent: float) -> Tensor:
    values, vectors = torch.linalg.eigh(matrix)
    raised: Tensor = (vectors * values**exponent) @ vectors.T
    return raised


def textbook(weight: Tensor, inputs: Tensor, gradients: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """W' and singular values by the SVD of Gamma^1/2 W H^1/2 and both inverses."""
    whitened = power(gradients, 0.5) @ weight @ power(inputs, 0.5)
    left, values, right = torch.linalg.svd(whitened, full_matrices=False)
    cut = (left[:, :rank] * values[:rank]) @ right[:rank]
    return power(gradients, -0.5) @ cut @ power(inputs, -0.5), values


def low(found: Decomposition, weight: Tensor, rank: int) -> Tensor:
    left, right = found.factors(weight, rank)
    assert left.shape == (weight.shape[0], rank) and right.shape == (rank, weight.shape[1])
    assert left.dtype == right.dtype == solve_dtype(weight.dtype)
    return left.double() @ right.double()


def objective(error: Tensor, inputs: Tensor, gradients: Tensor) -> float:
    """tr(Gamma dW H dW^T)."""
    return float((gradients @ error @ inputs @ error.T).trace())


def close(found: Tensor, expected: Tensor, tolerance: float = 1e-9) -> bool:
    return bool((found - expected).norm() <= tolerance * expected.norm())


# -- against the definition


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("damping", [0.0, 1e-12])
def test_without_a_preference_among_outputs_it_is_one_sided(
    shape: tuple[int, int], damping: float, seed: int
) -> None:
    random = torch.Generator().manual_seed(seed)
    weight, inputs = normal(*shape, random=random), moment(shape[1], random)

    found = decompose(weight, inputs, torch.eye(shape[0], dtype=F64), damping)

    expected = decompose_inputs(weight, inputs)
    assert torch.allclose(found.spectrum, expected.spectrum, rtol=1e-8)
    for rank in (1, 5, min(shape)):
        assert close(low(found, weight, rank), low(expected, weight, rank))


@pytest.mark.parametrize("shape", SHAPES)
def test_damping_changes_nothing_but_the_scale_where_no_output_is_preferred(
    shape: tuple[int, int], random: Generator
) -> None:
    weight, inputs = normal(*shape, random=random), moment(shape[1], random)

    found = decompose(weight, inputs, 3 * torch.eye(shape[0], dtype=F64), 0.25)

    expected = decompose_inputs(weight, inputs)
    assert torch.allclose(found.spectrum, 3 * 1.25 * expected.spectrum, rtol=1e-8)
    assert close(low(found, weight, 4), low(expected, weight, 4))
    assert found.damping == 0.25


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("damping", [0.0, GRADIENT_DAMPING, 0.5])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_smaller_side_is_both_sides(shape: tuple[int, int], damping: float, seed: int) -> None:
    random = torch.Generator().manual_seed(seed)
    weight, inputs = normal(*shape, random=random), moment(shape[1], random)
    gradients = moment(shape[0], random)

    found = decompose(weight, inputs, gradients, damping)

    for rank in (1, 4, min(shape) - 1):
        expected, values = textbook(weight, inputs, damped(gradients, damping), rank)
        assert close(low(found, weight, rank), expected, 1e-8)
        assert torch.allclose(found.spectrum, values**2, rtol=1e-7)


@pytest.mark.parametrize("damping", [0.0, GRADIENT_DAMPING, 0.5])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_energies_cut_are_the_loss(
    shape: tuple[int, int], damping: float, random: Generator
) -> None:
    weight, inputs = normal(*shape, random=random), moment(shape[1], random)
    gradients = moment(shape[0], random)

    found = decompose(weight, inputs, gradients, damping)

    metric = damped(gradients, damping)
    whole = objective(weight, inputs, metric)
    assert float(found.spectrum.sum()) == pytest.approx(whole, rel=1e-9)
    for rank in range(1, min(shape)):
        lost = objective(weight - low(found, weight, rank), inputs, metric)
        assert float(found.spectrum[rank:].sum()) == pytest.approx(lost, rel=1e-7)
        assert found.relative_loss(rank) == pytest.approx(lost / whole, rel=1e-7)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_loss_is_that_of_the_outputs_to_first_order_of_the_gradients(
    shape: tuple[int, int], random: Generator
) -> None:
    """For one token, tr(Gamma dW H dW^T) is (g . dW x)^2: the squared change of the loss."""
    weight, token = normal(*shape, random=random), normal(shape[1], random=random)
    gradient = normal(shape[0], random=random)
    error = weight - low(decompose_inputs(weight, torch.eye(shape[1], dtype=F64)), weight, 3)

    lost = objective(error, torch.outer(token, token), torch.outer(gradient, gradient))

    assert lost == pytest.approx(float(gradient @ error @ token) ** 2, rel=1e-9)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("shape", SHAPES)
def test_no_other_matrix_of_the_rank_loses_less(shape: tuple[int, int], seed: int) -> None:
    random = torch.Generator().manual_seed(seed)
    weight, inputs = normal(*shape, random=random), moment(shape[1], random)
    gradients, rank = moment(shape[0], random), 4
    metric = damped(gradients, GRADIENT_DAMPING)
    left, right = decompose(weight, inputs, gradients).factors(weight, rank)
    best = objective(weight - left @ right, inputs, metric)

    for size in (1e-4, 1e-2, 1.0):
        for _ in range(10):
            other = left + size * left.norm() / 10 * normal(*left.shape, random=random)
            across = right + size * right.norm() / 10 * normal(*right.shape, random=random)
            assert objective(weight - other @ right, inputs, metric) > best
            assert objective(weight - left @ across, inputs, metric) > best
            assert objective(weight - other @ across, inputs, metric) > best
    for start in (right, normal(*right.shape, random=random)):
        lost = objective(weight - alternated(weight, inputs, metric, start), inputs, metric)
        assert lost >= best * (1 - 1e-9)


def alternated(weight: Tensor, inputs: Tensor, metric: Tensor, right: Tensor) -> Tensor:
    """W' after twenty alternating least squares, from the right factor ``right``."""
    for _ in range(20):
        left: Tensor = weight @ inputs @ right.T @ torch.linalg.inv(right @ inputs @ right.T)
        right = torch.linalg.inv(left.T @ metric @ left) @ left.T @ metric @ weight
    return left @ right


@pytest.mark.parametrize("shape", SHAPES)
def test_one_sided_loses_more_in_this_metric_and_two_sided_in_the_other(
    shape: tuple[int, int], random: Generator
) -> None:
    weight, inputs = normal(*shape, random=random), moment(shape[1], random)
    gradients = moment(shape[0], random)
    two = weight - low(decompose(weight, inputs, gradients), weight, 5)
    one = weight - low(decompose_inputs(weight, inputs), weight, 5)

    metric, free = damped(gradients, GRADIENT_DAMPING), torch.eye(shape[0], dtype=F64)

    assert objective(two, inputs, metric) < 0.9 * objective(one, inputs, metric)
    assert objective(one, inputs, free) < 0.9 * objective(two, inputs, free)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", SHAPES)
def test_full_rank_gives_the_weight_back(
    form: str, shape: tuple[int, int], random: Generator
) -> None:
    weight, inputs = normal(*shape, random=random), moment(shape[1], random)
    found = decompose(weight, inputs, moment(shape[0], random))

    tensors = find_form(form)().encode(*found.factors(weight, min(shape)), F64)

    assert close(low(found, weight, min(shape)), weight)
    assert close(stored(form, tensors), weight)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rank", [1, 5, 11])
def test_every_form_stores_the_same_matrix(
    form: str, shape: tuple[int, int], rank: int, random: Generator
) -> None:
    weight, inputs = normal(*shape, random=random), moment(shape[1], random)
    found = decompose(weight, inputs, moment(shape[0], random))

    tensors = find_form(form)().encode(*found.factors(weight, rank), F64)

    assert close(stored(form, tensors), low(found, weight, rank))


def stored(form: str, tensors: dict[str, Tensor]) -> Tensor:
    return product({f"linear.{leaf}": tensor for leaf, tensor in tensors.items()}, "linear", form)


@pytest.mark.parametrize("shape", SHAPES)
def test_factors_of_a_lower_rank_are_a_part_of_those_of_a_higher(
    shape: tuple[int, int], random: Generator
) -> None:
    weight, inputs = normal(*shape, random=random), moment(shape[1], random)
    found = decompose(weight, inputs, moment(shape[0], random))

    (left, right), (more, further) = found.factors(weight, 3), found.factors(weight, 9)

    assert close(left, more[:, :3], 1e-12) and close(right, further[:3], 1e-12)


@pytest.mark.parametrize("shape", SHAPES)
def test_scaling_the_moments_scales_the_energies_alone(
    shape: tuple[int, int], random: Generator
) -> None:
    weight, inputs = normal(*shape, random=random), moment(shape[1], random)
    gradients = moment(shape[0], random)
    found = decompose(weight, inputs, gradients)

    scaled = decompose(weight, 1e6 * inputs, 1e-12 * gradients)

    assert torch.allclose(scaled.spectrum, 1e-6 * found.spectrum, rtol=1e-8)
    assert close(low(scaled, weight, 5), low(found, weight, 5))


# -- the method


@pytest.mark.parametrize("damping", [0.0, 0.3])
@pytest.mark.parametrize(
    ("shape", "side"),
    [*((shape, "inputs") for shape in SHAPES), ((12, 20), "outputs"), ((16, 16), "outputs")],
)
def test_the_method_takes_either_moment(
    shape: tuple[int, int], side: str, damping: float, random: Generator
) -> None:
    weight, inputs = normal(*shape, random=random), moment(shape[1], random)
    gradients = moment(shape[0], random)
    own = weight.T @ gradients @ weight if shape[0] > shape[1] else gradients
    given = inputs if side == "inputs" else output_moment(weight, inputs)
    gradient = GradientMoment(own, float(gradients.trace()))

    found = TwoSided().decompose(
        weight,
        Moment(side, given, gradient=gradient),  # type: ignore[arg-type]
        damping,
    )

    expected, values = textbook(weight, inputs, damped(gradients, damping or GRADIENT_DAMPING), 6)
    assert close(low(found, weight, 6), expected, 1e-8)
    assert torch.allclose(found.spectrum, values**2, rtol=1e-7)
    assert found.damping == (damping or GRADIENT_DAMPING)
    assert found.fallback == ""


# -- data that leaves something open


@pytest.mark.parametrize("shape", SHAPES)
def test_without_any_gradient_the_inputs_decide_and_no_loss_is_expected(
    shape: tuple[int, int], random: Generator
) -> None:
    weight, inputs = normal(*shape, random=random), moment(shape[1], random)

    found = decompose(weight, inputs, torch.zeros(shape[0], shape[0], dtype=F64))

    assert found.fallback == "no gradient arrives: one-sided"
    assert not found.spectrum.any() and found.spectrum.shape == (min(shape),)
    assert found.relative_loss(2) == 0
    assert close(low(found, weight, 5), low(decompose_inputs(weight, inputs), weight, 5))


@pytest.mark.parametrize("rank", [1, 3])
@pytest.mark.parametrize("shape", SHAPES)
def test_gradients_of_few_tokens_leave_the_outputs_apart_to_the_damping(
    shape: tuple[int, int], rank: int, random: Generator
) -> None:
    weight, inputs = normal(*shape, random=random), moment(shape[1], random)
    gradients = moment(shape[0], random, rank=rank)

    found = decompose(weight, inputs, gradients)

    expected, values = textbook(weight, inputs, damped(gradients, GRADIENT_DAMPING), 5)
    assert close(low(found, weight, 5), expected, 1e-7)
    assert torch.allclose(found.spectrum, values**2, rtol=1e-6)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", SHAPES)
def test_inputs_of_few_tokens_are_reproduced(
    form: str, shape: tuple[int, int], random: Generator
) -> None:
    weight, tokens = normal(*shape, random=random), normal(shape[1], 4, random=random)
    gradients = moment(shape[0], random)

    found = decompose(weight, tokens @ tokens.T, gradients)

    for rank in (4, 7, min(shape) - 1):
        tensors = find_form(form)().encode(*found.factors(weight, rank), F64)
        wanted = weight @ tokens
        assert (stored(form, tensors) @ tokens - wanted).norm() < 1e-3 * wanted.norm()
        assert found.relative_loss(rank) < 1e-4
    assert found.spectrum.isfinite().all()
    assert close(low(found, weight, min(shape)), weight, 1e-6)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", SHAPES)
def test_one_token_alone_is_survived(form: str, shape: tuple[int, int], random: Generator) -> None:
    weight, token = normal(*shape, random=random), normal(shape[1], 1, random=random)

    found = decompose(weight, token @ token.T, moment(shape[0], random, rank=1))

    tensors = find_form(form)().encode(*found.factors(weight, 3), F64)
    assert (stored(form, tensors) @ token - weight @ token).norm() < 1e-2 * (weight @ token).norm()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", SHAPES)
def test_inputs_that_are_always_zero_are_survived(
    form: str, shape: tuple[int, int], random: Generator
) -> None:
    weight = normal(*shape, random=random)

    found = decompose(weight, torch.zeros(shape[1], shape[1], dtype=F64), moment(shape[0], random))

    assert not found.spectrum.any()
    tensors = find_form(form)().encode(*found.factors(weight, 5), F64)
    assert stored(form, tensors).isfinite().all()


@pytest.mark.parametrize("rank", [0, 1, 3])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", SHAPES)
def test_a_weight_of_low_rank_is_given_back_at_any_higher_one(
    form: str, shape: tuple[int, int], rank: int, random: Generator
) -> None:
    """Rank 0 is a weight of zeros."""
    rows, columns = shape
    weight = normal(rows, rank, random=random) @ normal(rank, columns, random=random)
    found = decompose(weight, moment(columns, random), moment(rows, random))

    for kept in (max(rank, 1), 6, min(shape)):
        tensors = find_form(form)().encode(*found.factors(weight, kept), F64)
        assert (stored(form, tensors) - weight).norm() <= 1e-7 * weight.norm()
        assert found.relative_loss(kept) < 1e-12


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", SHAPES)
def test_channels_of_zeros_are_survived(
    form: str, shape: tuple[int, int], random: Generator
) -> None:
    weight, inputs = normal(*shape, random=random), moment(shape[1], random)
    gradients = moment(shape[0], random)
    weight[::3] = 0  # outputs that are always zero
    inputs[:, 1::4] = inputs[1::4] = 0  # inputs that are
    gradients[:, 2::5] = gradients[2::5] = 0  # and outputs that nothing reads

    found = decompose(weight, inputs, gradients)

    metric = damped(gradients, GRADIENT_DAMPING)
    for rank in (2, 6, 10):
        tensors = find_form(form)().encode(*found.factors(weight, rank), F64)
        lost = objective(weight - stored(form, tensors), inputs, metric)
        whole = objective(weight, inputs, metric)
        assert lost == pytest.approx(float(found.spectrum[rank:].sum()), abs=1e-4 * whole)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", [(1, 20), (20, 1), (1, 1), (2, 1), (1, 2)])
def test_a_linear_of_one_row_or_column_is_given_back(
    form: str, shape: tuple[int, int], random: Generator
) -> None:
    weight, inputs = normal(*shape, random=random), moment(shape[1], random)
    gradients = moment(shape[0], random)

    found = decompose(weight, inputs, gradients)

    tensors = find_form(form)().encode(*found.factors(weight, 1), F64)
    assert close(stored(form, tensors), weight)
    whole = objective(weight, inputs, damped(gradients, GRADIENT_DAMPING))
    assert float(found.spectrum.sum()) == pytest.approx(whole, rel=1e-9)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_moment_that_rounding_made_indefinite_is_damped(
    shape: tuple[int, int], random: Generator
) -> None:
    weight, inputs = normal(*shape, random=random), moment(shape[1], random, rank=6)
    gradients = moment(shape[0], random)
    inputs += 1e-7 * inputs.diagonal().mean() * torch.diag(normal(shape[1], random=random))

    found = decompose(weight, inputs, gradients)

    assert low(found, weight, 8).isfinite().all()
    lost = objective(weight - low(found, weight, 8), inputs, damped(gradients, GRADIENT_DAMPING))
    assert lost < 1e-3 * float(found.spectrum.sum())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_narrow_moments_come_as_close_as_their_dtype_allows(
    shape: tuple[int, int], dtype: torch.dtype, random: Generator
) -> None:
    weight = normal(*shape, random=random).to(dtype)
    inputs, gradients = moment(shape[1], random), moment(shape[0], random)
    wide, metric = weight.double(), damped(gradients, GRADIENT_DAMPING)
    behind = wide.T @ gradients @ wide

    if shape[0] > shape[1]:
        found = decompose_two_sided_inputs(
            weight, inputs.float(), behind.float(), float(gradients.trace())
        )
    else:
        found = decompose_two_sided_outputs(
            weight, output_moment(weight, inputs).float(), gradients.float()
        )

    best = decompose(wide, inputs, gradients)
    lost = objective(wide - low(found, weight, 5), inputs, metric)
    assert lost == pytest.approx(float(best.spectrum[5:].sum()), rel=1e-4)
