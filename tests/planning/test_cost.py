"""The formulas of the workspaces against what this machine's LAPACK really takes."""

from __future__ import annotations

import itertools
import json

import pytest
import torch

from streamcomp.linalg.allocation import largest_rank
from streamcomp.linalg.symmetric import solve_dtype
from streamcomp.modeling.modules import FORMS as BY_RANK
from streamcomp.planning.cost import (
    analysis_bytes,
    decomposition_bytes,
    factorization_bytes,
    sharing_bytes,
)
from tests.jobs import REPOSITORY, run_python

MiB = 2**20
SHAPES = [(256, 256), (512, 512), (1024, 1024), (1536, 512), (512, 1536), (256, 1024), (2560, 640)]
# The moment of the outputs is taken where they are fewer.
PARTS = [
    (shape, side)
    for shape in SHAPES
    for side in (("inputs",) if shape[0] >= shape[1] else ("inputs", "outputs"))
]
# Code of the libraries read at a size that the warming up did not have, and gaps of the heap.
LATE = 8 * MiB

# Measures each part in a fork of its own: bytes above what was resident before it.
MEASURE = """
import json, os, sys
import torch
from streamcomp.linalg.low_rank import decompose_weight
from streamcomp.methods import GradientMoment, Moment, factor_tensors, find_method
from streamcomp.planning.meter import PeakMeter, release, resident_bytes, settle, warm_up

torch.set_num_threads(1)
settle()
warm_up(torch.device("cpu"), torch.float32)
meter = PeakMeter()
assert meter._exact

def measure(rows, columns, rank, form, side, method, dtype):
    once(rows // 4, columns // 4, rank // 4, form, side, method, dtype)  # the libraries' code
    return once(rows, columns, rank, form, side, method, dtype)

def once(rows, columns, rank, form, side, method, dtype):
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
        found.share(weight, Moment(side, moment), rows * columns // 2, dtype=dtype)
        return meter.peak() - before, 0
    if method == "no data":
        found = decompose_weight(weight)
    else:
        total = torch.ones(len(moment)) if method == "rom" else None
        moment = Moment(side, moment, 10 * rows, total, gradient)
        found = found.decompose(weight, moment, 0.01 if method == "damped" else 0.0)
    decomposed = meter.peak() - before
    release()
    meter.restart()
    held = factor_tensors(form, *found.factors(weight, rank), dtype)
    return decomposed, meter.peak() - before

results = []
for part in json.loads(sys.argv[1]):
    reader, writer = os.pipe()
    if (child := os.fork()) == 0:
        os.close(reader)
        with os.fdopen(writer, "w") as file:
            json.dump(measure(*part), file)
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as file:
        text = file.read()
    assert os.waitpid(child, 0)[1] == 0, part
    results.append(json.loads(text))
print(json.dumps(results))
"""

METHODS = ("svd-llm", "two-sided")  # with the moments of the gradients, or without

DTYPES = ("float32", "bfloat16")  # solved in fp64, or in fp32

Key = tuple[tuple[int, int], str, str, str, str]


def rank_of(shape: tuple[int, int], form: str) -> int:
    """The rank of a ratio of 0.2."""
    return largest_rank(form, *shape, 0.8 * shape[0] * shape[1])


@pytest.fixture(scope="module")
def measured() -> dict[Key, tuple[int, int]]:
    """Bytes of the decomposition and of the factorization, by what they depend on."""
    keys: list[Key] = [
        (*part, *others) for part, *others in itertools.product(PARTS, BY_RANK, METHODS, DTYPES)
    ]
    parts = [
        [*shape, rank_of(shape, form), form, side, method, dtype]
        for shape, side, form, method, dtype in keys
    ]
    done = run_python("-c", MEASURE, json.dumps(parts), cwd=REPOSITORY)
    assert done.code == 0, done.err
    return {key: (int(a), int(b)) for key, (a, b) in zip(keys, done.json, strict=True)}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("shape", "side"), PARTS)
def test_a_decomposition_takes_what_was_counted_and_not_much_less(
    measured: dict[Key, tuple[int, int]],
    shape: tuple[int, int],
    side: str,
    method: str,
    dtype: str,
) -> None:
    two_sided = method == "two-sided"
    counted = decomposition_bytes(*shape, side, getattr(torch, dtype), gradients=two_sided)
    taken = measured[shape, side, "pivot", method, dtype][0]

    assert taken <= counted + LATE
    assert counted <= 2 * taken + 16 * MiB


def test_damping_centring_and_want_of_data_take_what_was_counted() -> None:
    shapes = [(1536, 512), (512, 1536), (1536, 1536)]
    kinds = [
        (shape, side, method, dtype)
        for (shape, side), method, dtype in itertools.product(
            [*itertools.product(shapes, ("inputs", "outputs"))],
            ("damped", "rom", "no data"),
            DTYPES,
        )
        if (shape[0] <= shape[1] or side == "inputs") and (method, side) != ("no data", "outputs")
    ]
    parts = [[*shape, 8, "uv", side, method, dtype] for shape, side, method, dtype in kinds]
    done = run_python("-c", MEASURE, json.dumps(parts), cwd=REPOSITORY)
    assert done.code == 0, done.err

    for (shape, side, method, dtype), (taken, _) in zip(kinds, done.json, strict=True):
        kind = getattr(torch, dtype)
        counted = decomposition_bytes(*shape, side, kind, damped=method == "damped")
        size = shape[1] if side == "inputs" else shape[0]
        counted += 8 * size**2 if method == "rom" else 0
        # more routines, and so more late code, than the parts above; a copy of 1536^2 shows
        assert 0 < taken <= counted + 2 * LATE, (shape, side, method, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("form", BY_RANK)
@pytest.mark.parametrize(("shape", "side"), PARTS)
def test_a_factorization_takes_what_was_counted_and_not_much_less(
    measured: dict[Key, tuple[int, int]],
    shape: tuple[int, int],
    side: str,
    form: str,
    method: str,
    dtype: str,
) -> None:
    kind = getattr(torch, dtype)
    counted = factorization_bytes(*shape, rank_of(shape, form), form, kind)
    counted += analysis_bytes(*shape, method == "two-sided", solve_dtype(kind))
    taken = measured[shape, side, form, method, dtype][1]

    assert taken <= counted + LATE
    assert counted <= 2 * taken + 16 * MiB


@pytest.mark.parametrize("shape", [(512, 512), (768, 256), (256, 768)])
def test_sharing_channels_takes_what_was_counted(shape: tuple[int, int]) -> None:
    parts = [[*shape, 0, "shared", "inputs", "swsc", "float32"]]
    done = run_python("-c", MEASURE, json.dumps(parts), cwd=REPOSITORY)
    assert done.code == 0, done.err
    ((taken, _),) = done.json

    assert 0 < taken <= sharing_bytes(*shape) + LATE
