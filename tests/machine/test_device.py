"""Which device a job runs on, and how much of it is its own. No GPU is needed."""

from __future__ import annotations

import pytest
import torch

from streamcomp import RecipeError
from streamcomp.machine.device import (
    CONTEXT_BYTES,
    choose_device,
    device_budget_bytes,
    limit_device,
)

MiB, GiB = 2**20, 2**30


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)


@pytest.mark.usefixtures("two_gpus")
@pytest.mark.parametrize(
    ("name", "number"), [("auto", 0), ("cuda", 0), ("cuda:0", 0), ("cuda:1", 1)]
)
def test_a_gpu_comes_with_its_number(name: str, number: int) -> None:
    assert choose_device(name) == torch.device("cuda", number)


@pytest.mark.usefixtures("two_gpus")
def test_a_gpu_that_is_not_there_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"--device cuda:2: torch finds 2 GPUs, from cuda:0 on"):
        choose_device("cuda:2")


def test_without_a_gpu_the_cpu_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_device("auto") == choose_device("cpu") == torch.device("cpu")
    with pytest.raises(RecipeError, match="--device cuda:1: torch finds no CUDA GPU here"):
        choose_device("cuda:1")


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A GPU of 16 GiB, 10 of them free and 2 this process's; the shares its allocator is given."""
    shares: list[float] = []

    def fraction(share: float, device: torch.device) -> None:
        assert device.index is not None  # torch insists on it here, and nowhere else
        shares.append(share)

    answers = {
        "mem_get_info": lambda device: (10 * GiB, 16 * GiB),
        "empty_cache": lambda: None,
        "memory_reserved": lambda device: 2 * GiB,
        "get_per_process_memory_fraction": lambda device: 1.0,
        "set_per_process_memory_fraction": fraction,
    }
    for name, answer in answers.items():
        monkeypatch.setattr(torch.cuda, name, answer)
    return shares


def test_a_gpu_s_budget_is_kept_by_its_allocator(gpu: list[float]) -> None:
    device = torch.device("cuda", 0)

    assert device_budget_bytes(device, "12G") == 12 * GiB
    assert device_budget_bytes(device, "50%") == 8 * GiB
    assert device_budget_bytes(device, None) == int(0.9 * 12 * GiB)
    assert device_budget_bytes(device, "64M") == 64 * MiB  # for the plan to refuse

    with pytest.raises(RecipeError, match=r"--max-vram 17G is more than the 16\.0 GiB of cuda"):
        device_budget_bytes(device, "17G")
    assert not gpu

    put_back = limit_device(device, 12 * GiB)
    limit_device(device, 64 * MiB)
    put_back()

    assert gpu == pytest.approx([(12 * GiB - CONTEXT_BYTES) / (16 * GiB), 0.0, 1.0], abs=1e-9)


def test_the_cpu_has_no_budget_of_its_own() -> None:
    limit_device(torch.device("cpu"), 0)()
    assert device_budget_bytes(torch.device("cpu"), None) == 0
    with pytest.raises(RecipeError, match="--max-vram 8G: the job runs on the CPU"):
        device_budget_bytes(torch.device("cpu"), "8G")
