"""On a system that lacks calls which a job makes; some are taken away from this one."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import streamcomp
from streamcomp import Recipe, UnsupportedSystemError
from tests.jobs import RESOURCES, compress, logits_of, run_cli, run_python, varied_text
from tests.pico import pico_tokens

REFUSED = (
    r"error: streamcomp needs Linux: this system \(.+\) has no posix_fadvise, posix_fallocate;"
)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return varied_text(tmp_path_factory.mktemp("text") / "text.txt", 2000)


@pytest.fixture(scope="module")
def done(pico: Callable[..., Path], text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished job; not to be changed."""
    out = tmp_path_factory.mktemp("done") / "out"
    compress(pico("llama"), out, text)
    return out


@pytest.fixture
def elsewhere(done: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What macOS lacks."""
    for call in ("posix_fadvise", "posix_fallocate"):
        monkeypatch.delattr(os, call)


@pytest.mark.parametrize("command", ["plan", "compress", "eval", "export"])
def test_a_job_is_refused_in_one_line_before_it_begins(
    command: str, elsewhere: None, pico: Callable[..., Path], done: Path, text: Path, tmp_path: Path
) -> None:
    model, out = pico("llama"), tmp_path / "out"
    arguments: dict[str, list[object]] = {
        "plan": ["plan", model],
        "compress": ["compress", model, out, "--calibration", text],
        "eval": ["eval", done, "--text", text, "--work-dir", out],
        "export": ["export", done, out],
    }

    refused = run_cli(*arguments[command], "--quiet")

    assert (refused.code, refused.out) == (10, "")
    assert re.match(REFUSED, refused.err)
    assert refused.err.count("\n") == 1
    assert not out.exists()


def test_the_interface_of_python_refuses_alike(
    elsewhere: None, pico: Callable[..., Path], done: Path, text: Path, tmp_path: Path
) -> None:
    model, out = pico("llama"), tmp_path / "out"
    recipe, resources = Recipe(calibration=(str(text),)), RESOURCES
    for call in (
        lambda: streamcomp.compress(model, out, recipe, resources),
        lambda: streamcomp.plan(model, recipe, resources),
        lambda: streamcomp.evaluate(done, str(text), resources=resources),
        lambda: streamcomp.export(done, out),
    ):
        with pytest.raises(UnsupportedSystemError, match="streamcomp needs Linux"):
            call()
    assert not out.exists()


def test_one_call_alone_is_missed_too(
    monkeypatch: pytest.MonkeyPatch, pico: Callable[..., Path]
) -> None:
    monkeypatch.delattr(os, "preadv")

    with pytest.raises(UnsupportedSystemError, match=r"\) has no preadv; use a container"):
        streamcomp.plan(pico("llama"))


def test_models_are_inspected_and_loaded_all_the_same(elsewhere: None, done: Path) -> None:
    inspected, state = run_cli("inspect", done), run_cli("status", done)

    assert (inspected.code, state.code) == (0, 0)
    assert "pivot" in inspected.out and "finished" in state.out
    model = AutoModelForCausalLM.from_pretrained(done).eval()
    assert torch.isfinite(logits_of(model, pico_tokens())).all()


def test_a_system_without_locks_of_files_can_load_and_inspect(done: Path) -> None:
    """Windows has no fcntl: nothing imports it before a job has begun."""
    script = """
import os, sys
import torch, transformers, psutil  # which may, where there is one
del os.posix_fadvise
sys.modules["fcntl"] = None
import streamcomp
streamcomp.inspect(sys.argv[1])
streamcomp.status(sys.argv[1])
transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1])
try:
    streamcomp.compress(sys.argv[1], "out")
except streamcomp.UnsupportedSystemError:
    print("refused")
"""
    done_there = run_python("-c", script, done)

    assert (done_there.code, done_there.out) == (0, "refused\n"), done_there.err[-2000:]
