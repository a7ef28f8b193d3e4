"""Bytes that each kind of step holds at its peak, beside the interpreter and its libraries.

Every formula counts what the code it names keeps alive, from shapes alone; the LAPACK
workspaces among them were measured (``eigh`` overwrites its input and holds two further matrices,
``cholesky`` and ``lu_factor`` none). Bytes are of the host, or of the device where a step computes
there.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from streamcomp.calibration.hidden_states import StreamShape
from streamcomp.calibration.observe import MomentGroup, moment_dtype
from streamcomp.checkpoint.reader import COPY_BYTES
from streamcomp.linalg.moments import ROWS_PER_UPDATE, panel_of
from streamcomp.linalg.symmetric import PANEL, SMALL, solve_dtype
from streamcomp.modeling.sites import Site

__all__ = [
    "LATE_BYTES",
    "BlockCost",
    "Phase",
    "analysis_bytes",
    "decomposition_bytes",
    "decomposition_flops",
    "embed_bytes",
    "factorization_bytes",
    "factorization_flops",
    "gradient_dtype",
    "head_bytes",
    "head_gradient_bytes",
    "moment_products",
    "muon_flops",
    "sharing_bytes",
    "tokenize_bytes",
]

_F64 = 8
# Libraries that come after the baseline was measured, and gaps in the allocator's heap, which are
# not the same in two runs of one job: 40 to 81 MiB were seen.
LATE_BYTES = 112 * 2**20
# A tokenizer in memory, per byte of its file, and the records of one piece of text.
_TOKENIZER_FACTOR = 20
_PIECE_BYTES = 48 * 2**20
# What blocks are given beside the hidden states.
_CALLS = "masks and positions"


@dataclass(frozen=True)
class Phase:
    """A part of a step and the bytes alive in it, by what they are for."""

    name: str
    parts: Mapping[str, int]

    @property
    def nbytes(self) -> int:
        return sum(self.parts.values())


@dataclass(frozen=True)
class BlockCost:
    """What is known of one block before it is read."""

    weight_bytes: int  # all its parameters, in the dtype it runs in
    merge_bytes: int  # the most that one of them takes on disk as several tensors (experts)
    activation_bytes: int  # most alive in a forward of one window
    autograd_bytes: int  # most alive in a forward and backward of one window
    stream: StreamShape
    groups: tuple[MomentGroup, ...]
    call_bytes: int  # masks and positions of one window, of all blocks
    record_bytes: int  # most alive while the model makes those of one window

    # -- phases, in the order of a step's own --------------------------------------------

    def record(self, batch: int) -> Phase:
        """Masks and positions of ``batch`` windows, before a block is read; one window's are kept.

        Those of the others are views of it, as soon as they are found alike.
        """
        return Phase("record", {_CALLS: batch * self.record_bytes})

    def record_again_bytes(self, tokens: int) -> int:
        """What the model makes of them for ``tokens`` positions on its way to the head."""
        return math.ceil(self.record_bytes * (tokens / self.stream.seq_len) ** 2)

    def beside_calls(self, phase: Phase) -> Phase:
        """``phase``, and the masks and positions that are kept from the first step on."""
        calls = phase.parts.get(_CALLS, 0) + self.call_bytes
        return Phase(phase.name, {**phase.parts, _CALLS: calls})

    def load(self, factors: int = 0) -> Phase:
        """Reading the block, beside ``factors`` bytes of those that an earlier pass has made."""
        return Phase(
            "load",
            {"weights": self.weight_bytes, "merging": self.merge_bytes, "factors": factors},
        )

    def forward(self, batch: int, extra_weights: int = 0) -> Phase:
        """All windows through the block, ``batch`` at a time.

        A pivoted linear concatenates and permutes its output: then activations count twice.
        """
        twice = 2 if extra_weights else 1
        return Phase(
            "propagate",
            {
                "weights": self.weight_bytes,
                "factors": extra_weights,
                "activations": twice * self._activations(batch),
            },
        )

    def observe(self, batch: int, moments: int, factors: int = 0) -> Phase:
        """All windows through the block, ``batch`` at a time, into ``moments`` bytes of moments."""
        return Phase(
            "observe",
            {
                "weights": self.weight_bytes,
                "moments": moments,
                "factors": factors,
                "activations": self._activations(batch) + self._cast_bytes(batch),
            },
        )

    def reverse(self, batch: int, run_dtype: torch.dtype, moments: int) -> Phase:
        """Forward and backward of ``batch`` windows, in ``run_dtype``, into ``moments`` bytes.

        The incoming gradient, the input, its gradient and the products with W^T are held too.
        """
        wider = run_dtype.itemsize / self.stream.dtype.itemsize
        states = 4 * self.stream.window_bytes
        return Phase(
            "reverse",
            {
                "weights": self._cast_weights(run_dtype),
                "moments": moments,
                "activations": int(wider * batch * (self.autograd_bytes + states))
                + 2 * self._cast_bytes(batch)
                + self._cast_calls(run_dtype),
            },
        )

    def decompose(
        self,
        linear: Site,
        group: MomentGroup,
        moments: int,
        dropped: int,
        *,
        swsc: bool = False,
        metric: bool = True,
        damped: bool = False,
        centred: bool = False,
    ) -> Phase:
        """One decomposition; ``moments`` bytes of them are there, ``dropped`` of weights not.

        ``swsc`` shares channels, in the ``metric`` of the inputs or in none.
        The outputs' moment is ``damped`` where the recipe says so, or tokens are few. ``centred``
        makes a copy in fp64.
        """
        if swsc:
            work = sharing_bytes(linear.rows, linear.columns, metric=metric)
        else:
            work = decomposition_bytes(
                linear.rows,
                linear.columns,
                group.side,
                self.stream.dtype,
                gradients=group.gradients,
                damped=damped or linear.tokens(self.stream.tokens) < linear.rows,
            )
            work += _F64 * group.size**2 if centred else 0
        parts = {"weights": self.weight_bytes - dropped, "moments": moments, "decomposition": work}
        return Phase(f"decompose {linear.name}", parts)

    def factorize(
        self, linear: Site, rank: int, form: str, held: int, factors: int, dropped: int
    ) -> Phase:
        """Factors of one linear, ``held`` bytes of moments or bases and ``factors`` beside it.

        ``dropped`` bytes of weights are gone before.
        """
        return Phase(
            f"factorize {linear.name}",
            {
                "weights": self.weight_bytes - dropped,
                "moments": held,
                "factors": factors,
                "decomposition": factorization_bytes(
                    linear.rows, linear.columns, rank, form, self.stream.dtype
                ),
            },
        )

    def update(self, batch: int, ranks: Mapping[Site, int], factors: int) -> Phase:
        """Both blocks over ``batch`` windows, the outputs of all linears, r x r and m x r sums.

        Then the largest of the refits, in fp64.
        """
        item = moment_dtype(self.stream.dtype).itemsize
        sums = sum(r * r + linear.rows * r for linear, r in ranks.items()) * item
        tokens = batch * self.stream.seq_len
        outputs = sum(linear.rows * linear.tokens(tokens) for linear in ranks)
        outputs *= self.stream.dtype.itemsize
        refit = max((3 * (r * r + m.rows * r) * _F64 for m, r in ranks.items()), default=0)
        return Phase(
            "update",
            {
                "weights": self.weight_bytes,
                "factors": factors,
                "moments": sums,
                "activations": 2 * self._activations(batch) + outputs + refit,
            },
        )

    def refine(self, ranks: Mapping[Site, int], form: str, factors: int) -> list[Phase]:
        """Training both factors U and V of each linear, and bringing them back to their form.

        With their gradient, momentum, the best so far and the rounded copies, all in fp32 at
        least, and Muon's work on the largest factor; then with gradient and best, beside one
        product's decomposition in fp64.
        """
        item = max(4, self.stream.dtype.itemsize)
        numbers = sum(rank * (linear.rows + linear.columns) for linear, rank in ranks.items())
        states = 6 * self.stream.window_bytes
        run_dtype = gradient_dtype(self.stream.dtype)
        factors = factors * run_dtype.itemsize // self.stream.dtype.itemsize
        held = {
            "weights": self._cast_weights(run_dtype),
            "moments": 3 * self.output_gradient_bytes,
        }
        activations = 2 * (self.autograd_bytes + states) * self._widening
        activations += self._cast_calls(run_dtype)
        balanced = (
            max(
                _F64 * (3 * r * (m.rows + m.columns) + 5 * r * r),
                factorization_bytes(m.rows, m.columns, r, form, self.stream.dtype),
            )
            for m, r in ranks.items()
        )
        largest = max((rank * max(m.rows, m.columns) for m, rank in ranks.items()), default=0)
        trained = item * (5 * numbers + 3 * largest)
        training = {"factors": factors + trained, "activations": activations}
        return [
            Phase("refine", held | training),
            Phase(
                "convert",
                held
                | {
                    "factors": 2 * factors + 3 * item * numbers,
                    "decomposition": max(balanced, default=0),
                },
            ),
        ]

    def write(self, factors: int) -> Phase:
        return Phase("write", {"factors": factors, "buffers": COPY_BYTES})

    # -- what they are made of -----------------------------------------------------------

    @property
    def moment_bytes(self) -> int:
        return sum(group.nbytes(self.stream.dtype) for group in self.groups)

    @property
    def output_gradient_bytes(self) -> int:
        """The moment of the gradient of the block's output."""
        return self.stream.hidden**2 * moment_dtype(self.stream.dtype).itemsize

    def _cast_weights(self, run_dtype: torch.dtype) -> int:
        """The block's weights, and once more where they are cast to a wider ``run_dtype``."""
        wider = run_dtype.itemsize / self.stream.dtype.itemsize
        return self.weight_bytes + (int(wider * self.weight_bytes) if wider > 1 else 0)

    def _cast_calls(self, run_dtype: torch.dtype) -> int:
        """Those of one block cast to a wider ``run_dtype``; at most all."""
        wider = run_dtype.itemsize / self.stream.dtype.itemsize
        return int(wider * self.call_bytes) if wider > 1 else 0

    @property
    def _widening(self) -> int:
        """By how much fp32 is wider than the model's dtype."""
        return max(1, 4 // self.stream.dtype.itemsize)

    def _activations(self, batch: int) -> int:
        return batch * (self.activation_bytes + self.stream.window_bytes)

    def _cast_bytes(self, batch: int) -> int:
        """Rows that a moment casts and multiplies at a time."""
        widest = max((group.size for group in self.groups), default=0)
        rows = min(ROWS_PER_UPDATE, batch * self.stream.seq_len)
        return 2 * rows * widest * moment_dtype(self.stream.dtype).itemsize


def decomposition_bytes(
    rows: int,
    columns: int,
    side: str,
    dtype: torch.dtype,
    *,
    gradients: bool = False,
    damped: bool = False,
) -> int:
    """Peak of ``linalg.low_rank.decompose_*`` beside the weight and its moments.

    Bytes per entry of the small matrix: ``eigh`` 24 in fp64, 12 in fp32, and 8 for the Cholesky
    factor beside it where there is one; before it that, the result and what it is made of. For
    a fp64 weight K is kept beside it where it was computed from H, or ``damped``, for others in its
    own dtype where it came as that of the outputs and was ``damped``. Beside them
    ``PANEL`` rows of the moment, and three times as many of the weight, or of the products.
    """
    small = min(rows, columns)
    narrow = solve_dtype(dtype) == torch.float32 and small >= SMALL
    solver = 12 if narrow else 24
    if rows > columns:
        entry = max(24, 8 + solver)
    else:
        own = 8 if damped or side == "inputs" else 0
        factor = 8 if gradients else 0
        copied = moment_dtype(dtype).itemsize if damped and side == "outputs" else 0
        kept = own if solve_dtype(dtype) == torch.float64 else copied
        entry = max(2 * own, own + factor + 8, kept + factor + solver)
        if damped:
            entry = max(entry, own + factor + 12)
    wide = columns if side == "inputs" else small if gradients else 0
    rows = min(PANEL, small)
    panels = wide * (3 * rows + min(PANEL, wide)) + (2 * small * rows if narrow else 0)
    return entry * small * small + _F64 * panels


def analysis_bytes(rows: int, columns: int, gradients: bool, dtype: torch.dtype) -> int:
    """Spectrum in fp64 and one or two bases in ``dtype``, of one linear."""
    side = min(rows, columns)
    bases = 2 if gradients or rows > columns else 1
    return side * (_F64 + dtype.itemsize * side * bases)


def sharing_bytes(rows: int, columns: int, *, metric: bool = True) -> int:
    """Peak of ``linalg.channel_sharing.share_channels``: eight copies of the weight in fp64.

    And the decomposition of the error on its smaller side, and twice the moment of the inputs where
    that is the ``metric``.
    """
    side = min(rows, columns)
    moments = 2 * columns * columns if metric else 0
    return (8 * rows * columns + moments + 6 * side * side) * _F64


def factorization_bytes(rows: int, columns: int, rank: int, form: str, dtype: torch.dtype) -> int:
    """Peak of ``Decomposition.factors`` and ``methods.factors.factor_tensors`` beside the bases.

    Both factors and the rounded right one; beside them three r x r matrices in LU or in the fit,
    and panels, or the rounded left one twice.
    """
    longest, wide = max(rows, columns), solve_dtype(dtype).itemsize
    working = wide * (3 * rank * rank + 2 * min(PANEL, longest) * longest)
    held = rank * (wide * (rows + columns) + dtype.itemsize * columns)
    return held + max(working, dtype.itemsize * 2 * rows * rank)


def embed_bytes(stream: StreamShape, batch: int, vocabulary: int, record_bytes: int) -> int:
    """One row per distinct token, in the disk's dtype and the model's, and the states four times.

    Beside them ``record_bytes`` a window, of which its masks are made. Before it, the weights
    outside of the blocks are checked, ``COPY_BYTES`` at a time.
    """
    row = stream.hidden * stream.dtype.itemsize
    distinct = min(vocabulary, batch * stream.seq_len)
    embedded = 2 * distinct * row + batch * (4 * stream.window_bytes + record_bytes)
    return max(3 * COPY_BYTES, embedded)


def head_bytes(head_weight_bytes: int, vocabulary: int, tokens: int) -> int:
    """The head, and logits of ``tokens`` in the model's dtype and twice fp32.

    ``head_weight_bytes`` counts it as it is read and as it runs, where these differ.
    """
    return head_weight_bytes + 3 * 4 * tokens * vocabulary


def head_gradient_bytes(
    head_weight_bytes: int, vocabulary: int, tokens: int, window_bytes: int
) -> int:
    """As :func:`head_bytes`, with the logits' gradients, and three windows of hidden states.

    Logits that are scaled or softly capped are kept for the backward: one more copy.
    """
    return head_weight_bytes + 5 * 4 * tokens * vocabulary + 3 * window_bytes


def tokenize_bytes(tokenizer_file_bytes: int, windows: int, seq_len: int) -> int:
    """The tokenizer, one piece of text with its records, and the tokens."""
    return _TOKENIZER_FACTOR * tokenizer_file_bytes + _PIECE_BYTES + 4 * 4 * windows * seq_len


def moment_products(group: MomentGroup) -> float:
    """Operations per token of the moments of ``group``: the lower half, in panels."""
    sizes = [group.size]
    sizes += [min(m.rows, m.columns) for m in group.sites] if group.gradients else []
    return float(sum(size * (size + panel_of(size)) for size in sizes))


def decomposition_flops(
    rows: int, columns: int, side: str, gradients: bool = False
) -> dict[str, float]:
    """Floating-point operations of one linear, beside those of its eigenvectors, by their rate.

    Rates are fields of ``MachineRates``. Products of symmetric matrices count their lower half,
    those of triangles what is not zero.
    """
    small = min(rows, columns)
    flops = {"moment_flops": 0.0, "wide_flops": 0.0, "solve_flops": 0.0}
    if rows > columns:
        flops["moment_flops"] += rows * columns**2  # W^T W
    elif side == "inputs":
        flops["wide_flops"] += 2.0 * rows * columns**2 + rows**2 * columns  # W H W^T
    if rows > columns or gradients:
        flops["wide_flops"] += (1 / 3 + 1 + 1) * small**3  # Cholesky, L^T M L, one basis
        flops["solve_flops"] += small**3  # the other one
    return flops


def factorization_flops(rows: int, columns: int, rank: int, form: str) -> dict[str, float]:
    """The same of its factors at ``rank``, as ``form`` stores them."""
    solving = 2.0 * rows * columns * rank + 7 / 3 * rank**3  # the product, and the fit's solution
    fitted = rows
    if form == "pivot":  # LU, coefficients, pivot rows
        fitted = rows - rank
        solving += (rows + fitted + 2 * columns) * rank**2 + 5 / 3 * rank**3
    return {
        "moment_flops": (3.0 * columns + 2.0 * fitted) * rank**2,  # the fit's products
        "solve_flops": solving,
    }


def muon_flops(rows: int, columns: int, rank: int) -> float:
    """Of one step of Muon on both factors: five Newton-Schulz iterations each, in bf16."""
    return 5 * (4.0 * (rows + columns) * rank**2 + 4.0 * rank**3)


def gradient_dtype(dtype: torch.dtype) -> torch.dtype:
    """What a backward runs in: fp16 is too narrow for gradients, they take fp32."""
    return torch.float32 if dtype == torch.float16 else dtype
