"""Bytes that each kind of step holds at its peak, beside the interpreter and its libraries.

Every formula counts what the code it names keeps alive, from shapes alone; the LAPACK
workspaces among them were measured (``eigh`` holds three further matrices beside its input,
``lu_factor`` a copy). Bytes are of the host, or of the device where a step computes there.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from streamcomp.calibration.hidden_states import StreamShape
from streamcomp.calibration.observe import MomentGroup, moment_dtype
from streamcomp.checkpoint.reader import COPY_BYTES
from streamcomp.linalg.low_rank import ROWS_AT_ONCE
from streamcomp.linalg.moments import ROWS_PER_UPDATE
from streamcomp.modeling.linears import Linear

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
    "head_bytes",
    "head_gradient_bytes",
    "sharing_bytes",
    "tokenize_bytes",
]

_F64 = 8
# Libraries and allocator slack that come after the baseline was measured.
LATE_BYTES = 56 * 2**20
# A tokenizer in memory, per byte of its file, and the records of one piece of text.
_TOKENIZER_FACTOR = 20
_PIECE_BYTES = 48 * 2**20


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

    # -- phases, in the order of a step's own --------------------------------------------

    def load(self) -> Phase:
        return Phase("load", {"weights": self.weight_bytes, "merging": self.merge_bytes})

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

    def observe(self, batch: int) -> Phase:
        return Phase(
            "observe",
            {
                "weights": self.weight_bytes,
                "moments": self.moment_bytes,
                "activations": self._activations(batch) + self._cast_bytes(batch),
            },
        )

    def reverse(self, batch: int, run_dtype: torch.dtype) -> Phase:
        """Forward and backward of ``batch`` windows, in ``run_dtype``, with every moment.

        The incoming gradient, the input, its gradient and the products with W^T are held too.
        """
        wider = run_dtype.itemsize / self.stream.dtype.itemsize
        weights = self.weight_bytes + (int(wider * self.weight_bytes) if wider > 1 else 0)
        states = 4 * self.stream.window_bytes
        return Phase(
            "reverse",
            {
                "weights": weights,
                "moments": self.moment_bytes + self.output_gradient_bytes,
                "activations": int(wider * batch * (self.autograd_bytes + states))
                + 2 * self._cast_bytes(batch),
            },
        )

    def decompose(self, linear: Linear, group: MomentGroup, *, swsc: bool = False) -> Phase:
        """One decomposition while every moment is still there."""
        work = (
            sharing_bytes(linear.rows, linear.columns)
            if swsc
            else decomposition_bytes(linear.rows, linear.columns, group.side, group.gradients)
        )
        return Phase(
            f"decompose {linear.name}",
            {"weights": self.weight_bytes, "moments": self.moment_bytes, "decomposition": work},
        )

    def factorize(self, linear: Linear, rank: int, form: str, held: int, factors: int) -> Phase:
        """Factors of one linear, ``held`` bytes of moments or bases and ``factors`` beside it."""
        return Phase(
            f"factorize {linear.name}",
            {
                "weights": self.weight_bytes,
                "moments": held,
                "factors": factors,
                "decomposition": factorization_bytes(linear.rows, linear.columns, rank, form),
            },
        )

    def update(self, batch: int, ranks: Mapping[Linear, int], factors: int) -> Phase:
        """Both blocks over ``batch`` windows, the outputs of all linears, r x r and m x r sums.

        Then the largest of the refits, in fp64.
        """
        item = moment_dtype(self.stream.dtype).itemsize
        sums = sum(r * r + linear.rows * r for linear, r in ranks.items()) * item
        outputs = sum(linear.rows for linear in ranks) * self.stream.dtype.itemsize
        outputs *= batch * self.stream.seq_len
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

    def refine(self, ranks: Mapping[Linear, int], form: str, factors: int) -> list[Phase]:
        """Training both factors U and V of each linear, and bringing them back to their form.

        With their gradient, AdamW's two moments, the best so far and the rounded copies, all in
        fp32 at least; then with gradient and best, beside one product's decomposition in fp64.
        """
        item = max(4, self.stream.dtype.itemsize)
        numbers = sum(rank * (linear.rows + linear.columns) for linear, rank in ranks.items())
        states = 6 * self.stream.window_bytes
        held = {
            "weights": self.weight_bytes,
            "moments": 3 * self.output_gradient_bytes,
        }
        activations = 2 * (self.autograd_bytes + states) * self._widening
        balanced = (
            max(
                _F64 * (3 * r * (m.rows + m.columns) + 5 * r * r),
                factorization_bytes(m.rows, m.columns, r, form),
            )
            for m, r in ranks.items()
        )
        training = {"factors": factors + 6 * item * numbers, "activations": activations}
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
        return Phase(
            "write", {"weights": self.weight_bytes, "factors": factors, "buffers": COPY_BYTES}
        )

    # -- what they are made of -----------------------------------------------------------

    @property
    def moment_bytes(self) -> int:
        return sum(group.nbytes(self.stream.dtype) for group in self.groups)

    @property
    def output_gradient_bytes(self) -> int:
        """The moment of the gradient of the block's output."""
        return self.stream.hidden**2 * moment_dtype(self.stream.dtype).itemsize

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


