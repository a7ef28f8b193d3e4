"""Files of a folder that anybody may have made: pipes, devices, links, and companions."""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import pytest

from streamcomp.checkpoint import files
from streamcomp.checkpoint.files import check_link, companion_digests, companions, open_regular
from streamcomp.errors import SourceError


def make_pipe(path: Path) -> None:
    os.mkfifo(path)


def make_socket(path: Path) -> None:
    short = Path(os.path.relpath(path))  # an address is short
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(short))


def make_folder(path: Path) -> None:
    path.mkdir()


def link_to_device(path: Path) -> None:
    path.symlink_to("/dev/zero")


KINDS = [make_pipe, make_socket, make_folder, link_to_device]


@pytest.mark.parametrize("make", KINDS)
def test_only_a_regular_file_is_opened_and_nothing_is_waited_for(
    make: Callable[[Path], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    make(tmp_path / "a")

    with pytest.raises(OSError, match="no regular file"):
        open_regular(tmp_path / "a")


def test_a_link_is_followed_unless_it_must_not_be(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"text")
    (tmp_path / "link").symlink_to("a")

    os.close(open_regular(tmp_path / "link"))
    with pytest.raises(OSError, match="no regular file"):
        open_regular(tmp_path / "link", follow=False)


# -- links -------------------------------------------------------------------------------


def test_a_link_within_the_folder_is_fine(tmp_path: Path) -> None:
    model, other = tmp_path / "model", tmp_path / "other"
    (model / "deep").mkdir(parents=True)
    (model / "a").touch()
    (model / "deep" / "b").symlink_to("../a")
    other.symlink_to(model)

    for path in (model / "a", model / "deep" / "b", model / "missing"):
        check_link(model, path)
    check_link(other, other / "a")


@pytest.mark.parametrize("target", ["../secret", "deep", "/dev/shm", "/etc/passwd", "../modelled"])
def test_a_link_out_of_the_folder_is_refused_by_name(target: str, tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    (model / "deep").symlink_to("../secret")  # by way of another link
    (model / "LICENSE").symlink_to(target)

    with pytest.raises(SourceError, match=r"LICENSE is a link to .*outside .*cp -rL"):
        check_link(model, model / "LICENSE")


def test_links_in_a_circle_are_refused_or_lead_nowhere(tmp_path: Path) -> None:
    (tmp_path / "a.json").symlink_to("b.json")
    (tmp_path / "b.json").symlink_to("a.json")

    with pytest.raises(SourceError, match=r"a\.json cannot be read"):
        companions(tmp_path)


def test_a_snapshot_in_the_hub_s_cache_links_to_its_blobs_and_to_nothing_else(
    tmp_path: Path,
) -> None:
    snapshot = tmp_path / "models--org--name" / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    for place in ("models--org--name/blobs", "models--org--other/blobs", "blobs"):
        (tmp_path / place).mkdir(parents=True)
        (tmp_path / place / "abc").touch()
    (snapshot / "a.json").symlink_to("../../blobs/abc")
    check_link(snapshot, snapshot / "a.json")

    for place in ("../../../models--org--other/blobs/abc", "../../../blobs/abc", "../../refs"):
        (snapshot / "a.json").unlink()
        (snapshot / "a.json").symlink_to(place)
        with pytest.raises(SourceError, match="outside of the model's folder"):
            check_link(snapshot, snapshot / "a.json")


def test_blobs_that_all_models_of_the_hub_s_cache_share_belong_to_each(tmp_path: Path) -> None:
    name = "ab" + 31 * "01"
    snapshot, blobs = tmp_path / "models--org--name" / "snapshots" / "0123", tmp_path / "blobs"
    for folder in (snapshot, blobs / "ab", blobs / "cd", snapshot.parent.parent / "blobs"):
        folder.mkdir(parents=True)
    (snapshot / "a.json").symlink_to("../../blobs/etag")
    for place, accepted in ((f"ab/{name}", True), (f"cd/{name}", False), ("ab/secret", False)):
        (blobs / place).touch()
        link = snapshot.parent.parent / "blobs" / "etag"
        link.unlink(missing_ok=True)
        link.symlink_to(f"../../blobs/{place}")
        with nullcontext() if accepted else pytest.raises(SourceError, match="outside of"):
            check_link(snapshot, snapshot / "a.json")


# -- companions --------------------------------------------------------------------------


def test_companions_are_the_small_files_of_a_model_by_name(tmp_path: Path) -> None:
    kept = ["LICENSE", "NOTICE.md", "chat_template.jinja", "notes.txt", "tokenizer.json"]
    others = ["config.json", "model.safetensors.index.json", "streamcomp_report.json", "code.py"]
    for name in [*kept, *others, "README.md", "model.safetensors"]:
        (tmp_path / name).write_text(name)
    (tmp_path / "LICENSES").mkdir()

    assert [path.name for path in companions(tmp_path)] == kept
    digests = companion_digests(tmp_path)
    assert list(digests) == kept and len(set(digests.values())) == len(kept)
    (tmp_path / "notes.txt").write_text("other")
    changed = companion_digests(tmp_path)
    assert {name for name in kept if digests[name] != changed[name]} == {"notes.txt"}


@pytest.mark.parametrize("name", ["tokenizer.json", "LICENSE"])
def test_a_companion_that_is_no_file_is_refused(name: str, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / name)

    with pytest.raises(SourceError, match=f"{name} cannot be read: it is no regular file"):
        companions(tmp_path)


def test_a_companion_that_leads_nowhere_is_refused(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").symlink_to("missing")

    with pytest.raises(SourceError, match="tokenizer.json cannot be read: No such file"):
        companions(tmp_path)


def test_a_companion_larger_than_any_is_refused_unread(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").touch()
    os.truncate(tmp_path / "notes.txt", files._MOST_COMPANION_BYTES + 1)  # a hole: takes no space

    with pytest.raises(SourceError, match=re.escape("notes.txt has 1.00 GiB: no tokenizer")):
        companions(tmp_path)


def test_a_folder_that_cannot_be_listed_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="cannot be read: No such file"):
        companions(tmp_path / "none")
