from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Generator, Tensor

from streamcomp.errors import RecipeError
from streamcomp.linalg import channel_sharing
from streamcomp.linalg.channel_sharing import (
    AXES,
    SharedChannels,
    average_bits,
    kmeans,
    share_channels,
    shared_numbers,
)
from streamcomp.linalg.low_rank import decompose_inputs

SHAPES = [(24, 40), (40, 24), (32, 32)]
F64 = torch.float64


def normal(*shape: int, random: Generator) -> Tensor:
    return torch.randn(*shape, dtype=F64, generator=random)


def planted(points: int, size: int, clusters: int, random: Generator) -> tuple[Tensor, Tensor]:
    """Points that are copies of ``clusters`` others, and whose copies they are."""
    owners = torch.arange(points) % clusters
    owners = owners[torch.randperm(points, generator=random)]
    return normal(clusters, size, random=random)[owners], owners


def same_partition(first: Tensor, second: Tensor) -> bool:
    return torch.equal(first[:, None] == first, second[:, None] == second)


def correlated(size: int, random: Generator, *, rank: int | None = None) -> Tensor:
    """A second moment of inputs with a few strong directions, none of them an axis."""
    strengths = torch.logspace(0, -2, rank or size, dtype=F64)
    inputs = normal(size, rank or size, random=random) * strengths
    return inputs @ inputs.T


def inertia(points: Tensor, labels: Tensor, means: Tensor, weights: Tensor | None = None) -> float:
    distances = (points - means[labels]).square().sum(1)
    return float((distances if weights is None else distances * weights).sum())


def lost(weight: Tensor, found: SharedChannels, moment: Tensor | None = None) -> float:
    """The relative loss by its definition."""
    moment = torch.eye(weight.shape[1], dtype=F64) if moment is None else moment
    error = weight - found.dense()
    return float((error @ moment @ error.T).trace() / (weight @ moment @ weight.T).trace())


def numbers_of(found: SharedChannels) -> int:
    """Counted from the tensors themselves."""
    tensors = (found.codebook, found.labels, found.left, found.right)
    return sum(tensor.numel() for tensor in tensors)


def share(weight: Tensor, moment: Tensor | None, share_of_all: float, **given: Any) -> Any:
    settings = {"dtype": F64, **given}
    return share_channels(weight, moment, int(share_of_all * weight.numel()), **settings)


# -- k-means


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("noise", [0.0, 1e-3])
@pytest.mark.parametrize("seed", range(4))
def test_planted_clusters_come_back(
    dtype: torch.dtype, noise: float, seed: int, random: Generator
) -> None:
    points, owners = planted(60, 9, 7, random)
    points += noise * normal(60, 9, random=random)

    labels, means = kmeans(points.to(dtype), 7, seed=seed)

    assert labels.dtype == torch.int64 and means.dtype == dtype
    assert same_partition(labels, owners)
    tolerance = 10 * torch.finfo(dtype).eps if noise == 0 else 4 * noise
    assert (means[labels] - points).abs().max() < tolerance


@pytest.mark.parametrize("weighted", [False, True])
def test_inertia_never_rises(weighted: bool, random: Generator) -> None:
    points = normal(200, 6, random=random)
    weights = torch.logspace(0, 3, 200, dtype=F64) if weighted else None

    found = [
        inertia(points, *kmeans(points, 20, seed=3, iterations=i, weights=weights), weights)
        for i in range(1, 20)
    ]

    pairs = zip(found, found[1:], strict=False)
    assert all(after <= before * (1 + 1e-12) for before, after in pairs)
    assert found[-1] < 0.95 * found[0]


@pytest.mark.parametrize("weighted", [False, True])
def test_it_ends_where_every_point_has_the_nearest_of_its_means(
    weighted: bool, random: Generator
) -> None:
    points = normal(150, 4, random=random)
    weights = torch.rand(150, dtype=F64, generator=random) + 0.1 if weighted else None

    labels, means = kmeans(points, 11, seed=0, iterations=200, weights=weights)

    assert torch.equal(torch.cdist(points, means).argmin(1), labels)
    shares = torch.ones(150, dtype=F64) if weights is None else weights
    for label in range(11):
        part = labels == label
        mean = (shares[part, None] * points[part]).sum(0) / shares[part].sum()
        assert torch.allclose(means[label], mean, atol=1e-12)


def test_heavy_points_pull_the_mean(random: Generator) -> None:
    points = normal(10, 3, random=random)
    weights = torch.ones(10, dtype=F64)
    weights[4] = 1e9

    _, means = kmeans(points, 1, seed=0, weights=weights)

    assert torch.allclose(means[0], points[4], atol=1e-7)


