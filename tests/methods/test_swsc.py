from __future__ import annotations

import pytest
import torch
from torch import Generator, Tensor

from streamcomp.errors import RecipeError
from streamcomp.linalg.channel_sharing import AXES, SharedChannels, share_channels, shared_numbers
from streamcomp.methods.base import Moment
from streamcomp.methods.factors import shared_tensors
from streamcomp.methods.swsc import Swsc
from streamcomp.forms import runtime
from streamcomp.forms.runtime import SharedLinear, factored

SHAPES = [(12, 20), (20, 12), (16, 16)]


def problem(shape: tuple[int, int], random: Generator) -> tuple[Tensor, Tensor]:
    """A weight and the second moment of its inputs."""
    weight = torch.randn(*shape, dtype=torch.float64, generator=random)
    inputs = torch.randn(shape[1], 60, dtype=torch.float64, generator=random)
    inputs *= torch.logspace(0, -2, shape[1], dtype=torch.float64)[:, None]
    return weight, inputs @ inputs.T


def shared(shape: tuple[int, int], axis: str, random: Generator) -> SharedChannels:
    weight, _ = problem(shape, random)
    numbers = int(0.8 * weight.numel())
    return share_channels(weight, None, numbers, axis=axis, clusters=3, dtype=torch.float64)


@pytest.mark.parametrize("axis", [*AXES, "auto"])
@pytest.mark.parametrize("shape", SHAPES)
def test_it_shares_in_the_metric_of_the_inputs(
    shape: tuple[int, int], axis: str, random: Generator
) -> None:
    weight, moment = problem(shape, random)
    numbers = int(0.7 * weight.numel())
    method, dtype = Swsc(), torch.float32

    found = method.share(weight, Moment("inputs", moment), numbers, axis=axis, seed=2, dtype=dtype)
    free = method.share(weight, None, numbers, axis=axis, seed=2, dtype=dtype)

    for result, given in ((found, moment), (free, None)):
        expected = share_channels(weight, given, numbers, axis=axis, seed=2, dtype=dtype)
        assert torch.equal(result.dense(), expected.dense())
    assert method.name == "swsc"
    assert found.codebook.dtype == dtype
    assert not torch.equal(found.dense(), free.dense())


def test_it_takes_the_clusters_it_is_given(random: Generator) -> None:
    weight, moment = problem((16, 16), random)
    numbers = shared_numbers(16, 16, "columns", 4, 3)

    found = Swsc().share(
        weight, Moment("inputs", moment), numbers, axis="columns", clusters=4, dtype=torch.float64
    )

    assert (found.axis, found.codebook.shape, found.left.shape[1]) == ("columns", (16, 4), 3)


def test_the_moment_of_the_outputs_is_refused(random: Generator) -> None:
    weight, moment = problem((16, 16), random)

    with pytest.raises(RecipeError, match="swsc needs the moment of the inputs"):
        Swsc().share(weight, Moment("outputs", moment), 200, dtype=torch.float32)


# -- what is stored of it


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

    tensors = shared_tensors(found, torch.float64)
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
    weight, _ = problem((12, 20), random)
    found = share_channels(weight, None, 190, axis=axis, dtype=dtype)

    tensors = shared_tensors(found, dtype)

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

    stored = shared_tensors(found, torch.float32)["labels"]

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

    stored = sum(tensor.numel() for tensor in shared_tensors(found, torch.float16).values())

    rows, columns = shape
    assert stored == shared_numbers(rows, columns, axis, clusters, rank) <= 0.8 * rows * columns


def test_the_axes_have_one_name_each() -> None:
    assert AXES == modules.AXES
