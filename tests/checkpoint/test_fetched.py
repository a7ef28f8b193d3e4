"""Shards that are fetched from a hub as they are opened, one after the other."""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from huggingface_hub import snapshot_download

from streamcomp.checkpoint import fetched
from streamcomp.checkpoint.fetched import FETCHED_FOLDER, FetchedShards, streamed_index
from streamcomp.checkpoint.index import CheckpointIndex, read_index
from streamcomp.checkpoint.reader import TensorReader, read_ahead
from streamcomp.errors import CorruptShardError, OutputError, SourceError
from tests.fake_hub import NAME, FakeHub, fake_hub
from tests.jobs import tree
from tests.pico import save_pico


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return save_pico(tmp_path / "model", shard_size="30KB")


@pytest.fixture
def hub(tmp_path: Path, model: Path) -> Iterator[FakeHub]:
    with fake_hub(tmp_path / "cache") as hub:
        hub.add(model)
        yield hub


@pytest.fixture
def work(tmp_path: Path) -> Path:
    return tmp_path / "work"


def streamed(work: Path, most_bytes: int | None = None) -> tuple[CheckpointIndex, FetchedShards]:
    index = streamed_index(NAME, None, work)
    assert index.store is not None
    if most_bytes is not None:
        index.store.most_bytes = most_bytes
    return index, index.store


def read_all(index: CheckpointIndex) -> dict[str, torch.Tensor]:
    with TensorReader() as reader:
        return {name: reader.read(info) for name, info in sorted(index.tensors.items())}


def held(work: Path) -> list[str]:
    """Names of the shards that are there."""
    return sorted(path.name for path in work.rglob("*.safetensors"))


def largest(model: Path) -> int:
    return max(path.stat().st_size for path in model.glob("*.safetensors"))


def test_an_index_takes_headers_alone(hub: FakeHub, model: Path, work: Path) -> None:
    index, _ = streamed(work)

    whole = read_index(model)
    assert hub.shards() == [] and set(hub.ranges) == {path.name for path in whole.shards}
    assert not work.exists()
    assert index.config == whole.config and index.nbytes == whole.nbytes
    for name, info in whole.tensors.items():
        other = index.tensors[name]
        assert (info.start, info.stop, info.shape) == (other.start, other.stop, other.shape)


@pytest.mark.parametrize("lfs", [True, False])
def test_tensors_are_those_of_the_model(lfs: bool, hub: FakeHub, model: Path, work: Path) -> None:
    hub.lfs = lfs

    tensors = read_all(streamed(work)[0])

    whole = read_all(read_index(model))
    assert tensors.keys() == whole.keys()
    assert all(torch.equal(tensors[name], whole[name]) for name in whole)


def test_no_more_than_the_bytes_allowed_are_on_disk(hub: FakeHub, model: Path, work: Path) -> None:
    sizes = {path.name: path.stat().st_size for path in model.glob("*.safetensors")}
    most = sum(sorted(sizes.values())[-2:])
    index, store = streamed(work, most)
    seen = []
    hub.before = lambda name: seen.append(
        sizes[name] + sum(path.stat().st_size for path in work.rglob("*") if path.is_file())
    )

    read_all(index)

    assert max(seen) <= most + 1000  # the library's notes on the file that it fetches
    assert sum(sizes[name] for name in held(work)) <= most
    assert set(hub.shards()) == set(sizes)
    fetched_bytes = store.take_fetched()
    assert fetched_bytes.keys() == sizes.keys()
    assert sum(fetched_bytes.values()) == sum(sizes[name] for name in hub.shards())
    assert store.take_fetched() == {}


def test_the_shard_that_was_not_used_for_longest_goes_first(
    hub: FakeHub, model: Path, work: Path
) -> None:
    index, store = streamed(work, 3 * largest(model))
    one, two, three, four = index.shards[:4]

    for shard in (one, two, three, one, four):
        os.close(store.open(shard))

    assert held(work) == sorted(path.name for path in (one, three, four))


def test_a_note_says_what_is_fetched(hub: FakeHub, work: Path) -> None:
    index, store = streamed(work)
    notes: list[str] = []
    store.tell = notes.append
    shard = index.shards[0]

    os.close(store.open(shard))
    os.close(store.open(shard))

    size = index.stamp(shard)[1] / 1024
    assert notes == [f"fetching {shard.name} ({size:.1f} KiB)"]


# -- what can be wrong -------------------------------------------------------------------


def test_damage_on_the_way_is_refused(hub: FakeHub, work: Path) -> None:
    index, store = streamed(work)
    shard = index.shards[0]
    hub.damaged = {shard.name}

    with pytest.raises(CorruptShardError, match=f"{shard.name} .* digest .* on the hub"):
        store.open(shard)
    assert held(work) == []

    hub.damaged = set()
    os.close(store.open(shard))


