from __future__ import annotations

from typing import Any

import pytest

from streamcomp.evaluation.health import numerical_health


def linear(name: str, **more: Any) -> dict[str, Any]:
    return {"name": name, "relative_loss": 0.1, "damping": 0.0, "fallback": ""} | more


def report(linears: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
    return {"linears": linears, "recipe": {"method": "svd-llm", "damping": 0.0}} | more


TWO_SIDED = {"method": "two-sided", "damping": 0.0}


@pytest.mark.parametrize(
    ("recipe", "damping", "warned"),
    [
        (TWO_SIDED, 0.01, False),
        (TWO_SIDED, 0.099, False),
        (TWO_SIDED, 0.1, True),
        (TWO_SIDED | {"damping": 0.05}, 0.1, False),
        (TWO_SIDED | {"damping": 1e-4}, 1e-3, True),
        ({"method": "svd-llm", "damping": 0.0}, 0.0, False),
        ({"method": "svd-llm", "damping": 0.0}, 1e-6, False),  # the least that is tried
        ({"method": "svd-llm", "damping": 0.0}, 1e-5, True),
        ({}, 1e-5, True),
    ],
)
def test_damping_ten_times_what_was_asked_for_is_warned_of(
    recipe: dict[str, Any], damping: float, warned: bool
) -> None:
    found = numerical_health(report([linear("a", damping=damping)], recipe=recipe))

    assert bool(found.damped) is warned
    assert any("damping" in warning for warning in found.warnings()) is warned


def test_a_singular_moment_is_told_from_none_at_all() -> None:
    linears = [linear("a", condition=None), linear("b", condition=5.0), linear("c")]

    decomposed = numerical_health(report(linears))
    shared = numerical_health(report(linears, recipe={"method": "swsc"}))

    assert [m["name"] for m in decomposed.singular] == ["a"]
    assert not shared.singular


@pytest.mark.parametrize(
    ("method", "count", "loss", "warned"),
    [
        ("two-sided", 81, 19.0, False),  # 19 of 99
        ("two-sided", 81, 21.0, True),  # 21 of 101
        ("two-sided", 4, 21.0, False),  # few: that is about an even share
        ("svd-llm", 81, 1000.0, False),  # energies that do not compare
        ("two-sided", 81, float("nan"), False),
    ],
)
def test_one_linear_with_most_of_the_loss_is_warned_of(
    method: str, count: int, loss: float, warned: bool
) -> None:
    linears = [linear("heavy", loss=loss), *(linear(f"m{n}", loss=1.0) for n in range(1, count))]

    found = numerical_health(report(linears, recipe={"method": method}))

    assert found.warnings() == (["heavy alone causes 21% of the loss."] if warned else [])
    assert (found.total_loss is not None) == (method == "two-sided")


def test_nothing_is_wrong_where_nothing_is() -> None:
    for made in ({}, report([]), report([linear("a", condition=1.0, loss=0.0)], recipe=TWO_SIDED)):
        assert numerical_health(made).warnings() == []


def test_the_worst_come_first() -> None:
    linears = [
        linear("small", loss=1.0, relative_loss=0.5),
        linear("large", loss=9.0, relative_loss=0.1),
        linear("damped", loss=0.1, damping=1.0),
        linear("fallback", loss=0.0, fallback="one-sided"),
    ]

    for recipe, order in ((TWO_SIDED, ["large", "small"]), ({}, ["small", "large"])):
        found = numerical_health(report(linears, recipe=recipe))
        assert [m["name"] for m in found.worst(9)] == ["fallback", "damped", *order]
        assert len(found.worst(1)) == 1
