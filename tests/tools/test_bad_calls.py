"""Other commands on what they cannot use: one line that says what is wrong, and its exit code."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from streamcomp.checkpoint.index import SINGLE_FILE
from tests.jobs import (
    compress,
    run_cli,
    run_python,
    tree,
    varied_text,
)
from tests.model.folders import edit_config
from tests.refusals import (
    SETTINGS,
    assert_refused,
    remove_a_shard,
    remove_the_weights,
    run_compress,
    write,
)


def test_there_is_no_status_where_there_is_no_job(
    pico: Callable[..., Path], tmp_path: Path
) -> None:
    for folder in (tmp_path / "nothing", pico("llama")):
        assert_refused(run_cli("status", folder), 6, "holds no job")


def test_export_writes_into_a_folder_of_its_own(
    pico: Callable[..., Path], text: Path, tmp_path: Path
) -> None:
    out, dest = tmp_path / "out", tmp_path / "dest"
    compress(pico("llama"), out, text)
    before = tree(out)
    dest.mkdir()
    write(dest / "thesis.tex", "years of work")

    assert_refused(run_cli("export", out, dest, "-q"), 6, "dest is not an empty folder")
    assert_refused(run_cli("export", out, out, "-q"), 6, "is the model's own folder")
    assert_refused(run_cli("export", out, out / "config.json", "-q"), 6, "not an empty folder")
    done = run_cli("export", pico("llama"), tmp_path / "new", "-q")
    assert_refused(done, 4, "is not compressed: there is nothing to export")
    assert tree(dest) == {"thesis.tex": b"years of work"}
    assert tree(out) == before
    assert not (tmp_path / "new").exists()


def test_an_evaluation_needs_a_text_of_one_window_at_least(
    pico: Callable[..., Path], tmp_path: Path
) -> None:
    short = write(tmp_path / "short.txt", "too short")

    done = run_cli("eval", pico("llama"), "--text", short, "--seq-len", 16, "-q")

    assert_refused(done, 9, "9 tokens, a window needs 16")


def test_an_evaluation_beyond_the_positions_is_refused(
    pico: Callable[..., Path], text: Path
) -> None:
    done = run_cli("eval", pico("llama"), "--text", text, "--seq-len", 129, "-q")

    assert_refused(done, 2, "--seq-len 129: the model has 128 positions")


def test_an_evaluation_within_too_small_a_budget_is_refused(
    pico: Callable[..., Path], text: Path
) -> None:
    done = run_cli("eval", pico("llama"), "--text", text, "--seq-len", 16, "--max-ram", "1M", "-q")

    assert_refused(done, 5, r"the budget is 1\.00 MiB: --max-ram \d+M fits")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 99}, "format version 99"),
        ({"modules": {"model.layers.0.mlp.up_proj": {"form": "new", "rank": 3}}}, "unknown form"),
        (
            {"modules": {"model.layers.0.mlp.up_proj": {"form": "uv", "rank": 3, "bits": 4}}},
            "unknown key 'bits'",
        ),
        ({"modules": {"model.layers.9.mlp": {"form": "uv", "rank": 3}}}, "has no module"),
    ],
)
def test_a_compressed_model_of_another_format_is_refused(
    change: dict[str, Any],
    message: str,
    pico: Callable[..., Path],
    text: Path,
    tmp_path: Path,
) -> None:
    out = tmp_path / "out"
    compress(pico("llama"), out, text)
    quantization = json.loads((out / "config.json").read_text())["quantization_config"]
    edit_config(out, quantization_config={**quantization, **change})

    assert_refused(run_cli("inspect", out), 4, message)
    assert_refused(run_cli("eval", out, "--text", text, "-q"), 4, message)
    assert_refused(run_cli("export", out, tmp_path / "dest", "-q"), 4, message)


def test_an_error_of_the_whole_program_is_one_line_too(model: Path, tmp_path: Path) -> None:
    remove_a_shard(model)

    done = run_python("-m", "streamcomp", "compress", model, tmp_path / "out")

    assert_refused(done, 3, "shards are missing")


def test_a_single_file_that_is_no_safetensors_is_refused(
    model: Path, text: Path, tmp_path: Path
) -> None:
    remove_the_weights(model)
    for data in (b"", b"PK\x03\x04" * 99, b"\xff" * 99, (8).to_bytes(8, "little") + b"[1, 2, 3]"):
        write(model / SINGLE_FILE, data)

        done = run_compress(model, tmp_path / "out", text)

        assert_refused(done, 3, "model.safetensors")


def test_names_that_look_like_markup_are_printed_as_they_are(
    pico: Callable[..., Path], tmp_path: Path
) -> None:
    folder = tmp_path / "50% [" / "red]:cat: ö"
    shutil.copytree(pico("llama"), folder / "model")
    text = varied_text(folder / "text[i].txt", 4000)

    commands: list[list[object]] = [
        ["plan", folder / "model", *SETTINGS],
        ["compress", folder / "model", folder / "out", "--calibration", text, *SETTINGS],
        ["status", folder / "out"],
        ["inspect", folder / "out"],
        ["eval", folder / "out", "--text", text, "--seq-len", 16, "--windows", 2],
        ["export", folder / "out", folder / "dense"],
    ]
    for command in commands:
        done = run_cli(*command)

        assert done.code == 0, done.err
        told = "".join(done.out.split())  # tables wrap
        assert "[/red]:cat:ö" in told or command[0] in ("eval", "status")


def test_an_empty_checkpoint_is_refused(model: Path, text: Path, tmp_path: Path) -> None:
    remove_the_weights(model)
    save_file({"other": torch.zeros(3)}, model / SINGLE_FILE, metadata={"format": "pt"})

    done = run_compress(model, tmp_path / "out", text)

    assert done.code in (3, 4) and done.err.startswith("error: ")
    assert done.err.count("\n") == 1
