from __future__ import annotations

from dataclasses import FrozenInstanceError, asdict, fields
from typing import Any

import pytest

from streamcomp.errors import RecipeError
from streamcomp.methods import find_method
from streamcomp.recipe import OUTPUT_FIELDS, Recipe, Resources


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"ratio": 0.0}, "ratio 0: must be above 0 and below 1, e.g. 0.2"),
        ({"ratio": 1.0}, "ratio 1:"),
        ({"ratio": 20.0}, "ratio 20:"),
        ({"ratio": -0.1}, "ratio -0.1:"),
        ({"ratio": float("nan")}, "ratio nan:"),
        ({"form": "svd"}, "form 'svd' unknown; one of: pivot, uv"),
        ({"statistics": "sparse"}, "statistics 'sparse' unknown; one of: dense, compressed"),
        ({"allocation": "random"}, "allocation 'random' unknown"),
        ({"samples": 0}, "samples 0: must be at least 1"),
        ({"seq_len": 1}, "seq_len 1: must be at least 2"),
        ({"batch": -1}, "batch -1: must be at least 0"),
        ({"seed": -1}, "seed -1: must be 0 to"),
        ({"include": "("}, "include '\\(' is no regular expression"),
        ({"exclude": "*"}, "exclude '\\*' is no regular expression"),
    ],
)
def test_a_setting_that_cannot_be_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        Recipe(**settings)


def test_the_default_recipe_is_sound() -> None:
    recipe = Recipe()

    assert recipe.ratio == 0.2
    assert find_method(recipe.method).name == recipe.method


def test_a_recipe_does_not_change() -> None:
    with pytest.raises(FrozenInstanceError):
        Recipe().ratio = 0.3  # type: ignore[misc]


def test_the_fields_of_the_output_are_fields() -> None:
    assert set(OUTPUT_FIELDS) < {field.name for field in fields(Recipe)}


def test_a_recipe_is_made_of_plain_values() -> None:
    recipe = Recipe.from_mapping(
        {"ratio": 0.4, "form": "uv", "seq-len": 64, "calibration": ["a.txt", "b.txt"], "seed": 3}
    )

    expected = Recipe(ratio=0.4, form="uv", seq_len=64, calibration=("a.txt", "b.txt"), seed=3)
    assert recipe == expected
    assert Recipe.from_mapping(asdict(recipe)) == recipe
    assert Recipe.from_mapping({}) == Recipe()


def test_one_calibration_source_may_be_a_plain_string() -> None:
    assert Recipe.from_mapping({"calibration": "a.txt"}).calibration == ("a.txt",)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"ration": 0.2}, "here.toml: unknown setting 'ration'; known: ratio, size, method"),
        ({"ratio": "0.2"}, "here.toml: ratio = '0.2' should be of type float"),
        ({"ratio": True}, "ratio = True should be of type float"),
        ({"samples": 3.0}, "samples = 3.0 should be of type int"),
        ({"samples": True}, "samples = True should be of type int"),
        ({"form": 1}, "form = 1 should be of type str"),
        ({"calibration": [1]}, "calibration = \\[1\\] should be of type tuple"),
        ({"calibration": 1}, "calibration = 1 should be of type tuple"),
        ({"ratio": 2}, "ratio 2: must be above 0 and below 1"),
    ],
)
def test_values_of_the_wrong_kind_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        Recipe.from_mapping(settings, "here.toml")


@pytest.mark.parametrize("device", ["auto", "cpu", "cuda", "cuda:3"])
def test_devices_are_known(device: str) -> None:
    assert Resources(device=device).device == device


@pytest.mark.parametrize("device", ["", "gpu", "cuda:", "cuda:x", "cpu:0 "])
def test_unknown_devices_are_refused(device: str) -> None:
    with pytest.raises(RecipeError, match="auto, cpu, cuda or cuda:N"):
        Resources(device=device)


def test_threads_below_zero_are_refused() -> None:
    with pytest.raises(RecipeError, match="threads -1: must be at least 0"):
        Resources(threads=-1)