def test_another_header_than_the_first_is_refused(
    hub: FakeHub, work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    index, store = streamed(work)
    monkeypatch.setattr(fetched, "read_header", lambda path: {})

    with pytest.raises(CorruptShardError, match="another header"):
        store.open(index.shards[0])


def test_a_network_that_fails_is_one_error(hub: FakeHub, work: Path) -> None:
    index, store = streamed(work)
    hub.broken = {index.shards[1].name}
    os.close(store.open(index.shards[0]))

    with pytest.raises(SourceError, match=r"could not be fetched .*: .* the same command goes on"):
        store.open(index.shards[1])

    assert held(work) == [index.shards[0].name]
    hub.broken = set()
    os.close(store.open(index.shards[1]))


def test_a_disk_without_room_for_the_next_shard_is_refused(
    hub: FakeHub, work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    index, store = streamed(work)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=100))

    with pytest.raises(OutputError, match=r"needs \S+ KiB for the next shard .* 100 B free"):
        store.open(index.shards[0])
    assert hub.shards() == []


def test_a_disk_that_fills_meanwhile_is_one_error(
    hub: FakeHub, work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    index, store = streamed(work)
    monkeypatch.setattr(fetched, "hf_hub_download", fail)

    with pytest.raises(OutputError, match="no space left for"):
        store.open(index.shards[0])


@pytest.mark.parametrize("place", [FETCHED_FOLDER, f"{FETCHED_FOLDER}/COMMIT"])
def test_a_link_is_not_written_through(
    place: str, hub: FakeHub, work: Path, tmp_path: Path
) -> None:
    index, store = streamed(work)
    link, elsewhere = work / place.replace("COMMIT", hub.branch), tmp_path / "elsewhere"
    link.parent.mkdir(parents=True)
    (elsewhere / "kept").mkdir(parents=True)
    link.symlink_to(elsewhere)

    with pytest.raises(OutputError, match="is a link"):
        store.open(index.shards[0])
    store.clear()

    assert (elsewhere / "kept").is_dir()


# -- what is there already ---------------------------------------------------------------


def test_shards_of_the_users_cache_are_read_and_left_alone(
    hub: FakeHub, model: Path, work: Path
) -> None:
    folder = Path(snapshot_download(NAME))
    hub.fetched.clear()
    index, store = streamed(work, 1)

    tensors = read_all(index)
    before = tree(folder)
    store.clear()

    assert hub.fetched == [] and not work.exists()
    assert tree(folder) == before
    assert all(torch.equal(tensors[name], value) for name, value in read_all(index).items())


def test_what_an_earlier_run_left_is_used_if_it_is_whole(hub: FakeHub, work: Path) -> None:
    index, store = streamed(work)
    one, two, three = index.shards[:3]
    for shard in (one, two):
        os.close(store.open(shard))
    two.write_bytes(two.read_bytes()[:-1] + b"\0\0")
    three.parent.mkdir()
    (three.parent / "part").write_bytes(bytes(100))
    other = work / FETCHED_FOLDER / ("0" * 40)
    other.mkdir()
    hub.fetched.clear()

    index, store = streamed(work)
    for shard in (one, two, three):
        os.close(store.open(shard))

    assert hub.shards() == [two.name, three.name]
    assert not other.exists() and not (three.parent / "part").exists()


def test_a_smaller_limit_drops_what_an_earlier_run_left(
    hub: FakeHub, model: Path, work: Path
) -> None:
    index, store = streamed(work)
    for shard in index.shards:
        os.close(store.open(shard))

    index, store = streamed(work, largest(model))
    os.close(store.open(index.shards[2]))

    assert held(work) == [index.shards[2].name]


def test_clearing_deletes_all_that_was_fetched_and_nothing_else(hub: FakeHub, work: Path) -> None:
    index, store = streamed(work)
    os.close(store.open(index.shards[0]))
    (work / "other").write_text("kept")

    store.clear()

    assert [path.name for path in work.iterdir()] == ["other"]
    os.close(store.open(index.shards[0]))


# -- ahead -------------------------------------------------------------------------------


@pytest.mark.parametrize("ahead", [True, False])
def test_the_next_shards_are_fetched_in_the_background(
    ahead: bool, hub: FakeHub, work: Path
) -> None:
    index, store = streamed(work)
    store.fetches_ahead = ahead
    infos = [info for info in index.tensors.values() if info.shard in index.shards[:2]]

    read_ahead(infos)
    for thread in threading.enumerate():
        if thread.daemon and thread.name == "fetching":
            thread.join()

    assert sorted(hub.shards()) == [shard.name for shard in index.shards[:2] if ahead]
    store.fetches_ahead = False
    os.close(store.open(index.shards[0]))
    assert hub.shards().count(index.shards[0].name) == 1


def test_shards_fetched_ahead_do_not_drop_each_other(hub: FakeHub, model: Path, work: Path) -> None:
    index, store = streamed(work, 3 * largest(model))
    one, two, three, four = index.shards[:4]
    for shard in (one, two):
        os.close(store.open(shard))

    store._fetch_all([store.name_of(three), store.name_of(four)])

    assert held(work) == [two.name, three.name, four.name]


def test_what_fails_in_the_background_is_told_when_it_is_needed(hub: FakeHub, work: Path) -> None:
    index, store = streamed(work)
    store.fetches_ahead = True
    hub.damaged = {index.shards[0].name}

    store.fetch_ahead(index.shards[:1])

    with pytest.raises(CorruptShardError):
        store.open(index.shards[0])
