"""Settings that cannot be: one line that says what is wrong, and its exit code."""

from __future__ import annotations

import errno
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

import streamcomp
from streamcomp import BudgetError
from streamcomp.job.steps.loss import Loss
from streamcomp.job.steps.score import Score
from tests.jobs import (
    RESOURCES,
    compress,
    run_cli,
)
from tests.refusals import (
    SETTINGS,
    assert_refused,
    run_compress,
    write,
)


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (["--ratio", 0], 2, "ratio 0: must be above 0 and below 1"),
        (["--ratio", 1], 2, "ratio 1: must be above 0 and below 1"),
        (["--ratio", 1.5], 2, "ratio 1.5: must be above 0 and below 1"),
        (["--ratio", "nan"], 2, "ratio nan: must be above 0 and below 1"),
        (["--ratio", -0.2], 2, "ratio -0.2: must be above 0 and below 1"),
        (["--ratio", 0.99], 2, "ratio 0.99 cannot be reached: rank 1 everywhere removes 0.94"),
        (["--include", "("], 2, r"include '\(' is no regular expression"),
        (["--exclude", "*"], 2, r"exclude '\*' is no regular expression"),
        (["--include", "no_such_linear"], 2, "--include and --exclude leave no linear"),
        (["--exclude", "."], 2, "--include and --exclude leave no linear"),
        (["--ratio", "0.2,0.2"], 2, r"ratio \(0.2, 0.2\): several ratios must differ"),
        (["--ratio", "0.2,1.2"], 2, "ratio 1.2: must be above 0 and below 1"),
        (["--ratio", "0.2,0.99"], 2, "ratio 0.99 cannot be reached"),
        (["--size", "many"], 2, "many"),
        (["--size", "1K"], 2, "--size 1K: .* stay in any case; give a size in between"),
        (["--size", "1G"], 2, "--size 1G: .* stay in any case; give a size in between"),
        (["--blocks", "last:3"], 2, "blocks last:3: the model has blocks 0 to 1"),
        (["--blocks", "1-0"], 2, "blocks 1-0: the model has blocks 0 to 1"),
        (["--blocks", "0-2"], 2, "blocks 0-2: the model has blocks 0 to 1"),
        (["--blocks", "first:0"], 2, "blocks first:0: the model has blocks 0 to 1"),
        (["--blocks", "all"], 2, "blocks 'all' unknown: last:12, first:4 or 3-10"),
        (["--blocks", "last:1", "--ratio", 0.6], 2, "too few to remove the share 0.6 of all"),
        (["--method", "swsc", "--ratio", 0.9], 2, "shared channels take .*smaller ratio"),
        (["--seq-len", 129], 2, "--seq-len 129: the model has 128 positions"),
        (["--seq-len", 1], 2, "seq_len 1: must be at least 2"),
        (["--samples", 0], 2, "samples 0: must be at least 1"),
        (["--batch", -1], 2, "batch -1: must be at least 0"),
        (["--seed", -1], 2, "seed -1: must be 0 to"),
        (["--device", "gpu"], 2, "device 'gpu' unknown: auto, cpu, cuda or cuda:N"),
        (["--device", "cpu", "--max-vram", "8G"], 2, "--max-vram 8G: the job runs on the CPU"),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, list) else None,
)
def test_a_setting_that_cannot_be_is_refused(
    options: list[Any],
    code: int,
    message: str,
    pico: Callable[..., Path],
    text: Path,
    tmp_path: Path,
) -> None:
    for command in (["compress", pico("llama"), tmp_path / "out"], ["plan", pico("llama")]):
        done = run_cli(*command, "--calibration", text, *SETTINGS, "--quiet", *options)

        assert_refused(done, code, message)
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_a_gpu_that_is_not_there_is_missed(
    pico: Callable[..., Path], text: Path, tmp_path: Path
) -> None:
    for device in ("cuda", "cuda:3"):
        done = run_compress(pico("llama"), tmp_path / "out", text, "--device", device)

        assert_refused(done, 2, "torch finds no CUDA GPU here; use --device cpu")
    assert not (tmp_path / "out").exists()