def test_no_cluster_is_empty_where_points_are_fewer_than_clusters(random: Generator) -> None:
    points, _ = planted(30, 5, 3, random)

    labels, means = kmeans(points, 12, seed=0)

    assert sorted(labels.unique().tolist()) == list(range(12))
    assert torch.allclose(means[labels], points, atol=1e-14)


def test_an_empty_cluster_takes_the_point_that_costs_most() -> None:
    labels = torch.tensor([0, 0, 2, 0, 2])

    channel_sharing._fill_empty(labels, torch.tensor([1.0, 3.0, 9.0, 2.0, 8.0]), 4)

    # 2 costs most; then its cluster has one point left, 4, and the next is 1
    assert labels.tolist() == [0, 1, 3, 0, 2]


def test_as_many_clusters_as_points_are_the_points(random: Generator) -> None:
    points = normal(20, 3, random=random)

    labels, means = kmeans(points, 20, seed=1)

    assert sorted(labels.tolist()) == list(range(20))
    assert torch.equal(means[labels], points)


def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch, random: Generator) -> None:
    points = normal(100, 5, random=random)
    labels, means = kmeans(points, 9, seed=0)

    monkeypatch.setattr(channel_sharing, "CHUNK_BYTES", 7 * 9 * 8)
    other, chunked = kmeans(points, 9, seed=0)

    assert torch.equal(labels, other)
    assert torch.allclose(means, chunked, atol=1e-12)


def test_a_seed_gives_the_same_clusters_and_another_others(random: Generator) -> None:
    points = normal(100, 5, random=random)
    first, again, other = (kmeans(points, 9, seed=seed) for seed in (5, 5, 6))

    assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])
    assert not same_partition(first[0], other[0])


@pytest.mark.parametrize("clusters", [0, 5])
def test_an_impossible_number_of_clusters_is_refused(clusters: int) -> None:
    with pytest.raises(RecipeError, match=f"{clusters} clusters of 4 channels: give 1 to 4"):
        kmeans(torch.zeros(4, 2), clusters, seed=0)


# -- shared channels


@pytest.mark.parametrize("whitened", [False, True])
@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("shape", SHAPES)
def test_a_matrix_of_few_channels_comes_back(
    shape: tuple[int, int], axis: str, whitened: bool, random: Generator
) -> None:
    rows, columns = shape if axis == "rows" else shape[::-1]
    weight, owners = planted(rows, columns, 6, random)
    weight = weight if axis == "rows" else weight.T.contiguous()
    moment = correlated(shape[1], random) if whitened else None
    numbers = shared_numbers(*shape, axis, 6, 1)

    found = share_channels(weight, moment, numbers, axis=axis, clusters=6, dtype=F64)

    assert found.axis == axis
    assert same_partition(found.labels, owners)
    assert found.codebook.shape == ((6, shape[1]) if axis == "rows" else (shape[0], 6))
    assert torch.allclose(found.dense(), weight, atol=1e-10)
    assert found.relative_loss < 1e-20


@pytest.mark.parametrize("whitened", [False, True])
@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("shape", SHAPES)
def test_with_a_number_for_every_weight_the_matrix_comes_back(
    shape: tuple[int, int], axis: str, whitened: bool, random: Generator
) -> None:
    weight = normal(*shape, random=random)
    moment = correlated(shape[1], random) if whitened else None

    found = share(weight, moment, 1.2, axis=axis, clusters=shape[AXES.index(axis)])

    assert torch.allclose(found.dense(), weight, atol=1e-12)


@pytest.mark.parametrize("whitened", [False, True])
@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("shape", SHAPES)
def test_clusters_and_a_low_rank_part_come_back_together(
    shape: tuple[int, int], axis: str, whitened: bool, random: Generator
) -> None:
    """The low-rank part is small, so that it does not move a channel to another cluster."""
    rows, columns = shape if axis == "rows" else shape[::-1]
    weight, _ = planted(rows, columns, 5, random)
    weight = weight if axis == "rows" else weight.T.contiguous()
    low = normal(shape[0], 2, random=random) @ normal(2, shape[1], random=random)
    moment = correlated(shape[1], random) if whitened else None

    weight += 1e-3 * low
    numbers = shared_numbers(*shape, axis, 5, 4)
    found = share_channels(weight, moment, numbers, axis=axis, clusters=5, dtype=F64)
    without = share_channels(
        weight, moment, shared_numbers(*shape, axis, 5, 1), axis=axis, clusters=5, dtype=F64
    )

    # what the means take of the two ranks is of rank two again
    assert found.relative_loss < 1e-18 < 1e-12 < without.relative_loss


