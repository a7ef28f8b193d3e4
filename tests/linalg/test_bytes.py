"""The formulas of the workspaces against what this machine's LAPACK really takes."""

from __future__ import annotations

import itertools
import json
from dataclasses import dataclass

import pytest
import torch

from streamcomp.forms import find_form
from streamcomp.linalg.channel_sharing import sharing_bytes
from streamcomp.linalg.dtypes import solve_dtype
from streamcomp.linalg.low_rank import basis_bytes, decomposition_bytes
from streamcomp.machine.memory import PeakMeter
from tests.jobs import REPOSITORY, run_python

pytestmark = pytest.mark.skipif(not PeakMeter.reset_mark(), reason="this kernel tells no peak")

MiB = 2**20
SHAPES = [(256, 256), (512, 512), (1024, 1024), (1536, 512), (512, 1536), (256, 1024), (2560, 640)]
# The moment of the outputs is taken where they are fewer.
PARTS = [
    (shape, side)
    for shape in SHAPES
    for side in (("inputs",) if shape[0] >= shape[1] else ("inputs", "outputs"))
]
# A page here and there.
ROUNDING = MiB

# Measures each part in a fork of its own: bytes above what was resident before it, the second
# time. The first one reads the libraries' code, and makes the buffers that they keep. Tensors
# are mapped and returned one by one: gaps of the heap and large pages are no part of a formula.
# Prints what products take and give back on this machine, then the results.
MEASURE = """
import ctypes, json, sys
import torch
from streamcomp.linalg.low_rank import decompose_weight
from streamcomp.forms import Allowance, find_form
from streamcomp.methods import GradientMoment, Moment, find_method
from streamcomp.recipe import Recipe
from streamcomp.machine.allocator import release, settled
from streamcomp.machine.kernels import warm_up
from streamcomp.machine.memory import PeakMeter, resident_bytes
from tests.forks import in_a_fork
from tests.methods.sites import Place

SMALL_PAGES, MAPPED_FROM = (41, 1, 0, 0, 0), (-3, 64 * 2**10)  # prctl, mallopt
torch.set_num_threads(1)
settled().__enter__()
libc = ctypes.CDLL(None)
libc.prctl(*SMALL_PAGES)
libc.mallopt(*MAPPED_FROM)
kernels = {d: warm_up(torch.device("cpu"), getattr(torch, d)) for d in ("float32", "bfloat16")}
meter = PeakMeter()

def measure(*part):
    once(*part)
    return once(*part)

def taken(before):
    return meter.peak() - before

def once(rows, columns, ranks, side, method, dtype):
    random, dtype = torch.Generator().manual_seed(0), getattr(torch, dtype)
    weight = torch.randn(rows, columns, generator=random).to(dtype)
    moment = torch.eye(columns if side == "inputs" else rows) + 0.1
    gradient = None
    if method == "two-sided":
        gradient = GradientMoment(torch.eye(min(rows, columns)) + 0.1, 1.0 * rows)
    release()
    meter.restart()
    before = resident_bytes()
    found = find_method({"damped": "svd-llm", "no data": "svd-llm"}.get(method, method))
    if method == "swsc":
        recipe, allowance = Recipe(method=method), Allowance(1, rows * columns // 2)
        found.compress(Place(rows, columns, dtype), weight, Moment(side, moment), allowance, recipe)
        return [taken(before)]
    if method == "no data":
        found = decompose_weight(weight)
    else:
        moment = Moment(side, moment, 10 * rows, gradient)
        found = found.decompose(weight, moment, 0.01 if method == "damped" else 0.0)
    results = [taken(before)]
    for form, rank in ranks.items():
        release()
        meter.restart()
        held = find_form(form)().encode(*found.factors(weight, rank), dtype)
        results.append(taken(before))
        held = None
    return results

results = [in_a_fork(measure, *part) for part in json.loads(sys.argv[1])]
print(json.dumps([kernels, results]))
"""

METHODS = ("svd-llm", "two-sided")  # with the moments of the gradients, or without

