"""A job killed anywhere and continued leaves the bytes of one that was never killed."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from transformers import AutoModelForCausalLM

import streamcomp
from streamcomp import JobMismatchError, OutputError
from streamcomp.api import plan
from streamcomp.machine.session import probed
from tests.crash.driver import KINDS
from tests.jobs import (
    ENVIRONMENT,
    REPOSITORY,
    RESOURCES,
    FakeProbe,
    Interrupt,
    Interrupted,
    Notes,
    compress,
    products,
    small_recipe,
    tree,
    varied_text,
)
from tests.pico import save_pico

STATISTICS = ("dense", "compressed")
TWO_SIDED = ["forward 0", "forward 1", "gradient of the loss", "reverse 1", "reverse 0", "ranks"]
BLOCKS = ["block 0", "block 1"]


@pytest.fixture(scope="module")
def driven(
    pico: Callable[..., Path], text: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, list[dict[str, Any]]]:
    """What the driver tells, for each kind of job; they run side by side."""
    running = {
        kind: subprocess.Popen(
            [
                sys.executable,
                "-m",
                "tests.crash.driver",
                pico("llama"),
                text,
                tmp_path_factory.mktemp("killed"),
                kind,
            ],  # fmt: skip
            cwd=REPOSITORY,
            env=ENVIRONMENT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for kind in KINDS
    }
    told = {}
    for kind, process in running.items():
        out, err = process.communicate()
        assert process.returncode == 0, err[-3000:]
        told[kind] = [json.loads(line) for line in out.splitlines()]
    return told


def of_kind(results: list[dict[str, Any]], kind: str) -> list[dict[str, Any]]:
    found = [result for result in results if result["kind"] == kind]
    assert found
    return found


# -- SIGKILL -----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_killed_at_any_point_it_goes_on_to_the_same_bytes(
    kind: str, driven: dict[str, list[dict[str, Any]]]
) -> None:
    points = of_kind(driven[kind], "point")

    names = [point["name"] for point in points]
    steps = {
        "dense": ["tokenize", "embed", *BLOCKS, "copy the rest"],
        "compressed": BLOCKS,
        "refined": TWO_SIDED + BLOCKS,
    }
    for step in steps[kind]:
        assert f"before {step} is committed" in names
        assert f"within the journal line of {step}" in names
        assert f"after {step} is committed" in names
    assert "within hidden states" in names
    assert "within a shard" in names
    assert ("before config.json gets its name" in names) == (kind == "dense")
    if kind == "refined":
        assert "before analysis-00001.self_attn.k_proj.safetensors gets its name" in names
        assert "before gradient-00001.bin is removed" in names
    for point in points:
        assert point["killed"], point
        assert point["different"] == [], point


@pytest.mark.parametrize("kind", KINDS)
def test_killed_at_any_point_it_leaves_nothing_that_loads_and_is_not_whole(
    kind: str, driven: dict[str, list[dict[str, Any]]]
) -> None:
    for point in of_kind(driven[kind], "point"):
        assert not point["loads_before_the_end"], point


@pytest.mark.parametrize("kind", KINDS)
def test_killed_at_any_point_and_continued_it_leaves_no_temporary_file(
    kind: str, driven: dict[str, list[dict[str, Any]]]
) -> None:
    for point in of_kind(driven[kind], "point"):
        assert point["left_over"] == [], point


@pytest.mark.parametrize("kind", ["compressed", "refined"])
def test_a_resumed_job_may_be_killed_too(
    kind: str, driven: dict[str, list[dict[str, Any]]]
) -> None:
    assert not of_kind(driven[kind], "torn")[0]["whole_line"]
    for point in of_kind(driven[kind], "point of a resumed job"):
        assert point["killed"] and not point["different"] and not point["left_over"], point


@pytest.mark.parametrize(("kind", "steps"), [("compressed", 5), ("refined", 11)])
def test_a_job_killed_after_each_of_its_steps_does_each_once(
    kind: str, steps: int, driven: dict[str, list[dict[str, Any]]]
) -> None:
    (result,) = of_kind(driven[kind], "every step")

    assert result["runs"] == steps  # tokenize, embed, the sweeps, two blocks, the rest
    assert not result["different"] and not result["left_over"]


@pytest.mark.parametrize("kind", ["compressed", "refined"])
def test_a_job_killed_again_and_again_comes_through(
    kind: str, driven: dict[str, list[dict[str, Any]]]
) -> None:
    results = of_kind(driven[kind], "again and again")

    assert sum(result["kills"] for result in results) > len(results)
    assert all(not result["different"] and not result["left_over"] for result in results)


# -- what lies there afterwards ----------------------------------------------------------


def test_a_torn_journal_line_is_as_good_as_none(
    pico: Callable[..., Path], text: Path, tmp_path: Path
) -> None:
    dense, out = pico("llama"), tmp_path / "out"
    with pytest.raises(Interrupted):
        compress(dense, out, text, progress=Interrupt(2))
    journal = out / ".streamcomp" / "journal.jsonl"
    whole = journal.read_bytes()

    for torn in (b'{"step": "block 1", "seco', b"{", b"\0\0\0\0", '{"step": "blöck'.encode()[:-3]):
        journal.write_bytes(whole + torn)
        assert streamcomp.status(out).steps_done == 3
    with pytest.raises(Interrupted):
        compress(dense, out, text, progress=Interrupt(3))

    assert journal.read_bytes().startswith(whole)
    assert streamcomp.status(out).last_step == "forward 1"


def test_a_journal_without_its_header_is_refused(
    pico: Callable[..., Path], text: Path, tmp_path: Path
) -> None:
    dense, out = pico("llama"), tmp_path / "out"
    with pytest.raises(Interrupted):
        compress(dense, out, text, progress=Interrupt(2))
    journal = out / ".streamcomp" / "journal.jsonl"
    journal.write_bytes(journal.read_bytes().replace(b'"fingerprint"', b'"fingerpr\0nt"', 1))
    before = tree(out)

    with pytest.raises(OutputError, match="is damaged: remove"):
        compress(dense, out, text)

    assert tree(out) == before


@pytest.mark.parametrize("there", [False, True], ids=["without index", "with index"])
def test_an_unpublished_folder_is_no_model(
    there: bool, pico: Callable[..., Path], text: Path, tmp_path: Path
) -> None:
    dense, out = pico("llama"), tmp_path / "out"
    if there:
        with (
            mock.patch("streamcomp.job.publish.write_text", fail_at("config.json")),
            pytest.raises(Interrupted),
        ):
            compress(dense, out, text)
    else:
        with pytest.raises(Interrupted):
            compress(dense, out, text, progress=Interrupt(10))
    assert (out / "model.safetensors.index.json").exists() == there

    with pytest.raises((OSError, ValueError)):
        AutoModelForCausalLM.from_pretrained(out)
    assert not streamcomp.status(out).finished
    assert not compress(dense, out, text).already_done
    AutoModelForCausalLM.from_pretrained(out)


def fail_at(name: str) -> Callable[[Path, str], None]:
    from streamcomp.checkpoint.atomic import write_text

    def write(path: Path, text: str) -> None:
        if path.name == name:
            raise Interrupted(name)
        write_text(path, text)

    return write


# -- what may change between two runs, and what may not ----------------------------------


def test_a_source_changed_in_between_is_refused(text: Path, tmp_path: Path) -> None:
    dense, out = save_pico(tmp_path / "model"), tmp_path / "out"
    with pytest.raises(Interrupted):
        compress(dense, out, text, progress=Interrupt(2))
    before = tree(out)
    shard = sorted(dense.glob("*.safetensors"))[-1]
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)  # as long as before
    os.utime(shard, ns=(0, shard.stat().st_mtime_ns + 1))

    with pytest.raises(JobMismatchError, match="the model's files have changed") as caught:
        compress(dense, out, text)

    assert caught.value.field == "source"
    assert tree(out) == before


def test_a_calibration_file_changed_in_between_is_refused(
    pico: Callable[..., Path], tmp_path: Path
) -> None:
    text, out = varied_text(tmp_path / "text.txt", 4000), tmp_path / "out"
    with pytest.raises(Interrupted):
        compress(pico("llama"), out, text, progress=Interrupt(2))
    varied_text(text, 4000, seed=1)

    with pytest.raises(JobMismatchError) as caught:
        compress(pico("llama"), out, text)

    assert caught.value.field == "calibration_files"


def test_a_calibration_file_that_was_copied_anew_is_the_same_one(
    pico: Callable[..., Path], tmp_path: Path
) -> None:
    text, out = varied_text(tmp_path / "text.txt", 4000), tmp_path / "out"
    with pytest.raises(Interrupted):
        compress(pico("llama"), out, text, progress=Interrupt(2))
    content = text.read_bytes()
    text.unlink()
    text.write_bytes(content)
    os.utime(text, ns=(0, 0))

    assert compress(pico("llama"), out, text).report["model"]["ratio"] > 0


def test_a_folder_of_texts_may_hold_the_output_too(
    pico: Callable[..., Path], tmp_path: Path
) -> None:
    varied_text(tmp_path / "text.txt", 4000)
    out = tmp_path / "out"
    for after in range(10):
        with pytest.raises(Interrupted):
            compress(pico("llama"), out, tmp_path, progress=Interrupt(after))

    compress(pico("llama"), out, tmp_path, progress=(notes := Notes()))

    assert notes.steps == ["copy the rest"]
    again = compress(pico("llama"), out, tmp_path)
    assert again.already_done  # its card and its settings are no texts
    varied_text(tmp_path / "more.txt", 10)
    with pytest.raises(JobMismatchError):
        compress(pico("llama"), out, tmp_path)


@pytest.mark.parametrize("package", ["torch", "transformers"])
def test_another_version_of_a_library_continues_no_job_but_recognises_a_finished_one(
    package: str, pico: Callable[..., Path], text: Path, tmp_path: Path
) -> None:
    dense, out = pico("llama"), tmp_path / "out"
    with pytest.raises(Interrupted):
        compress(dense, out, text, progress=Interrupt(2))

    with mock.patch(f"streamcomp.job.journal.{package}.__version__", "0.1"):
        with pytest.raises(JobMismatchError) as caught:
            compress(dense, out, text)
        assert caught.value.field == package
    compress(dense, out, text)
    with mock.patch(f"streamcomp.job.journal.{package}.__version__", "0.1"):
        assert compress(dense, out, text).already_done


@pytest.mark.parametrize("statistics", STATISTICS)
def test_a_smaller_budget_that_forces_another_batch_says_so_and_goes_on(
    statistics: str, pico: Callable[..., Path], text: Path, tmp_path: Path
) -> None:
    dense, out = pico("llama", dtype=torch.float64), tmp_path / "out"
    settings: dict[str, Any] = {"method": "svd-llm", "statistics": statistics}
    recipe = small_recipe(text, **settings)
    with (  # what does not depend on the batch is larger than all of a pico model
        probed(FakeProbe(baseline=300 * 2**20)),
        mock.patch("streamcomp.calibration.corpus._PIECE_BYTES", 0),
        mock.patch("streamcomp.calibration.corpus._BYTES_PER_FILE_BYTE", 0),
        mock.patch("streamcomp.machine.budget.Budget.minimum", property(lambda own: own.fewest)),
        mock.patch("streamcomp.linalg.low_rank.PANEL", 1),
        mock.patch("streamcomp.forms.base.PANEL", 1),
        mock.patch("streamcomp.job.steps.embed.COPY_BYTES", 0),
        mock.patch("streamcomp.job.steps.write_block.COPY_BYTES", 0),
        mock.patch("streamcomp.job.steps.copy.COPY_BYTES", 0),
    ):
        ample = plan(dense, recipe, RESOURCES)
        small = str(ample.minimum_bytes)
        tight = plan(dense, recipe, streamcomp.Resources(small))
        assert (ample.levers.batch, tight.levers.batch) == (8, 1)
        with pytest.raises(Interrupted):
            compress(dense, out, text, progress=Interrupt(2), **settings)
        notes = Notes()
        compress(dense, out, text, max_ram=small, progress=notes, **settings)
        compress(dense, tmp_path / "whole", text, **settings)

    assert notes.done == 3
    assert notes.texts == [
        "this budget asks for other levers than the job began with (batch 8 -> 1): "
        "the result is the same within rounding"
    ]
    expected = products(tmp_path / "whole")
    for name, weight in products(out).items():
        assert (weight - expected[name]).norm() <= 1e-9 * expected[name].norm()


def test_a_resumed_job_keeps_its_batch_also_with_a_larger_budget(
    pico: Callable[..., Path], text: Path, tmp_path: Path
) -> None:
    dense, out = pico("llama"), tmp_path / "out"
    with mock.patch("streamcomp.job.plan._largest_batch", return_value=2):
        compress(dense, tmp_path / "whole", text)
        with pytest.raises(Interrupted):
            compress(dense, out, text, progress=Interrupt(2))

    result = compress(dense, out, text)  # would take 8

    assert result.report["levers"]["batch"] == 2
    for shard in out.glob("*.safetensors"):
        assert shard.read_bytes() == (tmp_path / "whole" / shard.name).read_bytes()


def test_a_lock_is_not_left_behind(pico: Callable[..., Path], text: Path, tmp_path: Path) -> None:
    dense, out = pico("llama"), tmp_path / "out"
    for after in range(3):
        with pytest.raises(Interrupted):
            compress(dense, out, text, progress=Interrupt(after))

    shutil.copytree(out, tmp_path / "copy")
    assert not compress(dense, tmp_path / "copy", text).already_done
    assert not compress(dense, out, text).already_done
