"""The machine's measured rates."""

from __future__ import annotations

import tempfile
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from streamcomp.machine.rates import MachineRates, measure_disk, measure_rates


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_rates_are_measured_for_every_dtype(dtype: torch.dtype) -> None:
    rates = measure_rates(torch.device("cpu"), dtype)

    measured = asdict(rates)
    del measured["disk_bytes"]
    assert all(1e6 < rate < 1e16 for rate in measured.values())


@pytest.mark.parametrize(
    ("size", "seconds"), [(1023, 9 * 1023**3 / 5.0), (1024, 9 * 1024**3 / 6.0)]
)
def test_large_matrices_have_a_rate_of_their_own(size: int, seconds: float) -> None:
    assert MachineRates(1.0, 2.0, 3.0, 4.0, 5.0, 6.0).eigh_seconds(size) == seconds


def test_the_disk_is_measured_above_a_folder_that_is_not_there_yet(tmp_path: Path) -> None:
    assert measure_disk(tmp_path / "out" / "work") > 0
    assert not list(tmp_path.iterdir())


def test_a_disk_that_takes_nothing_has_a_usual_rate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(**_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tempfile, "TemporaryFile", refuse)

    assert measure_disk(tmp_path) == MachineRates(1.0, 1.0, 1.0, 1.0, 1.0, 1.0).disk_bytes
