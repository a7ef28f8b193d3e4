from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import pytest

from streamcomp.checkpoint.atomic import (
    atomic_file,
    make_folder,
    sync_folder,
    write_json,
    write_text,
)
from streamcomp.errors import OutputError


def failing(number: int) -> Callable[..., NoReturn]:
    def fail(*_: object) -> NoReturn:
        raise OSError(number, os.strerror(number))

    return fail


def test_a_file_appears_whole(tmp_path: Path) -> None:
    path = tmp_path / "a"
    with atomic_file(path) as file:
        file.write(b"new")
        assert not path.exists()

    assert path.read_bytes() == b"new"
    assert list(tmp_path.iterdir()) == [path]


def test_a_failure_leaves_the_old_content(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"old")

    with pytest.raises(ZeroDivisionError), atomic_file(path) as file:
        file.write(b"half of the n")
        raise ZeroDivisionError

    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_an_interrupt_leaves_the_old_content(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"old")

    with pytest.raises(KeyboardInterrupt), atomic_file(path):
        raise KeyboardInterrupt

    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("call", ["fsync", "replace"])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_an_output_error_that_says_what_to_do(
    tmp_path: Path, call: str, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"old")
    monkeypatch.setattr(os, call, failing(number))

    with pytest.raises(OutputError, match="no space left for .*free some and run"):
        write_text(path, "new")

    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_another_failure_of_the_disk_is_told_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "fsync", failing(errno.EIO))

    with pytest.raises(OutputError, match="cannot be written: Input/output error"):
        write_text(tmp_path / "a", "new")

    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_process_left_behind_is_overwritten(tmp_path: Path) -> None:
    (tmp_path / ".a.tmp").write_bytes(b"x" * 1000)

    write_text(tmp_path / "a", "new")

    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert (tmp_path / "a").read_text() == "new"


def test_bytes_are_on_disk_before_the_name_and_the_name_before_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    fsync, replace = os.fsync, os.replace

    def noted_fsync(descriptor: int) -> None:
        kind = "folder" if os.path.isdir(f"/proc/self/fd/{descriptor}") else "file"
        calls.append(f"fsync {kind}")
        fsync(descriptor)

    def noted_replace(source: Path, target: Path) -> None:
        calls.append("replace")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(os, "replace", noted_replace)

    write_text(tmp_path / "a", "new")

    assert calls == ["fsync file", "replace", "fsync folder"]


def test_json_is_readable_by_people(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"name": "Größe", "numbers": [1, 2]})

    text = (tmp_path / "a.json").read_text("utf-8")
    assert '"name": "Größe"' in text
    assert text.endswith("}\n")


def test_a_folder_is_made_with_its_parents(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "b"

    make_folder(folder)
    make_folder(folder)

    assert folder.is_dir()
    assert list(folder.iterdir()) == []
    sync_folder(folder)


def test_a_folder_below_a_file_is_an_output_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()

    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(OutputError, match="cannot be written"):
            make_folder(path)
    with pytest.raises(OutputError, match="cannot be written"):
        write_text(tmp_path / "none" / "a", "new")


def test_a_folder_that_cannot_be_written_is_found_when_it_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "open", failing(errno.EROFS))

    with pytest.raises(OutputError, match="Read-only file system"):
        make_folder(tmp_path)


@pytest.mark.parametrize("link", ["symlink_to", "hardlink_to"])
@pytest.mark.parametrize("exists", [True, False])
def test_a_link_planted_under_the_temporary_name_is_not_written_through(
    link: str, exists: bool, tmp_path: Path
) -> None:
    victim = tmp_path / "victim"
    if exists:
        victim.write_text("mine")
    elif link == "hardlink_to":
        pytest.skip("there is no hard link to nothing")
    {"symlink_to": Path.symlink_to, "hardlink_to": Path.hardlink_to}[link](
        tmp_path / ".a.tmp", victim
    )

    write_text(tmp_path / "a", "new")

    assert (tmp_path / "a").read_text() == "new"
    assert victim.read_text() == "mine" if exists else not victim.exists()
    assert not (tmp_path / ".a.tmp").exists()


def test_a_link_that_has_the_final_name_is_replaced_not_followed(tmp_path: Path) -> None:
    (tmp_path / "victim").write_text("mine")
    (tmp_path / "a").symlink_to("victim")

    write_text(tmp_path / "a", "new")

    assert not (tmp_path / "a").is_symlink()
    assert (tmp_path / "victim").read_text() == "mine"
