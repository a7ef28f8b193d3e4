"""One ``with`` sets the machine up, and everything is as before when it is left."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from streamcomp import RecipeError, Resources
from streamcomp.machine import session
from streamcomp.machine.session import Probe, machine, probe, probed
from tests.jobs import BUDGET, FakeProbe, compress, varied_text

SETTINGS = ("THP_MEM_ALLOC_ENABLE", "ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")


def state() -> tuple[int, dict[str, str]]:
    return torch.get_num_threads(), dict(os.environ)


def test_threads_and_environment_are_set_inside_and_put_back() -> None:
    before = state()
    threads = before[0] + 1

    with machine(Resources(BUDGET, threads=threads)) as here:
        assert torch.get_num_threads() == threads
        assert all(name in os.environ for name in SETTINGS)
        assert here.budget_bytes == 1500 * 2**20

    assert state() == before


def test_they_are_put_back_after_an_error_too() -> None:
    before = state()

    with pytest.raises(KeyboardInterrupt), machine(Resources(BUDGET, threads=1)):
        raise KeyboardInterrupt
    with pytest.raises(RecipeError), machine(Resources("1000T")):
        pass

    assert state() == before


def test_what_the_caller_has_set_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(SETTINGS[0], "0")

    with machine(Resources(BUDGET)):
        assert os.environ[SETTINGS[0]] == "0"

    assert os.environ[SETTINGS[0]] == "0"


def test_the_limit_of_a_gpu_is_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []

    def limited(device: torch.device, budget: int) -> object:
        done.append("set")
        return lambda: done.append("put back")

    monkeypatch.setattr(session, "limit_device", limited)

    with machine(Resources(BUDGET)) as here:
        here.limit_device()
        assert done == ["set"]

    assert done == ["set", "put back"]


def test_a_job_leaves_its_caller_s_process_as_it_was(
    pico: Callable[..., Path], tmp_path: Path
) -> None:
    before = state()

    compress(pico("llama"), tmp_path / "out", varied_text(tmp_path / "text", 2000))

    assert state() == before


def test_a_probe_is_asked_only_while_it_is_put_there() -> None:
    usual = probe()
    other = FakeProbe(baseline=7)

    with probed(other):
        assert probe() is other
        assert probe().baseline_bytes() == 7

    assert probe() is usual
    assert type(usual) is Probe