@pytest.mark.parametrize("whitened", [False, True])
@pytest.mark.parametrize("clusters", [0, 3])
@pytest.mark.parametrize("axis", [*AXES, "auto"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kept", [0.25, 0.5, 0.8, 0.99])
def test_the_numbers_are_used_up_and_not_passed(
    kept: float, shape: tuple[int, int], axis: str, clusters: int, whitened: bool, random: Generator
) -> None:
    weight = normal(*shape, random=random)
    numbers = int(kept * weight.numel())
    moment = correlated(shape[1], random) if whitened else None

    found = share_channels(weight, moment, numbers, axis=axis, clusters=clusters, dtype=F64)

    assert 0 <= numbers - numbers_of(found) < max(shape)
    used = found.codebook.shape[AXES.index(found.axis)]
    assert used >= max(1, clusters)
    assert found.labels.shape == (shape[AXES.index(found.axis)],)
    assert 0 < found.left.shape[1] < min(shape)
    assert numbers_of(found) == shared_numbers(*shape, found.axis, used, found.left.shape[1])


@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_least_that_fits_is_one_cluster_and_rank_one(
    shape: tuple[int, int], axis: str, random: Generator
) -> None:
    weight = normal(*shape, random=random)
    least = shared_numbers(*shape, axis, 1, 1)

    found = share_channels(weight, None, least, axis=axis, dtype=F64)

    assert numbers_of(found) == least
    with pytest.raises(RecipeError, match=rf"takes {least} numbers.*{least - 1} allowed: lower"):
        share_channels(weight, None, least - 1, axis=axis, dtype=F64)


@pytest.mark.parametrize("whitened", [False, True])
@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_loss_is_that_of_the_result(
    shape: tuple[int, int], axis: str, whitened: bool, random: Generator
) -> None:
    weight = normal(*shape, random=random)
    moment = correlated(shape[1], random) if whitened else None

    found = share(weight, moment, 0.6, axis=axis)

    assert found.relative_loss > 1e-4
    assert found.relative_loss == pytest.approx(lost(weight, found, moment), rel=1e-9)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("axis", [*AXES, "auto"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", ["random", "clustered", "steep"])
def test_the_moment_makes_outputs_better(
    kind: str, shape: tuple[int, int], axis: str, seed: int
) -> None:
    random = Generator().manual_seed(seed)
    weight = normal(*shape, random=random)
    if kind == "clustered":
        weight = planted(*shape, 5, random)[0] + 0.2 * weight
    if kind == "steep":
        basis = torch.linalg.qr(normal(shape[0], shape[0], random=random)).Q
        weight = (basis * torch.logspace(0, -2, shape[0], dtype=F64)) @ weight
    moment = correlated(shape[1], random)

    whitened, free = (share(weight, given, 0.5, axis=axis) for given in (moment, None))

    assert whitened.relative_loss < lost(weight, free, moment)
    assert lost(weight, whitened) > lost(weight, free)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_low_rank_part_is_the_best_one(shape: tuple[int, int], random: Generator) -> None:
    weight = normal(*shape, random=random)
    moment = correlated(shape[1], random)

    for given in (None, moment):
        metric = torch.eye(shape[1], dtype=F64) if given is None else given
        found = share(weight, given, 0.5, axis="rows", clusters=4)
        error = weight - found.codebook[found.labels]
        energies = torch.linalg.svdvals(error @ torch.linalg.cholesky(metric)).square()

        left = float(energies[found.left.shape[1] :].sum())
        total = float((weight @ metric @ weight.T).trace())
        assert found.relative_loss == pytest.approx(left / total, rel=1e-8)


def test_rows_are_compared_by_their_outputs(random: Generator) -> None:
    """Rows equal on all that the inputs ever are share a cluster, whatever else they hold."""
    seen, owners = planted(30, 20, 5, random)
    moment = correlated(20, random, rank=8)
    values, vectors = torch.linalg.eigh(moment)
    unseen = vectors[:, :12]  # no input has a part along these
    weight = seen + 10 * normal(30, 12, random=random) @ unseen.T

    whitened, free = (
        share_channels(
            weight, given, shared_numbers(30, 20, "rows", 5, 1), axis="rows", clusters=5, dtype=F64
        )
        for given in (moment, None)
    )

    assert values[11] < 1e-12 < values[12]
    assert len(whitened.codebook) == 5
    assert same_partition(whitened.labels, owners)
    assert not same_partition(free.labels, owners)
    # the means of rows in the metric of the inputs are the means of the rows themselves
    for label, mean in enumerate(whitened.codebook):
        assert torch.allclose(mean, weight[whitened.labels == label].mean(0), atol=1e-10)


def test_shared_columns_minimise_the_loss_over_all_codebooks(random: Generator) -> None:
    """The error that a codebook of columns leaves is orthogonal to what it can change."""
    weight, moment = normal(12, 30, random=random), correlated(30, random)
    labels = torch.arange(30) % 4
    split = channel_sharing._Split("columns", 4, 1)
    indicators = torch.nn.functional.one_hot(labels).double()

    codebook = channel_sharing._codebook(weight, moment, labels, split)

    slope = (weight - codebook @ indicators.T) @ moment @ indicators
    plain = (weight - weight @ indicators / indicators.sum(0) @ indicators.T) @ moment @ indicators
    assert slope.norm() < 1e-3 * plain.norm()


def test_columns_that_are_fed_more_count_more(random: Generator) -> None:
    """Two loud columns are kept apart although many silent ones lie further from each other."""
    weight = 5 * normal(10, 40, random=random)
    weight[:, 1] = weight[:, 0] + 0.1 * normal(10, random=random)
    moment = torch.full((40,), 1e-6, dtype=F64)
    moment[:2] = 1e6

    whitened = share(weight, moment.diag(), 0.5, axis="columns", clusters=6)
    free = share(weight, None, 0.5, axis="columns", clusters=6)

    assert whitened.labels[0] != whitened.labels[1]
    assert free.labels[0] == free.labels[1]


def test_auto_keeps_the_better_axis(random: Generator) -> None:
    tall, _ = planted(40, 40, 8, random)

    for weight, axis in ((tall, "rows"), (tall.T.contiguous(), "columns")):
        noisy = weight + 0.05 * normal(40, 40, random=random)
        losses = {name: share(noisy, None, 0.4, axis=name).relative_loss for name in AXES}

        found = share(noisy, None, 0.4)

        assert found.axis == axis == min(losses, key=lambda name: losses[name])
        assert found.relative_loss == losses[axis] < max(losses.values())


def test_the_best_of_the_tried_splits_is_kept(
    monkeypatch: pytest.MonkeyPatch, random: Generator
) -> None:
    weight = planted(40, 40, 15, random)[0] + 0.05 * normal(40, 40, random=random)
    losses = []
    for part in channel_sharing.SHARES:
        monkeypatch.setattr(channel_sharing, "SHARES", (part,))
        losses.append(share(weight, None, 0.6, axis="rows").relative_loss)
    monkeypatch.undo()

    found = share(weight, None, 0.6, axis="rows").relative_loss

    assert len(losses) == 4 and len(set(losses)) == 4
    assert found == min(losses) < max(losses)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("axis", AXES)
def test_the_low_rank_part_makes_up_for_a_rounded_codebook(
    axis: str, dtype: torch.dtype, random: Generator
) -> None:
    """Of rank one, the rounding of a single representative is mended to the last digit."""
    weight = normal(20, 1, random=random).expand(20, 30).contiguous()
    weight = weight if axis == "columns" else weight.T.contiguous()
    rows, columns = weight.shape
    numbers = shared_numbers(rows, columns, axis, 1, 1)

    found = share_channels(weight, None, numbers, axis=axis, clusters=1, dtype=dtype)

    assert found.codebook.dtype == dtype
    shared = found.codebook.double().expand(rows, columns)
    assert (shared - weight).abs().max() > 1e-4
    assert torch.allclose(found.dense(), weight, atol=1e-12)


def test_a_seed_gives_the_same_result(random: Generator) -> None:
    weight, moment = normal(24, 40, random=random), correlated(40, random)

    first, again, other = (share(weight, moment, 0.5, seed=seed) for seed in (1, 1, 2))

    assert torch.equal(first.dense(), again.dense())
    assert torch.equal(first.labels, again.labels)
    assert not torch.equal(first.dense(), other.dense())


@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("shape", SHAPES)
def test_inputs_of_low_rank_cost_nothing_that_they_do_not_show(
    shape: tuple[int, int], axis: str, random: Generator
) -> None:
    weight = normal(*shape, random=random)
    moment = correlated(shape[1], random, rank=4)

    found = share(weight, moment, 0.7, axis=axis)

    assert found.relative_loss < 1e-6
    assert found.dense().isfinite().all()


def test_columns_that_are_never_fed_are_clustered_all_the_same(random: Generator) -> None:
    rows, owners = planted(40, 24, 6, random)
    moment = (owners < 3).double().diag()  # three kinds of columns are fed, three are not

    found = share_channels(
        rows.T.contiguous(),
        moment,
        shared_numbers(24, 40, "columns", 6, 1),
        axis="columns",
        clusters=6,
        dtype=F64,
    )

    assert same_partition(found.labels, owners)
    assert torch.allclose(found.dense(), rows.T, atol=1e-12)


@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("shape", SHAPES)
def test_zeros_are_no_trouble(shape: tuple[int, int], axis: str, random: Generator) -> None:
    weight, silent = normal(*shape, random=random), torch.zeros(shape[1], shape[1])

    unfed = share(weight, silent, 0.5, axis=axis)
    nothing = share(torch.zeros(shape), correlated(shape[1], random), 0.5, axis=axis)

    assert unfed.relative_loss == nothing.relative_loss == 0
    assert unfed.dense().isfinite().all()
    assert not nothing.dense().any()


def test_the_weight_and_the_moment_are_left_as_they_were(random: Generator) -> None:
    weight, moment = normal(24, 40, random=random), correlated(40, random)
    before = weight.clone(), moment.clone()

    share(weight, moment, 0.5)
    share(weight, None, 0.5)

    assert torch.equal(weight, before[0]) and torch.equal(moment, before[1])


def test_narrow_weights_are_taken_as_they_are(random: Generator) -> None:
    weight, moment = normal(24, 40, random=random).bfloat16(), correlated(40, random)

    narrow = share(weight, moment.float(), 0.5, dtype=torch.bfloat16)
    wide = share(weight.double(), moment, 0.5)

    assert narrow.codebook.dtype == torch.bfloat16
    assert narrow.relative_loss == pytest.approx(wide.relative_loss, rel=0.05)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"axis": "both"}, "axis 'both' unknown; one of: auto, rows, columns"),
        ({"clusters": -1}, "-1 clusters: give 0"),
        ({"clusters": 41}, "41 clusters are more than 24 x 40 has channels along auto"),
        ({"clusters": 25, "axis": "rows"}, "25 clusters are more than 24 x 40 has channels"),
        ({"clusters": 20}, "with 20 clusters and rank 1 along auto, 480 allowed: lower"),
    ],
)
def test_what_cannot_be_is_refused(given: dict[str, Any], message: str, random: Generator) -> None:
    with pytest.raises(RecipeError, match=message):
        share(normal(24, 40, random=random), None, 0.5, **given)


