from __future__ import annotations

from typing import Any

import pytest

from streamcomp.report.health import numerical_health
from tests.report.reports import linear, report

TWO_SIDED = {"method": "two-sided", "damping": 0.0}
SVD_LLM = {"method": "svd-llm", "damping": 0.0}


@pytest.mark.parametrize(
    ("recipe", "damping", "warned"),
    [
        (TWO_SIDED, 0.01, False),
        (TWO_SIDED, 0.099, False),
        (TWO_SIDED, 0.1, True),
        (TWO_SIDED | {"damping": 0.05}, 0.1, False),
        (TWO_SIDED | {"damping": 1e-4}, 1e-3, True),
        (SVD_LLM, 0.0, False),
        (SVD_LLM, 1e-6, False),  # the least that is tried
        (SVD_LLM, 1e-5, True),
        (SVD_LLM | {"damping": 1e-3}, 1e-3, False),
    ],
)
def test_damping_ten_times_what_was_asked_for_is_warned_of(
    recipe: dict[str, Any], damping: float, warned: bool
) -> None:
    health = numerical_health(report([linear("a", damping=damping)], recipe=recipe))

    assert bool(health.damped) is warned
    assert any("damping" in warning for warning in health.warnings()) is warned


def test_a_singular_moment_is_told_from_none_at_all() -> None:
    shared = linear("b", energy=None, condition=None)

    health = numerical_health(report([linear("a", condition=None), shared, linear("c")]))

    assert [m.name for m in health.singular] == ["a"]


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

    health = numerical_health(report(linears, recipe={"method": method}))

    assert health.warnings() == (["heavy alone causes 21% of the loss."] if warned else [])
    assert (health.total_loss is not None) == (method == "two-sided")


def test_nothing_is_wrong_where_nothing_is() -> None:
    for made in (report([]), report([linear("a", loss=0.0)], recipe=TWO_SIDED)):
        assert numerical_health(made).warnings() == []


def test_the_worst_come_first() -> None:
    linears = [
        linear("small", loss=1.0, relative_loss=0.5),
        linear("large", loss=9.0, relative_loss=0.1),
        linear("damped", loss=0.1, damping=1.0),
        linear("fallback", loss=0.0, fallback="one-sided"),
    ]

    for recipe, order in ((TWO_SIDED, ["large", "small"]), (SVD_LLM, ["small", "large"])):
        health = numerical_health(report(linears, recipe=recipe))
        assert [m.name for m in health.worst(9)] == ["fallback", "damped", *order]
        assert len(health.worst(1)) == 1
