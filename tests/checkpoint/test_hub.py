"""A model by its name on the hub, with the hub's own calls replaced: no network."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from streamcomp.checkpoint import hub
from streamcomp.checkpoint.index import read_header, read_index
from streamcomp.errors import SourceError
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
        monkeypatch.setattr(hub, "get_safetensors_metadata", lambda *_, **__: metadata)
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
    monkeypatch.setattr(hub, "get_safetensors_metadata", fail)

    with pytest.raises(SourceError, match="cannot be reached"), hub.headers_folder("some/model"):
        pass
