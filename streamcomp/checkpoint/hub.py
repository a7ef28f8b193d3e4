"""A model given as a folder, or by its name on the Hugging Face hub."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub import get_safetensors_metadata, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    NotASafetensorsRepoError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
    SafetensorsParsingError,
)

from streamcomp.checkpoint.files import COMPANIONS, check_link, companions
from streamcomp.checkpoint.index import INDEX_FILE, check_inside
from streamcomp.errors import SourceError

__all__ = ["checkpoint_folder", "headers_folder"]


def checkpoint_folder(model: str | Path, revision: str | None = None) -> Path:
    """The folder of ``model``; unless it is a local folder, it is downloaded from the hub.

    Never fetches code or pickled weights. SourceError says why it is not available.
    """
    if Path(model).is_dir():
        return Path(model)
    return _fetch(model, revision, [*COMPANIONS, "*.safetensors"])


@contextmanager
def headers_folder(model: str | Path, revision: str | None = None) -> Iterator[Path]:
    """A folder to plan from: for a hub model its config and the headers of its shards.

    Shards have their true length and header, and companions their length, but no other contents
    (sparse files). The folder is deleted at the end.
    """
    if Path(model).is_dir():
        yield Path(model)
        return
    small = _fetch(model, revision, [*COMPANIONS])
    try:
        metadata = get_safetensors_metadata(str(model), revision=revision)
    except NotASafetensorsRepoError:
        raise SourceError(f"{model} has no safetensors weights on the hub") from None
    except SafetensorsParsingError as error:
        raise SourceError(f"{model}: {str(error).splitlines()[0][:200]}") from None
    except Exception as error:  # the hub's client raises many kinds of exceptions
        raise _unreachable(model, error) from None
    with tempfile.TemporaryDirectory(prefix="streamcomp-headers-") as name:
        folder = Path(name)
        for path in (small / "config.json", small / INDEX_FILE):
            check_link(small, path)
            if path.exists():
                shutil.copyfile(path, folder / path.name)
        for path in companions(small):
            (folder / path.name).touch()
            os.truncate(folder / path.name, path.stat().st_size)
        for shard, entry in metadata.files_metadata.items():
            check_inside(folder, next(iter(entry.tensors), "nothing"), shard)
            try:
                _write_header(folder / shard, entry.tensors)
            except (OSError, OverflowError, TypeError, ValueError) as error:
                raise SourceError(f"{model}: {shard} has no valid header ({error})") from None
        yield folder


def _fetch(model: str | Path, revision: str | None, patterns: list[str]) -> Path:
    try:
        return Path(snapshot_download(str(model), revision=revision, allow_patterns=patterns))
    except HFValidationError:
        raise SourceError(f"{model} is no folder here, and no name on the hub") from None
    except GatedRepoError:
        raise SourceError(
            f"{model} is gated: accept its licence on the hub and log in (hf auth login)"
        ) from None
    except RevisionNotFoundError:
        raise SourceError(f"{model} has no revision {revision!r} on the hub") from None
    except RepositoryNotFoundError:
        raise SourceError(f"{model} is no folder here, and not on the hub") from None
    except (HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled, OSError) as error:
        raise _unreachable(model, error) from None


def _unreachable(model: str | Path, error: Exception) -> SourceError:
    return SourceError(
        f"{model} is no folder here, and the hub cannot be reached ({type(error).__name__}): "
        "give a model folder, or go online"
    )


def _write_header(path: Path, tensors: dict[str, Any]) -> None:
    header = {
        name: {
            "dtype": info.dtype,
            "shape": list(info.shape),
            "data_offsets": list(info.data_offsets),
        }
        for name, info in tensors.items()
    }
    text = json.dumps(header).encode()
    length = max((info.data_offsets[1] for info in tensors.values()), default=0)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("xb") as file:  # fails on an existing file or link
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + length)
