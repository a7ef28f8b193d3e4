"""Bytes that products take next to their operands are measured, and only those given back."""

from __future__ import annotations

import pytest
import torch

from streamcomp.machine import kernels
from streamcomp.machine.allocator import settled
from streamcomp.machine.kernels import warm_up
from streamcomp.machine.memory import PeakMeter

MiB = 2**20

needs_a_mark = pytest.mark.skipif(not PeakMeter.reset_mark(), reason="this kernel tells no peak")


def product_bytes() -> int:
    return kernels._product_bytes.__wrapped__(torch.device("cpu"), torch.float32, 1)


def touched(nbytes: int) -> torch.Tensor:
    return torch.ones(nbytes, dtype=torch.uint8)


@needs_a_mark
def test_what_a_product_gives_back_is_counted_and_what_it_keeps_is_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    kept: list[torch.Tensor] = []
    with settled():  # or the heap keeps what is given back
        monkeypatch.setattr(torch, "mm", lambda *_, out: len(touched(40 * MiB)))
        assert 40 * MiB <= product_bytes() <= 42 * MiB

        def keeping(*_: torch.Tensor, out: torch.Tensor) -> None:
            if not kept:
                kept.append(touched(40 * MiB))

        monkeypatch.setattr(torch, "mm", keeping)
        assert product_bytes() <= 2 * MiB
        assert kept


def test_without_the_kernel_s_mark_nothing_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PeakMeter, "reset_mark", lambda: False)

    assert product_bytes() == 0


def test_a_process_measures_its_products_once(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    taken = warm_up(cpu, torch.float32)
    monkeypatch.setattr(torch, "mm", lambda *_, out: pytest.fail("measured again"))

    assert warm_up(cpu, torch.float32, gradients=True) == taken >= 0
