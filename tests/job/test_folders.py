"""Whose is what lies in OUT and in the work folder: nothing of anybody else's is touched."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest

from streamcomp import JobMismatchError, OutputError, RecipeError, Resources, status
from streamcomp.api import plan
from streamcomp.job.journal import JOURNAL, Journal, locked
from streamcomp.job.rows import StepRow
from streamcomp.job.steps.tokenize import Tokenize
from streamcomp.model.skeleton import Skeleton
from tests.jobs import (
    BUDGET,
    Interrupt,
    Interrupted,
    Notes,
    compress,
    quick_plan,
    small_recipe,
    tree,
    varied_text,
)
from tests.pico import save_pico


def interrupted(model: Path, out: Path, text: Path, after: int, **settings: Any) -> None:
    with pytest.raises(Interrupted):
        compress(model, out, text, progress=Interrupt(after), **settings)


# -- a work folder that several jobs use, one after the other ----------------------------


def test_a_job_where_another_process_finishes_another_one_is_refused(
    pico: Callable[[str], Path], text: Path, tmp_path: Path
) -> None:
    dense, out = pico("llama"), tmp_path / "out"
    others: list[Any] = []

    def after_the_other(index: Any) -> Any:
        if not others:
            others.append(None)
            compress(dense, out, text, ratio=0.2)
        return Skeleton(index)

    with (
        mock.patch("streamcomp.job.run.Skeleton", after_the_other),
        pytest.raises(JobMismatchError, match="ratio"),
    ):
        compress(dense, out, text, ratio=0.5)


@pytest.mark.parametrize("after", [3, 9])  # in the sweeps; with shards in OUT
def test_a_finished_job_that_is_run_again_leaves_the_next_ones_work(
    after: int, pico: Callable[..., Path], text: Path, tmp_path: Path
) -> None:
    dense, work, out = pico("llama"), tmp_path / "work", tmp_path / "next"
    compress(dense, tmp_path / "first", text, work_dir=work)
    interrupted(dense, out, text, after, work_dir=work, ratio=0.4)
    before = tree(work)

    assert compress(dense, tmp_path / "first", text, work_dir=work).already_done

    assert tree(work) == before
    progress = Notes()
    compress(dense, out, text, work_dir=work, ratio=0.4, progress=progress)
    assert progress.done == after + 1
    assert not work.exists()


def test_work_is_not_removed_while_a_process_holds_it(
    pico: Callable[..., Path], text: Path, tmp_path: Path
) -> None:
    dense, out = pico("llama"), tmp_path / "out"
    with mock.patch("streamcomp.api.remove_work"):  # killed before its work was removed
        compress(dense, out, text)
    work = out / ".streamcomp"
    before = tree(work)
    assert before

    with locked(work):
        assert compress(dense, out, text).already_done
    assert tree(work) == before

    assert compress(dense, out, text).already_done
    assert not work.exists()


def test_removing_work_that_was_interrupted_is_done_by_the_next_call(
    pico: Callable[..., Path], text: Path, tmp_path: Path
) -> None:
    dense, out = pico("llama"), tmp_path / "out"
    with mock.patch("streamcomp.api.remove_work"):
        compress(dense, out, text, statistics="dense")
    work = out / ".streamcomp"
    (work / "hidden-00000.bin").write_bytes(b"left")
    removed: list[str] = []

    def until_killed(path: Path, missing_ok: bool = False) -> None:
        removed.append(path.name)
        raise KeyboardInterrupt

    with mock.patch.object(Path, "unlink", until_killed), pytest.raises(KeyboardInterrupt):
        compress(dense, out, text)
    assert removed != ["journal.jsonl"] and (work / "journal.jsonl").is_file()

    compress(dense, out, text)
    assert not work.exists()
    work.mkdir()  # killed between the last file and the folder
    compress(dense, out, text)
    assert not work.exists()


@pytest.mark.parametrize("method", ["two-sided", "svd-llm"])
def test_what_somebody_keeps_in_the_work_folder_stays(
    method: str, pico: Callable[..., Path], text: Path, tmp_path: Path
) -> None:
    work = tmp_path / "scratch"
    (work / "compressed-models").mkdir(parents=True)
    own = {"analysis-2024.csv", "hidden-layers.bin", ".hidden.tmp", "gradient-1.bin"}
    for name in own:
        (work / name).write_text("mine")

    compress(pico("llama"), work / "compressed-pico", text, work_dir=work, method=method)

    left = {path.name for path in work.iterdir()}
    assert left == own | {"compressed-models", "compressed-pico"}
    assert (work / "compressed-pico" / "config.json").is_file()


def test_a_file_is_no_work_folder(pico: Callable[..., Path], text: Path, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("mine")

    with pytest.raises(OutputError, match="file is a file, --work-dir must be a folder"):
        compress(pico("llama"), tmp_path / "out", text, work_dir=file)
    assert not (tmp_path / "out").exists()
    with pytest.raises(OutputError, match="holds no job"):
        status(tmp_path / "out", work_dir=file)


# -- an OUT that is not this job's -------------------------------------------------------


@pytest.mark.parametrize("after", [-1, 0, 3])  # without a step, one, several; never a shard
@pytest.mark.parametrize("ratio", [0.2, (0.2, 0.4)])
def test_a_job_does_not_go_on_in_a_folder_of_somebody_else(
    after: int, ratio: Any, pico: Callable[..., Path], text: Path, tmp_path: Path
) -> None:
    dense, work = pico("llama"), tmp_path / "work"
    victim = save_pico(tmp_path / "victim", seed=5, shard_size="30KB")
    if after < 0:
        with (
            mock.patch.object(Tokenize, "run", side_effect=Interrupted),
            pytest.raises(Interrupted),
        ):
            compress(dense, tmp_path / "out", text, work_dir=work, ratio=ratio)
    else:
        interrupted(dense, tmp_path / "out", text, after, work_dir=work, ratio=ratio)
    before = tree(victim)

    with pytest.raises(OutputError, match=r"victim is not empty \(config.json\)"):
        compress(dense, victim, text, work_dir=work, ratio=ratio)

    assert tree(victim) == before
    (tmp_path / "out").rename(tmp_path / "renamed")  # its own, by another name
    compress(dense, tmp_path / "renamed", text, work_dir=work, ratio=ratio)


def test_a_job_goes_on_beside_its_own_shards_and_half_written_files(
    pico: Callable[..., Path], text: Path, tmp_path: Path
) -> None:
    dense, work, out = pico("llama"), tmp_path / "work", tmp_path / "out"
    compress(dense, tmp_path / "whole", text)
    interrupted(dense, out, text, 8, work_dir=work)
    (out / ".model-00002-of-00003.safetensors.tmp").write_bytes(b"half of a shard")

    compress(dense, out, text, work_dir=work)

    whole = {path.name: path.read_bytes() for path in (tmp_path / "whole").glob("*.safetensors")}
    assert whole == {path.name: path.read_bytes() for path in out.glob("*.safetensors")}
    assert not list(out.glob(".*"))


def test_a_job_whose_shards_are_there_minds_no_stray_file(
    pico: Callable[..., Path], text: Path, tmp_path: Path
) -> None:
    dense, work, out = pico("llama"), tmp_path / "work", tmp_path / "out"
    interrupted(dense, out, text, 9, work_dir=work)  # behind two shards
    (out / "notes.txt").write_text("mine")

    compress(dense, out, text, work_dir=work)

    assert (out / "notes.txt").read_text() == "mine"


def test_a_work_folder_in_out_may_be_spelled_in_another_way(
    pico: Callable[..., Path], text: Path, tmp_path: Path
) -> None:
    dense, out = pico("llama"), tmp_path / "out"
    (tmp_path / "link").symlink_to(tmp_path)
    work = tmp_path / "link" / "out" / "w"
    interrupted(dense, out, text, 3, work_dir=work)

    compress(dense, out, text, work_dir=work)

    assert (out / "config.json").is_file()


def test_folders_of_other_ratios_with_nothing_in_them_are_no_job(
    pico: Callable[..., Path], text: Path, tmp_path: Path
) -> None:
    dense, work, out = pico("llama"), tmp_path / "work", tmp_path / "out"
    with (
        mock.patch.object(Tokenize, "run", side_effect=Interrupted),
        pytest.raises(Interrupted),
    ):
        compress(dense, out, text, work_dir=work, ratio=(0.2, 0.4))

    compress(dense, out, text, work_dir=work, ratio=(0.3, 0.4))

    assert (out / "ratio-0.3" / "config.json").is_file()


def test_a_path_that_is_no_utf_8_is_published(pico: Callable[..., Path], tmp_path: Path) -> None:
    text = varied_text(Path(os.fsdecode(os.fsencode(tmp_path) + b"/t\xe9xt.txt")), 4000)
    out = tmp_path / "out"

    compress(pico("llama"), out, text)

    report = json.loads((out / "streamcomp_report.json").read_text("utf-8"))
    assert report["recipe"]["calibration"] == [str(text)]
    assert compress(pico("llama"), out, text).already_done


# -- disks -------------------------------------------------------------------------------


def test_each_disk_needs_room_for_what_lies_on_it(
    pico: Callable[..., Path], text: Path, tmp_path: Path
) -> None:
    """OUT and the work folder on two disks, of which one after the other is too small."""
    dense, out, work = pico("llama"), tmp_path / "out", tmp_path / "work"
    with quick_plan():
        made = plan(dense, small_recipe(text), Resources(BUDGET, threads=1, work_dir=work))
    outputs = made.disk_bytes - made.work_bytes
    assert 0 < made.work_bytes < made.disk_bytes
    other = tmp_path.stat().st_dev + 1
    stat = Path.stat

    def two_disks(path: Path, **more: Any) -> Any:
        found = stat(path, **more)
        if not path.is_relative_to(work):
            return found
        return SimpleNamespace(st_mode=found.st_mode, st_size=found.st_size, st_dev=other)

    def free(sizes: dict[Path, int]) -> Any:
        def usage(path: Path) -> Any:
            (size,) = (s for folder, s in sizes.items() if path.is_relative_to(folder))
            return SimpleNamespace(free=size)

        return mock.patch.object(shutil, "disk_usage", usage)

    work.mkdir()
    out.mkdir()
    with mock.patch.object(Path, "stat", two_disks):
        with (
            free({out: outputs - 1, work: made.work_bytes}),
            pytest.raises(OutputError, match="out needs .* free: give another OUT, or"),
        ):
            compress(dense, out, text, work_dir=work)
        with (
            free({out: outputs, work: made.work_bytes - 1}),
            pytest.raises(OutputError, match="work needs .* free: give another --work-dir, or"),
        ):
            compress(dense, out, text, work_dir=work)
        with free({out: outputs, work: made.work_bytes}):
            compress(dense, out, text, work_dir=work)
    assert (out / "config.json").is_file()


# -- what is said ------------------------------------------------------------------------


def test_ratios_that_would_share_a_folder_are_refused() -> None:
    with pytest.raises(RecipeError, match="must differ in their first six digits"):
        small_recipe("text", ratio=(0.2, 0.2000001))


def test_keeping_work_of_a_job_that_began_without_is_said_to_be_too_late(
    pico: Callable[..., Path], text: Path, tmp_path: Path
) -> None:
    dense, out, progress = pico("llama"), tmp_path / "out", Notes()
    interrupted(dense, out, text, 3)

    compress(dense, out, text, keep_work=True, progress=progress)

    assert any("--keep-work comes too late" in note for note in progress.texts)
    assert not (out / ".streamcomp").exists()


# -- links in OUT and in the work folder ---------------------------------------------------


def test_a_work_folder_in_out_that_is_a_link_is_refused(
    pico: Callable[..., Path], text: Path, tmp_path: Path
) -> None:
    dense, out, other = pico("llama"), tmp_path / "out", tmp_path / "other"
    interrupted(dense, tmp_path / "first", text, 3, work_dir=other)
    before = tree(other)
    out.mkdir()
    (out / ".streamcomp").symlink_to(other)

    for ratio in (0.3, 0.4):
        with pytest.raises(OutputError, match=r"streamcomp is a link: remove it.*--work-dir"):
            compress(dense, out, text, ratio=ratio)
    assert tree(other) == before


def test_the_work_of_a_finished_job_is_not_removed_through_a_link(
    pico: Callable[..., Path], text: Path, tmp_path: Path
) -> None:
    dense, out, other = pico("llama"), tmp_path / "out", tmp_path / "other"
    with mock.patch("streamcomp.api.remove_work"):  # killed before its work was removed
        compress(dense, out, text, work_dir=other)
    before = tree(other)
    (out / ".streamcomp").symlink_to(other)

    assert compress(dense, out, text).already_done

    assert tree(other) == before


def test_a_work_folder_that_the_user_names_may_be_a_link(
    pico: Callable[..., Path], text: Path, tmp_path: Path
) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    (tmp_path / "work").symlink_to(disk)

    compress(pico("llama"), tmp_path / "out", text, work_dir=tmp_path / "work")

    assert (tmp_path / "out" / "config.json").is_file()
    assert (tmp_path / "work").is_symlink() and list(disk.iterdir()) == []


@pytest.mark.parametrize(
    "name", ["journal.jsonl", ".journal.jsonl.tmp", "hidden-00000.bin", ".windows.safetensors.tmp"]
)
@pytest.mark.parametrize("exists", [True, False])
def test_a_link_under_the_name_of_a_work_file_is_refused_and_not_written_through(
    name: str, exists: bool, pico: Callable[..., Path], text: Path, tmp_path: Path
) -> None:
    out, victim = tmp_path / "out", tmp_path / "victim"
    if exists:
        victim.write_text("mine")
    (out / ".streamcomp").mkdir(parents=True)
    (out / ".streamcomp" / name).symlink_to(victim)

    with pytest.raises(OutputError, match="is a link|is no regular file"):
        compress(pico("llama"), out, text)

    assert victim.read_text() == "mine" if exists else not victim.exists()


def test_a_journal_is_not_appended_to_through_a_link(tmp_path: Path) -> None:
    victim, path = tmp_path / "victim", tmp_path / JOURNAL
    victim.write_text("mine\n")
    path.symlink_to(victim)
    journal = Journal(path, mock.Mock(), [])

    with pytest.raises(OutputError, match="cannot be written"):
        journal.commit(
            StepRow(
                step="embed", seconds=1.0, stages={}, limits={}, peak_bytes=1, predicted_bytes=1
            )
        )
    assert victim.read_text() == "mine\n"
    with pytest.raises(OutputError, match="is no regular file"):
        Journal.read(tmp_path)


def test_a_pipe_instead_of_a_journal_is_not_waited_for(tmp_path: Path) -> None:
    (tmp_path / ".streamcomp").mkdir()
    os.mkfifo(tmp_path / ".streamcomp" / JOURNAL)

    with pytest.raises(OutputError, match="is no regular file"):
        status(tmp_path)


def test_a_folder_for_one_of_several_ratios_that_is_a_link_is_refused(
    pico: Callable[..., Path], text: Path, tmp_path: Path
) -> None:
    out, other = tmp_path / "out", tmp_path / "other"
    out.mkdir()
    other.mkdir()
    (out / "ratio-0.2").symlink_to(other)

    with pytest.raises(OutputError, match=r"ratio-0\.2 is a link"):
        compress(pico("llama"), out, text, ratio=(0.2, 0.4))
    assert list(other.iterdir()) == []
