"""Reports made by hand, as small as a test needs them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from streamcomp.job.rows import (
    JobLevers,
    LinearRow,
    MemoryFigures,
    ModelFigures,
    Report,
    StepRow,
)
from streamcomp.machine.rates import MachineRates

MIB = 2**20

RATES = MachineRates(
    model_flops=7e11,
    moment_flops=1.6e11,
    solve_flops=1.7e11,
    wide_flops=8e10,
    small_eigh_flops=4e10,
    eigh_flops=5e10,
    disk_bytes=5e8,
)
MODEL = ModelFigures(
    source="pico",
    type="llama",
    linear_parameters=8_000_000,
    linear_parameters_kept=6_000_000,
    ratio=0.25,
    parameters=10_000_000,
    parameters_kept=8_000_000,
    model_ratio=0.2,
    bytes=20_000_000,
    bytes_kept=16_000_000,
)
MEMORY = MemoryFigures(
    budget_bytes=1024 * MIB,
    minimum_bytes=350 * MIB,
    predicted_bytes=400 * MIB,
    peak_bytes=300 * MIB,
)


def linear(name: str, relative_loss: float = 0.01, **more: Any) -> LinearRow:
    """With a decomposition that went well; ``more`` are further fields."""
    row = LinearRow(
        name=name,
        rows=64,
        columns=32,
        energy=1.0,
        damping=0.0,
        condition=10.0,
        fallback="",
        rank=12,
        relative_loss=relative_loss,
        spec={},
    )
    return replace(row, **more)


def step(name: str, peak: int = 300 * MIB, **more: Any) -> StepRow:
    row = StepRow(
        step=name,
        seconds=1.5,
        stages={"loading": 0.5, "observing": 1.0},
        limits={},
        peak_bytes=peak,
        predicted_bytes=400 * MIB,
    )
    return replace(row, **more)


def report(linears: list[LinearRow] | None = None, blocks: int = 2, **more: Any) -> Report:
    """By default of a model of so many ``blocks``, one-sided; ``more`` are further fields."""
    if linears is None:
        names = ("self_attn.q_proj", "mlp.down_proj")
        linears = [linear(f"model.layers.{n}.{name}") for n in range(blocks) for name in names]
    made = Report(
        model=MODEL,
        memory=MEMORY,
        seconds=12.5,
        stages={},
        limits={},
        rates=RATES,
        windows=8,
        recipe={"method": "svd-llm"},
        levers=JobLevers(1, 1, 1, 1, 1, 1, 1, "cpu", False, False),
        fingerprint={},
        versions={},
        notes=(),
        linears=tuple(linears),
        dense=(),
        refined=(),
        left={},
        steps=(step("tokenize"), *(step(f"block {n}") for n in range(blocks))),
    )
    return replace(made, **more)
