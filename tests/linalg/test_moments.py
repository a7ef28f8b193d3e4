from __future__ import annotations

import pytest
import torch
from torch import Generator, Tensor

from streamcomp.linalg import moments
from streamcomp.linalg.moments import SecondMoment


def whole_numbers(*shape: int, random: Generator) -> Tensor:
    """Their products and sums are exact in fp32, so that equal means equal."""
    return torch.randint(-8, 9, shape, generator=random).float()


def moment_of(*updates: Tensor, shift: Tensor | None = None) -> Tensor:
    moment = SecondMoment(updates[0].shape[-1], dtype=torch.float32, device="cpu")
    for rows in updates:
        moment.update(rows, shift)
    return moment.value


def test_the_moment_is_the_sum_of_outer_products(random: Generator) -> None:
    rows = whole_numbers(37, 5, random=random)

    expected = sum((torch.outer(row, row) for row in rows), start=torch.zeros(5, 5))

    assert torch.equal(moment_of(rows), expected)


def test_leading_dimensions_are_rows(random: Generator) -> None:
    states = whole_numbers(3, 7, 5, random=random)

    assert torch.equal(moment_of(states), moment_of(states.reshape(21, 5)))


@pytest.mark.parametrize("chunk", [1, 4, 37, 100])
def test_the_moment_does_not_depend_on_how_rows_arrive(
    chunk: int, random: Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = whole_numbers(37, 5, random=random)
    shift = whole_numbers(5, random=random)
    at_once = moment_of(rows, shift=shift)

    assert torch.equal(moment_of(*rows.split(chunk), shift=shift), at_once)
    monkeypatch.setattr(moments, "ROWS_PER_UPDATE", chunk)
    assert torch.equal(moment_of(rows, shift=shift), at_once)


def test_a_shift_is_taken_off_every_row(random: Generator) -> None:
    rows, bias = whole_numbers(37, 5, random=random), whole_numbers(5, random=random)

    assert torch.equal(moment_of(rows + bias, shift=bias), moment_of(rows))
    assert not torch.equal(moment_of(rows + bias), moment_of(rows))


def test_rows_of_a_narrow_dtype_are_summed_in_the_moments_own(random: Generator) -> None:
    rows = whole_numbers(3000, 4, random=random)

    assert torch.equal(moment_of(rows.bfloat16()), moment_of(rows))


def test_observing_needs_no_gradient(random: Generator) -> None:
    rows = whole_numbers(6, 4, random=random).requires_grad_()

    assert not moment_of(rows).requires_grad
