"""Channels that share weights, and a low-rank part for what they do not share.

SWSC (arXiv 2501.08631) clusters the channels of W (m x n) by k-means, keeps the mean of each
cluster in a *codebook* and a *label* for each channel, and adds back the truncated SVD of the
error E, which is what the shared part leaves of W:

- rows: W'[i] = codebook[labels[i]] + (left right)[i], with a codebook (k, n);
- columns: W'[:, j] = codebook[:, labels[j]] + (left right)[:, j], with a codebook (m, k).

The paper does so in the plain Frobenius norm. Where the moment H = X X^T of the inputs is known,
all of it is done for ||W X - W' X||_F instead:

- rows are compared as outputs: the distance of w_i and w_j is ||(w_i - w_j) X||. The k-means is
  run on any P with P P^T = W H W^T, which keeps the smaller side; that map of the rows is linear,
  so means there are means of the rows of W;
- columns are compared by a k-means with the weights diag(H), as if channels were uncorrelated.
  Given the labels, as an n x k matrix B of zeros and ones, the codebook is then the minimiser
  over all of H: W H B (B^T H B)^-1;
- E is decomposed in the metric of H (:mod:`streamcomp.linalg.low_rank`), after the codebook
  has been rounded: the low-rank part makes up for the rounding too.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from streamcomp.errors import RecipeError
from streamcomp.linalg.low_rank import (
    FIRST_DAMPING,
    decompose_inputs,
    decompose_outputs,
)
from streamcomp.linalg.symmetric import PANEL

__all__ = [
    "AXES",
    "CHUNK_BYTES",
    "ITERATIONS",
    "SHARES",
    "SharedChannels",
    "average_bits",
    "kmeans",
    "share_channels",
    "shared_numbers",
    "sharing_bytes",
]

# Which channels share: outputs (rows of W) or inputs (columns of W).
AXES = ("rows", "columns")

# Shares of the numbers that are tried for the codebook; the rest is rank.
SHARES = (1 / 32, 1 / 8, 3 / 8, 3 / 4)

# Most rounds of Lloyd's algorithm.
ITERATIONS = 25

# Distances between points and means that are held at a time.
CHUNK_BYTES = 1 << 26


@dataclass(frozen=True)
class SharedChannels:
    """W' (m x n) as channels that share a codebook, plus a product of two factors.

    Parameters
    ----------
    codebook : Tensor of shape (k, n) for rows, (m, k) for columns
        One representative for each cluster, in the dtype that it is stored in.
    labels : int64 Tensor of shape (m,) for rows, (n,) for columns
        The cluster of each channel.
    axis : str
        One of ``AXES``.
    left : Tensor of shape (m, r), fp64
    right : Tensor of shape (r, n), fp64
    relative_loss : float
        ||W X - W' X||^2 / ||W X||^2, or of W and W' alone where no moment was given.
    damping : float
        What the decomposition of the error added to the moment; 0 if nothing.
    """

    codebook: Tensor
    labels: Tensor
    axis: str
    left: Tensor
    right: Tensor
    relative_loss: float
    damping: float

    def dense(self) -> Tensor:
        """W' (m, n) in fp64."""
        shared = self.codebook.double().index_select(AXES.index(self.axis), self.labels)
        return shared.addmm_(self.left, self.right)


@dataclass(frozen=True)
class _Split:
    """How the numbers are divided: ``clusters`` along ``axis``, the rest ``rank``."""

    axis: str
    clusters: int
    rank: int


def shared_numbers(rows: int, columns: int, axis: str, clusters: int, rank: int) -> int:
    """Numbers that the form stores: codebook, factors, and one for each label."""
    channels, length = (rows, columns) if axis == "rows" else (columns, rows)
    return clusters * length + channels + rank * (rows + columns)


def average_bits(
    rows: int,
    columns: int,
    axis: str,
    clusters: int,
    rank: int,
    *,
    itemsize: int = 2,
    stored: bool = False,
) -> float:
    """Bits for each weight of a rows x columns linear, as the paper reports them.

    Floats take ``itemsize`` bytes, labels ceil(log2 k) bits. With ``stored`` labels are counted
    as they are on disk: 16 bits where int16 holds them, else 32.
    """
    channels = rows if axis == "rows" else columns
    floats = shared_numbers(rows, columns, axis, clusters, rank) - channels
    label = math.ceil(math.log2(clusters))
    if stored:
        label = 16 if clusters <= torch.iinfo(torch.int16).max else 32
    return (8 * itemsize * floats + label * channels) / (rows * columns)