FORMS = ("uv", "pivot")

DTYPES = ("float32", "bfloat16")  # solved in fp64, or in fp32

Key = tuple[tuple[int, int], str, str, str]  # shape, side, method, dtype


@dataclass(frozen=True)
class Measured:
    """What parts took, and what products take on this machine beside their operands."""

    kernels: dict[str, int]
    parts: dict[Key, list[int]]  # of the decomposition, and of the factors in each form

    def fits(self, taken: int, counted: int, dtype: str) -> bool:
        """Whether a formula counts all that this took."""
        return 0 < taken <= counted + self.kernels[dtype] + ROUNDING


def rank_of(shape: tuple[int, int], form: str) -> int:
    """The rank of a ratio of 0.2."""
    return find_form(form)().largest_rank(*shape, 0.8 * shape[0] * shape[1])


def measure(keys: list[Key], forms: tuple[str, ...] = ()) -> Measured:
    parts = [
        [*shape, {form: rank_of(shape, form) for form in forms}, side, method, dtype]
        for shape, side, method, dtype in keys
    ]
    done = run_python("-c", MEASURE, json.dumps(parts), cwd=REPOSITORY)
    assert done.code == 0, done.err
    kernels, found = done.json
    return Measured(kernels, dict(zip(keys, found, strict=True)))


@pytest.fixture(scope="module")
def measured() -> Measured:
    """The decomposition and the factors in all forms, by what they depend on."""
    return measure(
        [
            (*part, method, dtype)
            for part, method, dtype in itertools.product(PARTS, METHODS, DTYPES)
        ],
        FORMS,
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("shape", "side"), PARTS)
def test_a_decomposition_takes_what_was_counted_and_not_much_less(
    measured: Measured, shape: tuple[int, int], side: str, method: str, dtype: str
) -> None:
    two_sided = method == "two-sided"
    counted = decomposition_bytes(*shape, side, getattr(torch, dtype), gradients=two_sided)
    taken = measured.parts[shape, side, method, dtype][0]

    assert measured.fits(taken, counted, dtype)
    assert counted <= 2 * taken + 16 * MiB


def test_damping_centring_and_want_of_data_take_what_was_counted() -> None:
    shapes = [(1024, 512), (512, 1024), (1024, 1024)]
    measured = measure(
        [
            (shape, side, method, dtype)
            for shape, side, method, dtype in itertools.product(
                shapes, ("inputs", "outputs"), ("damped", "rom", "no data"), DTYPES
            )
            if (shape[0] <= shape[1] or side == "inputs")
            and (method, side) != ("no data", "outputs")
        ]
    )

    for (shape, side, method, dtype), (taken,) in measured.parts.items():
        kind = getattr(torch, dtype)
        counted = decomposition_bytes(*shape, side, kind, damped=method == "damped")
        size = shape[1] if side == "inputs" else shape[0]
        counted += 8 * size**2 if method == "rom" else 0
        assert measured.fits(taken, counted, dtype), (shape, side, method, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("shape", "side"), PARTS)
def test_a_factorization_takes_what_was_counted_and_not_much_less(
    measured: Measured, shape: tuple[int, int], side: str, form: str, method: str, dtype: str
) -> None:
    kind = getattr(torch, dtype)
    counted = find_form(form)().encoding_bytes(*shape, rank_of(shape, form), kind)
    counted += basis_bytes(*shape, solve_dtype(kind), gradients=method == "two-sided")
    taken = measured.parts[shape, side, method, dtype][1 + FORMS.index(form)]

    assert measured.fits(taken, counted, dtype)
    assert counted <= 2 * taken + 16 * MiB


def test_sharing_channels_takes_what_was_counted() -> None:
    shapes = [(384, 384), (768, 256), (256, 768)]
    measured = measure([(shape, "inputs", "swsc", "float32") for shape in shapes])

    for (shape, _, _, _), (taken,) in measured.parts.items():
        assert measured.fits(taken, sharing_bytes(*shape), "float32"), shape
