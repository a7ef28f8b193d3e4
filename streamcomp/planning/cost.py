"""Bytes that each kind of step holds at its peak, beside the interpreter and its libraries.

Every formula counts what the code it names keeps alive, from shapes alone; the LAPACK
workspaces among them were measured (``eigh`` holds three further matrices beside its input,
``lu_factor`` a copy). Bytes are of the host, or of the device where a step computes there.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from streamcomp.calibration.hidden_states import StreamShape
from streamcomp.calibration.observe import MomentGroup, moment_dtype
from streamcomp.checkpoint.reader import COPY_BYTES
from streamcomp.linalg.allocation import stored_numbers
from streamcomp.linalg.low_rank import ROWS_AT_ONCE
from streamcomp.linalg.moments import ROWS_PER_UPDATE

__all__ = [
    "LATE_BYTES",
    "BlockCost",
    "Phase",
    "decomposition_bytes",
    "decomposition_flops",
    "embed_bytes",
    "factorization_bytes",
    "head_bytes",
    "tokenize_bytes",
]

_F64 = 8
# Libraries and allocator slack that come after the baseline was measured.
LATE_BYTES = 48 * 2**20
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
    stream: StreamShape
    groups: tuple[MomentGroup, ...]
    ranks: Mapping[str, int | None]  # by full name; None = dense
    form: str

    def phases(self, batch: int, *, propagates_factors: bool) -> list[Phase]:
        """The block's phases with ``batch`` windows per forward, in running order."""
        moments = sum(group.nbytes(self.stream.dtype) for group in self.groups)
        activations = batch * (self.activation_bytes + self.stream.window_bytes)
        widest = max((group.size for group in self.groups), default=0)
        rows = min(ROWS_PER_UPDATE, batch * self.stream.seq_len)
        cast = 2 * rows * widest * moment_dtype(self.stream.dtype).itemsize
        phases = [
            Phase("load", {"weights": self.weight_bytes, "merging": self.merge_bytes}),
            Phase(
                "observe",
                {
                    "weights": self.weight_bytes,
                    "moments": moments,
                    "activations": activations + cast,
                },
            ),
        ]
        factors = 0
        for group in self.groups:
            for linear in group.linears:
                rank = self.ranks[linear.full_name]
                if rank is None:
                    continue
                itemsize = self.stream.dtype.itemsize
                work = max(
                    decomposition_bytes(linear.rows, linear.columns, group.side),
                    factorization_bytes(linear.rows, linear.columns, rank, self.form),
                )
                phases.append(
                    Phase(
                        f"factorize {linear.name}",
                        {
                            "weights": self.weight_bytes,
                            "moments": moments,
                            "factors": factors,
                            "decomposition": work,
                        },
                    )
                )
                factors += itemsize * stored_numbers(self.form, linear.rows, linear.columns, rank)
                factors += 4 * linear.rows  # pivots
            moments -= group.nbytes(self.stream.dtype)
        if propagates_factors:
            phases.append(
                Phase(
                    "propagate",
                    # a pivoted linear concatenates and permutes its output
                    {
                        "weights": self.weight_bytes + factors,
                        "activations": 2 * activations,
                    },
                )
            )
        phases.append(
            Phase(
                "write", {"weights": self.weight_bytes, "factors": factors, "buffers": COPY_BYTES}
            )
        )
        return phases


def decomposition_bytes(rows: int, columns: int, side: str) -> int:
    """Peak of ``linalg.low_rank.decompose_*`` beside the weight and its fp32 moment.

    Outputs: K, and three more m x m in eigh. Inputs with m > n: L, the small matrix, and
    three more n x n in eigh, or H, W^T W and two products before it. Inputs with m <= n: the
    weight, H and their product in fp64, then as for outputs.
    """
    if side == "outputs":
        return 4 * rows * rows * _F64
    chunk = min(ROWS_AT_ONCE, rows) * columns
    if rows > columns:
        return (5 * columns * columns + chunk) * _F64
    product = 2 * rows * columns + columns * columns + rows * rows
    return max(product, 4 * rows * rows) * _F64


def factorization_bytes(rows: int, columns: int, rank: int, form: str) -> int:
    """Peak of ``Decomposition.basis`` and ``methods.factors.factor_tensors``.

    The eigenvectors stay; beside them the basis and V in fp64, then for ``pivot`` two copies
    of the basis and the coefficients during LU, and for either form the fit of the left one.
    """
    side = min(rows, columns)
    basis = rows * rank if rows > columns else 0
    held = side * side + basis + rank * columns
    rest = rows - rank if form == "pivot" else rows
    chunk = min(ROWS_AT_ONCE, rows) * max(columns, rank)
    pivoted = form == "pivot"  # keeps the pivot rows and the coefficients while it fits
    fit = (3 if pivoted else 2) * rank * columns + 4 * rank * rank
    fit += (13 if pivoted else 9) * rest * rank // 4
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


def tokenize_bytes(tokenizer_file_bytes: int, windows: int, seq_len: int) -> int:
    """The tokenizer, one piece of text with its records, and the tokens."""
    return _TOKENIZER_FACTOR * tokenizer_file_bytes + _PIECE_BYTES + 4 * 4 * windows * seq_len


def decomposition_flops(rows: int, columns: int, rank: int, side: str) -> float:
    """Floating-point operations in fp64 of one linear: eigh counts 9 n^3, the rest products."""
    small = min(rows, columns)
    gram = 0.0
    if side == "inputs":
        gram = 2.0 * rows * columns * columns + 2.0 * small * small * max(rows, columns)
    return 9.0 * small**3 + gram + 6.0 * rows * columns * rank