def test_a_gpu_that_is_full_ends_the_job_and_keeps_what_is_done(
    pico: Callable[..., Path], text: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    full = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
    with (
        mock.patch.object(Loss, "run", side_effect=full),
        pytest.raises(
            BudgetError, match="the loss needs more of the GPU .*--max-vram .*--device cpu"
        ),
    ):
        compress(pico("llama"), out, text)
    assert not (out / "config.json").exists()

    assert compress(pico("llama"), out, text).report["model"]["ratio"] > 0
    with (
        mock.patch.object(Score, "run", side_effect=full),
        pytest.raises(BudgetError, match="head needs more of the GPU"),
    ):
        streamcomp.evaluate(out, str(text), seq_len=32, resources=RESOURCES)


REFUSALS = {
    "Python": MemoryError(),
    "torch": RuntimeError(
        "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: "
        "you tried to allocate 2099200 bytes. Error code 12 (Cannot allocate memory)"
    ),
    "a thread": RuntimeError("can't start new thread"),
    "the system": OSError(errno.ENOMEM, "Cannot allocate memory"),
}


@pytest.mark.parametrize("refusal", REFUSALS.values(), ids=REFUSALS)
def test_memory_that_the_system_refuses_is_one_line_and_keeps_what_is_done(
    refusal: Exception, pico: Callable[..., Path], text: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    with mock.patch.object(Loss, "run", side_effect=refusal):
        done = run_compress(pico("llama"), out, text)
    assert_refused(done, 5, "the loss needs more memory .*; what is done is kept: ")

    run_compress(pico("llama"), out, text)
    compress(pico("llama"), tmp_path / "whole", text)
    for shard in (tmp_path / "whole").glob("*.safetensors"):
        assert (out / shard.name).read_bytes() == shard.read_bytes()


@pytest.mark.parametrize("refusal", REFUSALS.values(), ids=REFUSALS)
def test_memory_that_is_refused_to_a_plan_or_to_model_code_is_one_line(
    refusal: Exception, pico: Callable[..., Path], text: Path, tmp_path: Path
) -> None:
    for place, architecture in {
        "streamcomp.job.run.make_plan": "llama",
        "streamcomp.model.meta.check_counts": "llama",
        "streamcomp.model.tracing._trace": "llama",
        "streamcomp.model.tracing._faked": "llama",
        "streamcomp.api.read_index": "llama",
        "streamcomp.forms.expert_trial._small_copy": "mixtral",
    }.items():
        with mock.patch(place, side_effect=refusal):
            done = run_compress(pico(architecture), tmp_path / "out", text)
        assert_refused(done, 5, "compressing needs more memory")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("toml", "message"),
    [
        ("ration = 0.2", "unknown setting 'ration'; known: ratio, size, method"),
        ("ratio = ", "cannot be read as TOML"),
        ("ratio = '0.2'", "ratio = '0.2' should be of type float"),
        ("[recipe]\nratio = 0.2", "unknown setting 'recipe'"),
        ("ratio = 2", "ratio 2: must be above 0 and below 1"),
        ("max_ram = '1G'", "unknown setting 'max_ram'"),
        (b"\xff", "cannot be read as TOML"),
    ],
)
def test_a_recipe_file_that_cannot_be_is_refused(
    toml: str | bytes, message: str, pico: Callable[..., Path], text: Path, tmp_path: Path
) -> None:
    recipe = write(tmp_path / "recipe.toml", toml)

    done = run_compress(pico("llama"), tmp_path / "out", text, "--config", recipe)

    assert_refused(done, 2, message)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "options",
    [
        ["--config", "/no/such.toml"],
        ["--form", "svd"],
        ["--statistics", "sparse"],
        ["--ratio", "much"],
        ["--ratio", "0.2,"],
        ["--method", "magic"],
        ["--samples", "2.5"],
        ["--threads", "-1"],
        ["--no-such-option"],
    ],
    ids=" ".join,
)
def test_what_is_no_option_at_all_is_refused_with_the_usage(
    options: list[str], pico: Callable[..., Path], text: Path, tmp_path: Path
) -> None:
    done = run_compress(pico("llama"), tmp_path / "out", text, *options)

    assert done.code == 2
    assert options[0].strip("-") in done.err and "Traceback" not in done.err
    assert not (tmp_path / "out").exists()
