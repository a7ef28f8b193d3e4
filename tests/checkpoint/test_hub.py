"""A model by its name on the hub: no network, but a hub of the tests or its calls replaced."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from huggingface_hub import HfApi, constants

from streamcomp.checkpoint import hub
from streamcomp.checkpoint.index import read_header, read_index
from streamcomp.errors import OutputError, SourceError
from tests.fake_hub import NAME, FakeHub, fake_hub
from tests.jobs import tree
from tests.pico import save_pico


@pytest.fixture
def cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """A model in the hub's cache, weights too: names that link to files called by their hashes."""

    def make(rename: Callable[[str], str] = str) -> Path:
        home = tmp_path / "models--somebody--model"
        model, snapshot = save_pico(home / "blobs", shard_size="30KB"), home / "snapshots" / "01ab"
        snapshot.mkdir(parents=True)
        for path in model.iterdir():
            (snapshot / path.name).symlink_to(path)
        shards = {
            rename(shard.name): SimpleNamespace(
                tensors={
                    name: SimpleNamespace(
                        dtype=info.dtype,
                        shape=list(info.shape),
                        data_offsets=(info.start - start, info.stop - start),
                    )
                    for name, info in header.items()
                }
            )
            for shard in sorted(model.glob("*.safetensors"))
            for header in [read_header(shard)]
            for start in [min(info.start for info in header.values())]
        }
        metadata = SimpleNamespace(files_metadata=shards)
        monkeypatch.setattr(hub, "snapshot_download", lambda *_, **__: str(snapshot))
        monkeypatch.setattr(HfApi, "get_safetensors_metadata", lambda *_, **__: metadata)
        return snapshot

    return make


def test_headers_of_a_model_that_is_cached_leave_its_weights_alone(
    cached: Callable[..., Path],
) -> None:
    snapshot = cached()
    before = tree(snapshot)

    with hub.headers_folder("somebody/model") as folder:
        found = read_index(folder)
        assert not any(shard.is_symlink() for shard in found.shards)

    assert tree(snapshot) == before
    whole = read_index(snapshot)
    assert found.tensors.keys() == whole.tensors.keys()
    assert found.nbytes == whole.nbytes


@pytest.mark.parametrize("place", ["../", "/", "a/../../"])
def test_a_shard_that_leaves_the_folder_is_refused(
    place: str, cached: Callable[..., Path], tmp_path: Path
) -> None:
    cached(lambda name: place + name)
    before = tree(tmp_path)

    with pytest.raises(SourceError, match="outside of"), hub.headers_folder("somebody/model"):
        pass

    assert tree(tmp_path) == before


@pytest.mark.parametrize("error", [RuntimeError("of some client"), OSError(5, "read")])
def test_whatever_a_network_does_is_one_error(
    error: Exception, cached: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    cached()
    monkeypatch.setattr(HfApi, "get_safetensors_metadata", fail)

    with pytest.raises(SourceError, match="cannot be reached"), hub.headers_folder("some/model"):
        pass


# -- whole models ------------------------------------------------------------------------


@pytest.fixture
def served(tmp_path: Path) -> Iterator[FakeHub]:
    with fake_hub(tmp_path / "cache" / "hub") as served:
        served.add(save_pico(tmp_path / "model", shard_size="30KB"))
        yield served


@pytest.fixture
def free(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Makes every disk have so many bytes free."""

    def leave(size: int) -> None:
        monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=size))

    return leave


def test_a_disk_too_small_is_refused_before_anything_is_fetched(
    served: FakeHub, free: Callable[[int], None]
) -> None:
    total = sum(each["size"] for each in served.files(served.branch))
    free(total - 1)

    with pytest.raises(OutputError) as raised:
        hub.cached_index(NAME, None)

    told = str(raised.value)
    assert served.fetched == [] and "\n" not in told
    assert told.startswith(
        f"{NAME} has {total / 1024:.0f} KiB, of which {total / 1024:.0f} KiB are"
    )
    assert "--stream-download" in told and "HF_HOME" in told
    free(total)
    hub.cached_index(NAME, None)


def test_what_the_cache_holds_needs_no_room(served: FakeHub, free: Callable[[int], None]) -> None:
    index = hub.cached_index(NAME, None)
    (first, *_) = index.shards
    size = first.stat().st_size
    free(0)

    hub.cached_index(NAME, None)
    (first.parent / first.readlink()).unlink()

    free(size - 1)
    with pytest.raises(OutputError, match=f"of which {size / 1024:.1f} KiB are not in"):
        hub.cached_index(NAME, None)
    free(size)
    assert hub.cached_index(NAME, None).shards == index.shards


def test_a_cached_model_needs_no_hub(
    served: FakeHub, free: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    index = hub.cached_index(NAME, None)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    served.fetched.clear()

    again = hub.cached_index(NAME, None)

    assert again == index and served.fetched == []
    assert again.hub is not None and again.hub.commit == served.branch
    sizes = {each["name"]: each["size"] for each in served.files(served.branch)}
    digests = {e["name"]: e["lfs"]["sha256"] for e in served.files(served.branch) if "lfs" in e}
    stamps = [again.stamp(shard) for shard in again.shards]
    assert stamps == [(name, sizes[name], digests[name]) for name in sorted(digests)]


def test_a_model_that_no_hub_has_is_refused(served: FakeHub) -> None:
    with pytest.raises(SourceError, match="nobody/nothing is no folder here, and not on the hub"):
        hub.cached_index("nobody/nothing", None)