def sharing_bytes(rows: int, columns: int, *, metric: bool = True) -> int:
    """Peak of :func:`share_channels`: eight copies of the weight in fp64.

    And the decomposition of the error on its smaller side, and twice the moment of the inputs where
    that is the ``metric``.
    """
    side = min(rows, columns)
    moments = 2 * columns * columns if metric else 0
    return (8 * rows * columns + moments + 6 * side * side) * 8


# -- the clusters ------------------------------------------------------------------------


def kmeans(
    points: Tensor,
    clusters: int,
    *,
    seed: int,
    iterations: int = ITERATIONS,
    weights: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Lloyd's algorithm from k-means++ seeds, in the dtype of ``points``: fp32 or fp64.

    Minimises sum_i weights_i ||points_i - means[labels_i]||^2. No cluster is empty: one that
    would be takes the point farthest from its mean. Distances are products, taken of so many
    points at a time that they fill ``CHUNK_BYTES``. Beside ``points`` it holds two k x d
    matrices, three times ``CHUNK_BYTES``, and some vectors of N.

    Parameters
    ----------
    points : Tensor of shape (N, d)
    clusters : int, at most N
    weights : Tensor of shape (N,), positive; 1 where none is given

    Returns
    -------
    labels : int64 Tensor of shape (N,)
    means : Tensor of shape (clusters, d), the means of the points that have each label
    """
    if not 0 < clusters <= len(points):
        raise RecipeError(f"{clusters} clusters of {len(points)} channels: give 1 to {len(points)}")
    if weights is None:
        weights = points.new_ones(len(points))
    weights = weights.to(points.dtype)
    squares = torch.cat([part.square().sum(1) for part in points.split(PANEL)])  # (N,)
    means = points[_seeds(points, squares, weights, clusters, seed)]  # (k, d)
    labels = torch.full((len(points),), -1, device=points.device)
    for _ in range(max(1, iterations)):
        before = labels
        labels, distances = _nearest(points, squares, means)
        _fill_empty(labels, distances * weights, clusters)
        if torch.equal(labels, before):
            break
        means = _means(points, labels, weights, clusters)
    return labels, means


def _seeds(points: Tensor, squares: Tensor, weights: Tensor, clusters: int, seed: int) -> Tensor:
    """k-means++: each next one is drawn by its squared distance from those before, (k,)."""
    random = Generator().manual_seed(seed)
    chosen = torch.zeros(clusters, dtype=torch.int64, device=points.device)
    distances = torch.full_like(squares, math.inf)
    chances = weights.clone()
    for number in range(clusters):
        if not bool((chances > 0).any()):  # fewer distinct points than clusters
            chances = torch.ones_like(chances)
            chances[chosen[:number]] = 0
        # scaled, so that no tiny or huge weight is lost; drawn on the CPU, alike everywhere
        drawn = int(torch.multinomial((chances / chances.max()).cpu(), 1, generator=random))
        chosen[number] = drawn
        to_drawn = squares + squares[drawn] - 2 * (points @ points[drawn])
        distances = torch.minimum(distances, to_drawn.clamp_min_(0))
        distances[drawn] = 0
        chances = distances * weights
    return chosen


def _nearest(points: Tensor, squares: Tensor, means: Tensor) -> tuple[Tensor, Tensor]:
    """For each point the number of the nearest mean (N,) and its squared distance (N,)."""
    inner = means.square().sum(1)  # (k,)
    nearest = []
    for part in points.split(_rows_of_a_chunk(points, len(means))):
        nearest.append(torch.addmm(inner, part, means.T, alpha=-2).min(dim=1))  # less ||part||^2
    labels = torch.cat([part.indices for part in nearest])
    return labels, torch.cat([part.values for part in nearest]).add_(squares).clamp_min_(0)


def _fill_empty(labels: Tensor, distances: Tensor, clusters: int) -> None:
    """Give each empty cluster, in place, the point that costs most in a cluster of several."""
    counts = torch.bincount(labels, minlength=clusters)
    empty = (counts == 0).nonzero().flatten().tolist()
    if not empty:
        return
    for point in distances.argsort(descending=True, stable=True).tolist():
        owner = int(labels[point])
        if counts[owner] > 1:
            counts[owner] -= 1
            labels[point] = empty.pop()
        if not empty:
            return


def _means(points: Tensor, labels: Tensor, weights: Tensor, clusters: int) -> Tensor:
    """The weighted mean of the points (N, d) of each label, (k, d) in the dtype of the weights."""
    sums, total = _sums(points, labels, weights, clusters)
    return sums.div_(total[:, None])


def _sums(points: Tensor, labels: Tensor, weights: Tensor, clusters: int) -> tuple[Tensor, Tensor]:
    """Weighted sum of the points of each label (k, d), and of the weights (k,).

    Products with the labels' indicators: the same bits on every run of a GPU, which an
    ``index_add`` does not give.
    """
    sums = weights.new_zeros(clusters, points.shape[1])
    total = weights.new_zeros(clusters)
    size = _rows_of_a_chunk(weights, clusters)
    for start in range(0, len(points), size):
        part = slice(start, start + size)
        indicators = weights.new_zeros(clusters, len(labels[part]))  # (k, chunk)
        indicators.scatter_(0, labels[part][None], weights[part][None])
        sums.addmm_(indicators, points[part].to(weights.dtype))
        total += indicators.sum(1)
    return sums, total


def _rows_of_a_chunk(like: Tensor, clusters: int) -> int:
    """How many rows of ``clusters`` numbers fill ``CHUNK_BYTES``."""
    return max(1, CHUNK_BYTES // (clusters * like.element_size()))


# -- the whole ---------------------------------------------------------------------------


def share_channels(
    weight: Tensor,
    moment: Tensor | None,
    numbers: int,
    *,
    axis: str = "auto",
    clusters: int = 0,
    seed: int = 0,
    dtype: torch.dtype,
) -> SharedChannels:
    """W' of at most ``numbers`` numbers, the best of the splits that are tried.

    Parameters
    ----------
    weight : Tensor of shape (m, n)
    moment : Tensor of shape (n, n), or None
        H, the second moment of the inputs; without it the error is that of W alone.
    numbers : int
        k n + m + r (m + n) for rows, k m + n + r (m + n) for columns; r and k are at least 1.
        What flooring r leaves goes to more clusters, so that for numbers < m n less than
        max(m, n) of them is left over.
    axis : str
        One of ``AXES``, or ``auto``: both are tried.
    clusters : int
        The least number of clusters; 0 tries ``SHARES`` of the numbers.
    dtype : torch.dtype
        What the codebook is stored in.

    Raises RecipeError where nothing fits. Each try holds the error (m x n, fp64) and what its
    decomposition takes; the points of an axis stay from one try to the next: m x min(m, n) for
    rows, n x m for columns, in fp32, or fp64 where W is.
    """
    rows, columns = weight.shape
    splits = list(dict.fromkeys(_splits(rows, columns, numbers, axis, clusters)))
    if not splits:
        raise RecipeError(_nothing_fits(rows, columns, numbers, axis, clusters))
    total = _energy(weight, moment)
    best = None
    for name in dict.fromkeys(split.axis for split in splits):
        points, weights = _points(weight, moment, name)
        for split in (split for split in splits if split.axis == name):
            labels, _ = kmeans(points, split.clusters, seed=seed, weights=weights)
            codebook = _codebook(weight, moment, labels, split).to(dtype)
            split_up = _with_low_rank(weight, moment, codebook, labels, split, total)
            if best is None or split_up.relative_loss < best.relative_loss:
                best = split_up
    assert best is not None
    return best


def _splits(rows: int, columns: int, numbers: int, axis: str, clusters: int) -> Iterator[_Split]:
    """The splits worth a try."""
    if axis not in (*AXES, "auto"):
        raise RecipeError(f"axis {axis!r} unknown; one of: auto, {', '.join(AXES)}")
    if clusters < 0:
        raise RecipeError(f"{clusters} clusters: give 0 (chosen by the error) or more")
    side, most = rows + columns, min(rows, columns) - 1
    for name in AXES if axis == "auto" else (axis,):
        channels, length = (rows, columns) if name == "rows" else (columns, rows)
        free = numbers - channels
        wanted = [clusters * length] if clusters else [int(share * free) for share in SHARES]
        if clusters > channels:
            continue
        for part in wanted:
            rank = _rank(free - part, side, most, bool(clusters))
            count = min((free - rank * side) // length, channels)
            if rank and count >= max(1, clusters):
                if count == channels:  # all of W fits: what is left can only be rank
                    rank = min(most, (free - count * length) // side)
                yield _Split(name, count, rank)


def _rank(free: int, side: int, most: int, fixed: bool) -> int:
    """The rank that ``free`` numbers pay for; at least 1 unless the clusters are ``fixed``."""
    return min(most, max(free // side, 0 if fixed else 1))


def _nothing_fits(rows: int, columns: int, numbers: int, axis: str, clusters: int) -> str:
    axes = AXES if axis == "auto" else (axis,)
    if clusters > max(rows if name == "rows" else columns for name in axes):
        return f"{clusters} clusters are more than {rows} x {columns} has channels along {axis}"
    least = min(shared_numbers(rows, columns, name, max(1, clusters), 1) for name in axes)
    return (
        f"{rows} x {columns} takes {least} numbers with {max(1, clusters)} clusters and rank 1 "
        f"along {axis}, {numbers} allowed: lower the ratio or the clusters"
    )


def _points(weight: Tensor, moment: Tensor | None, axis: str) -> tuple[Tensor, Tensor | None]:
    """Points that k-means compares, and the weight of each channel."""
    dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
    if axis == "rows":
        if moment is None:
            return weight.to(dtype), None
        return _rooted(weight, moment).to(dtype), None
    weights = None
    if moment is not None:
        energies = moment.diagonal().double()
        mean = energies.mean()
        weights = energies.clamp_min(FIRST_DAMPING * mean) if mean > 0 else None
    return weight.T.contiguous().to(dtype), weights


def _rooted(weight: Tensor, moment: Tensor) -> Tensor:
    """P (m, min(m, n)) with P P^T = W H W^T, fp64, by an eigh on the smaller side.

    Needs no damping: an eigenvalue that is not positive counts as zero.
    """
    wide, metric = weight.double(), moment.double()
    if weight.shape[0] <= weight.shape[1]:
        values, vectors = torch.linalg.eigh(wide @ metric @ wide.T)
        root: Tensor = vectors.mul_(values.clamp_min_(0).sqrt_())
        return root
    values, vectors = torch.linalg.eigh(metric)
    root = vectors.mul_(values.clamp_min_(0).sqrt_())  # S, with H = S S^T
    return wide @ root


def _codebook(weight: Tensor, moment: Tensor | None, labels: Tensor, split: _Split) -> Tensor:
    """The best representatives for ``labels``: (k, n) or (m, k), fp64."""
    ones = torch.ones(len(labels), dtype=torch.float64, device=weight.device)
    if split.axis == "rows":
        return _means(weight, labels, ones, split.clusters)
    means = _means(weight.T, labels, ones, split.clusters).T  # (m, k)
    if moment is None:
        return means
    # C = M + (W - M B^T) H B (B^T H B + eps I)^-1: the ridge draws towards the means M
    metric, _ = _sums(moment, labels, ones, split.clusters)  # (k, n) = B^T H
    inner, _ = _sums(metric.T, labels, ones, split.clusters)  # (k, k) = B^T H B
    inner.diagonal().add_(FIRST_DAMPING * inner.diagonal().mean())
    factor, info = torch.linalg.cholesky_ex(inner)
    if int(info):  # an input that is always zero: any representative will do
        return means
    error = weight.double() - means.index_select(1, labels)
    return means + torch.cholesky_solve(metric @ error.T, factor).T


def _with_low_rank(
    weight: Tensor,
    moment: Tensor | None,
    codebook: Tensor,
    labels: Tensor,
    split: _Split,
    total: float,
) -> SharedChannels:
    """The shared part with the best ``split.rank`` of its error E added back."""
    error = weight.double() - codebook.double().index_select(AXES.index(split.axis), labels)
    left, right, damping = _low_rank(error, moment, split.rank)
    lost = _energy(error.addmm_(left, right, alpha=-1), moment)
    loss = lost / total if total > 0 else 0.0
    return SharedChannels(codebook, labels, split.axis, left, right, loss, damping)


def _low_rank(error: Tensor, moment: Tensor | None, rank: int) -> tuple[Tensor, Tensor, float]:
    """The factors (m, r), (r, n) nearest to E (m, n), fp64, and the damping that they took."""
    if moment is not None:
        decomposition = decompose_inputs(error, moment)
        return *decomposition.factors(error, rank), decomposition.damping
    if error.shape[0] > error.shape[1]:  # the smaller side: E^T = Q Q^T E^T
        right, left, damping = _low_rank(error.T, None, rank)
        return left.T, right.T, damping
    decomposition = decompose_outputs(error, error @ error.T)
    return *decomposition.factors(error, rank), 0.0


def _energy(matrix: Tensor, moment: Tensor | None) -> float:
    """||A X||^2 = trace(A H A^T), or ||A||^2; ``PANEL`` rows of A at a time."""
    metric = None if moment is None else moment.double()
    energy = 0.0
    for part in matrix.split(PANEL):
        wide = part.double()
        image = wide if metric is None else wide @ metric
        energy += float((image * wide).sum())
    return max(energy, 0.0)