def decomposition_bytes(rows: int, columns: int, side: str, gradients: bool = False) -> int:
    """Peak of ``linalg.low_rank.decompose_*`` beside the weight and its fp32 moments.

    Outputs: K, and three more m x m in eigh; two-sided, R and the small matrix as well. Inputs
    with m > n: L, the small matrix, and three more n x n in eigh, or H, W^T W and two products
    before it; two-sided, one more. Inputs with m <= n: the weight, H and their product in fp64,
    then as for outputs.
    """
    outputs = (6 if gradients else 4) * rows * rows
    if side == "outputs":
        return outputs * _F64
    chunk = min(ROWS_AT_ONCE, rows) * columns
    if rows > columns:
        return ((6 if gradients else 5) * columns * columns + chunk) * _F64
    product = 2 * rows * columns + columns * columns + rows * rows
    return max(product, outputs + (2 if gradients else 1) * rows * rows) * _F64


def analysis_bytes(rows: int, columns: int, gradients: bool) -> int:
    """Spectrum in fp64 and one or two bases in fp32, as they are kept of one linear."""
    side = min(rows, columns)
    return side * (_F64 + 4 * side * (2 if gradients else 1))


def sharing_bytes(rows: int, columns: int) -> int:
    """Peak of ``linalg.channel_sharing.share_channels``: eight copies of the weight in fp64.

    And the decomposition of the error on its smaller side.
    """
    side = min(rows, columns)
    return (8 * rows * columns + 2 * columns * columns + 6 * side * side) * _F64


def factorization_bytes(rows: int, columns: int, rank: int, form: str) -> int:
    """Peak of ``Decomposition.factors`` and ``methods.factors.factor_tensors``.

    The eigenvectors stay; beside them both factors in fp64, then for ``pivot`` two copies of the
    left one and the coefficients during LU, and for either form the fit of the left one.
    """
    side = min(rows, columns)
    held = side * side + rows * rank + rank * columns
    rest = rows - rank if form == "pivot" else rows
    chunk = min(ROWS_AT_ONCE, rows) * max(columns, rank)
    pivoted = form == "pivot"  # keeps the pivot rows and the coefficients while it fits
    fit = (3 if pivoted else 4) * rank * columns + 4 * rank * rank
    fit += (13 if pivoted else 17) * rest * rank // 4
    lu = rows * rank + 3 * rest * rank if form == "pivot" else 0
    return (held + max(chunk, lu, fit)) * _F64


def embed_bytes(stream: StreamShape, batch: int, vocabulary: int) -> int:
    """One row per distinct token, in the disk's dtype and the model's, and the states four times.

    Before it, the weights outside of the blocks are checked, ``COPY_BYTES`` at a time.
    """
    row = stream.hidden * stream.dtype.itemsize
    distinct = min(vocabulary, batch * stream.seq_len)
    return max(3 * COPY_BYTES, 2 * distinct * row + 4 * batch * stream.window_bytes)


def head_bytes(head_weight_bytes: int, vocabulary: int, tokens: int) -> int:
    """The head, read and cast, and logits of ``tokens`` in the model's dtype and twice fp32."""
    return 2 * head_weight_bytes + 3 * 4 * tokens * vocabulary


def head_gradient_bytes(
    head_weight_bytes: int, vocabulary: int, tokens: int, window_bytes: int
) -> int:
    """As :func:`head_bytes`, with the logits' gradients, and three windows of hidden states."""
    return 2 * head_weight_bytes + 4 * 4 * tokens * vocabulary + 3 * window_bytes


def tokenize_bytes(tokenizer_file_bytes: int, windows: int, seq_len: int) -> int:
    """The tokenizer, one piece of text with its records, and the tokens."""
    return _TOKENIZER_FACTOR * tokenizer_file_bytes + _PIECE_BYTES + 4 * 4 * windows * seq_len


def decomposition_flops(rows: int, columns: int, side: str) -> float:
    """Floating-point operations in fp64 of one linear: eigh counts 9 n^3, the rest products."""
    small = min(rows, columns)
    gram = 0.0
    if side == "inputs":
        gram = 2.0 * rows * columns * columns + 2.0 * small * small * max(rows, columns)
    return 9.0 * small**3 + gram


def factorization_flops(rows: int, columns: int, rank: int) -> float:
    """The same of its factors at ``rank``."""
    return 6.0 * rows * columns * rank
