from __future__ import annotations

import pytest
import torch
from torch import Generator, Tensor

from streamcomp.errors import RecipeError
from streamcomp.forms import Allowance
from streamcomp.forms.shared import Shared
from streamcomp.linalg.channel_sharing import AXES, share_channels, shared_numbers
from streamcomp.methods import Factors, Moment
from streamcomp.methods.swsc import Swsc
from streamcomp.recipe import Recipe
from tests.methods.sites import Place

SHAPES = [(12, 20), (20, 12), (16, 16)]


def problem(shape: tuple[int, int], random: Generator) -> tuple[Tensor, Tensor]:
    """A weight and the second moment of its inputs."""
    weight = torch.randn(*shape, dtype=torch.float64, generator=random)
    inputs = torch.randn(shape[1], 60, dtype=torch.float64, generator=random)
    inputs *= torch.logspace(0, -2, shape[1], dtype=torch.float64)[:, None]
    return weight, inputs @ inputs.T


def compressed(
    weight: Tensor, moment: Moment | None, numbers: int, dtype: torch.dtype, recipe: Recipe
) -> Factors:
    site = Place(weight.shape[0], weight.shape[1], dtype)
    return Swsc().compress(site, weight, moment, Allowance(1, numbers), recipe)


@pytest.mark.parametrize("axis", [*AXES, "auto"])
@pytest.mark.parametrize("shape", SHAPES)
def test_it_shares_in_the_metric_of_the_inputs(
    shape: tuple[int, int], axis: str, random: Generator
) -> None:
    weight, moment = problem(shape, random)
    numbers, dtype = int(0.7 * weight.numel()), torch.float32
    recipe = Recipe(method="swsc", axis=axis, seed=2)

    whitened = compressed(weight, Moment("inputs", moment), numbers, dtype, recipe)
    free = compressed(weight, None, numbers, dtype, recipe)

    for result, given in ((whitened, moment), (free, None)):
        shared = share_channels(weight, given, numbers, axis=axis, seed=2, dtype=dtype)
        expected = Shared().encode_channels(shared, dtype)
        assert result.tensors.keys() == expected.keys()
        assert all(torch.equal(result.tensors[name], expected[name]) for name in expected)
    assert whitened.tensors["codebook"].dtype == dtype
    assert whitened.figures.relative_loss != free.figures.relative_loss


def test_it_takes_the_clusters_it_is_given(random: Generator) -> None:
    weight, moment = problem((16, 16), random)
    numbers = shared_numbers(16, 16, "columns", 4, 3)
    recipe = Recipe(method="swsc", axis="columns", clusters=4)

    factors = compressed(weight, Moment("inputs", moment), numbers, torch.float64, recipe)

    assert factors.spec == {"form": "shared", "rank": 3, "clusters": 4, "axis": "columns"}
    assert factors.tensors["codebook"].shape == (16, 4)
    assert factors.figures.numbers == numbers


def test_it_says_what_it_leaves_over(random: Generator) -> None:
    weight, _ = problem((16, 16), random)
    recipe = Recipe(method="swsc", axis="columns", clusters=4)
    numbers = shared_numbers(16, 16, "columns", 4, 3)

    factors = compressed(weight, None, numbers + 5, torch.float64, recipe)

    assert factors.spare(Allowance(1, numbers + 5)) == 5
    assert "energy" not in factors.figures.values()
    assert factors.figures.values()["condition"] is None


def test_the_moment_of_the_outputs_is_refused(random: Generator) -> None:
    weight, moment = problem((16, 16), random)

    with pytest.raises(RecipeError, match="swsc needs the moment of the inputs"):
        compressed(weight, Moment("outputs", moment), 200, torch.float32, Recipe(method="swsc"))


def test_more_clusters_than_channels_are_refused() -> None:
    Swsc().check(Place(4, 9), Recipe(method="swsc", clusters=9))
    with pytest.raises(RecipeError, match=r"\(4 x 9\) has 4 channels along rows"):
        Swsc().check(Place(4, 9), Recipe(method="swsc", clusters=5, axis="rows"))
