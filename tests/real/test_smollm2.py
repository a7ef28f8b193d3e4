"""A real model, from its PyPI wheel, through the command line under a tight budget."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

REPOSITORY = Path(__file__).parents[2]
MODEL = REPOSITORY / ".cache" / "SmolLM2-135M"
BUDGET = "700M"


@pytest.fixture(scope="module")
def model() -> Path:
    made = subprocess.run(
        [sys.executable, "benchmarks/smollm2.py", str(MODEL)],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
    )
    if made.returncode:
        pytest.skip(f"the model's wheel cannot be had: {made.stderr.strip()[-200:]}")
    return MODEL


def streamcomp(*arguments: str) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-m", "streamcomp", *arguments, "--max-ram", BUDGET, "--json"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def test_a_real_model_is_compressed_and_evaluated_within_its_budget(
    model: Path, tmp_path: Path
) -> None:
    out = str(tmp_path / "out")

    report = streamcomp("compress", str(model), out, "--samples", "8", "--ratio", "0.1")
    dense = streamcomp("eval", str(model), "--windows", "4")
    compressed = streamcomp("eval", out, "--windows", "4")

    for found in (report["memory"], dense, compressed):
        assert found["peak_bytes"] <= found["predicted_bytes"] <= found["budget_bytes"]
    assert report["model"]["ratio"] == pytest.approx(0.1, abs=0.002)
    assert 5 < dense["perplexity"] < 20
    assert dense["perplexity"] < compressed["perplexity"] < 2 * dense["perplexity"]