def test_sharing_beats_the_best_low_rank_where_channels_are_alike(random: Generator) -> None:
    """With more clusters than the rank of equal size: no low rank can tell all of them apart."""
    weight = planted(48, 64, 12, random)[0] + 0.05 * normal(48, 64, random=random)
    moment = correlated(64, random)
    moment.diagonal().add_(0.1)

    found = share(weight, moment, 0.35, axis="rows")

    alone = decompose_inputs(weight, moment).relative_loss(int(0.35 * 48 * 64) // (48 + 64))
    assert found.relative_loss < 0.5 * alone


# -- what it costs


def test_average_bits_are_those_of_the_paper() -> None:
    # 4096 x 4096, 128 clusters, rank 64 in 16 bits: half a bit each, and 7 bits for each channel
    bits = average_bits(4096, 4096, "columns", 128, 64)

    assert bits == 0.5 + 0.5 + 7 / 4096
    assert average_bits(4096, 4096, "columns", 128, 64, stored=True) == 1 + 16 / 4096
    assert average_bits(4096, 4096, "rows", 128, 64, itemsize=4) == 2 + 7 / 4096


@pytest.mark.parametrize(("clusters", "bits"), [(1, 0), (2, 1), (3, 2), (256, 8), (257, 9)])
def test_labels_take_the_bits_that_tell_the_clusters_apart(clusters: int, bits: int) -> None:
    found = average_bits(512, 64, "rows", clusters, 2) - 16 * (clusters * 64 + 2 * 576) / (512 * 64)

    assert found == pytest.approx(bits / 64)


def test_many_clusters_have_wider_labels_on_disk() -> None:
    narrow, wide = (
        average_bits(40000, 8, "rows", count, 1, stored=True)
        - average_bits(40000, 8, "rows", count, 1)
        for count in (32767, 32768)
    )

    assert narrow == pytest.approx((16 - 15) / 8)
    assert wide == pytest.approx((32 - 15) / 8)
