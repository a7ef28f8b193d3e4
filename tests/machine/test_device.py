"""Which device a job runs on. No GPU is needed."""

from __future__ import annotations

import pytest
import torch

from streamcomp import RecipeError
from streamcomp.job.run import choose_device


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
