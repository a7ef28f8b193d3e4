"""A hub on this machine: what the real library asks of huggingface.co, served from folders."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from unittest import mock
from urllib.parse import unquote, urlsplit

from huggingface_hub import constants

__all__ = ["NAME", "FakeHub", "fake_hub"]

NAME = "somebody/model"


class FakeHub:
    """One model, ``NAME``, with a commit for each folder in ``commits``; ``branch`` is main's."""

    def __init__(self, url: str, cache: Path) -> None:
        self.url, self.cache = url, cache
        self.commits: dict[str, Path] = {}
        self.branch = ""
        self.fetched: list[str] = []  # whole files
        self.ranges: list[str] = []  # files of which a part was asked for
        self.before: Callable[[str], None] = lambda name: None  # each whole file is sent
        self.damaged: set[str] = set()  # files that are sent with one bit flipped
        self.broken: set[str] = set()  # files that are refused, except for parts of them
        self.lfs = True  # keeps safetensors files in LFS, or else in git

    def add(self, folder: Path) -> str:
        """Make ``folder`` main's newest commit."""
        self.branch = hashlib.sha1(str(folder).encode()).hexdigest()
        self.commits[self.branch] = folder
        return self.branch

    def files(self, commit: str) -> list[dict[str, Any]]:
        """The files of a commit as the API lists them."""
        listed = []
        for path in sorted(self.commits[commit].iterdir()):
            data = path.read_bytes()
            entry: dict[str, Any] = {"name": path.name, "size": len(data), "oid": git_digest(data)}
            if self.lfs and path.suffix == ".safetensors":
                digest = hashlib.sha256(data).hexdigest()
                entry["lfs"] = {"size": len(data), "sha256": digest, "pointerSize": 130}
            listed.append(entry)
        return listed

    def shards(self) -> list[str]:
        """Shards that were fetched whole, in order."""
        return [name for name in self.fetched if name.endswith(".safetensors")]


def git_digest(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: FakeHub

    def log_message(self, format: str, *args: Any) -> None: ...

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, *, body: bool) -> None:
        parts = unquote(urlsplit(self.path).path).strip("/").split("/")
        if parts[:3] == ["api", "models", *NAME.split("/")][:3] and parts[3] == NAME.split("/")[1]:
            self._send(json.dumps(self._api(parts[4:])).encode(), {}, body=body)
        elif "/".join(parts[:2]) == NAME and parts[2] == "resolve":
            self._file(self._commit(parts[3]), "/".join(parts[4:]), body=body)
        else:
            self._send(b"", {"X-Error-Code": "RepoNotFound"}, code=404, body=body)

    def _commit(self, revision: str) -> str:
        return self.hub.branch if revision == "main" else revision

    def _api(self, rest: list[str]) -> Any:
        commit = self._commit(rest[1] if rest else "main")
        files = self.hub.files(commit)
        if rest and rest[0] == "tree":
            return [
                {"type": "file", "path": each["name"], "size": each["size"], "oid": each["oid"]}
                | ({"lfs": each["lfs"] | {"oid": each["lfs"]["sha256"]}} if "lfs" in each else {})
                for each in files
            ]
        siblings = [
            {"rfilename": each["name"], "size": each["size"], "blobId": each["oid"]}
            | ({"lfs": each["lfs"]} if "lfs" in each else {})
            for each in files
        ]
        return {"id": NAME, "modelId": NAME, "sha": commit, "siblings": siblings, "tags": []}

    def _file(self, commit: str, name: str, *, body: bool) -> None:
        entry = next((e for e in self.hub.files(commit) if e["name"] == name), None)
        asked = self.headers.get("Range")
        if entry is None or (name in self.hub.broken and not asked):
            code, word = (404, "EntryNotFound") if entry is None else (403, "Refused")
            self._send(b"", {"X-Error-Code": word}, code=code, body=body)
            return
        data = (self.hub.commits[commit] / name).read_bytes()
        if body and not asked:
            self.hub.before(name)
            self.hub.fetched.append(name)
            if name in self.hub.damaged:
                data = data[:-1] + bytes([data[-1] ^ 1])
        headers = {"X-Repo-Commit": commit, "ETag": f'"{entry["oid"]}"'}
        if "lfs" in entry:
            headers["X-Linked-Etag"] = f'"{entry["lfs"]["sha256"]}"'
            headers["X-Linked-Size"] = str(len(data))
        if asked:
            self.hub.ranges.append(name)
            first, _, last = asked.removeprefix("bytes=").partition("-")
            stop = min(int(last) + 1, len(data)) if last else len(data)
            headers["Content-Range"] = f"bytes {first}-{stop - 1}/{len(data)}"
            self._send(data[int(first) : stop], headers, code=206, body=body)
        else:
            self._send(data, headers, body=body)

    def _send(self, data: bytes, headers: dict[str, str], *, code: int = 200, body: bool) -> None:
        self.send_response(code)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if body:
            self.wfile.write(data)


@contextmanager
def fake_hub(cache: Path) -> Iterator[FakeHub]:
    """A hub that the library in this process asks, with its cache in the folder ``cache``."""

    class Handler(_Handler):
        pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    Handler.hub = hub = FakeHub(f"http://127.0.0.1:{server.server_port}", cache)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    settings: dict[str, Any] = {
        "ENDPOINT": hub.url,
        "HF_HUB_OFFLINE": False,
        "HF_HUB_CACHE": str(cache),
        "HUGGINGFACE_CO_URL_TEMPLATE": hub.url + "/{repo_id}/resolve/{revision}/{filename}",
    }
    try:
        with mock.patch.multiple(constants, **settings):
            yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
