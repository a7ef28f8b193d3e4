from __future__ import annotations

import pytest
import torch
from torch import Generator

from streamcomp.errors import RecipeError
from streamcomp.forms import find_form, runtime
from streamcomp.forms.runtime import SharedLinear, factored
from streamcomp.forms.shared import Shared
from streamcomp.linalg.channel_sharing import AXES, SharedChannels, share_channels, shared_numbers
from tests.methods.sites import Place

SHAPES = [(12, 20), (20, 12), (16, 16)]


def shared(shape: tuple[int, int], axis: str, random: Generator) -> SharedChannels:
    weight = torch.randn(*shape, dtype=torch.float64, generator=random)
    numbers = int(0.8 * weight.numel())
    return share_channels(weight, None, numbers, axis=axis, clusters=3, dtype=torch.float64)


@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_runtime_module_holds_the_same_matrix(
    shape: tuple[int, int], axis: str, random: Generator
) -> None:
    found = shared(shape, axis, random)
    rank, clusters = found.left.shape[1], found.codebook.shape[AXES.index(axis)]
    dense = torch.nn.Linear(shape[1], shape[0], bias=False, dtype=torch.float64)
    spec = {"form": "shared", "rank": rank, "clusters": clusters, "axis": axis}
    module = factored(dense, spec).requires_grad_(False)
    assert isinstance(module, SharedLinear)

    tensors = Shared().encode_channels(found, torch.float64)
    module.load_state_dict(tensors)

    assert {name: (t.dtype, t.shape) for name, t in tensors.items()} == {
        name: (t.dtype, t.shape) for name, t in module.tensors().items()
    }
    assert torch.allclose(module.dense_weight(), found.dense(), atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("axis", AXES)
def test_narrow_tensors_come_as_close_as_their_dtype_allows(
    axis: str, dtype: torch.dtype, random: Generator
) -> None:
    weight = torch.randn(12, 20, dtype=torch.float64, generator=random)
    found = share_channels(weight, None, 190, axis=axis, dtype=dtype)

    tensors = Shared().encode_channels(found, dtype)

    assert {t.dtype for name, t in tensors.items() if name != "labels"} == {dtype}
    assert torch.equal(tensors["codebook"], found.codebook)
    low = tensors["U"].double() @ tensors["weight"].double()
    wanted = found.left @ found.right
    assert (low - wanted).norm() < 3 * torch.finfo(dtype).eps * wanted.norm()


@pytest.mark.parametrize(
    ("clusters", "dtype"), [(1, torch.int16), (32767, torch.int16), (32768, torch.int32)]
)
def test_labels_are_as_narrow_as_their_module_has_them(
    clusters: int, dtype: torch.dtype, random: Generator
) -> None:
    labels = torch.arange(40_000) % clusters
    factors = (
        torch.randn(40_000, 1, dtype=torch.float64, generator=random),
        torch.randn(1, 2, dtype=torch.float64, generator=random),
    )
    found = SharedChannels(torch.zeros(clusters, 2), labels, "rows", *factors, 0.0, 0.0)

    stored = Shared().encode_channels(found, torch.float32)["labels"]

    module = SharedLinear(2, 40_000, 1, clusters=clusters, axis="rows")
    assert stored.dtype == module.labels.dtype == dtype
    assert torch.equal(stored.long(), labels)


@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("shape", SHAPES)
def test_as_many_numbers_are_stored_as_were_counted(
    shape: tuple[int, int], axis: str, random: Generator
) -> None:
    found = shared(shape, axis, random)
    rank, clusters = found.left.shape[1], found.codebook.shape[AXES.index(axis)]

    stored = sum(
        tensor.numel() for tensor in Shared().encode_channels(found, torch.float16).values()
    )

    rows, columns = shape
    assert stored == shared_numbers(rows, columns, axis, clusters, rank) <= 0.8 * rows * columns


def test_the_axes_have_one_name_each() -> None:
    assert AXES == runtime.AXES


# -- how numbers are shared


def test_weights_that_stay_dense_are_paid_for_by_the_others() -> None:
    places = [Place(64, 64), Place(5, 6), Place(64, 128)]

    kept = Shared().share_evenly(places, 0.3)

    assert kept[1] is None and not Shared().can_hold(5, 6)
    stored = sum(allowance.numbers for allowance in kept if allowance)
    assert 0 <= 0.7 * (64 * 64 + 30 + 64 * 128) - 30 - stored < 2
    assert kept[0] and kept[0].rank == kept[0].numbers // 128


def test_a_share_below_the_smallest_codebook_is_refused() -> None:
    with pytest.raises(RecipeError, match="shared channels take 96: give a smaller ratio"):
        Shared().share_evenly([Place(16, 16)], 0.9)


def test_a_plain_product_is_refused() -> None:
    with pytest.raises(RecipeError, match="form shared holds no plain product"):
        find_form("shared")().encode(torch.ones(3, 1), torch.ones(1, 3), torch.float32)
